// The end of a decoding step in one kernel: the likeliest token (or one that was drawn), and what is kept of it.
#pragma once

#include "tsld/vector8.cuh"

namespace tsld {

struct StepParams {
  const void* logits;    // [batch, vocabulary], rows at a distance; null where `chosen` is given
  const i64* chosen;     // [batch]
  i64* tokens;           // [batch]: input of the next step
  i64* positions;        // [batch]: grows by one, up to the last
  i64* history;          // [batch, length]: tokens made so far
  i64* counts;           // [batch]: how many; grows by one, up to the last
  u8* finished;          // [batch] bool: such a sequence gets `pad`
  const i64* eos;        // [eos_count] tokens that end a sequence; -1 for none
  const i64* pad;        // one token
  i64 logits_stride;     // elements between rows
  int vocabulary, length, eos_count;
};

// Larger for larger values, NaN the largest of all; for equal values larger for the lower index.
__device__ __forceinline__ u64 rank_of(float v, int index) {
  const u32 bits = __float_as_uint(v + 0.f);  // -0 becomes +0
  const u32 order = v != v ? ~0u : bits ^ (bits >> 31 ? ~0u : 0x80000000u);
  return static_cast<u64>(order) << 32 | (~0u - static_cast<u32>(index));
}

__device__ __forceinline__ u64 larger(u64 a, u64 b) { return a > b ? a : b; }

// Index of the largest of `count` values, the first of them where several are; all threads of the block take part.
template <class T, int kThreads>
__device__ __forceinline__ int first_largest(const u16* values, int count, u64 (&best_of_warp)[kThreads / 32]) {
  constexpr int kUnroll = 4;
  u64 best = 0;
  const int vectors = reinterpret_cast<u64>(values) % 16 == 0 ? count / 8 : 0;
  for (int from = threadIdx.x; from < vectors; from += kThreads * kUnroll) {
    Vec16 raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) raw[u] = reinterpret_cast<const Vec16*>(values)[min(from + u * kThreads, vectors - 1)];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float v[8];
      unpack8<T>(v, raw[u]);
      const int first = min(from + u * kThreads, vectors - 1) * 8;
#pragma unroll
      for (int j = 0; j < 8; ++j) best = larger(best, rank_of(v[j], first + j));
    }
  }
  for (int i = vectors * 8 + threadIdx.x; i < count; i += kThreads) best = larger(best, rank_of(T::to_float(values[i]), i));
#pragma unroll
  for (int step = 16; step; step /= 2) best = larger(best, __shfl_xor_sync(~0u, best, step));
  if (threadIdx.x % 32 == 0) best_of_warp[threadIdx.x / 32] = best;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) best = larger(best, best_of_warp[w]);
  return static_cast<int>(~0u - static_cast<u32>(best));
}

// One block per sequence.
template <class T, int kThreads>
__device__ __forceinline__ void take_token(const StepParams& p) {
  __shared__ u64 best_of_warp[kThreads / 32];
  const int row = blockIdx.x;
  allow_next_kernel();
  wait_for_previous_kernel();
  i64 token;
  if (p.logits != nullptr)
    token = first_largest<T, kThreads>(static_cast<const u16*>(p.logits) + row * p.logits_stride, p.vocabulary, best_of_warp);
  else
    token = p.chosen[row];
  if (threadIdx.x != 0) return;
  if (p.finished[row]) token = *p.pad;
  bool ends = false;
  for (int i = 0; i < p.eos_count; ++i) ends = ends || p.eos[i] == token;
  if (ends) p.finished[row] = 1;
  const i64 last = p.length - 1, count = p.counts[row], next = p.positions[row] + 1;
  p.tokens[row] = token;
  p.history[row * p.length + count] = token;
  p.counts[row] = count < last ? count + 1 : last;
  p.positions[row] = next < last ? next : last;
}

}  // namespace tsld
