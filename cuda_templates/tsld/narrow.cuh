// Activations of 8 bits (int8, fp8 e4m3) for ternary weights: types, weight registers, and the quantisation of x.
//
// A code's two bits at the top of a byte are 0, +-64 as int8 and 0, +-2.0 as e4m3, so one shift and one AND give four
// weights. They come out of the same words as the 16-bit registers of dequant.cuh, in another order of the inputs:
// byte b of a lane's register j holds, of the 32 inputs of a word, input 16 * (b is even) + 8 * (j / 2) + 2t + b / 2,
// where the instruction expects input 16 * (j / 2) + 4t + b. The order of the inputs does not matter to the sum as
// long as x has the same one: `TokenRow` writes it so.
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
  // Ties to even, no saturation needed: 1.5 * 2^23 leaves a small integer in the low bits of the sum.
  static __device__ __forceinline__ u32 round4(const float (&v)[4]) {
    u32 bytes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bytes[i] = __float_as_uint(v[i] + 12582912.f);
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

// A token on its way to 8 bits: scale = max|x| / largest, q = round(x / scale). A token with an Inf or NaN gets a NaN
// scale. Inputs go in vectors of eight; the four that make 32 inputs belong to neighbouring lanes.
template <class T>
class TokenRow {
  using Out = typename T::Out;

  const u16* const x_;
  u32* const q_;
  const int k_;

 public:
  const int vecs;  // of the row, with the zeros past its end

  __device__ __forceinline__ TokenRow(const void* x, i64 ldx, void* q, i64 ldq, int token, int k)
      : x_(static_cast<const u16*>(x) + token * ldx),
        q_(reinterpret_cast<u32*>(static_cast<u8*>(q) + token * ldq)),
        k_(k),
        vecs(static_cast<int>(ldq / 8)) {}

  __device__ __forceinline__ Vec16 load(int vec) const {  // zeros past the last input
    Vec16 v = {};
    const int from = vec * 8;
    if (from + 8 <= k_) {
      v = *reinterpret_cast<const Vec16*>(x_ + from);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (from + i < k_) v.w[i / 2] |= static_cast<u32>(x_[from + i]) << (16 * (i % 2));
    }
    return v;
  }

  // Two at once, of the bits without sign: NaN is larger than Inf, which is larger than every number.
  static __device__ __forceinline__ u32 larger(u32 largest, const Vec16& v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = __vmaxu2(largest, v.w[i] & 0x7FFF7FFFu);
    return largest;
  }
  static __device__ __forceinline__ u32 largest_of_warp(u32 largest) {
    return __reduce_max_sync(~0u, max(largest & 0xFFFFu, largest >> 16));
  }

  struct Scale {
    float inverse, scale;  // where scale is NaN, the values do not matter
    __device__ __forceinline__ explicit Scale(u32 largest) {
      const float most = Out::to_float(static_cast<u16>(largest));
      const bool finite = most <= 3.402823466e38f;  // false for NaN too
      inverse = finite && most > 0.f ? T::kLargest / most : 0.f;
      scale = finite ? most / T::kLargest : __uint_as_float(0x7FC00000u);
    }
  };

  // Of the 32 inputs of a word, vector 2e + h holds 16e + 8h .. +7; its bytes belong to registers 4h .. 4h+3, in the
  // even places where e is 1, else in the odd ones. Vectors of e = 0 and 1 lie two lanes apart and trade halves, so
  // that whole warps have to call this.
  __device__ __forceinline__ void store(int vec, const Vec16& v, const Scale& s) const {
    const bool second = vec % 4 >= 2;  // e
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float f[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const u32 two = v.w[2 * i + j / 2];
        f[j] = __fmul_rn(Out::to_float(static_cast<u16>(j % 2 ? two >> 16 : two)), s.inverse);
      }
      const u32 bytes = T::round4(f);
      words[2 * i] = __byte_perm(bytes, 0, second ? 0x4140 : 0x1404);
      words[2 * i + 1] = __byte_perm(bytes, 0, second ? 0x4342 : 0x3424);
    }
    uint2 out;
    out.x = (second ? words[2] : words[0]) | __shfl_xor_sync(~0u, second ? words[0] : words[2], 2);
    out.y = (second ? words[3] : words[1]) | __shfl_xor_sync(~0u, second ? words[1] : words[3], 2);
    if (vec < vecs) *reinterpret_cast<uint2*>(q_ + vec / 4 * 8 + vec % 2 * 4 + (second ? 2 : 0)) = out;
  }
};

// Blocks walk over the tokens; a thread loads its vectors of the next token before it writes those of this one. It keeps
// kVecs of them in registers between the two passes; only rows of more than kVecs * kThreads vectors are read twice.
template <class T, int kThreads, int kVecs>
__device__ __forceinline__ void quantize_tokens(const QuantizeParams& p) {
  using Row = TokenRow<T>;
  __shared__ u32 warp_largest[2][kThreads / 32];
  allow_next_kernel();
  wait_for_previous_kernel();
  Vec16 next[kVecs];
  const auto load = [&](int token) {
    const Row row(p.x, p.ldx, p.q, p.ldq, token, p.k);
#pragma unroll
    for (int i = 0; i < kVecs; ++i) next[i] = row.load(i * kThreads + threadIdx.x);
  };
  load(blockIdx.x);
  const int step = gridDim.x;
  for (int token = blockIdx.x, turn = 0; token < p.m; token += step, turn ^= 1) {
    const Row row(p.x, p.ldx, p.q, p.ldq, token, p.k);
    Vec16 kept[kVecs];
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) largest = Row::larger(largest, kept[i] = next[i]);
    for (int vec = kVecs * kThreads + threadIdx.x; vec < row.vecs; vec += kThreads)
      largest = Row::larger(largest, row.load(vec));
    if (p.m - token > step) load(token + step);
    largest = Row::largest_of_warp(largest);
    if (threadIdx.x % 32 == 0) warp_largest[turn][threadIdx.x / 32] = largest;
    __syncthreads();  // the only one: the warps' largest of the next token have a place of their own
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) largest = max(largest, warp_largest[turn][w]);
    const typename Row::Scale scale(largest);
    if (threadIdx.x == 0) p.scale[token] = scale.scale;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) row.store(i * kThreads + threadIdx.x, kept[i], scale);
    for (int vec = kVecs * kThreads + threadIdx.x; vec / 32 * 32 < row.vecs; vec += kThreads)
      row.store(vec, row.load(vec), scale);
  }
}

}  // namespace tsld
