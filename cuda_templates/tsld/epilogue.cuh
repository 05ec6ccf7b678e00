// From accumulators to y: sum over the warps that split K, sum over the blocks that split K, scale, bias, round.
// Every sum runs in a fixed order, so results are the same bits from run to run.
#pragma once

#include "tsld/params.cuh"

namespace tsld {

constexpr int kPadRows = 20;  // floats per token in shared memory: 16 rows, padded against bank conflicts

// v[i] = sum * scale + bias of row .. row+3; scale: those of the four rows
template <class T>
__device__ __forceinline__ void scaled_outputs(float (&v)[4], const GemmParams& p, int row, const float (&sum)[4],
                                               const float* scale) {
  const u16* bias = static_cast<const u16*>(p.bias);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[i] = sum[i] * scale[i];
    if (bias != nullptr && row + i < p.n) v[i] += T::to_float(bias[row + i]);
  }
}

// y[token, row .. row+3] = round(sum * scale + bias)
template <class T>
__device__ __forceinline__ void store_outputs(const GemmParams& p, int token, int row, const float (&sum)[4],
                                              const float* scale) {
  if (row >= p.n) return;
  float v[4];
  scaled_outputs<T>(v, p, row, sum, scale);
  u16* y = static_cast<u16*>(p.y) + static_cast<i64>(token) * p.n + row;
  const u32 low = T::pack2(v[0], v[1]), high = T::pack2(v[2], v[3]);
  if (p.n % 4 == 0) {
    *reinterpret_cast<uint2*>(y) = make_uint2(low, high);
    return;
  }
  const u16 out[4] = {static_cast<u16>(low), static_cast<u16>(low >> 16), static_cast<u16>(high),
                      static_cast<u16>(high >> 16)};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (row + i < p.n) y[i] = out[i];
}

template <class T>
__device__ __forceinline__ void store_outputs(const GemmParams& p, int token, int row, const float (&sum)[4]) {
  store_outputs<T>(p, token, row, sum, p.row_scale + row);  // padded to whole tiles, 16-byte aligned
}

// What the end of the kernel needs of consecutive rows, into L2.
__device__ __forceinline__ void prefetch_scales(const GemmParams& p, int first_row, int rows) {
  const int row = first_row + threadIdx.x * 32;
  if (static_cast<int>(threadIdx.x) * 32 >= rows || row >= p.row_tiles * 16) return;
  prefetch_l2(p.row_scale + row);
  if (p.bias != nullptr && row < p.n) prefetch_l2(static_cast<const u16*>(p.bias) + row);
}

// The last of the blocks that share an output tile to arrive adds up all partial sums, in the order of the splits.
// Returns true in that block; `arrived` lies in shared memory. The counter is left at zero for the next launch.
template <class C>
__device__ __forceinline__ bool last_block_of_tile(const GemmParams& p, int& arrived) {
  C::sync();
  if (threadIdx.x == 0) {
    int* counter = p.counters + blockIdx.y * gridDim.x + blockIdx.x;
    arrived = arrive_at(counter);
    if (arrived == static_cast<int>(gridDim.z) - 1) *counter = 0;
  }
  C::sync();
  return arrived == static_cast<int>(gridDim.z) - 1;
}

__device__ __forceinline__ float* partial_sum(const GemmParams& p, int split, int token, int row) {
  return p.partial + (static_cast<i64>(split) * p.m + token) * (p.row_tiles * 16) + row;
}

// In the order of the splits; four loads at once.
template <class T>
__device__ __forceinline__ void add_splits_and_store(const GemmParams& p, int token, int row) {
  float sum[4] = {0.f, 0.f, 0.f, 0.f};
  const int splits = gridDim.z;
#pragma unroll 1
  for (int split = 0; split < splits; split += 4) {
    float part[4][4] = {};
#pragma unroll
    for (int s = 0; s < 4; ++s)
      if (split + s < splits) load_float4_l2(part[s], partial_sum(p, split + s, token, row));
#pragma unroll
    for (int s = 0; s < 4; ++s)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += part[s][i];
  }
  store_outputs<T>(p, token, row, sum);
}

// C: the kernel's configuration. `acc[rt][nt]` is the fragment of row tile rt, tokens 8*nt .. 8*nt+7:
// c0, c1 = row g, tokens 2t, 2t+1; c2, c3 = row g+8. C::row_tile(warp_n, rt) places the tile within the block.
// C::sync() is a barrier of the kEpilogueThreads threads that hold accumulators.
template <class C>
__device__ __forceinline__ void reduce_and_store(const GemmParams& p, float* shared,
                                                 const float (&acc)[C::kRowTiles][C::kTokenTiles][4], int warp_n,
                                                 int warp_k, int warp_m) {
  using T = typename C::Type;
  constexpr int kWarpTokens = C::kTokenTiles * 8;
  constexpr int kWarpFloats = kWarpTokens * kPadRows;
  constexpr int kQuads = C::kWarpsN * C::kBlockTokens * 4;  // groups of four rows per row tile of the warps
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int token0 = blockIdx.y * C::kBlockTokens;
  const bool split = gridDim.z > 1;
  float* mine = shared + ((warp_k * C::kWarpsN + warp_n) * C::kWarpsM + warp_m) * kWarpFloats;

#pragma unroll
  for (int rt = 0; rt < C::kRowTiles; ++rt) {
    C::sync();  // the memory is free: pipeline stages before, the previous row tile later
#pragma unroll
    for (int nt = 0; nt < C::kTokenTiles; ++nt) {
      float* to = mine + (nt * 8 + 2 * t) * kPadRows + g;
      to[0] = acc[rt][nt][0];
      to[kPadRows] = acc[rt][nt][1];
      to[8] = acc[rt][nt][2];
      to[kPadRows + 8] = acc[rt][nt][3];
    }
    C::sync();
    for (int q = threadIdx.x; q < kQuads; q += C::kEpilogueThreads) {
      const int r = 4 * (q % 4), token = q / 4 % C::kBlockTokens, wn = q / (4 * C::kBlockTokens);
      const int tile = blockIdx.x * (C::kBlockRows / 16) + C::row_tile(wn, rt);
      if (token0 + token >= p.m || tile >= p.row_tiles) continue;
      const float* from = shared + (wn * C::kWarpsM + token / kWarpTokens) * kWarpFloats +
                          token % kWarpTokens * kPadRows + r;
      float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int wk = 0; wk < C::kWarpsK; ++wk) {
        const float4 part = *reinterpret_cast<const float4*>(from + wk * C::kWarpsN * C::kWarpsM * kWarpFloats);
        sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
      }
      if (split)
        store_float4_l2(partial_sum(p, blockIdx.z, token0 + token, tile * 16 + r), sum);
      else
        store_outputs<T>(p, token0 + token, tile * 16 + r, sum);
    }
  }
  if (!split || !last_block_of_tile<C>(p, *reinterpret_cast<int*>(shared))) return;
  for (int q = threadIdx.x; q < kQuads * C::kRowTiles; q += C::kEpilogueThreads) {
    const int row = blockIdx.x * C::kBlockRows + 4 * (q % (C::kBlockRows / 4)), token = token0 + q / (C::kBlockRows / 4);
    if (token < p.m && row < p.row_tiles * 16) add_splits_and_store<T>(p, token, row);
  }
}

// Eight outputs of consecutive rows of one token, rounded already; rows behind the last are left out.
__device__ __forceinline__ void store_rows(const GemmParams& p, int token, int row, const Vec16& v) {
  u16* to = static_cast<u16*>(p.y) + static_cast<i64>(token) * p.n + row;
  if (p.n % 8 == 0) {
    *reinterpret_cast<Vec16*>(to) = v;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (row + i < p.n) to[i] = static_cast<u16>(v.w[i / 2] >> (16 * (i % 2)));
}

}  // namespace tsld
