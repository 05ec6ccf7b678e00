// x -> 16-bit integers, as two bytes in the order of an operand of mma.m16n8k32, for gemm_digits.cuh.
#pragma once

#include "tsld/stream_digits.cuh"

namespace tsld {

// A warp takes a token. An item is what one lane takes at once: the 16 inputs of 32 at 8*h and at 8*(h + 2), which fill
// whole words of the operand (narrow.cuh says which input goes where). A lane's items lie 512 inputs apart.
template <class C>
class TokenDigits {
  using T = typename C::Type;
  static constexpr int kTurns = ceil_div(C::kTokens, C::kWarps);    // tokens of a warp
  static constexpr int kKept = imax(1, 4 / kTurns);               // items of a token kept in registers

  struct Item {
    Vec16 v[2];
  };

  const GemmParams& p_;
  const int token0_, tokens_;
  const int inputs_, filled_;  // of the block, in shared memory; those of them that x has: zeros follow
  const int offset_;           // of the lane's first item among the block's inputs
  const u16* const x_;

 public:
  __device__ __forceinline__ TokenDigits(const GemmParams& p, int token0, int tokens, int first_chunk, int chunks, int filled_up)
      : p_(p),
        token0_(token0),
        tokens_(tokens),
        inputs_(filled_up * kChunk),
        filled_(min(chunks * kChunk, p.k - first_chunk * kChunk)),
        offset_(threadIdx.x % 32 / 2 * 32 + threadIdx.x % 2 * 8),
        x_(static_cast<const u16*>(p.x) + first_chunk * kChunk) {}

  __device__ __forceinline__ void stage(char* x, DigitScale* scales) const {
    Item kept[kTurns][kKept];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn)
#pragma unroll
      for (int n = 0; n < kKept; ++n) kept[turn][n] = load(threadIdx.x / 32 + turn * C::kWarps, offset_ + n * 512);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int token = threadIdx.x / 32 + turn * C::kWarps;
      if (token >= tokens_) break;
      u32 largest = 0;
#pragma unroll
      for (int n = 0; n < kKept; ++n) look_at(kept[turn][n], offset_ + n * 512, largest);
#pragma unroll 1
      for (int k = offset_ + kKept * 512; k < inputs_; k += 512) {
        Item item = load(token, k);
        look_at(item, k, largest);
      }
      largest = __reduce_max_sync(~0u, max(largest & 0xFFFFu, largest >> 16));
      const float bound = T::to_float(static_cast<u16>(largest));
      const int exponent = largest ? static_cast<int>(__float_as_uint(bound) >> 23) - 127 : 0;
      // Inf and NaN, and bf16 values too small for a power of two that lifts them: one product after another
      const bool direct = exponent > 127 || exponent < -112;
      int shift = direct ? 0 : 14 - exponent;
      shift -= bound * power_of_two(shift) > 32639.f;  // the largest 127 * 256 + 127
      const float up = power_of_two(shift);
      if (threadIdx.x % 32 == 0) scales[token] = {2.f * power_of_two(-shift), 1.f, !direct, 0};
      char* to = x + token / 8 * (2 * C::kTileBytes) + token % 8 * C::kInputsOf;
#pragma unroll
      for (int n = 0; n < kKept; ++n)
        if (offset_ + n * 512 < inputs_) write(to, kept[turn][n], offset_ + n * 512, up);
#pragma unroll 1
      for (int k = offset_ + kKept * 512; k < inputs_; k += 512) {
        Item item = load(token, k);
        u32 unused = 0;
        look_at(item, k, unused);
        write(to, item, k, up);
      }
    }
  }

 private:
  static __device__ __forceinline__ Vec16 load_l2(const Vec16* p) {  // past L1
    const uint4 v = __ldcg(reinterpret_cast<const uint4*>(p));
    return {v.x, v.y, v.z, v.w};
  }

  // x's rows are 16-byte aligned, so that no vector with an input of x leaves x's memory.
  __device__ __forceinline__ Item load(int token, int k) const {
    Item found = {};
    const Vec16* x = reinterpret_cast<const Vec16*>(x_ + (token0_ + min(token, tokens_ - 1)) * p_.ldx + k);
    if (k < filled_) found.v[0] = load_l2(x);
    if (k + 16 < filled_) found.v[1] = load_l2(x + 2);
    return found;
  }

  // Zeros past the last input. Largest magnitudes of both halves, as bits without sign: NaN is larger than Inf.
  __device__ __forceinline__ void look_at(Item& item, int k, u32& largest) const {
    if (filled_ % 8 != 0) {
#pragma unroll
      for (int q = 0; q < 2; ++q)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int values = filled_ - k - 16 * q - 2 * i;
          if (values < 2) item.v[q].w[i] = values == 1 ? item.v[q].w[i] & 0xFFFFu : 0;
        }
    }
#pragma unroll
    for (int q = 0; q < 2; ++q)
#pragma unroll
      for (int i = 0; i < 4; ++i) largest = T::max_magnitude2(largest, item.v[q].w[i]);
  }

  // 1.5 * 2^23 leaves the integer in the low bits of the sum, ties to even; 128 makes the low byte a signed digit, but
  // for its top bit.
  static __device__ __forceinline__ u32 two(u32 a, u32 b, bool second, float up) {
    const u16 low = second ? static_cast<u16>(a >> 16) : static_cast<u16>(a);
    const u16 high = second ? static_cast<u16>(b >> 16) : static_cast<u16>(b);
    return __byte_perm(__float_as_uint(fmaf(T::to_float(low), up, 12583040.f)),
                       __float_as_uint(fmaf(T::to_float(high), up, 12583040.f)), 0x5410);
  }

  static __device__ __forceinline__ void write(char* x, const Item& item, int k, float up) {
    Vec16 high, low;
#pragma unroll
    for (int t = 0; t < 4; ++t) {  // bytes 0 and 2 are of the second vector, 1 and 3 of the first
      const u32 first = two(item.v[1].w[t], item.v[0].w[t], false, up);
      const u32 second = two(item.v[1].w[t], item.v[0].w[t], true, up);
      high.w[t] = __byte_perm(first, second, 0x7531);
      low.w[t] = __byte_perm(first, second, 0x6420) ^ 0x80808080u;
    }
    if constexpr (C::kHopper) {
      char* to = x + (k / 32 * 2 + k / 8 % 2) * C::kInputsBytes;
      *reinterpret_cast<Vec16*>(to) = high;
      *reinterpret_cast<Vec16*>(to + C::kTileBytes) = low;
    } else {
      u32* to = reinterpret_cast<u32*>(x + k / 64 * C::kInputsBytes) + k / 32 % 2 * 2 + k / 8 % 2;
#pragma unroll
      for (int t = 0; t < 4; ++t) to[t * 4] = high.w[t], to[t * 4 + C::kTileBytes / 4] = low.w[t];
    }
  }
};

}  // namespace tsld
