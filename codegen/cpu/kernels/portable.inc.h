// Products of one panel (64 rows) with P planes of int8 activations, without intrinsics: 16-byte vector types of GNU
// C++, which compilers lower to what the machine has (SSE2, NEON). d[plane][row] is overwritten.
// 16 bytes hold four rows of four inputs; seen as eight uint16, the low bytes are inputs 0 and 2 of a row, the high ones
// 1 and 3. int16 holds the products: 8 * 2 * 128 (2 bits), 4 * 15 * 128 (4 bits), 255 * 128 (8 bits, one at a time).

template <int BITS, int P>
TSLD_TARGET void dots(const uint8_t* codes, int64_t steps, const int8_t* const* planes, int32_t (*d)[kPanel]) {
  typedef uint16_t Shorts __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  constexpr int kParts = 8 / BITS;
  constexpr uint16_t kMask = (1 << BITS) - 1;
  for (int block = 0; block < 4; block++)
    for (int p = 0; p < P; p++) {
      Ints acc[4] = {};
      const uint8_t* from = codes + 64 * block;
      const int8_t* x = planes[p];
      for (int64_t step = 0; step < steps; step++, from += 256) {
        Shorts low[kParts], high[kParts];
        for (int s = 0; s < kParts; s++, x += 4) {
          const uint16_t x0 = static_cast<uint16_t>(x[0]), x1 = static_cast<uint16_t>(x[1]);
          const uint16_t x2 = static_cast<uint16_t>(x[2]), x3 = static_cast<uint16_t>(x[3]);
          low[s] = Shorts{x0, x2, x0, x2, x0, x2, x0, x2};
          high[s] = Shorts{x1, x3, x1, x3, x1, x3, x1, x3};
        }
        for (int quarter = 0; quarter < 4; quarter++) {
          Shorts v;
          memcpy(&v, from + 16 * quarter, 16);
          Shorts even = (v & kMask) * low[0], odd = (v >> 8 & kMask) * high[0];
          for (int s = 1; s < kParts; s++) {
            even += (v >> (s * BITS) & kMask) * low[s];
            odd += (v >> (8 + s * BITS) & kMask) * high[s];
          }
          if (BITS != 8) even += odd;
          const Ints a = (Ints)even, b = (Ints)odd;
          acc[quarter] += (a << 16 >> 16) + (a >> 16);
          if (BITS == 8) acc[quarter] += (b << 16 >> 16) + (b >> 16);
        }
      }
      for (int quarter = 0; quarter < 4; quarter++) memcpy(d[p] + 16 * block + 4 * quarter, &acc[quarter], 16);
    }
}
