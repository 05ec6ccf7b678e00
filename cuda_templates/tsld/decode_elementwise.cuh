// What stands between the products of a decoder: RMSNorm with the residual before it, and the gated activation.
// Intermediate roundings are those of the plain graph, so that both give nearly the same bits.
#pragma once

#include "tsld/vector8.cuh"

namespace tsld {

struct NormParams {
  const void* x;         // [rows, columns], contiguous
  const void* residual;  // [rows, columns], or null
  const void* weight;    // [columns]
  void* sum;             // [rows, columns]: x + residual, or null without one
  void* y;               // [rows, columns]
  i64 rows;
  int columns;           // a multiple of 8
  float eps;
};

// y = weight * round(s * rsqrt(mean(s^2) + eps)) with s = x (+ residual), one block per row.
template <class T, int kThreads>
__device__ __forceinline__ void rms_norm(const NormParams& p) {
  __shared__ float parts[kThreads / 32];
  constexpr int kKept = 2;  // vectors of 8 that a thread keeps in registers; longer rows are read again
  const int vectors = p.columns / 8, lane = threadIdx.x % 32;
  const i64 row = static_cast<i64>(blockIdx.x) * vectors;
  const Vec16* x = static_cast<const Vec16*>(p.x) + row;
  const Vec16* weight = static_cast<const Vec16*>(p.weight);
  const bool added = p.residual != nullptr;
  allow_next_kernel();
  Vec16 kept_weight[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i)
    if (threadIdx.x + i * kThreads < vectors) kept_weight[i] = weight[threadIdx.x + i * kThreads];
  wait_for_previous_kernel();

  float kept[kKept][8], total = 0.f;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int at = threadIdx.x + i * kThreads;
    if (at >= vectors) continue;
    unpack8<T>(kept[i], x[at]);
    if (added) {
      float other[8];
      unpack8<T>(other, static_cast<const Vec16*>(p.residual)[row + at]);
#pragma unroll
      for (int j = 0; j < 8; ++j) kept[i][j] = round_to<T>(kept[i][j] + other[j]);
      static_cast<Vec16*>(p.sum)[row + at] = pack8<T>(kept[i]);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) total += kept[i][j] * kept[i][j];
  }
  for (int at = threadIdx.x + kKept * kThreads; at < vectors; at += kThreads) {
    float v[8];
    unpack8<T>(v, x[at]);
    if (added) {
      float other[8];
      unpack8<T>(other, static_cast<const Vec16*>(p.residual)[row + at]);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = round_to<T>(v[j] + other[j]);
      static_cast<Vec16*>(p.sum)[row + at] = pack8<T>(v);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) total += v[j] * v[j];
  }
#pragma unroll
  for (int step = 16; step; step /= 2) total += __shfl_xor_sync(~0u, total, step);
  if (lane == 0) parts[threadIdx.x / 32] = total;
  __syncthreads();
  total = 0.f;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) total += parts[i];
  const float scale = rsqrtf(total / p.columns + p.eps);

  Vec16* y = static_cast<Vec16*>(p.y) + row;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int at = threadIdx.x + i * kThreads;
    if (at >= vectors) continue;
    float w[8], out[8];
    unpack8<T>(w, kept_weight[i]);
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = w[j] * round_to<T>(kept[i][j] * scale);
    y[at] = pack8<T>(out);
  }
  for (int at = threadIdx.x + kKept * kThreads; at < vectors; at += kThreads) {
    float v[8], w[8], out[8];
    unpack8<T>(v, added ? static_cast<const Vec16*>(p.sum)[row + at] : x[at]);  // written by this thread
    unpack8<T>(w, weight[at]);
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = w[j] * round_to<T>(v[j] * scale);
    y[at] = pack8<T>(out);
  }
}

struct GateParams {
  const void* gate;      // [rows, columns], rows at a distance; `step` vectors of 8 columns apart
  const void* up;
  void* y;               // [rows, columns], contiguous
  i64 gate_stride, up_stride;  // elements between rows, multiples of 8
  i64 rows;
  int columns;           // a multiple of 8
  int step;              // 1; or 2 where 8 columns of gate and 8 of up take turns
};

// y = round(silu(gate)) * up
template <class T, int kThreads>
__device__ __forceinline__ void silu_mul(const GateParams& p) {
  const int vectors = p.columns / 8;
  allow_next_kernel();
  wait_for_previous_kernel();
  for (i64 at = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x; at < p.rows * vectors;
       at += static_cast<i64>(gridDim.x) * kThreads) {
    const i64 row = at / vectors, column = at % vectors;
    float gate[8], up[8], out[8];
    unpack8<T>(gate, static_cast<const Vec16*>(p.gate)[row * (p.gate_stride / 8) + column * p.step]);
    unpack8<T>(up, static_cast<const Vec16*>(p.up)[row * (p.up_stride / 8) + column * p.step]);
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = rounded_silu<T>(gate[j]) * up[j];
    static_cast<Vec16*>(p.y)[at] = pack8<T>(out);
  }
}

}  // namespace tsld
