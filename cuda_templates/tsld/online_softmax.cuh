// Softmax-weighted sums that take keys and values as they come, for the attention of one new token
// (decode_attention.cuh). D / 8 lanes share a key; every sum runs in a fixed order.
#pragma once

#include "tsld/vector8.cuh"

namespace tsld {

// One of R query heads that share keys and values: running maximum, sum and weighted values of 8 dimensions a lane.
template <int R>
struct Online {
  float most[R], sum[R], acc[R][8];
};

// kKeys: keys that a block works on at once.
template <class T, int D, int R, int kKeys>
struct OnlineSoftmax {
  static constexpr int kLanes = D / 8;

  // More keys and values, kKeys positions apart; the first of them counts if `left` is positive, and so on. `key` and `value`
  // give a lane's vector of each; values that do not count are zeros. All lanes of a warp take part.
  template <int kCount, class Key, class Value>
  static __device__ __forceinline__ void take(Online<R>& mine, const float (&q)[R][8], Key key, Value value, int left) {
    float score[kCount][R];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      float k[8];
      unpack8<T>(k, key(u));
#pragma unroll
      for (int r = 0; r < R; ++r) {
        score[u][r] = 0.f;
#pragma unroll
        for (int j = 0; j < 8; ++j) score[u][r] += q[r][j] * k[j];
      }
    }
#pragma unroll
    for (int step = kLanes / 2; step; step /= 2)
#pragma unroll
      for (int u = 0; u < kCount; ++u)
#pragma unroll
        for (int r = 0; r < R; ++r) score[u][r] += __shfl_xor_sync(~0u, score[u][r], step);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float most = mine.most[r];
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        if (left <= u * kKeys) score[u][r] = -1e30f;
        most = fmaxf(most, score[u][r]);
      }
      const float keep = power_of_two_of(mine.most[r] - most);
      mine.most[r] = most, mine.sum[r] *= keep;
#pragma unroll
      for (int j = 0; j < 8; ++j) mine.acc[r][j] *= keep;
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        score[u][r] = left > u * kKeys ? power_of_two_of(score[u][r] - most) : 0.f;
        mine.sum[r] += score[u][r];
      }
    }
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      float v[8];
      unpack8<T>(v, value(u));
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int j = 0; j < 8; ++j) mine.acc[r][j] += score[u][r] * v[j];
    }
  }

  // Lanes of a warp that hold the same dimensions of different keys add up; each ends with the sum.
  static __device__ __forceinline__ void merge_lanes(Online<R>& mine) {
#pragma unroll
    for (int step = kLanes; step < 32; step *= 2)
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float other = __shfl_xor_sync(~0u, mine.most[r], step), most = fmaxf(mine.most[r], other);
        const float keep = power_of_two_of(mine.most[r] - most), weight = power_of_two_of(other - most);
        mine.most[r] = most;
        mine.sum[r] = mine.sum[r] * keep + __shfl_xor_sync(~0u, mine.sum[r], step) * weight;
#pragma unroll
        for (int j = 0; j < 8; ++j)
          mine.acc[r][j] = mine.acc[r][j] * keep + __shfl_xor_sync(~0u, mine.acc[r][j], step) * weight;
      }
  }

  // Dimension d of `count` shares at a distance, added up in order, eight loads at once; their common maximum and sum.
  template <class Load>
  static __device__ __forceinline__ float add_up(Load load, int count, int d, float& most, float& sum) {
    constexpr int kAtOnce = 8;
    most = -1e30f, sum = 0.f;
    float value = 0.f;
    for (int first = 0; first < count; first += kAtOnce) {
      float top[kAtOnce], total[kAtOnce], part[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const bool any = first + n < count;
        top[n] = any ? load(first + n, D) : -1e30f;
        total[n] = any ? load(first + n, D + 1) : 0.f, part[n] = any ? load(first + n, d) : 0.f;
      }
      float higher = most;
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) higher = fmaxf(higher, top[n]);
      const float keep = power_of_two_of(most - higher);
      most = higher, sum *= keep, value *= keep;
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const float weight = power_of_two_of(top[n] - most);
        sum += weight * total[n];
        value += weight * part[n];
      }
    }
    return value;
  }
};

}  // namespace tsld
