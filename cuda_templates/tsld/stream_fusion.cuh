// What a stream kernel (gemm_stream.cuh) computes besides the product, so that a decoding step needs fewer kernels:
// RMSNorm of its input, with the residual addition before it, and a gated activation of its output.
//
// Every block normalises all of x again: a token is a few kilobytes in L2, a kernel of its own costs more. Roundings are
// those of the separate operators (tsld_fx/decode_ops.py); sums run in a fixed order.
#pragma once

#include "tsld/epilogue.cuh"
#include "tsld/vector8.cuh"

namespace tsld {

// Shared memory gets weight * round(s * rsqrt(mean(s^2) + eps)) with s = round(x + residual), zeros past the last input.
// C: the kernel's configuration. p.k is a multiple of 8, and the block holds all inputs (no split).
template <class C>
class NormStaging {
  using T = typename C::Type;
  static constexpr int kKept = 2;                            // vectors of the weight that a thread keeps in registers
  static constexpr int kAtOnce = C::kTokens < 2 ? 1 : 2;     // tokens whose loads are in flight together

  const GemmParams& p_;
  const int token0_, tokens_, vectors_, padded_;
  Vec16 weight_[kKept];

 public:
  __device__ __forceinline__ NormStaging(const GemmParams& p, int token0)
      : p_(p), token0_(token0), tokens_(min(C::kTokens, p.m - token0)), vectors_(p.k / 8), padded_(p.chunks * 16) {}

  // Before the wait for earlier kernels: the weight of the norm does not depend on them.
  __device__ __forceinline__ void fetch_weight() {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int v = threadIdx.x + i * C::kThreads;
      if (v < vectors_) weight_[i] = static_cast<const Vec16*>(p_.norm_weight)[v];
    }
  }

  // x: shared memory, a token every x_stride bytes. scratch: kTokens * kWarps floats. The caller synchronises after it.
  __device__ __forceinline__ void stage(char* x, int x_stride, float* scratch) const {
    float squares[C::kTokens];
#pragma unroll
    for (int t = 0; t < C::kTokens; ++t) squares[t] = 0.f;
    for (int v = threadIdx.x; v < padded_; v += C::kThreads)
#pragma unroll
      for (int t = 0; t < C::kTokens; t += kAtOnce) take(squares, t, v, x, x_stride);
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int t = 0; t < C::kTokens; ++t) {
#pragma unroll
      for (int step = 16; step; step /= 2) squares[t] += __shfl_xor_sync(~0u, squares[t], step);
      if (threadIdx.x % 32 == 0) scratch[t * C::kWarps + warp] = squares[t];
    }
    __syncthreads();
    float scale[C::kTokens];
#pragma unroll
    for (int t = 0; t < C::kTokens; ++t) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < C::kWarps; ++w) sum += scratch[t * C::kWarps + w];
      scale[t] = rsqrtf(sum / p_.k + p_.eps);
    }
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int v = threadIdx.x + i * C::kThreads;
      if (v < vectors_) normalise(scale, weight_[i], x + v * 16, x_stride);
    }
    for (int v = threadIdx.x + kKept * C::kThreads; v < vectors_; v += C::kThreads)
      normalise(scale, static_cast<const Vec16*>(p_.norm_weight)[v], x + v * 16, x_stride);
  }

 private:
  // Vector v of kAtOnce tokens to shared memory, and its squares to the sums of this thread.
  __device__ __forceinline__ void take(float (&squares)[C::kTokens], int first, int v, char* x, int x_stride) const {
    const bool added = p_.residual != nullptr;
    Vec16 raw[kAtOnce] = {}, other[kAtOnce] = {};
    if (v < vectors_)
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (first + i < tokens_) {
          const i64 token = token0_ + first + i;
          raw[i] = static_cast<const Vec16*>(p_.x)[token * (p_.ldx / 8) + v];
          if (added) other[i] = static_cast<const Vec16*>(p_.residual)[token * vectors_ + v];
        }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= tokens_) continue;
      float s[8];
      unpack8<T>(s, raw[i]);
      if (added) {
        float r[8];
        unpack8<T>(r, other[i]);
#pragma unroll
        for (int j = 0; j < 8; ++j) s[j] = round_to<T>(s[j] + r[j]);
        raw[i] = pack8<T>(s);
        if (blockIdx.x == 0 && v < vectors_)
          static_cast<Vec16*>(p_.total)[static_cast<i64>(token0_ + first + i) * vectors_ + v] = raw[i];
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) squares[first + i] += s[j] * s[j];
      *reinterpret_cast<Vec16*>(x + (first + i) * x_stride + v * 16) = raw[i];
    }
  }

  // This thread's own vector of every token, in place.
  __device__ __forceinline__ void normalise(const float (&scale)[C::kTokens], const Vec16& weight, char* x,
                                            int x_stride) const {
    float w[8];
    unpack8<T>(w, weight);
#pragma unroll
    for (int t = 0; t < C::kTokens; ++t) {
      if (t >= tokens_) continue;
      Vec16* at = reinterpret_cast<Vec16*>(x + t * x_stride);
      float s[8];
      unpack8<T>(s, *at);
#pragma unroll
      for (int j = 0; j < 8; ++j) s[j] = w[j] * round_to<T>(s[j] * scale[t]);
      *at = pack8<T>(s);
    }
  }
};

// y[token, f] = round(silu(gate)) * up for four features. Rows come in tiles of 16: those of 8 features of the gate,
// then those of the same features of up. `row` is the first gate row of the four, n the rows of both; scale: theirs.
template <class T>
__device__ __forceinline__ void store_gated(const GemmParams& p, int token, int row, const float (&gate)[4],
                                            const float (&up)[4], const float* scale) {
  if (row >= p.n) return;
  float v[2][4], out[4];
  scaled_outputs<T>(v[0], p, row, gate, scale);
  scaled_outputs<T>(v[1], p, row + 8, up, scale + 8);
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = rounded_silu<T>(round_to<T>(v[0][i])) * round_to<T>(v[1][i]);
  u16* y = static_cast<u16*>(p.y) + static_cast<i64>(token) * (p.n / 2) + row / 16 * 8 + row % 16;
  *reinterpret_cast<uint2*>(y) = make_uint2(T::pack2(out[0], out[1]), T::pack2(out[2], out[3]));
}

}  // namespace tsld
