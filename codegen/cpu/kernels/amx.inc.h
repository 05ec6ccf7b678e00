// Many tokens with AMX int8 tiles: codes are unpacked to tiles once per block of inputs and used for up to kAmxRound
// tokens, whose sums stay in the tile registers for the whole block. Included in the namespace of the AVX512 level.

constexpr int64_t kAmxInputs = 64;  // tiles of 64 inputs unpacked at once: 256 KiB, in the second-level cache
constexpr int64_t kAmxRound = 128;  // tokens in one go, or half of them so that their limbs stay in that cache, too
constexpr int64_t kAmxBytes = 1 << 20;

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

// A panel (64 rows) of `tiles` * 64 inputs -> uint8 tiles [2 halves][kAmxInputs][2][16][64].
template <int BITS>
TSLD_TARGET void unpack_tiles(const uint8_t* codes, int64_t tiles, uint8_t* out) {
  constexpr int kParts = 8 / BITS, kSteps = 2 * BITS;  // steps per 64 inputs
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << BITS) - 1));
  for (int64_t t = 0; t < tiles; t++, out += 2048)
#pragma GCC unroll 4
    for (int step = 0; step < kSteps; step++, codes += 256)
#pragma GCC unroll 4
      for (int block = 0; block < 4; block++) {
        _mm_prefetch(reinterpret_cast<const char*>(codes) + 64 * block + TSLD_CPU_AHEAD, _MM_HINT_T0);
        const __m512i v = _mm512_loadu_si512(codes + 64 * block);
        uint8_t* to = out + block / 2 * (kAmxInputs * 2048) + block % 2 * 1024 + step * kParts * 64;
#pragma GCC unroll 4
        for (int s = 0; s < kParts; s++)
          _mm512_store_si512(to + s * 64, BITS == 8 ? v : _mm512_and_si512(_mm512_srli_epi16(v, BITS * s), mask));
      }
}

// d0, d1 [16][kPanel] (32 columns of them) += two tiles of activations (ROWS 1: one) x codes.
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
    if (ROWS == 2) {
      _tile_loadd(5, a1, 64);
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

// Tokens t0 <= t < t1, at most kAmxRound, of one panel.
template <int BITS>
TSLD_AMX_TARGET void many_tokens(const Weights& w, const Workspace& layout, const void* ws, const float* bias, void* y,
                                 int dtype, int64_t ldy, int64_t t0, int64_t t1, int64_t panel) {
  alignas(64) static thread_local int32_t d[3][kAmxRound][kPanel];
  alignas(64) static thread_local float acc[kAmxRound][kPanel];
  alignas(64) static thread_local uint8_t codes[kAmxInputs * 4096];
  const Token* facts = layout.tokens(ws);
  const int64_t size = dtype == TSLD_CPU_F32 ? 4 : 2;
  memset(acc, 0, static_cast<size_t>(t1 - t0) * sizeof acc[0]);
  for (int64_t index = 0; index < layout.segments; index++) {
    const Segment s = segment(w, index);
    const int64_t begin = s.at / 64, end = (s.at + s.padded) / 64;
    for (int64_t k0 = begin; k0 < end; k0 += kAmxInputs) {
      const int64_t tiles = end - k0 < kAmxInputs ? end - k0 : kAmxInputs;
      unpack_tiles<BITS>(w.codes() + panel * w.panel_bytes() + k0 * 2 * BITS * 256, tiles, codes);
      for (int64_t r0 = t0; r0 < t1; r0 += 32) {
        const int64_t r1 = r0 + 32 < t1 ? r0 + 32 : t1;
        const int8_t* planes[6];  // tiles of 16 tokens, of all limbs that are in use
        int32_t* sums[6];
        int count = 0;
        for (int64_t t = r0; t < r1; t += 16) {
          int limbs = 0;
          for (int64_t i = t; i < t + 16 && i < r1; i++) limbs = facts[i].limbs > limbs ? facts[i].limbs : limbs;
          for (int l = 0; l < limbs; l++, count++) {
            planes[count] = layout.tile(ws, w, t / 16, l) + k0 * 1024;
            sums[count] = d[l][t - t0];
          }
        }
        if (index + 1 == layout.segments && k0 + tiles >= end)  // the results' lines arrive while the tiles multiply
          for (int64_t t = r0; t < r1; t++)
            for (int64_t at = 0; at < kPanel * size; at += 64)
              __builtin_prefetch(static_cast<const char*>(y) + (t * ldy + panel * kPanel) * size + at, 1);
        for (int i = 0; i < count; i += 2)
          for (int half = 0; half < 2; half++) {
            const uint8_t* b = codes + half * (kAmxInputs * 2048);
            int32_t* d0 = sums[i] + 32 * half;
            const bool first = k0 == begin;
            if (i + 1 < count)
              multiply_tiles<2>(planes[i], planes[i + 1], b, tiles, d0, sums[i + 1] + 32 * half, first);
            else multiply_tiles<1>(planes[i], planes[i], b, tiles, d0, nullptr, first);
          }
        if (k0 + tiles < end) continue;
        for (int64_t t = r0; t < r1; t++) {
          const int32_t* of[3] = {d[0][t - t0], d[1][t - t0], d[2][t - t0]};
          fold_token(w, index, panel, facts[t].limbs, of, layout.sums(ws, t), layout.segments, acc[t - t0]);
          if (index + 1 == layout.segments) store(w, facts[t], panel, acc[t - t0], bias, y, dtype, t * ldy);
        }
      }
    }
  }
}

TSLD_AMX_TARGET static void multiply_amx(const Weights& w, const Workspace& layout, const void* ws, const float* bias,
                                         void* y, int dtype, int64_t ldy, int64_t t0, int64_t t1, int64_t p0,
                                         int64_t p1) {
  configure_tiles();
  int limbs = 1;
  for (int64_t t = t0; t < t1; t++) limbs = layout.tokens(ws)[t].limbs > limbs ? layout.tokens(ws)[t].limbs : limbs;
  const int64_t round = kAmxRound * limbs * w.k_pad > kAmxBytes ? kAmxRound / 2 : kAmxRound;
  for (int64_t r0 = t0; r0 < t1; r0 += round) {
    const int64_t r1 = r0 + round < t1 ? r0 + round : t1;
    for (int64_t panel = p0; panel < p1; panel++) {
      if (w.bits == 2) many_tokens<2>(w, layout, ws, bias, y, dtype, ldy, r0, r1, panel);
      else if (w.bits == 4) many_tokens<4>(w, layout, ws, bias, y, dtype, ldy, r0, r1, panel);
      else many_tokens<8>(w, layout, ws, bias, y, dtype, ldy, r0, r1, panel);
    }
  }
  _tile_release();
}
