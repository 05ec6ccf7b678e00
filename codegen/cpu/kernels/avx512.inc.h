// As portable.inc.h and add.inc.h, with AVX512-VNNI: a lane is an output row, so no horizontal sums.

template <int BITS, int P>
TSLD_TARGET void dots(const uint8_t* codes, int64_t steps, const int8_t* const* planes, int32_t (*d)[kPanel]) {
  constexpr int kParts = 8 / BITS, kSets = P == 1 && kParts > 1 ? 2 : 1;  // two sums a row hide the latency of one plane
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << BITS) - 1));
  __m512i acc[kSets][P][4];
  for (int e = 0; e < kSets; e++)
    for (int p = 0; p < P; p++)
      for (int b = 0; b < 4; b++) acc[e][p][b] = _mm512_setzero_si512();
  for (int64_t step = 0; step < steps; step++, codes += 256) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int b = 0; b < 4; b++) {
      _mm_prefetch(reinterpret_cast<const char*>(codes) + 64 * b + TSLD_CPU_AHEAD, _MM_HINT_T0);
      v[b] = _mm512_loadu_si512(codes + 64 * b);
    }
#pragma GCC unroll 4
    for (int s = 0; s < kParts; s++) {
      __m512i c[4];
#pragma GCC unroll 4
      for (int b = 0; b < 4; b++)
        c[b] = BITS == 8 ? v[b] : _mm512_and_si512(s ? _mm512_srli_epi16(v[b], BITS * s) : v[b], mask);
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) {
        const __m512i x = _mm512_set1_epi32(load32(planes[p] + (step * kParts + s) * 4));
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++) acc[s % kSets][p][b] = _mm512_dpbusd_epi32(acc[s % kSets][p][b], c[b], x);
      }
    }
  }
  for (int p = 0; p < P; p++)
    for (int b = 0; b < 4; b++)
      _mm512_storeu_si512(d[p] + 16 * b,
                          kSets == 2 ? _mm512_add_epi32(acc[0][p][b], acc[kSets - 1][p][b]) : acc[0][p][b]);
}

TSLD_TARGET static void adds(const uint8_t* codes, int64_t steps, const float* x, float* sum) {
  __m512 plus[4], minus[4];
  for (int b = 0; b < 4; b++) plus[b] = minus[b] = _mm512_setzero_ps();
  for (int64_t step = 0; step < steps; step++, codes += 256, x += 16) {
    __m512i words[4];
#pragma GCC unroll 4
    for (int b = 0; b < 4; b++) {
      _mm_prefetch(reinterpret_cast<const char*>(codes) + 64 * b + TSLD_CPU_AHEAD, _MM_HINT_T0);
      words[b] = _mm512_loadu_si512(codes + 64 * b);
    }
#pragma GCC unroll 16
    for (int input = 0; input < 16; input++) {
      const int bit = input % 4 * 8 + input / 4 * 2;
      const __m512i one = _mm512_set1_epi32(static_cast<int>(2u << bit)), any = _mm512_set1_epi32(static_cast<int>(3u << bit));
      const __m512 value = _mm512_set1_ps(x[input]);
#pragma GCC unroll 4
      for (int b = 0; b < 4; b++) {
        plus[b] = _mm512_mask_add_ps(plus[b], _mm512_test_epi32_mask(words[b], one), plus[b], value);
        minus[b] = _mm512_mask_add_ps(minus[b], _mm512_testn_epi32_mask(words[b], any), minus[b], value);
      }
    }
  }
  for (int b = 0; b < 4; b++)
    _mm512_storeu_ps(sum + 16 * b, _mm512_add_ps(_mm512_loadu_ps(sum + 16 * b), _mm512_sub_ps(plus[b], minus[b])));
}
