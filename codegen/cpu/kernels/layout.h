// The kernel layout of weights and of the workspace: sizes, offsets, packing.
#pragma once
#include <stddef.h>
#include <string.h>

#include "tsld_cpu.h"

namespace tsld_cpu {

constexpr int64_t kPanel = 64;         // output rows
constexpr int64_t kSegment = 65536;    // inputs whose products fit an int32: 255 * 128 * 65536 < 2^31
constexpr int64_t kAmxTokens = 16;     // from here on tiles pay
constexpr int64_t kAddBlock = 512;     // inputs between two folds of the float sums of `add`
constexpr uint32_t kMagic = 0x43445354;  // "TSDC"

static inline int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Head of a packed layer. Scales are float32 [groups][rows], zeros uint8 [groups][rows], rows padded.
struct Weights {
  uint32_t magic;
  int32_t bits;
  int64_t n, k, group, groups;   // group: inputs per scale
  int64_t splits;                // segments per group (1 unless a group exceeds kSegment)
  int64_t group_pad, k_pad;      // padded inputs of a group, of a row
  int64_t rows;                  // n padded
  int64_t scales_at, zeros_at;   // offsets in bytes; zeros_at 0: the zero point is `zero` everywhere
  int32_t zero, tiles;           // tiles: every segment is a multiple of 64 inputs
  int64_t bytes, reserved[3];

  const uint8_t* codes() const { return reinterpret_cast<const uint8_t*>(this) + sizeof(Weights); }
  const float* scales() const {
    return reinterpret_cast<const float*>(reinterpret_cast<const uint8_t*>(this) + scales_at);
  }
  const uint8_t* zeros() const { return zeros_at ? reinterpret_cast<const uint8_t*>(this) + zeros_at : nullptr; }
  int64_t step() const { return 32 / bits; }              // inputs per 64 bytes of a block
  int64_t panel_bytes() const { return kPanel * k_pad * bits / 8; }
  int64_t segments() const { return groups * splits; }
};
static_assert(sizeof(Weights) == 128, "the codes start 64-byte aligned");

// One run of inputs that shares a scale: [start, start + length) of x lies at [at, at + padded) of a plane.
struct Segment {
  int64_t start, length, at, padded;
};

static inline Segment segment(const Weights& w, int64_t index) {
  const int64_t g = index / w.splits, s = index % w.splits, from = s * kSegment;
  const bool last = s == w.splits - 1;
  return {g * w.group + from, last ? w.group - from : kSegment, g * w.group_pad + from,
          last ? w.group_pad - from : kSegment};
}

static inline Weights geometry(int bits, int64_t n, int64_t k, int64_t group, bool has_zeros) {
  Weights w;
  memset(&w, 0, sizeof w);
  w.magic = kMagic, w.bits = bits, w.n = n, w.k = k, w.group = group;
  w.groups = group ? k / group : 0;
  w.splits = group ? (group + kSegment - 1) / kSegment : 1;
  w.tiles = group % 64 == 0 || group >= 512;
  w.group_pad = up(group, w.tiles ? 64 : 32 / bits);
  w.k_pad = w.groups * w.group_pad;
  w.rows = up(n, kPanel);
  w.zero = 1 << (bits - 1);
  if (bits == 2) w.zero = 1;
  w.scales_at = sizeof(Weights) + w.rows * w.k_pad * bits / 8;
  const int64_t end = up(w.scales_at + w.groups * w.rows * 4, 64);
  w.zeros_at = has_zeros ? end : 0;
  w.bytes = has_zeros ? up(end + w.groups * w.rows, 64) : end;
  return w;
}

// The codes of one step of a row, canonical (input 4 s + i of 2 bits at bit 8 s + 2 i) -> kernel order (8 i + 2 s).
static inline uint32_t step_word(int bits, uint32_t word) {
  if (bits == 2) {  // transpose 4 x 4 fields
    uint32_t swap = (word ^ word >> 6) & 0x00cc00ccu;
    word ^= swap ^ swap << 6;
    swap = (word ^ word >> 12) & 0x0000f0f0u;
    return word ^ swap ^ swap << 12;
  }
  if (bits == 8) return word;
  uint32_t low = word & 0xffff, high = word >> 16;  // inputs 0 to 3, 4 to 7: one nibble to a byte each
  low = (low | low << 8) & 0x00ff00ffu, high = (high | high << 8) & 0x00ff00ffu;
  return ((low | low << 4) & 0x0f0f0f0fu) | ((high | high << 4) & 0x0f0f0f0fu) << 4;
}

static inline void pack(int bits, int64_t n, int64_t k, int64_t group, const uint8_t* packed, const float* scales,
                        bool per_row, const uint8_t* zeros, void* out) {
  const Weights w = geometry(bits, n, k, group, zeros != nullptr);
  uint8_t* base = static_cast<uint8_t*>(out);
  memset(base, 0, w.bytes);
  memcpy(base, &w, sizeof w);
  uint8_t* codes = base + sizeof(Weights);
  const int64_t width = (k * bits + 7) / 8, step = w.step(), parts = 8 / bits;
  const int mask = (1 << bits) - 1;
  for (int64_t row = 0; row < n; row++) {
    uint8_t* panel = codes + row / kPanel * w.panel_bytes() + row % kPanel / 16 * 64 + row % 16 * 4;
    const uint8_t* line = packed + row * width;
    for (int64_t index = 0; index < w.segments(); index++) {
      const Segment s = segment(w, index);
      int64_t i = 0;
      if (s.start % step == 0)  // four canonical bytes are one step
        for (; i + step <= s.length; i += step) {
          uint32_t word;
          memcpy(&word, line + (s.start + i) / parts, 4);
          word = step_word(bits, word);
          memcpy(panel + (s.at + i) / step * 256, &word, 4);
        }
      for (; i < s.length; i++) {
        const int64_t from = s.start + i, to = s.at + i;
        const int code = line[from / parts] >> (from % parts * bits) & mask;
        panel[to / step * 256 + to % 4] |= static_cast<uint8_t>(code << (to % step / 4 * bits));
      }
    }
  }
  float* s = reinterpret_cast<float*>(base + w.scales_at);
  for (int64_t row = 0; row < n; row++)
    for (int64_t g = 0; g < w.groups; g++) {
      const int64_t from = per_row ? row * w.groups + g : 0;
      s[g * w.rows + row] = scales[from];
      if (zeros) base[w.zeros_at + g * w.rows + row] = zeros[from];
    }
}

// Of one token in the workspace: y = (sum of products * weight scale) * scale * post.
struct Token {
  float scale, post;
  int32_t limbs, unused;
};

// Where things lie in the workspace of `tokens` rows.
struct Workspace {
  int limbs;           // at most, per token
  bool tiles, floats;  // planes lie in AMX tiles; planes are float32 (`add`)
  int64_t stride;      // bytes from one plane to the next (not in tiles)
  int64_t token_tiles, sums_at, planes_at, bytes, segments;

  Workspace(const Weights& w, int level, int activations, int64_t tokens) {
    floats = activations == TSLD_CPU_ADD && w.bits == 2 && !w.zeros_at;
    limbs = floats || activations == TSLD_CPU_INT8 ? 1 : 3;
    tiles = level == TSLD_CPU_AMX && w.tiles && tokens >= kAmxTokens && !floats;
    stride = up(w.k_pad * (floats ? 4 : 1), 64) + 64;
    token_tiles = (tokens + 15) / 16;
    segments = w.segments();
    sums_at = up(tokens * static_cast<int64_t>(sizeof(Token)), 64);
    planes_at = up(sums_at + tokens * limbs * segments * 4, 64);
    bytes = planes_at + (tiles ? token_tiles * 16 * limbs * w.k_pad : tokens * limbs * stride) + 64;
  }

  Token* tokens(void* ws) const { return static_cast<Token*>(ws); }
  const Token* tokens(const void* ws) const { return static_cast<const Token*>(ws); }
  // int32 [limb][segment] of a token: the sums of its quantised activations
  int32_t* sums(void* ws, int64_t token) const {
    return reinterpret_cast<int32_t*>(static_cast<char*>(ws) + sums_at) + token * limbs * segments;
  }
  const int32_t* sums(const void* ws, int64_t token) const { return sums(const_cast<void*>(ws), token); }
  int8_t* plane(void* ws, int64_t token, int limb) const {
    return reinterpret_cast<int8_t*>(ws) + planes_at + (token * limbs + limb) * stride;
  }
  const int8_t* plane(const void* ws, int64_t token, int limb) const {
    return plane(const_cast<void*>(ws), token, limb);
  }
  // Tile [16 tokens][64 inputs] number 0 of a limb; the tile of input i is 1024 * (i / 64) bytes on.
  int8_t* tile(void* ws, const Weights& w, int64_t token_tile, int limb) const {
    return reinterpret_cast<int8_t*>(ws) + planes_at + (limb * token_tiles + token_tile) * 16 * w.k_pad;
  }
  const int8_t* tile(const void* ws, const Weights& w, int64_t token_tile, int limb) const {
    return tile(const_cast<void*>(ws), w, token_tile, limb);
  }
};

}  // namespace tsld_cpu
