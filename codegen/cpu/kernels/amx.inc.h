// Many tokens with AMX int8 tiles: 2-bit and 4-bit codes are unpacked once per block of inputs and used for up to
// kAmxRound tokens. Included in the namespace of the AVX512 level.

constexpr int64_t kAmxInputs = 8;   // tiles of 64 inputs unpacked at once: 16 KiB
constexpr int64_t kAmxRound = 128;  // tokens whose int32 sums stay in the cache

struct alignas(64) TileConfig {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

TSLD_AMX_TARGET static void configure_tiles() {
  TileConfig c;
  memset(&c, 0, sizeof c);
  c.palette = 1;
  for (int i = 0; i < 8; i++) c.bytes[i] = 64, c.rows[i] = 16;
  _tile_loadconfig(&c);
}

// Two blocks (32 rows) of `tiles` * 64 inputs -> uint8 tiles [tiles][2][16][64].
template <int BITS>
TSLD_TARGET void unpack_tiles(const uint8_t* codes, int64_t tiles, uint8_t* out) {
  constexpr int kParts = 8 / BITS, kSteps = 2 * BITS;  // steps per 64 inputs
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << BITS) - 1));
  for (int64_t t = 0; t < tiles; t++)
    for (int half = 0; half < 2; half++, out += 1024)
#pragma GCC unroll 4
      for (int step = 0; step < kSteps; step++) {
        const uint8_t* from = codes + (t * kSteps + step) * 256 + 64 * half;
        _mm_prefetch(reinterpret_cast<const char*>(from) + TSLD_CPU_AHEAD, _MM_HINT_T0);
        const __m512i v = _mm512_loadu_si512(from);
#pragma GCC unroll 4
        for (int s = 0; s < kParts; s++)
          _mm512_store_si512(out + (step * kParts + s) * 64,
                             BITS == 8 ? v : _mm512_and_si512(_mm512_srli_epi16(v, BITS * s), mask));
      }
}

// d [16 * ROWS planes][64] (two blocks of 16 columns of it) += a planes x codes; A0, A1: tiles of activations.
template <int ROWS>
TSLD_AMX_TARGET void multiply_tiles(const int8_t* a0, const int8_t* a1, const uint8_t* codes, int64_t tiles,
                                    int32_t* d0, int32_t* d1, bool first) {
  constexpr int64_t kStride = kPanel * 4;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    if (ROWS == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, d0, kStride);
    _tile_loadd(1, d0 + 16, kStride);
    if (ROWS == 2) {
      _tile_loadd(2, d1, kStride);
      _tile_loadd(3, d1 + 16, kStride);
    }
  }
  for (int64_t t = 0; t < tiles; t++, codes += 2048, a0 += 1024, a1 += 1024) {
    _tile_loadd(6, codes, 64);
    _tile_loadd(4, a0, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, codes + 1024, 64);
    _tile_dpbsud(1, 4, 7);
    if (ROWS == 2) _tile_loadd(5, a1, 64);
#pragma GCC unroll 16
    for (int line = 0; line < 16; line++) {
      _mm_prefetch(reinterpret_cast<const char*>(a0) + 2048 + 64 * line, _MM_HINT_T0);
      if (ROWS == 2) _mm_prefetch(reinterpret_cast<const char*>(a1) + 2048 + 64 * line, _MM_HINT_T0);
    }
    if (ROWS == 2) {
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, d0, kStride);
  _tile_stored(1, d0 + 16, kStride);
  if (ROWS == 2) {
    _tile_stored(2, d1, kStride);
    _tile_stored(3, d1 + 16, kStride);
  }
}

template <int BITS>
TSLD_AMX_TARGET void many_tokens(const Weights& w, const Workspace& layout, const void* ws, const float* bias, void* y,
                                 int dtype, int64_t ldy, int64_t t0, int64_t t1, int64_t panel) {
  alignas(64) static thread_local int32_t d[3][kAmxRound][kPanel];
  alignas(64) static thread_local float acc[kAmxRound][kPanel];
  alignas(64) static thread_local uint8_t codes[kAmxInputs * 2048];
  const Token* facts = layout.tokens(ws);
  for (int64_t r0 = t0; r0 < t1; r0 += kAmxRound) {
    const int64_t r1 = r0 + kAmxRound < t1 ? r0 + kAmxRound : t1;
    memset(acc, 0, static_cast<size_t>(r1 - r0) * sizeof acc[0]);
    const int8_t* planes[3 * kAmxRound / 16];  // tiles of 16 tokens, of all limbs that are in use
    int32_t* sums[3 * kAmxRound / 16];
    int count = 0;
    for (int64_t t = r0; t < r1; t += 16) {
      int limbs = 0;
      for (int64_t i = t; i < t + 16 && i < r1; i++) limbs = facts[i].limbs > limbs ? facts[i].limbs : limbs;
      for (int l = 0; l < limbs; l++, count++) {
        planes[count] = layout.tile(ws, w, t / 16, l);
        sums[count] = d[l][t - r0];
      }
    }
    for (int64_t index = 0; index < layout.segments; index++) {
      const Segment s = segment(w, index);
      for (int half = 0; half < 2; half++)
        for (int64_t k0 = s.at / 64, end = (s.at + s.padded) / 64; k0 < end; k0 += kAmxInputs) {
          const int64_t tiles = end - k0 < kAmxInputs ? end - k0 : kAmxInputs;
          const bool first = k0 == s.at / 64;
          const uint8_t* from = w.codes() + panel * w.panel_bytes() + k0 * 2 * BITS * 256 + half * 128;
          unpack_tiles<BITS>(from, tiles, codes);
          for (int i = 0; i < count; i += 2) {
            int32_t* d0 = sums[i] + 32 * half;
            const int8_t* a0 = planes[i] + k0 * 1024;
            if (i + 1 < count)
              multiply_tiles<2>(a0, planes[i + 1] + k0 * 1024, codes, tiles, d0, sums[i + 1] + 32 * half, first);
            else multiply_tiles<1>(a0, a0, codes, tiles, d0, nullptr, first);
          }
        }
      for (int64_t t = r0; t < r1; t++) {
        const int32_t* of[3] = {d[0][t - r0], d[1][t - r0], d[2][t - r0]};
        fold_token(w, index, panel, facts[t].limbs, of, layout.sums(ws, t), layout.segments, acc[t - r0]);
      }
    }
    for (int64_t t = r0; t < r1; t++) store(w, facts[t], panel, acc[t - r0], bias, y, dtype, t * ldy);
  }
}

TSLD_AMX_TARGET static void multiply_amx(const Weights& w, const Workspace& layout, const void* ws, const float* bias,
                                         void* y, int dtype, int64_t ldy, int64_t t0, int64_t t1, int64_t p0,
                                         int64_t p1) {
  configure_tiles();
  for (int64_t panel = p0; panel < p1; panel++) {
    if (w.bits == 2) many_tokens<2>(w, layout, ws, bias, y, dtype, ldy, t0, t1, panel);
    else if (w.bits == 4) many_tokens<4>(w, layout, ws, bias, y, dtype, ldy, t0, t1, panel);
    else many_tokens<8>(w, layout, ws, bias, y, dtype, ldy, t0, t1, panel);
  }
  _tile_release();
}
