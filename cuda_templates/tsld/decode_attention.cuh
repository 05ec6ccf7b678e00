// Attention of one new token per sequence over a static KV cache: rotary embedding, cache update and softmax in one
// kernel. Blocks share the heads of keys and values and, where these are few, the cached positions; the last block of
// a head to arrive adds the shares up in a fixed order.
#pragma once

#include "tsld/decode_elementwise.cuh"

namespace tsld {

struct AttentionParams {
  const void* q;               // [batch, heads, D], batches at a distance
  const void* k;               // [batch, kv_heads, D]
  const void* v;
  const void* cos;             // [batch, D], or null: no rotary embedding
  const void* sin;
  const i64* positions;        // [batch]: where the new token goes
  void* key_cache;             // [>= batch, kv_heads, length, D]
  void* value_cache;
  void* out;                   // [batch, heads, D]
  float* partial;              // [batch * kv_heads * chunks of heads, splits, R, D + 2]
  int* counters;               // [batch * kv_heads * chunks of heads], zero before and after
  i64 q_stride, k_stride, v_stride;  // elements between batches, multiples of 8
  int heads, kv_heads, length, splits;
  float scale;
};

// One of R query heads that share keys and values: running maximum, sum and weighted values of 8 dimensions a lane.
template <int R>
struct Online {
  float most[R], sum[R], acc[R][8];
};

template <class T, int D, int R, int kThreads>
class DecodeAttention {
  static constexpr int kLanes = D / 8;                 // lanes that share a key
  static constexpr int kKeys = kThreads / kLanes;      // keys in flight per step
  static constexpr int kUnroll = R > 2 ? 2 : 4;
  static_assert(D % 8 == 0 && kLanes <= 32 && 32 % kLanes == 0, "head size: a power of two, 8 to 256");

 public:
  struct Shared {
    float q[R][D];
    float piece[kKeys][R][D + 2];
    int arrived;
  };

  static __device__ __forceinline__ void run(const AttentionParams& p, Shared& shared) {
    const int chunks = p.heads / p.kv_heads / R;       // chunks of query heads per head of keys
    const int unit = blockIdx.x, split = blockIdx.y;
    const int batch = unit / (p.kv_heads * chunks), group = unit / chunks % p.kv_heads;
    const int head0 = group * (p.heads / p.kv_heads) + unit % chunks * R;
    allow_next_kernel();
    wait_for_previous_kernel();
    const int position = static_cast<int>(p.positions[batch]);
    const int total = position + 1, share = (total + p.splits - 1) / p.splits;
    const int begin = min(total, split * share), end = min(total, begin + share);
    const i64 cache = (static_cast<i64>(batch) * p.kv_heads + group) * p.length;
    u16* keys = static_cast<u16*>(p.key_cache) + cache * D;
    u16* values = static_cast<u16*>(p.value_cache) + cache * D;

    const u16* q = static_cast<const u16*>(p.q) + batch * p.q_stride + head0 * D;
    for (int i = threadIdx.x; i < R * D; i += kThreads)
      shared.q[i / D][i % D] = rotated(p, q + i / D * D, i % D, batch) * (p.scale * 1.44269504f);
    if (begin <= position && position < end) {         // this block owns the new token
      const u16* k = static_cast<const u16*>(p.k) + batch * p.k_stride + group * D;
      const u16* v = static_cast<const u16*>(p.v) + batch * p.v_stride + group * D;
      for (int i = threadIdx.x; i < D; i += kThreads) {
        keys[static_cast<i64>(position) * D + i] = static_cast<u16>(T::pack2(rotated(p, k, i, batch), 0.f));
        values[static_cast<i64>(position) * D + i] = v[i];
      }
    }
    __syncthreads();

    Online<R> mine;
    attend(mine, shared, keys, values, begin, end);
    float* piece = shared.piece[threadIdx.x / kLanes][0];
    const int first = threadIdx.x % kLanes * 8;
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int j = 0; j < 8; ++j) piece[r * (D + 2) + first + j] = mine.acc[r][j];
      piece[r * (D + 2) + D] = mine.most[r], piece[r * (D + 2) + D + 1] = mine.sum[r];
    }
    __syncthreads();
    finish(p, shared, unit, split, batch, head0);
  }

 private:
  // One rounded dimension of q or k after the rotary embedding: x * cos + rotate_half(x) * sin
  static __device__ __forceinline__ float rotated(const AttentionParams& p, const u16* x, int i, int batch) {
    const float v = T::to_float(x[i]);
    if (p.cos == nullptr) return v;
    const float other = i < D / 2 ? -T::to_float(x[i + D / 2]) : T::to_float(x[i - D / 2]);
    const float cos = T::to_float(static_cast<const u16*>(p.cos)[batch * D + i]);
    const float sin = T::to_float(static_cast<const u16*>(p.sin)[batch * D + i]);
    return round_to<T>(v * cos + other * sin);
  }

  static __device__ __forceinline__ void attend(Online<R>& mine, const Shared& shared, const u16* keys,
                                                const u16* values, int begin, int end) {
    const int lane = threadIdx.x % kLanes, key0 = threadIdx.x / kLanes;
    float q[R][8];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      mine.most[r] = -1e30f, mine.sum[r] = 0.f;
#pragma unroll
      for (int j = 0; j < 8; ++j) q[r][j] = shared.q[r][lane * 8 + j], mine.acc[r][j] = 0.f;
    }
    for (int from = begin; from < end; from += kKeys * kUnroll) {  // the same trip count in every lane of a warp
      Vec16 key[kUnroll], value[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const i64 at = static_cast<i64>(min(from + u * kKeys + key0, end - 1)) * D + lane * 8;
        key[u] = *reinterpret_cast<const Vec16*>(keys + at);
        value[u] = *reinterpret_cast<const Vec16*>(values + at);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float k[8], v[8];
        unpack8<T>(k, key[u]);
        unpack8<T>(v, value[u]);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          float score = 0.f;
#pragma unroll
          for (int j = 0; j < 8; ++j) score += q[r][j] * k[j];
#pragma unroll
          for (int step = kLanes / 2; step; step /= 2) score += __shfl_xor_sync(~0u, score, step);
          if (from + u * kKeys + key0 < end) {
            const float most = fmaxf(mine.most[r], score);
            const float keep = exp2f(mine.most[r] - most), weight = exp2f(score - most);
            mine.most[r] = most, mine.sum[r] = mine.sum[r] * keep + weight;
#pragma unroll
            for (int j = 0; j < 8; ++j) mine.acc[r][j] = mine.acc[r][j] * keep + weight * v[j];
          }
        }
      }
    }
  }

  // Adds `count` pieces [maximum, sum, values] at a distance, in order; returns dimension i of their softmax average,
  // or, without `whole`, leaves maximum and sum to be added up later.
  static __device__ __forceinline__ float add_up(const float* from, int count, int distance, int i, float& most,
                                                 float& sum) {
    most = -1e30f, sum = 0.f;
    for (int n = 0; n < count; ++n) most = fmaxf(most, from[n * distance + D]);
    float value = 0.f;
    for (int n = 0; n < count; ++n) {
      const float weight = exp2f(from[n * distance + D] - most);
      sum += weight * from[n * distance + D + 1];
      value += weight * from[n * distance + i];
    }
    return value;
  }

  static __device__ __forceinline__ void finish(const AttentionParams& p, Shared& shared, int unit, int split,
                                                int batch, int head0) {
    constexpr int kPiece = R * (D + 2);
    u16* out = static_cast<u16*>(p.out) + (static_cast<i64>(batch) * p.heads + head0) * D;
    float* partial = p.partial + (static_cast<i64>(unit) * p.splits + split) * kPiece;
    for (int i = threadIdx.x; i < R * D; i += kThreads) {
      const int r = i / D, d = i % D;
      float most, sum;
      const float value = add_up(&shared.piece[0][r][0], kKeys, kPiece, d, most, sum);
      if (p.splits == 1) {
        out[i] = static_cast<u16>(T::pack2(value / sum, 0.f));
      } else {
        __stcg(partial + r * (D + 2) + d, value);
        if (d == 0) __stcg(partial + r * (D + 2) + D, most), __stcg(partial + r * (D + 2) + D + 1, sum);
      }
    }
    if (p.splits == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      shared.arrived = atomicAdd(p.counters + unit, 1);
      if (shared.arrived == p.splits - 1) p.counters[unit] = 0;
      __threadfence();
    }
    __syncthreads();
    if (shared.arrived != p.splits - 1) return;
    const float* all = p.partial + static_cast<i64>(unit) * p.splits * kPiece;
    for (int i = threadIdx.x; i < R * D; i += kThreads) {
      const int r = i / D, d = i % D;
      float most = -1e30f, sum = 0.f, value = 0.f;
      for (int n = 0; n < p.splits; ++n) most = fmaxf(most, __ldcg(all + n * kPiece + r * (D + 2) + D));
      for (int n = 0; n < p.splits; ++n) {
        const float* from = all + n * kPiece + r * (D + 2);
        const float weight = exp2f(__ldcg(from + D) - most);
        sum += weight * __ldcg(from + D + 1);
        value += weight * __ldcg(from + d);
      }
      out[i] = static_cast<u16>(T::pack2(value / sum, 0.f));
    }
  }
};

}  // namespace tsld
