// y[m, n] = x[m, k] * dequantised(weights)[n, k]^T for some tens of tokens on Hopper (sm_90a): ternary weights.
//
// The grid fills the machine once. A block keeps its inputs of x in shared memory for good, and its warp groups stream
// equal contiguous shares of its work, (group of 64 rows, chunk of 128 inputs) in memory order, without waiting for
// each other: weights go from memory straight to registers, kStages units ahead, and are the register operand of
// wgmma. The blocks that share K form a cluster, which adds up their sums through shared memory: block r of the
// cluster finishes every r-th share of the tokens.
//
// Pieces of sums: where a share goes on into the next row group, the sums so far go to `middle` (one per row group,
// because the end of a row group lies within one share at most); the last sums of a warp group stay in registers until
// x is no longer needed and then take its place.
//
// Shared memory: barriers | x panels, later final pieces and received sums | middle pieces.
#pragma once

#include "tsld/cluster.cuh"
#include "tsld/epilogue.cuh"
#include "tsld/multiply.cuh"
#include "tsld/wgmma.cuh"

namespace tsld {

template <class Type_, int kBits_, int kGroup_, int kTokens_, int kGroups_, int kStages_>
struct FewConfig {
  static_assert(kBits_ == 2 && (kGroup_ == 0 || kGroup_ == 128), "ternary, one scale per row or per 128 inputs");
  using Type = Type_;
  static constexpr int kBits = kBits_, kGroup = kGroup_, kTokens = kTokens_, kGroups = kGroups_, kStages = kStages_;
  static constexpr int kTokenTiles = kTokens / 8;
  static constexpr int kThreads = 128 * kGroups;
  using Weights = WeightLayout<kBits>;
  using Meta = MetaLayout<kBits, kGroup>;
  static constexpr int kRows = 64;                       // of a row group: a row tile for each warp
  static constexpr int kTiles = kRows / kTileRows;
  static constexpr int kPanelBytes = kTokens * 128;      // 64 inputs of every token
  static constexpr int kPieceStride = kRows + 4;         // floats per token, padded against bank conflicts
  static constexpr int kPieceFloats = kTokens * kPieceStride;
  static constexpr int kParts = 4;                       // in which x arrives
  static constexpr int kBarrierBytes = 1024;             // so that panels stay aligned
  static constexpr int kStageBytes = Weights::kBytes + Meta::kBytes;  // of a warp
  static constexpr int kRingBytes = ceil_div(4 * kGroups * kStages * kStageBytes, 1024) * 1024;
  static constexpr int kSharedBytes = kBarrierBytes + kRingBytes;     // the rest depends on the shape
};

template <class C>
class FewGemm {
  using T = typename C::Type;
  using Weights = typename C::Weights;
  using Meta = typename C::Meta;
  using Sums = float[C::kTokenTiles][4];

  const GemmParams& p_;
  const TensorMap* x_map_;
  char* const memory_;
  const int warp_, lane_;
  const int split_, splits_;
  const int first_chunk_, chunks_;  // the block's inputs
  const int first_group_, groups_;  // the block's rows
  const int token0_, tokens_;
  const u64 policy_;

 public:
  __device__ __forceinline__ FewGemm(const GemmParams& p, const TensorMap& x_map, void* shared)
      : p_(p),
        x_map_(&x_map),
        memory_(static_cast<char*>(shared)),
        warp_(__shfl_sync(~0u, threadIdx.x / 32, 0)),
        lane_(threadIdx.x % 32),
        split_(blockIdx.z),
        splits_(gridDim.z),
        first_chunk_(split_ * p.chunks_per_split),
        chunks_(min(p.chunks_per_split, p.chunks - first_chunk_)),
        first_group_(share_start(all_groups(), gridDim.x, blockIdx.x)),
        groups_(share_start(all_groups(), gridDim.x, blockIdx.x + 1) - first_group_),
        token0_(blockIdx.y * C::kTokens),
        tokens_(min(C::kTokens, p.m - token0_)),
        policy_(evict_first_policy()) {}

  __device__ __forceinline__ void run(void*) {
    if (threadIdx.x == 0) {
      for (int part = 0; part < C::kParts; ++part) barrier_init(x_barrier(part), 1);
      barrier_init_done();
    }
    allow_next_kernel();
    const int begin = share(warp_ / 4), end = share(warp_ / 4 + 1);
    int group = begin / chunks_, chunk = begin % chunks_;
    Source source = {*this, group, chunk};
    u32 filled = ring();
#pragma unroll
    for (int s = 0; s < C::kStages - 1; ++s) load_unit(source, filled, begin + s < end);
    __syncthreads();
    wait_for_previous_kernel();
    if (warp_ == 0) copy_x();

    Sums acc = {};
    u32 at = ring();
    for (int unit = begin; unit < end; ++unit, ++chunk) {
      cp_async_wait<C::kStages - 2>();
      if constexpr (C::kGroup != 0) __syncwarp();  // group scales were copied by other lanes
      load_unit(source, filled, unit + C::kStages - 1 < end);
      if (chunk == chunks_) {
        wgmma_wait<0>();
        pin(acc);
        put_piece(acc, middle(group));
        chunk = 0, ++group;
      }
      multiply(acc, at, chunk);
      at = next_stage(at);
    }
    wgmma_wait<0>();
    cp_async_wait<0>();
    pin(acc);
    __syncthreads();                    // x is no longer needed
    if (splits_ > 1) cluster_arrive_relaxed();  // ... and other blocks may write there
    if (begin < end) put_piece(acc, last_piece(warp_ / 4));
    __syncthreads();
    if (splits_ == 1) {
      add_pieces([&](int token, int row, const float(&sum)[4]) {
        store_outputs<T>(p_, token0_ + token, first_group_ * C::kRows + row, sum);
      });
    } else {
      const int share = tokens_per_block();
      cluster_wait();
      add_pieces([&](int token, int row, const float(&sum)[4]) {
        store_remote(received(split_, token % share, row), token / share, sum);
      });
      cluster_arrive();
      cluster_wait();
      add_splits_and_store();
    }
  }

 private:
  // Where a lane loads from next. Reads up to three tiles past the last: the packed weights have such room.
  struct Source {
    const char* weights;
    const char* meta;
    int chunk;

    __device__ __forceinline__ Source(const FewGemm& gemm, int group, int first)
        : chunk(first) {
      const i64 tile = (gemm.first_group_ + group) * C::kTiles + gemm.warp_ % 4;
      const i64 block = tile * gemm.p_.chunks + gemm.first_chunk_ + first;
      weights = static_cast<const char*>(gemm.p_.weights) + block * Weights::kBytes + gemm.lane_ * 16;
      meta = static_cast<const char*>(gemm.p_.meta) + block * Meta::kBytes + gemm.lane_ * 16;
    }

    __device__ __forceinline__ void advance(const FewGemm& gemm) {
      int blocks = 1;
      if (++chunk == gemm.chunks_) chunk = 0, blocks += C::kTiles * gemm.p_.chunks - gemm.chunks_;
      weights += static_cast<i64>(blocks) * Weights::kBytes;
      if constexpr (C::kGroup != 0) meta += static_cast<i64>(blocks) * Meta::kBytes;
    }
  };

  // `total` items in `parts` contiguous shares whose sizes differ by one at most
  static __device__ __forceinline__ int share_start(int total, int parts, int part) {
    return static_cast<u32>(total) * part / parts;
  }
  __device__ __forceinline__ int all_groups() const { return ceil_div(p_.row_tiles, C::kTiles); }
  __device__ __forceinline__ int share(int warp_group) const {
    return share_start(groups_ * chunks_, C::kGroups, warp_group);
  }
  __device__ __forceinline__ int tokens_per_block() const { return (C::kTokens + splits_ - 1) / splits_; }

  __device__ __forceinline__ u32 x_barrier(int part) const { return shared_address(memory_) + 8 * part; }
  __device__ __forceinline__ u32 x_panel(int panel) const {
    return shared_address(memory_) + C::kSharedBytes + panel * C::kPanelBytes;
  }
  __device__ __forceinline__ float* last_piece(int warp_group) const {
    return reinterpret_cast<float*>(memory_ + C::kSharedBytes) + warp_group * C::kPieceFloats;
  }
  __device__ __forceinline__ float* received(int split, int token, int row) const {
    return last_piece(C::kGroups) + (split * tokens_per_block() + token) * (groups_ * C::kRows) + row;
  }
  __device__ __forceinline__ float* middle(int group) const {
    const int x_bytes = 2 * p_.chunks_per_split * C::kPanelBytes;
    const int later = (C::kGroups * C::kPieceFloats + (splits_ > 1 ? splits_ * tokens_per_block() * groups_ * C::kRows : 0)) * 4;
    return reinterpret_cast<float*>(memory_ + C::kSharedBytes + max(x_bytes, later)) + group * C::kPieceFloats;
  }

  // The part of x in which a chunk arrives.
  __device__ __forceinline__ int part_of(int chunk) const { return chunk * C::kParts / chunks_; }

  __device__ __forceinline__ u32 ring() const {  // the warp's first stage
    return shared_address(memory_) + C::kBarrierBytes + warp_ * (C::kStages * C::kStageBytes);
  }
  __device__ __forceinline__ u32 next_stage(u32 stage) const {
    return stage == ring() + (C::kStages - 1) * C::kStageBytes ? ring() : stage + C::kStageBytes;
  }

  __device__ __forceinline__ void load_unit(Source& source, u32& stage, bool wanted) const {
    if (wanted) {
      const u32 to = stage + lane_ * 16;
      cp_async_stream(to, source.weights, policy_);
      if constexpr (C::kGroup != 0) {
        if (lane_ < Meta::kBytes / 16) cp_async_stream(to + Weights::kBytes, source.meta, policy_);
      }
      source.advance(*this);
      stage = next_stage(stage);
    }
    cp_async_commit();
  }

  // One warp; inputs and tokens past the last arrive as zeros.
  __device__ __forceinline__ void copy_x() const {
    if (lane_ < C::kParts) {
      int chunks = 0;
      for (int i = 0; i < chunks_; ++i) chunks += part_of(i) == lane_;
      if (chunks > 0) barrier_expect(x_barrier(lane_), 2 * chunks * C::kPanelBytes);
    }
    __syncwarp();
    for (int panel = lane_; panel < 2 * chunks_; panel += 32)
      copy_tensor(x_panel(panel), x_map_, first_chunk_ * kChunk + panel * 64, token0_, x_barrier(part_of(panel / 2)));
  }

  // acc += the unit's codes x the block's tokens. The tensor cores multiply 64 inputs while the next are dequantised.
  __device__ __forceinline__ void multiply(Sums& acc, u32 stage, int chunk) {
    const Vec16 codes = load_shared16(stage + lane_ * 16);
    barrier_wait(x_barrier(part_of(chunk)), 0);
    u32 scale[2];
    if constexpr (C::kGroup != 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) scale[half] = T::both(load_shared2(stage + Weights::kBytes + lane_ / 4 * 2 + 16 * half));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        dequant_step(a_[half][step], codes.w[2 * half + step / 2], step % 2);
        if constexpr (C::kGroup != 0) {
#pragma unroll
          for (int j = 0; j < 4; ++j) a_[half][step][j] = T::mul2(a_[half][step][j], scale[j % 2]);
        }
      }
      pin(a_[half]);
      wgmma_fence();
      pin(acc);
      const u64 panel = panel_descriptor(x_panel(2 * chunk + half));
#pragma unroll
      for (int step = 0; step < 4; ++step) Wgmma<T, C::kTokenTiles>::run(acc, a_[half][step], panel + 2 * step);
      wgmma_commit();
      pin(acc);
      wgmma_wait<1>();  // the other half of the registers is free
    }
  }
  u32 a_[2][4][4];

  // The warp group's sums of one row group go to memory, and start again at zero.
  __device__ __forceinline__ void put_piece(Sums& acc, float* piece) const {
    float* to = piece + warp_ % 4 * kTileRows + lane_ / 4 + lane_ % 4 * 2 * C::kPieceStride;
#pragma unroll
    for (int nt = 0; nt < C::kTokenTiles; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[(nt * 8 + i % 2) * C::kPieceStride + i / 2 * 8] = acc[nt][i];
        acc[nt][i] = 0.f;
      }
  }

  // Calls take(token, row of the block, sums of four rows) for every four rows and token, pieces in the order of K.
  template <class Take>
  __device__ __forceinline__ void add_pieces(const Take& take) const {
    constexpr int kQuads = C::kRows / 4;
    for (int group = 0; group < groups_; ++group) {
      for (int q = threadIdx.x; q < kQuads * tokens_; q += C::kThreads) {
        const int token = q / kQuads, row = q % kQuads * 4;
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int wg = 0; wg < C::kGroups; ++wg) {
          const int begin = max(share(wg), group * chunks_), end = min(share(wg + 1), (group + 1) * chunks_);
          if (begin >= end) continue;
          const float* from = end == share(wg + 1) ? last_piece(wg) : middle(group);
          const float4 piece = *reinterpret_cast<const float4*>(from + token * C::kPieceStride + row);
          sum[0] += piece.x, sum[1] += piece.y, sum[2] += piece.z, sum[3] += piece.w;
        }
        take(token, group * C::kRows + row, sum);
      }
    }
  }

  // The block's own tokens: the sums of all splits, in their order.
  __device__ __forceinline__ void add_splits_and_store() const {
    const int quads = groups_ * C::kRows / 4, share = tokens_per_block(), first = split_ * share;
    for (int q = threadIdx.x; q < quads * min(share, tokens_ - first); q += C::kThreads) {
      const int token = q / quads, row = q % quads * 4;
      float sum[4] = {0.f, 0.f, 0.f, 0.f};
      for (int split = 0; split < splits_; ++split) {
        const float4 part = *reinterpret_cast<const float4*>(received(split, token, row));
        sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
      }
      store_outputs<T>(p_, token0_ + first + token, first_group_ * C::kRows + row, sum);
    }
  }
};

}  // namespace tsld
