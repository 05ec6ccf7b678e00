// K split over blocks (gemm_wgmma.cuh): whose sums meet in the shared memory of a cluster, or in global memory.
// Every sum runs in the order of the splits, so results are the same bits from run to run.
#pragma once

#include "tsld/cluster.cuh"
#include "tsld/params.cuh"
#include "tsld/wgmma_config.cuh"

namespace tsld {

template <class C>
class WgmmaSplits {
  using Sum = typename C::Type::Sum;

  const GemmParams& p_;
  char* const memory_;
  const int splits_;

 public:
  __device__ __forceinline__ WgmmaSplits(const GemmParams& p, char* memory, int splits)
      : p_(p), memory_(memory), splits_(splits) {}

  // Split K over a cluster: a block gets the sums of the others for its share of the token tiles, in the order of a
  // lane's registers, and adds them up in the order of the splits. Returns the token tiles of a share.
  __device__ __forceinline__ int exchange(Sum (&acc)[C::kRowTiles][C::kTokenTiles][4], int split) const {
    const int share = C::kTokenTiles / splits_;
    float* const slots = reinterpret_cast<float*>(memory_ + C::kSharedBytes - C::kReceivedBytes) + threadIdx.x * 4;
    const auto owner = [&](int nt) { return nt * splits_ / C::kTokenTiles; };
    const auto slot = [&](int from, int rt, int nt) {
      return slots + ((from * C::kRowTiles + rt) * share + nt - owner(nt) * share) * (C::kEpilogueThreads * 4);
    };
    cluster_wait();  // all blocks have started
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt)
#pragma unroll
      for (int nt = 0; nt < C::kTokenTiles; ++nt)
        if (owner(nt) != split) store_remote(slot(split, rt, nt), owner(nt), acc[rt][nt]);
    cluster_arrive();
    cluster_wait();
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt)
#pragma unroll
      for (int nt = 0; nt < C::kTokenTiles; ++nt)
        if (owner(nt) == split) {
          Sum sum[4] = {};
#pragma unroll 1
          for (int from = 0; from < splits_; ++from) {
            const float4 part = from == split ? make_float4(acc[rt][nt][0], acc[rt][nt][1], acc[rt][nt][2], acc[rt][nt][3])
                                              : *reinterpret_cast<const float4*>(slot(from, rt, nt));
            sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[rt][nt][i] = sum[i];
        }
    return share;
  }

  // Split K: every block leaves its sums in the order of its registers; the last to arrive adds them up in the order
  // of the splits and returns true. The counter is left at zero for the next launch.
  __device__ __forceinline__ bool add(Sum (&acc)[C::kRowTiles][C::kTokenTiles][4], int split_of_block, int tile) const {
    constexpr int kFloats = C::kBlockRows * C::kTokens;  // of a tile
    float* mine = p_.partial + static_cast<i64>(tile) * splits_ * kFloats + threadIdx.x * 4;
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt)
#pragma unroll
      for (int nt = 0; nt < C::kTokenTiles; ++nt)
        store_float4_l2(mine + static_cast<i64>(split_of_block) * kFloats + (rt * C::kTokenTiles + nt) * C::kEpilogueThreads * 4,
                        acc[rt][nt]);
    C::sync();
    if (threadIdx.x == 0) {
      arrival_flag() = arrive_at(p_.counters + tile);
      if (arrival_flag() == splits_ - 1) p_.counters[tile] = 0;
    }
    C::sync();
    const bool last = arrival_flag() == splits_ - 1;
    C::sync();  // the flag may be written again
    if (!last) return false;
    constexpr int kSlab = imin(C::kTokenTiles, 8), kAtOnce = imax(16 / kSlab, 1);  // 16 loads of a lane in flight
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt)
#pragma unroll
      for (int first = 0; first < C::kTokenTiles; first += kSlab) {
#pragma unroll
        for (int nt = first; nt < first + kSlab; ++nt)
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[rt][nt][i] = 0;
#pragma unroll 1
        for (int split = 0; split < splits_; split += kAtOnce) {
          Sum part[kAtOnce][kSlab][4] = {};
#pragma unroll
          for (int s = 0; s < kAtOnce; ++s)
            if (split + s < splits_) {
#pragma unroll
              for (int nt = 0; nt < kSlab; ++nt)
                load_float4_l2(part[s][nt], mine + static_cast<i64>(split + s) * kFloats +
                                                (rt * C::kTokenTiles + first + nt) * C::kEpilogueThreads * 4);
            }
#pragma unroll
          for (int s = 0; s < kAtOnce; ++s)
#pragma unroll
            for (int nt = 0; nt < kSlab; ++nt)
#pragma unroll
              for (int i = 0; i < 4; ++i) acc[rt][first + nt][i] += part[s][nt][i];
        }
      }
    return true;
  }

 private:
  __device__ __forceinline__ int& arrival_flag() const { return *reinterpret_cast<int*>(memory_ + 512); }
};

}  // namespace tsld
