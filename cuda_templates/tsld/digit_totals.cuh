// What a block of a stream kernel over digits adds up, and how it becomes y. Sums are integers, so that the warps that share
// a row may add theirs in any order.
#pragma once

#include "tsld/group_digits.cuh"
#include "tsld/stream_fusion.cuh"

namespace tsld {

template <class C>
struct DigitTotals {
  using T = typename C::Type;
  using Sums = typename If<C::kGroup == 0, DigitSums<C>, GroupDigitSums<C>>::type;

  const GemmParams& p;
  int* const sums;                 // shared memory: [token][row][digit], of groups [high, low, unused]
  const DigitScale* const scales;  // of the tokens
  const float* const row_scales;
  const int first_group, groups;   // the block's rows

  __device__ __forceinline__ void clear() const {
#pragma unroll 1
    for (int i = threadIdx.x; i < groups * C::kGroupRows * C::kTokens; i += C::kThreads)
      reinterpret_cast<Vec16*>(sums)[i] = Vec16{};
  }

  // A warp's sums, which start again at zero. A lane has two digits of a token.
  __device__ __forceinline__ void add(Sums& acc, int group) const {
    const int lane = threadIdx.x % 32;
    int* to = sums + (group * C::kGroupRows + lane / 4) * kDigitsOf;
#pragma unroll
    for (int nt = 0; nt < C::kTokenTiles; ++nt) {
      const int token = nt * 2 + lane % 4 / 2;
#pragma unroll
      for (int rt = 0; rt < C::kRowTiles; ++rt)
        add_digits(to + (token * groups * C::kGroupRows + rt * kTileRows) * kDigitsOf, acc, rt, nt, token < C::kTokens);
    }
    acc = {};
  }

  // All outputs of the block's rows, for the tokens from token0 on; without a split.
  __device__ __forceinline__ void store(int token0) const {
    const int tokens = min(C::kTokens, p.m - token0), outputs = groups * C::kGroupRows / (C::kGated ? 2 : 1);
    const int first = first_group * C::kGroupRows;
#pragma unroll 1
    for (int token = 0; token < tokens; ++token)
#pragma unroll 1
      for (int i = threadIdx.x; i < outputs; i += C::kThreads) {
        const int r = C::kGated ? i / 8 * kTileRows + i % 8 : i;
        if (first + r >= p.n) continue;
        float v = output(token0, token, r);
        if constexpr (C::kGated) v = rounded_silu<T>(round_to<T>(v)) * round_to<T>(output(token0, token, r + 8));
        const int width = C::kGated ? p.n / 2 : p.n, column = C::kGated ? first / 2 + i : first + i;
        static_cast<u16*>(p.y)[static_cast<i64>(token0 + token) * width + column] = static_cast<u16>(T::pack2(v, 0.f));
      }
  }

 private:
  // One row of a token, scaled.
  __device__ __forceinline__ float output(int token0, int token, int r) const {
    const int row = first_group * C::kGroupRows + r;
    const DigitScale scale = scales[token];
    float sum = join_digits<C::kGroup>(sums + (token * groups * C::kGroupRows + r) * kDigitsOf, scale);
    if (!scale.finite)
      sum = C::kNorm ? __uint_as_float(0x7FC00000u) : exact_row<T, C::kGroup>(p, token0 + token, row, 0, p.k);
    sum *= row_scales[r];
    return p.bias != nullptr && row < p.n ? sum + T::to_float(static_cast<const u16*>(p.bias)[row]) : sum;
  }
};

}  // namespace tsld
