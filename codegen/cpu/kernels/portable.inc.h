// Products of one panel (64 rows) with P planes of int8 activations, without intrinsics. d[plane][row] is overwritten.

template <int BITS, int P>
TSLD_TARGET void dots(const uint8_t* codes, int64_t steps, const int8_t* const* planes, int32_t (*d)[kPanel]) {
  constexpr int kParts = 8 / BITS, kMask = (1 << BITS) - 1;
  for (int p = 0; p < P; p++)
    for (int r = 0; r < kPanel; r++) d[p][r] = 0;
  for (int64_t step = 0; step < steps; step++, codes += 256)
    for (int p = 0; p < P; p++) {
      const int8_t* x = planes[p] + step * 4 * kParts;
      for (int r = 0; r < kPanel; r++) {
        int32_t sum = 0;
        for (int i = 0; i < 4; i++)
          for (int s = 0; s < kParts; s++) sum += (codes[4 * r + i] >> (s * BITS) & kMask) * x[4 * s + i];
        d[p][r] += sum;
      }
    }
}
