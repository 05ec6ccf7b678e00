// As portable.inc.h, with AVX2. Pairs of products are summed in int16: at most 4 * 2 * 2 * 128 (2 bits),
// 2 * 2 * 15 * 128 (4 bits, and the halves of 8-bit codes), so nothing saturates.

template <int BITS, int P>
TSLD_TARGET void dots(const uint8_t* codes, int64_t steps, const int8_t* const* planes, int32_t (*d)[kPanel]) {
  constexpr int kParts = BITS == 2 ? 4 : 2, kInputs = 32 / BITS, kBlocks = P == 1 ? 2 : 1;
  const __m256i mask = _mm256_set1_epi8(BITS == 2 ? 3 : 15), ones = _mm256_set1_epi16(1);
  const __m256i sixteens = _mm256_set1_epi16(16);
  for (int first = 0; first < 4; first += kBlocks) {
    __m256i acc[P][2 * kBlocks];
    for (int p = 0; p < P; p++)
      for (int h = 0; h < 2 * kBlocks; h++) acc[p][h] = _mm256_setzero_si256();
    const uint8_t* from = codes + 64 * first;
    for (int64_t step = 0; step < steps; step++, from += 256) {
      _mm_prefetch(reinterpret_cast<const char*>(from) + 4096, _MM_HINT_T0);
#pragma GCC unroll 4
      for (int h = 0; h < 2 * kBlocks; h++) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * h));
        __m256i c[kParts];
#pragma GCC unroll 4
        for (int s = 0; s < kParts; s++)
          c[s] = _mm256_and_si256(_mm256_srli_epi16(v, (BITS == 8 ? 4 : BITS) * s), mask);
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
          const int8_t* x = planes[p] + step * kInputs;
          if (BITS == 8) {
            const __m256i b = _mm256_set1_epi32(load32(x));
            acc[p][h] = _mm256_add_epi32(acc[p][h], _mm256_madd_epi16(_mm256_maddubs_epi16(c[0], b), ones));
            acc[p][h] = _mm256_add_epi32(acc[p][h], _mm256_madd_epi16(_mm256_maddubs_epi16(c[1], b), sixteens));
          } else {
            __m256i pairs = _mm256_maddubs_epi16(c[0], _mm256_set1_epi32(load32(x)));
#pragma GCC unroll 4
            for (int s = 1; s < kParts; s++)
              pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(c[s], _mm256_set1_epi32(load32(x + 4 * s))));
            acc[p][h] = _mm256_add_epi32(acc[p][h], _mm256_madd_epi16(pairs, ones));
          }
        }
      }
    }
    for (int p = 0; p < P; p++)
      for (int h = 0; h < 2 * kBlocks; h++)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(d[p] + 16 * first + 8 * h), acc[p][h]);
  }
}
