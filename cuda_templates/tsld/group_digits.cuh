// The digits of one or two tokens (stream_digits.cuh) times ternary weights with a scale per row and 128 inputs.
//
// The sums of a chunk are to become float32 anyhow, so there is one accumulator a row tile, and codes are signed: the two
// bits at the top of a byte are 0 or +-64 (narrow.cuh). A lane has two neighbouring digits of a token; their sums are
// joined as integers, below 2^28 + 2^20, rounded once, and added to those of the row with the scale of the group. The sums
// of a warp's share become integers again, so that those of the warps may meet in any order.
#pragma once

#include "tsld/multiply.cuh"
#include "tsld/narrow.cuh"
#include "tsld/stream_digits.cuh"

namespace tsld {

// A warp's sums of one row group: [row tile][pair of tokens][rows g, g+8], of the lane's two digits, 64 times too large.
template <class C>
struct GroupDigitSums {
  float of[C::kRowTiles][C::kTokenTiles][2];
};

// sums += codes of the row tiles x digits of the tokens x scales, over 128 inputs. x: shared address of the chunk;
// weights: of the row tiles' codes, with their scales behind them.
template <class C>
__device__ __forceinline__ void multiply_digits(GroupDigitSums<C>& sums, u32 x, u32 weights) {
  using Layout = DigitLayout<C::kTokens>;
  const u32 mine = lane_columns<C>(x);
  Vec16 codes[C::kRowTiles];
  load_codes<C>(codes, weights);
  float scale[C::kRowTiles][2];
#pragma unroll
  for (int rt = 0; rt < C::kRowTiles; ++rt) load_group_scales<C>(scale[rt], weights + C::kRowTiles * C::Weights::kBytes + rt * C::Meta::kBytes, 0);
  int products[C::kRowTiles][C::kTokenTiles][4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Vec16 b[C::kTokenTiles];
#pragma unroll
    for (int nt = 0; nt < C::kTokenTiles; ++nt) b[nt] = load_shared16(mine + nt * Layout::kTileBytes + half * Layout::kHalf);
#pragma unroll
    for (int part = 0; part < 2; ++part)  // the upper, the lower half of every byte
#pragma unroll
      for (int rt = 0; rt < C::kRowTiles; ++rt) {
        u32 first[4], second[4];
        dequant_narrow(first, codes[rt].w[half * 2]);
        dequant_narrow(second, codes[rt].w[half * 2 + 1]);
        const u32 a[4] = {first[2 * part], first[2 * part + 1], second[2 * part], second[2 * part + 1]};
#pragma unroll
        for (int nt = 0; nt < C::kTokenTiles; ++nt)
          mma_int8(products[rt][nt], a, b[nt].w[2 * part], b[nt].w[2 * part + 1]);
      }
  }
#pragma unroll
  for (int rt = 0; rt < C::kRowTiles; ++rt)
#pragma unroll
    for (int nt = 0; nt < C::kTokenTiles; ++nt)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        sums.of[rt][nt][half] +=
            scale[rt][half] * __int2float_rn(products[rt][nt][2 * half] * 256 + products[rt][nt][2 * half + 1]);
}

// A lane's sums for rows g and g+8, added to those of the block as integers: `to` [row][high, low]. What is left of
// `high` goes to `low`, which is rounded 28 bits below the token's largest.
template <class C>
__device__ __forceinline__ void add_digits(int* to, const GroupDigitSums<C>& sums, int rt, int nt, bool wanted) {
  const bool is_low = threadIdx.x % 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float mine = sums.of[rt][nt][half] * (1.f / 64.f), other = __shfl_xor_sync(~0u, mine, 1);
    const float high = is_low ? other : mine, whole = rintf(high);
    const float value = is_low ? fmaf(high - whole, 32768.f, mine) : whole;
    if (wanted) atomicAdd(to + half * 8 * kDigitsOf + is_low, __float2int_rn(value));
  }
}

}  // namespace tsld
