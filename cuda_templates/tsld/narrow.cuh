// Activations of 8 bits (int8, fp8 e4m3) for ternary weights: types, weight registers, and the quantisation of x.
//
// A code's two bits at the top of a byte are 0, +-64 as int8 and 0, +-2.0 as e4m3, so one shift and one AND give four
// weights. They come out of the same words as the 16-bit registers of dequant.cuh, in another order of the inputs:
// byte b of a lane's register j holds, of the 32 inputs of a word, input 16 * (b is even) + 8 * (j / 2) + 2t + b / 2,
// where the instruction expects input 16 * (j / 2) + 4t + b. The order of the inputs does not matter to the sum as
// long as x has the same one: `quantize_tokens` writes it so.
#pragma once

#include "tsld/layout.cuh"

namespace tsld {

// Out: the type of y and of x before quantisation.
template <class Out_>
struct Int8 {
  using Out = Out_;
  using Sum = int;
  static constexpr int kBytes = 1;
  static constexpr float kLargest = 127.f;
  static constexpr float kWeight = 1.f / 32.f;  // row_scale expects codes of +-2; here they are +-64
  static __device__ __forceinline__ u32 round4(const float (&v)[4]) {  // ties to even, no saturation needed
    u32 bytes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) asm("cvt.rni.s32.f32 %0, %1;" : "=r"(bytes[i]) : "f"(v[i]));
    return __byte_perm(__byte_perm(bytes[0], bytes[1], 0x0040), __byte_perm(bytes[2], bytes[3], 0x0040), 0x5410);
  }
};

template <class Out_>
struct Fp8 {
  using Out = Out_;
  using Sum = float;
  static constexpr int kBytes = 1;
  static constexpr float kLargest = 448.f;
  static constexpr float kWeight = 1.f;
  static __device__ __forceinline__ u32 round4(const float (&v)[4]) {
#if __CUDA_ARCH__ >= 890
    u16 low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(v[1]), "f"(v[0]));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(v[3]), "f"(v[2]));
    return low | static_cast<u32>(high) << 16;
#else
    return 0;  // never rendered for older devices
#endif
  }
};

__device__ __forceinline__ void dequant_narrow(u32 (&a)[4], u32 word) {
#pragma unroll
  for (int j = 0; j < 4; ++j) a[j] = (word << (2 * j)) & 0xC0C0C0C0u;
}

struct QuantizeParams {
  const void* x;  // [m, ldx] fp16 or bf16, 16-byte aligned rows
  void* q;        // [m, ldq] of 8-bit values, inputs in the order above, zeros past the last
  float* scale;   // [m]: x = q * scale
  i64 ldx, ldq;   // elements; ldq is a multiple of 128
  int m, k;
};

// One block per token: scale = max|x| / largest, q = round(x / scale). A token with an Inf or NaN gets a NaN scale.
template <class T, int kThreads>
__device__ __forceinline__ void quantize_tokens(const QuantizeParams& p) {
  using Out = typename T::Out;
  __shared__ u32 warp_largest[kThreads / 32];
  allow_next_kernel();
  wait_for_previous_kernel();
  const u16* x = static_cast<const u16*>(p.x) + static_cast<i64>(blockIdx.x) * p.ldx;
  u32* q = reinterpret_cast<u32*>(static_cast<u8*>(p.q) + static_cast<i64>(blockIdx.x) * p.ldq);

  const auto load8 = [&](int from) {  // eight inputs, zeros past the last
    Vec16 v = {};
    if (from + 8 <= p.k) {
      v = *reinterpret_cast<const Vec16*>(x + from);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (from + i < p.k) v.w[i / 2] |= static_cast<u32>(x[from + i]) << (16 * (i % 2));
    }
    return v;
  };

  u32 largest = 0;  // of the bits without sign: NaN is larger than Inf, which is larger than every number
  for (int from = threadIdx.x * 8; from < p.k; from += kThreads * 8) {
    const Vec16 v = load8(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      largest = max(largest, v.w[i] & 0x7FFFu);
      largest = max(largest, v.w[i] >> 16 & 0x7FFFu);
    }
  }
  largest = __reduce_max_sync(~0u, largest);
  if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = largest;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) largest = max(largest, warp_largest[w]);
  const float magnitude = Out::to_float(static_cast<u16>(largest));
  const bool finite = magnitude <= 3.402823466e38f;  // false for NaN too
  const float inverse = finite && magnitude > 0.f ? T::kLargest / magnitude : 0.f;
  if (threadIdx.x == 0) p.scale[blockIdx.x] = finite ? magnitude / T::kLargest : __uint_as_float(0x7FC00000u);

  for (int word = threadIdx.x; word < p.ldq / 32; word += kThreads) {  // 32 inputs
    Vec16 v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = load8(word * 32 + i * 8);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Vec16 out;
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        float f[4];
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const u32 two = v[2 * (b % 2 == 0) + half].w[t];  // inputs 16 * (b is even) + 8 * half + 2t, +1
          const float value = Out::to_float(static_cast<u16>(b / 2 ? two >> 16 : two)) * inverse;
          f[b] = finite ? value : 0.f;
        }
        out.w[t] = T::round4(f);
      }
      *reinterpret_cast<Vec16*>(q + word * 8 + half * 4) = out;
    }
  }
}

}  // namespace tsld
