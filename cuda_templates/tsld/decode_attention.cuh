// Attention of one new token per sequence over a static KV cache: rotary embedding, cache update and softmax in one
// kernel. Blocks share the heads of keys and values and, where these are few, the cached positions. The shares of a head
// meet in the shared memory of the first of its blocks where these form a cluster (Hopper), else in global memory, where
// the last block to arrive adds them up; in a fixed order in both cases.
//
// Keys and values of earlier positions do not depend on the kernels of this step before this one: the first of them are
// on their way before the wait. That is right as long as some kernel between two steps waits for all earlier ones, which
// launches without overlap and replays of CUDA graphs do.
#pragma once

#include "tsld/cluster.cuh"
#include "tsld/online_softmax.cuh"

namespace tsld {

struct AttentionParams {
  const void* q;               // [batch, heads, D], batches at a distance
  const void* k;               // [batch, kv_heads, D]
  const void* v;
  const void* cos;             // [batch, D]; or of all positions, [length, D]; or null: no rotary embedding
  const void* sin;
  const i64* positions;        // [batch]: where the new token goes
  void* key_cache;             // [>= batch, kv_heads, length, D]
  void* value_cache;
  void* out;                   // [batch, heads, D]
  float* partial;              // [batch * kv_heads * chunks of heads, splits, R, D + 2]
  int* counters;               // [batch * kv_heads * chunks of heads], zero before and after
  i64 q_stride, k_stride, v_stride;  // elements between batches, multiples of 8
  int heads, kv_heads, length, splits;
  int clustered;               // whether the blocks of a head form a cluster
  int tables;                  // whether cos and sin are of all positions (and not of this step's)
  float scale;
};

template <class T, int D, int R, int kThreads>
class DecodeAttention {
  static constexpr int kLanes = D / 8;                 // lanes that share a key
  static constexpr int kKeys = kThreads / kLanes;      // keys in flight per step
  using Softmax = OnlineSoftmax<T, D, R, kKeys>;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kUnroll = R > 2 ? 2 : 4;
  static constexpr int kRow = D + 2;                   // of a share: values, maximum, sum
  static constexpr int kMostCluster = R * D <= 512 ? 8 : 1;  // blocks whose shares fit into shared memory
  static_assert(D % 8 == 0 && kLanes <= 32 && 32 % kLanes == 0, "head size: a power of two, 8 to 256");

 public:
  struct Shared {
    float q[R][D];
    float key[D];                                      // of the new token
    float piece[kWarps][R][kRow];                      // shares of the block's warps
    float gathered[kMostCluster][kMostCluster > 1 ? R : 1][kRow];  // shares of the cluster's blocks, in the first block
    int arrived;
  };

  static __device__ __forceinline__ void run(const AttentionParams& p, Shared& shared) {
    const int chunks = p.heads / p.kv_heads / R;       // chunks of query heads per head of keys
    const int unit = blockIdx.x, split = blockIdx.y;
    const int batch = unit / (p.kv_heads * chunks), group = unit / chunks % p.kv_heads;
    const int head0 = group * (p.heads / p.kv_heads) + unit % chunks * R;
    const bool newest = split == p.splits - 1;         // this block owns the new token
    allow_next_kernel();
    if (p.clustered) cluster_arrive();
    const int position = static_cast<int>(p.positions[batch]);
    const int share = (position + p.splits - 1) / p.splits;
    const int begin = min(position, split * share), end = min(position, begin + share);
    const i64 cache = (static_cast<i64>(batch) * p.kv_heads + group) * p.length;
    u16* keys = static_cast<u16*>(p.key_cache) + cache * D;
    u16* values = static_cast<u16*>(p.value_cache) + cache * D;
    Vec16 key[kUnroll] = {}, value[kUnroll] = {};
    load(key, value, keys, values, begin, end);
    fetch_later(keys, values, begin + kKeys * kUnroll, end);
    Turn turn = {};
    if (p.tables) turn = turn_of(p, threadIdx.x % D, position);
    wait_for_previous_kernel();
    if (!p.tables) turn = turn_of(p, threadIdx.x % D, batch);

    const u16* q = static_cast<const u16*>(p.q) + batch * p.q_stride + head0 * D;
    const u16* v = static_cast<const u16*>(p.v) + batch * p.v_stride + group * D;
    for (int i = threadIdx.x; i < R * D; i += kThreads)
      shared.q[i / D][i % D] = rotated(p, q + i / D * D, i % D, turn, batch, position) * (p.scale * 1.44269504f);
    if (newest) {
      const u16* k = static_cast<const u16*>(p.k) + batch * p.k_stride + group * D;
      for (int i = threadIdx.x; i < D; i += kThreads) {
        const float one = rotated(p, k, i, turn, batch, position);
        keys[static_cast<i64>(position) * D + i] = static_cast<u16>(T::pack2(one, 0.f));
        values[static_cast<i64>(position) * D + i] = v[i];
        shared.key[i] = round_to<T>(one);
      }
    }
    __syncthreads();

    const int lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes;
    float wide_q[R][8];
    Online<R> mine;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      mine.most[r] = -1e30f, mine.sum[r] = 0.f;
#pragma unroll
      for (int j = 0; j < 8; ++j) wide_q[r][j] = shared.q[r][lane * 8 + j], mine.acc[r][j] = 0.f;
    }
    for (int from = begin; from < end;) {              // the same trip count in every lane of a warp
      Softmax::take(mine, wide_q, key, value, end - from - first);
      from += kKeys * kUnroll;
      if (from < end) load(key, value, keys, values, from, end);
    }
    if (newest) {
      float k[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) k[j] = shared.key[lane * 8 + j];
      const Vec16 newest_key[1] = {pack8<T>(k)}, newest_value[1] = {reinterpret_cast<const Vec16*>(v)[lane]};
      Softmax::take(mine, wide_q, newest_key, newest_value, first == 0);
    }
    Softmax::merge_lanes(mine);
    if (threadIdx.x % 32 < kLanes) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        float* piece = shared.piece[threadIdx.x / 32][r];
#pragma unroll
        for (int j = 0; j < 8; ++j) piece[lane * 8 + j] = mine.acc[r][j];
        if (lane == 0) piece[D] = mine.most[r], piece[D + 1] = mine.sum[r];
      }
    }
    __syncthreads();
    finish(p, shared, unit, split, batch, head0);
  }

 private:
  struct Turn {
    float cos, sin;
  };

  static __device__ __forceinline__ Turn turn_of(const AttentionParams& p, int i, int row) {
    if (p.cos == nullptr) return {};
    return {T::to_float(static_cast<const u16*>(p.cos)[static_cast<i64>(row) * D + i]),
            T::to_float(static_cast<const u16*>(p.sin)[static_cast<i64>(row) * D + i])};
  }

  // One rounded dimension of q or k after the rotary embedding: x * cos + rotate_half(x) * sin. `turn` is that of
  // dimension threadIdx.x % D, which is i % D unless there are more dimensions than threads.
  static __device__ __forceinline__ float rotated(const AttentionParams& p, const u16* x, int i, Turn turn, int batch,
                                                  int position) {
    const float v = T::to_float(x[i]);
    if (p.cos == nullptr) return v;
    if (kThreads % D != 0) turn = turn_of(p, i, p.tables ? position : batch);
    const float other = i < D / 2 ? -T::to_float(x[i + D / 2]) : T::to_float(x[i - D / 2]);
    return round_to<T>(v * turn.cos + other * turn.sin);
  }

  // Keys and values of the positions from `from` on that this thread works on; the last one again past the end.
  static __device__ __forceinline__ void load(Vec16 (&key)[kUnroll], Vec16 (&value)[kUnroll], const u16* keys,
                                              const u16* values, int from, int end) {
    if (from >= end) return;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const i64 at = static_cast<i64>(min(from + u * kKeys + static_cast<int>(threadIdx.x) / kLanes, end - 1)) * D +
                     threadIdx.x % kLanes * 8;
      key[u] = *reinterpret_cast<const Vec16*>(keys + at);
      value[u] = *reinterpret_cast<const Vec16*>(values + at);
    }
  }

  // Positions that come after the first ones, on their way to L2: as many as one line a thread holds.
  static __device__ __forceinline__ void fetch_later(const u16* keys, const u16* values, int from, int end) {
    const i64 at = static_cast<i64>(from) * D + threadIdx.x * 64;
    if (at >= static_cast<i64>(end) * D) return;
    prefetch_l2(keys + at);
    prefetch_l2(values + at);
  }

  static __device__ __forceinline__ void finish(const AttentionParams& p, Shared& shared, int unit, int split,
                                                int batch, int head0) {
    constexpr int kPiece = R * kRow, kOwn = (R * D + kThreads - 1) / kThreads;
    u16* out = static_cast<u16*>(p.out) + (static_cast<i64>(batch) * p.heads + head0) * D;
    float most[kOwn], sum[kOwn], value[kOwn];
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      const int i = threadIdx.x + n * kThreads;
      if (i >= R * D) continue;
      const float* from = shared.piece[0][i / D];
      value[n] = Softmax::add_up([=](int w, int d) { return from[w * kPiece + d]; }, kWarps, i % D, most[n], sum[n]);
      if (p.splits == 1) out[i] = static_cast<u16>(T::pack2(value[n] / sum[n], 0.f));
    }
    if (p.splits == 1) return;
    if (p.clustered) cluster_wait();                   // every block has started
    float* partial = p.partial + (static_cast<i64>(unit) * p.splits + split) * kPiece;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      const int i = threadIdx.x + n * kThreads, r = i / D, d = i % D;
      if (i >= R * D) continue;
      float* to = p.clustered ? &shared.gathered[kMostCluster > 1 ? split : 0][kMostCluster > 1 ? r : 0][0] : partial + r * kRow;
      put(p.clustered, to, d, value[n]);
      if (d == 0) put(p.clustered, to, D, most[n]), put(p.clustered, to, D + 1, sum[n]);
    }
    const float* all = &shared.gathered[0][0][0];
    if (p.clustered) {
      cluster_sync();
      if (split > 0) return;
    } else {
      if (!last_to_arrive(p, shared, unit)) return;
      all = p.partial + static_cast<i64>(unit) * p.splits * kPiece;
    }
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      const int i = threadIdx.x + n * kThreads;
      if (i >= R * D) continue;
      const float* from = all + i / D * kRow;
      float top, total;
      const float v = p.clustered
          ? Softmax::add_up([=](int w, int d) { return from[w * kPiece + d]; }, p.splits, i % D, top, total)
          : Softmax::add_up([=](int w, int d) { return __ldcg(from + w * kPiece + d); }, p.splits, i % D, top, total);
      out[i] = static_cast<u16>(T::pack2(v / total, 0.f));
    }
  }

  // To the same place in the shared memory of the cluster's first block, or to global memory past L1.
  static __device__ __forceinline__ void put(bool clustered, float* to, int i, float v) {
    if (clustered)
      store_to_first_block(to + i, v);
    else
      __stcg(to + i, v);
  }

  // Whether this block is the last of its unit whose share is in global memory; the counter is zero again then.
  static __device__ __forceinline__ bool last_to_arrive(const AttentionParams& p, Shared& shared, int unit) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      shared.arrived = atomicAdd(p.counters + unit, 1);
      if (shared.arrived == p.splits - 1) p.counters[unit] = 0;
      __threadfence();
    }
    __syncthreads();
    return shared.arrived == p.splits - 1;
  }
};

}  // namespace tsld
