// One chunk of 128 inputs: the codes of a warp's row tiles times the activations, all from shared memory.
#pragma once

#include "tsld/dequant.cuh"
#include "tsld/layout.cuh"

namespace tsld {

template <class C, class Zero>
__device__ __forceinline__ void load_group_zeros(Zero& zero, u32 meta, int group) {
  const u32 from = meta + C::Meta::kScaleBytes + group * kTileRows + threadIdx.x % 32 / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    u32 value;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(value) : "r"(from + 8 * half) : "memory");
    zero.set(half, value);
  }
}

// Group scales are fp16, relative to the row's largest (which is in row_scale).
template <class C>
__device__ __forceinline__ void load_group_scales(float (&scale)[2], u32 meta, int group) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
    scale[half] = Fp16::to_float(load_shared2(meta + (group * kTileRows + threadIdx.x % 32 / 4 + 8 * half) * 2));
}

// The other way to apply group scales: to the weights before the product, rounded to the type of x.
template <class C>
__device__ __forceinline__ void scale_weights(u32 (&a)[2][4], u32 meta, int group) {
  using T = typename C::Type;
  float scale[2];
  load_group_scales<C>(scale, meta, group);
  const u32 both[2] = {T::pack2(scale[0], scale[0]), T::pack2(scale[1], scale[1])};
#pragma unroll
  for (int step = 0; step < 2; ++step)
#pragma unroll
    for (int j = 0; j < 4; ++j) a[step][j] = T::mul2(a[step][j], both[j % 2]);
}

// acc[rt][nt] += codes of row tile rt x tokens first_token + 8*nt .. +7, over 128 inputs.
//   x       shared address of the chunk's first input of token 0; x_stride bytes between tokens
//   weights shared address of the warp's (tile, chunk) blocks, one after another; meta likewise
template <class C>
__device__ __forceinline__ void multiply_chunk(float (&acc)[C::kRowTiles][C::kTokenTiles][4],
                                               ZeroPoint<typename C::Type, C::kBits> (&zero)[C::kRowTiles], u32 x,
                                               int x_stride, int first_token, u32 weights, u32 meta) {
  using T = typename C::Type;
  constexpr int kWords = C::Weights::kWordsPerPair;
  // Group scales: on the float32 sums of each group, or, with many tokens, on the weights (half the accumulators).
  constexpr bool kScaleWeights = C::kGroup != 0 && C::kTokenTiles >= 4;
  constexpr bool kGrouped = C::kGroup != 0 && !kScaleWeights;
  constexpr bool kTwoChains = C::kGroup == 0 && C::kRowTiles * C::kTokenTiles == 1;  // a lone accumulator waits for itself
  const int lane = threadIdx.x % 32;
  u32 x_row[C::kTokenTiles];  // rows past the last staged token repeat it: their columns are never stored
#pragma unroll
  for (int nt = 0; nt < C::kTokenTiles; ++nt)
    x_row[nt] = x + min(first_token + nt * 8 + lane % 8, C::kTokens - 1) * x_stride + lane / 8 * 16;

  Vec16 codes[C::kRowTiles];
  float part[C::kRowTiles][C::kTokenTiles][4];  // sums of the current group, or of every second step
  if constexpr (kTwoChains) {
#pragma unroll
    for (int i = 0; i < 4; ++i) part[0][0][i] = 0.f;
  }
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    u32 b[C::kTokenTiles][4];  // x: two steps of 16 inputs x 8 tokens each
#pragma unroll
    for (int nt = 0; nt < C::kTokenTiles; ++nt) ldmatrix_x4(b[nt], x_row[nt] + pair * 64);
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt) {
      const u32 tile_meta = meta + rt * C::Meta::kBytes;
      if (pair * kWords % 4 == 0)
        codes[rt] = load_shared16(weights + rt * C::Weights::kBytes + pair * kWords / 4 * 512 + lane * 16);
      u32 words[kWords];
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = codes[rt].w[(pair * kWords + i) % 4];
      if constexpr (C::kGroup != 0 && C::kBits > 2) {
        if (pair * 32 % C::kGroup == 0) load_group_zeros<C>(zero[rt], tile_meta, pair * 32 / C::kGroup);
      }
      if constexpr (kGrouped) {
        if (pair * 32 % C::kGroup == 0) {
#pragma unroll
          for (int nt = 0; nt < C::kTokenTiles; ++nt)
#pragma unroll
            for (int i = 0; i < 4; ++i) part[rt][nt][i] = 0.f;
        }
      }
      u32 a[2][4];
      dequant_pair(a, words, zero[rt]);
      if constexpr (kScaleWeights) scale_weights<C>(a, tile_meta, pair * 32 / C::kGroup);
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int nt = 0; nt < C::kTokenTiles; ++nt)
          T::mma(kGrouped || (kTwoChains && step == 1) ? part[rt][nt] : acc[rt][nt], a[step], b[nt][2 * step],
                 b[nt][2 * step + 1]);
      if constexpr (kGrouped) {
        if ((pair + 1) * 32 % C::kGroup == 0) {
          float scale[2];
          load_group_scales<C>(scale, tile_meta, pair * 32 / C::kGroup);
#pragma unroll
          for (int nt = 0; nt < C::kTokenTiles; ++nt)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[rt][nt][i] += scale[i / 2] * part[rt][nt][i];
        }
      }
    }
  }
  if constexpr (kTwoChains) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[0][0][i] += part[0][0][i];
  }
}

}  // namespace tsld
