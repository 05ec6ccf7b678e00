// Attention of one new token per sequence over a static KV cache: rotary embedding, cache update and softmax in one
// kernel. Blocks share the heads of keys and values and, where these are few, the cached positions. The shares of a head
// meet in the shared memory of the first of its blocks where these form a cluster (Hopper), else in global memory, where
// the last block to arrive adds them up; in a fixed order in both cases.
//
// Keys and values of earlier positions do not depend on the kernels of this step before this one: the first of them are
// on their way to shared memory before the wait. That is right as long as some kernel between two steps waits for all
// earlier ones, which launches without overlap and replays of CUDA graphs do.
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
  static constexpr int kAhead = kThreads > 128 ? 8 : 10;       // keys of a lane on their way to shared memory at once
  static constexpr int kUnroll = R > 2 ? 2 : kAhead / 2;       // keys that a lane takes at once
  static constexpr int kBatches = kAhead / kUnroll;
  static constexpr int kRow = D + 2;                   // of a share: values, maximum, sum
  static constexpr int kMostCluster = R * D <= 512 ? 8 : 1;  // blocks whose shares fit into shared memory
  static_assert(D % 8 == 0 && kLanes <= 32 && 32 % kLanes == 0, "head size: a power of two, 8 to 256");

 public:
  static constexpr int kRingBytes = kAhead * 32 * kThreads;

  struct Shared {
    float piece[kWarps][R][kRow];                      // shares of the block's warps
    float gathered[kMostCluster][kMostCluster > 1 ? R : 1][kRow];  // shares of the cluster's blocks, in the first block
    int arrived;
    u64 barrier;
  };

  static __device__ __forceinline__ void run(const AttentionParams& p, Shared& shared, Vec16* ring) {
    const int chunks = p.heads / p.kv_heads / R;       // chunks of query heads per head of keys
    const int unit = blockIdx.x, split = blockIdx.y;
    const int batch = unit / (p.kv_heads * chunks), group = unit / chunks % p.kv_heads;
    const int head0 = group * (p.heads / p.kv_heads) + unit % chunks * R;
    const bool newest = split == p.splits - 1;         // this block owns the new token
    const int lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes;
    allow_next_kernel();
    if (p.clustered) {
      if (split == 0 && threadIdx.x == 0) expect_stores(&shared.barrier, p.splits * R * kRow * 4);
      cluster_arrive_relaxed();
    }
    const int position = static_cast<int>(p.positions[batch]);
    const int share = (position + p.splits - 1) / p.splits;
    const int begin = min(position, split * share), end = min(position, begin + share);
    const i64 cache = (static_cast<i64>(batch) * p.kv_heads + group) * p.length;
    u16* keys = static_cast<u16*>(p.key_cache) + cache * D;
    u16* values = static_cast<u16*>(p.value_cache) + cache * D;
    constexpr int kStep = kKeys * kUnroll;
    int fetched = begin;
#pragma unroll
    for (int slot = 0; slot < kBatches; ++slot, fetched += kStep) fetch(ring, slot, keys, values, fetched, end);
    fetch_later(keys, values, fetched, end);
    Turn turn = {};
    if (p.tables || p.cos == nullptr) turn = turn_of(p, lane, position);
    wait_for_previous_kernel();
    if (!p.tables && p.cos != nullptr) turn = turn_of(p, lane, batch);

    Halves q[R];  // all loads before the first use: each takes a while
#pragma unroll
    for (int r = 0; r < R; ++r) q[r] = load(p, static_cast<const u16*>(p.q) + batch * p.q_stride + (head0 + r) * D, lane);
    const Halves k = load(p, static_cast<const u16*>(p.k) + batch * p.k_stride + group * D, lane);
    const Vec16 v = load16_early(static_cast<const u16*>(p.v) + batch * p.v_stride + group * D + lane * 8);
    float wide_q[R][8];
    Online<R> mine;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      rotate(wide_q[r], q[r], lane, turn);
      mine.most[r] = -1e30f, mine.sum[r] = 0.f;
#pragma unroll
      for (int j = 0; j < 8; ++j) wide_q[r][j] *= p.scale * 1.44269504f, mine.acc[r][j] = 0.f;
    }
    if (newest) {
      float wide_k[8];
      rotate(wide_k, k, lane, turn);
      const Vec16 key = pack8<T>(wide_k), value = first == 0 ? v : Vec16{};
      if (first == 0) {
        reinterpret_cast<Vec16*>(keys + static_cast<i64>(position) * D)[lane] = key;
        reinterpret_cast<Vec16*>(values + static_cast<i64>(position) * D)[lane] = value;
      }
      Softmax::template take<1>(mine, wide_q, [&](int) { return key; }, [&](int) { return value; }, first == 0);
    }
    int slot = 0;
#pragma unroll 1
    for (int from = begin; from < end; from += kStep) {  // the same trip count in every lane of a warp
      cp_async_wait<kBatches - 1>();
      Softmax::template take<kUnroll>(mine, wide_q, [&](int u) { return *place(ring, slot, u); },
                                      [&](int u) { return place(ring, slot, u)[kThreads]; }, end - from - first);
      fetch(ring, slot, keys, values, fetched, end);
      fetched += kStep;
      slot = slot == kBatches - 1 ? 0 : slot + 1;
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
  // Cosines and sines of the eight dimensions of a lane.
  struct Turn {
    Vec16 cos, sin;
  };

  static __device__ __forceinline__ Turn turn_of(const AttentionParams& p, int lane, int row) {
    const u32 one = T::pack2(1.f, 1.f);
    if (p.cos == nullptr) return {{one, one, one, one}, {}};
    const i64 at = static_cast<i64>(row) * kLanes + lane;
    return {static_cast<const Vec16*>(p.cos)[at], static_cast<const Vec16*>(p.sin)[at]};
  }

  // A lane's eight dimensions of a head, and the same of the head's other half.
  struct Halves {
    Vec16 own, other;
  };

  // Without a branch, behind which the compiler would move a load.
  static __device__ __forceinline__ Halves load(const AttentionParams& p, const u16* x, int lane) {
    const Vec16* vectors = reinterpret_cast<const Vec16*>(x);
    Halves found = {load16_early(vectors + lane), load16_early(vectors + (kLanes > 1 ? lane ^ kLanes / 2 : lane))};
    if constexpr (kLanes == 1) found.other = {found.own.w[2], found.own.w[3], found.own.w[0], found.own.w[1]};
    const u32 any = p.cos == nullptr ? 0 : ~0u;        // 0 * Inf would be NaN
#pragma unroll
    for (int i = 0; i < 4; ++i) found.other.w[i] &= any;
    return found;
  }

  // After the rotary embedding, rounded: x * cos + rotate_half(x) * sin.
  static __device__ __forceinline__ void rotate(float (&out)[8], const Halves& x, int lane, const Turn& turn) {
    float other[8], cos[8], sin[8];
    unpack8<T>(out, x.own);
    unpack8<T>(other, x.other);
    unpack8<T>(cos, turn.cos);
    unpack8<T>(sin, turn.sin);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const bool first_half = kLanes > 1 ? lane < kLanes / 2 : j < 4;
      out[j] = round_to<T>(out[j] * cos[j] + (first_half ? -other[j] : other[j]) * sin[j]);
    }
  }

  // Where a thread, which copies and reads its own, has a key; kThreads further on the value.
  static __device__ __forceinline__ Vec16* place(Vec16* ring, int slot, int u) {
    return ring + (slot * kUnroll + u) * 2 * kThreads + threadIdx.x;
  }

  // Keys and values of the positions from `from` on that this thread works on, on their way to its places of a slot.
  static __device__ __forceinline__ void fetch(Vec16* ring, int slot, const u16* keys, const u16* values, int from,
                                               int end) {
    if (from < end) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int row = from + u * kKeys + static_cast<int>(threadIdx.x) / kLanes, bytes = row < end ? 16 : 0;
        const i64 at = static_cast<i64>(min(row, end - 1)) * D + threadIdx.x % kLanes * 8;
        Vec16* to = place(ring, slot, u);
        cp_async_zfill(shared_address(to), keys + at, bytes);
        cp_async_zfill(shared_address(to + kThreads), values + at, bytes);
      }
    }
    cp_async_commit();
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
      put(p.clustered, shared, to, d, value[n]);
      if (d == 0) put(p.clustered, shared, to, D, most[n]), put(p.clustered, shared, to, D + 1, sum[n]);
    }
    const float* all = &shared.gathered[0][0][0];
    if (p.clustered) {
      if (split > 0) return;
      wait_for_stores(&shared.barrier);
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
  static __device__ __forceinline__ void put(bool clustered, Shared& shared, float* to, int i, float v) {
    if (clustered)
      store_to_first_block(to + i, v, &shared.barrier);
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
