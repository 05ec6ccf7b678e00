// Codes -> the register operand of wgmma: 64 inputs (two pairs) of a warp's row tile at a time.
#pragma once

#include "tsld/multiply.cuh"
#include "tsld/narrow.cuh"

namespace tsld {

// a = ternary codes of 32 inputs, times the scales of the lane's two rows where C::kOwnScales and not C::kScaleSums
template <class C, class Zero>
__device__ __forceinline__ void load_pair(u32 (&a)[2][4], u32 word, const Zero& zero, const u32 (&factor)[2]) {
  const u32 words[1] = {word};
  dequant_pair(a, words, zero);
  if constexpr (C::kOwnScales && !C::kScaleSums) {
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int j = 0; j < 4; ++j) a[step][j] = C::Type::mul2(a[step][j], factor[j % 2]);
  }
}

// a = codes of inputs 64 * half .. + 63 of a (tile, chunk); group scales are multiplied in here.
//   weights, meta: shared addresses of the (tile, chunk); factor: scales of the lane's two rows, where C::kOwnScales
template <class C, class Zero>
__device__ __forceinline__ void load_operand(u32 (&a)[C::kSteps][4], Zero& zero, const u32 (&factor)[2], u32 weights,
                                             u32 meta, int half) {
  using T = typename C::Type;
  constexpr int kWords = C::Weights::kWordsPerPair;
  const u32 from = weights + threadIdx.x % 32 * 16;
  u32 words[2][kWords];
  if constexpr (C::kBits == 2) {  // 8 bytes of the lane's 16
    asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];"
                 : "=r"(words[0][0]), "=r"(words[1][0])
                 : "r"(from + half * 8)
                 : "memory");
  } else {
#pragma unroll
    for (int v = 0; v < kWords / 2; ++v) {
      const Vec16 codes = load_shared16(from + (half * (kWords / 2) + v) * 512);
#pragma unroll
      for (int i = 0; i < 4; ++i) words[(4 * v + i) / kWords][(4 * v + i) % kWords] = codes.w[i];
    }
  }
  if constexpr (T::kBytes == 1) {
#pragma unroll
    for (int step = 0; step < 2; ++step) dequant_narrow(a[step], words[step][0]);
  } else {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const int group = C::kGroup ? (half * 64 + pair * 32) / (C::kGroup ? C::kGroup : 1) : 0;
      if constexpr (C::kGroup != 0 && C::kBits > 2) load_group_zeros<C>(zero, meta, group);
      u32 pair_a[2][4];
      dequant_pair(pair_a, words[pair], zero);
      if constexpr (C::kGroup != 0 && !C::kOwnScales) scale_weights<C>(pair_a, meta, group);
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          a[2 * pair + step][j] = C::kOwnScales ? T::mul2(pair_a[step][j], factor[j % 2]) : pair_a[step][j];
    }
  }
}

}  // namespace tsld
