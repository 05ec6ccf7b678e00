// y[m, n] = x[m, k] * dequantised(weights)[n, k]^T for some tens of tokens on Hopper: ternary weights.
//
// Like gemm_stream.cuh, the grid fills the machine once, a block keeps its inputs of x in shared memory for good, and
// its warps stream equal contiguous shares of (group of kRowTiles row tiles, chunk of 128 inputs) without waiting for
// each other. What differs: the blocks that share K form a cluster, which adds up the sums in shared memory: block r of
// the cluster owns every kTokens / splits-th part of the tokens, and gets the sums of all splits for them.
//
// Shared memory: ring | x slice | pieces of the sums (as in gemm_stream.cuh) | sums received, [split][token][row].
#pragma once

#include "tsld/cluster.cuh"
#include "tsld/dequant.cuh"
#include "tsld/epilogue.cuh"

namespace tsld {

template <class Type_, int kBits_, int kGroup_, int kTokens_, int kWarps_, int kRowTiles_, int kStages_>
struct ClusterConfig {
  static_assert(kBits_ == 2 && (kGroup_ == 0 || kGroup_ == 128), "ternary, one scale per row or per 128 inputs");
  using Type = Type_;
  static constexpr int kBits = kBits_, kGroup = kGroup_, kTokens = kTokens_, kWarps = kWarps_;
  static constexpr int kRowTiles = kRowTiles_, kStages = kStages_;
  static constexpr int kTokenTiles = ceil_div(kTokens, 8);
  static constexpr int kThreads = 32 * kWarps;
  using Weights = WeightLayout<kBits>;
  using Meta = MetaLayout<kBits, kGroup>;
  static constexpr int kGroupRows = kRowTiles * kTileRows;
  static constexpr int kSlotStride = kGroupRows + 4;  // floats per token, padded against bank conflicts
  static constexpr int kSlotFloats = kTokens * kSlotStride;
  static constexpr int kStageBytes = kRowTiles * (Weights::kBytes + Meta::kBytes);
  static constexpr int kRingBytes = kWarps * kStages * kStageBytes;
  static constexpr int kSharedBytes = kRingBytes;     // plus what depends on the shape
};

template <class C>
class ClusterGemm {
  using T = typename C::Type;
  using Weights = typename C::Weights;
  using Meta = typename C::Meta;
  using Sums = float[C::kRowTiles][C::kTokenTiles][4];

  const GemmParams& p_;
  char* const memory_;
  const int warp_, lane_;
  const int split_, splits_;
  const int first_chunk_, chunks_;  // the block's inputs
  const int first_group_, groups_;  // the block's rows
  const int token0_, tokens_;
  const int x_stride_;              // bytes between tokens in shared memory
  const u64 policy_;

 public:
  __device__ __forceinline__ ClusterGemm(const GemmParams& p, void* shared)
      : p_(p),
        memory_(static_cast<char*>(shared)),
        warp_(threadIdx.x / 32),  // not shuffled: nvcc 13.0 turns a uniform ring address into an illegal LDGSTS
        lane_(threadIdx.x % 32),
        split_(blockIdx.z),
        splits_(gridDim.z),
        first_chunk_(split_ * p.chunks_per_split),
        chunks_(min(p.chunks_per_split, p.chunks - first_chunk_)),
        first_group_(share_start(all_groups(), gridDim.x, blockIdx.x)),
        groups_(share_start(all_groups(), gridDim.x, blockIdx.x + 1) - first_group_),
        token0_(blockIdx.y * C::kTokens),
        tokens_(min(C::kTokens, p.m - token0_)),
        x_stride_(p.chunks_per_split * kChunk * 2 + 16),
        policy_(evict_first_policy()) {}

  __device__ __forceinline__ void run(void*) {
    if (splits_ > 1) cluster_arrive_relaxed();
    allow_next_kernel();
    const int begin = warp_start(warp_), end = warp_start(warp_ + 1);
    int group = begin / chunks_, chunk = begin % chunks_;
    Source source = {*this, group, chunk};
    u32 filled = ring();
#pragma unroll
    for (int s = 0; s < C::kStages - 1; ++s) load_unit(source, filled, begin + s < end);
    wait_for_previous_kernel();
    stage_x();
    cp_async_wait<0>();
    __syncthreads();

    Sums acc = {};
    u32 at = ring();
    for (int unit = begin; unit < end; ++unit) {
      cp_async_wait<C::kStages - 2>();
      if constexpr (C::kGroup != 0) __syncwarp();  // group scales were copied by other lanes
      load_unit(source, filled, unit + C::kStages - 1 < end);
      multiply(acc, at, chunk);
      at = next_stage(at);
      ++chunk;
      if (chunk == chunks_ || unit == end - 1) {
        put_piece(acc, group + warp_);
        chunk = 0, ++group;
      }
    }
    cp_async_wait<0>();
    __syncthreads();
    if (splits_ == 1) {
      add_pieces([&](int token, int row, const float(&sum)[4]) {
        store_outputs<T>(p_, token0_ + token, first_group_ * C::kGroupRows + row, sum);
      });
    } else {
      cluster_wait();  // every block of the cluster has started
      const int share = tokens_per_block();
      add_pieces([&](int token, int row, const float(&sum)[4]) {
        store_remote(received(split_, token % share, row), token / share, sum);
      });
      cluster_arrive();
      cluster_wait();
      add_splits_and_store();
    }
  }

 private:
  // Where a lane loads from next. Reads up to kRowTiles - 1 tiles past the last: the packed weights have such room.
  struct Source {
    const char* weights;
    const char* meta;
    int chunk;

    __device__ __forceinline__ Source(const ClusterGemm& gemm, int group, int first)
        : chunk(first) {
      const i64 tile = (gemm.first_group_ + group) * C::kRowTiles;
      const i64 block = tile * gemm.p_.chunks + gemm.first_chunk_ + first;
      weights = static_cast<const char*>(gemm.p_.weights) + block * Weights::kBytes + gemm.lane_ * 16;
      meta = static_cast<const char*>(gemm.p_.meta) + block * Meta::kBytes + gemm.lane_ * 16;
    }

    __device__ __forceinline__ void advance(const ClusterGemm& gemm) {
      int blocks = 1;
      if (++chunk == gemm.chunks_) chunk = 0, blocks += C::kRowTiles * gemm.p_.chunks - gemm.chunks_;
      weights += static_cast<i64>(blocks) * Weights::kBytes;
      if constexpr (C::kGroup != 0) meta += static_cast<i64>(blocks) * Meta::kBytes;
    }
  };

  // `total` items in `parts` contiguous shares whose sizes differ by one at most
  static __device__ __forceinline__ int share_start(int total, int parts, int part) {
    return static_cast<u32>(total) * part / parts;
  }
  __device__ __forceinline__ int all_groups() const { return (p_.row_tiles + C::kRowTiles - 1) / C::kRowTiles; }
  __device__ __forceinline__ int warp_start(int warp) const { return share_start(groups_ * chunks_, C::kWarps, warp); }
  // The warp whose share holds a unit.
  __device__ __forceinline__ int warp_of(int unit) const {
    return (static_cast<u32>(unit + 1) * C::kWarps - 1) / (groups_ * chunks_);
  }
  __device__ __forceinline__ int tokens_per_block() const { return (C::kTokens + splits_ - 1) / splits_; }

  __device__ __forceinline__ u32 ring() const {  // the warp's first stage
    return shared_address(memory_) + warp_ * (C::kStages * C::kStageBytes);
  }
  __device__ __forceinline__ u32 next_stage(u32 stage) const {
    return stage == ring() + (C::kStages - 1) * C::kStageBytes ? ring() : stage + C::kStageBytes;
  }
  __device__ __forceinline__ u32 x_address() const { return shared_address(memory_) + C::kRingBytes; }
  __device__ __forceinline__ float* slots() const {
    return reinterpret_cast<float*>(memory_ + C::kRingBytes + C::kTokens * x_stride_);
  }
  __device__ __forceinline__ float* received(int split, int token, int row) const {
    return slots() + (groups_ + C::kWarps) * C::kSlotFloats +
           (split * tokens_per_block() + token) * (groups_ * C::kGroupRows) + row;
  }

  __device__ __forceinline__ void load_unit(Source& source, u32& stage, bool wanted) const {
    if (wanted) {
      const u32 to = stage + lane_ * 16;
#pragma unroll
      for (int rt = 0; rt < C::kRowTiles; ++rt) {
        const i64 tile = static_cast<i64>(rt) * p_.chunks;
        cp_async_stream(to + rt * Weights::kBytes, source.weights + tile * Weights::kBytes, policy_);
        if constexpr (C::kGroup != 0) {
          if (lane_ < Meta::kBytes / 16)
            cp_async_stream(to + C::kRowTiles * Weights::kBytes + rt * Meta::kBytes,
                            source.meta + tile * Meta::kBytes, policy_);
        }
      }
      source.advance(*this);
      stage = next_stage(stage);
    }
    cp_async_commit();
  }

  // A warp copies a token. Inputs past the last become zeros; columns of tokens past the last are never stored.
  __device__ __forceinline__ void stage_x() const {
    const int k0 = first_chunk_ * kChunk;
    for (int token = warp_; token < tokens_; token += C::kWarps) {
      const u16* x = static_cast<const u16*>(p_.x) + (token0_ + token) * p_.ldx + k0;
      for (int v = lane_; v < chunks_ * (kChunk / 8); v += 32) {
        const int bytes = max(0, min(16, (p_.k - k0 - v * 8) * 2));
        cp_async_zfill(x_address() + token * x_stride_ + v * 16, x + (bytes > 0 ? v * 8 : 0), bytes);
      }
    }
    cp_async_commit();
  }

  // acc += the unit's codes x the block's tokens. Products that go to one accumulator lie far apart.
  __device__ __forceinline__ void multiply(Sums& acc, u32 stage, int chunk) const {
    Vec16 codes[C::kRowTiles];
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt) codes[rt] = load_shared16(stage + rt * Weights::kBytes + lane_ * 16);
    const u32 x = x_address() + chunk * (kChunk * 2) + lane_ % 8 * x_stride_ + lane_ / 8 * 16;
    Sums part = {};  // of the group
    Sums& sums = C::kGroup == 0 ? acc : part;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      u32 b[C::kTokenTiles][4];  // x: two steps of 16 inputs x 8 tokens each
#pragma unroll
      for (int nt = 0; nt < C::kTokenTiles; ++nt) ldmatrix_x4(b[nt], x + nt * 8 * x_stride_ + pair * 64);
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int rt = 0; rt < C::kRowTiles; ++rt) {
          u32 a[4];
          dequant_step(a, codes[rt].w[pair], step);
#pragma unroll
          for (int nt = 0; nt < C::kTokenTiles; ++nt) T::mma(sums[rt][nt], a, b[nt][2 * step], b[nt][2 * step + 1]);
        }
    }
    if constexpr (C::kGroup != 0) {
#pragma unroll
      for (int rt = 0; rt < C::kRowTiles; ++rt) {
        const u32 meta = stage + C::kRowTiles * Weights::kBytes + rt * Meta::kBytes + lane_ / 4 * 2;
        const float scale[2] = {Fp16::to_float(load_shared2(meta)), Fp16::to_float(load_shared2(meta + 16))};
#pragma unroll
        for (int nt = 0; nt < C::kTokenTiles; ++nt)
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[rt][nt][i] += scale[i / 2] * part[rt][nt][i];
      }
    }
  }

  // The warp's sums of one row group go to their slot, and start again at zero.
  __device__ __forceinline__ void put_piece(Sums& acc, int slot) const {
    float* to = slots() + slot * C::kSlotFloats + lane_ / 4;
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt)
#pragma unroll
      for (int nt = 0; nt < C::kTokenTiles; ++nt)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = nt * 8 + lane_ % 4 * 2 + i % 2;
          if (token < C::kTokens) to[token * C::kSlotStride + rt * kTileRows + i / 2 * 8] = acc[rt][nt][i];
          acc[rt][nt][i] = 0.f;
        }
  }

  // Calls take(token, row of the block, sums of four rows) for every four rows and token, pieces in warp order.
  template <class Take>
  __device__ __forceinline__ void add_pieces(const Take& take) const {
    constexpr int kRowQuads = C::kGroupRows / 4;
    const int quads = groups_ * kRowQuads;
    for (int q = threadIdx.x; q < quads * tokens_; q += C::kThreads) {
      const int token = q / quads, group = q % quads / kRowQuads, r = q % kRowQuads * 4;
      const int first = warp_of(group * chunks_), last = warp_of(group * chunks_ + chunks_ - 1);
      float sum[4] = {0.f, 0.f, 0.f, 0.f};
      for (int warp = first; warp <= last; ++warp) {
        if (warp_start(warp) == warp_start(warp + 1)) continue;  // fewer units than warps: some have no share
        const float* from = slots() + (group + warp) * C::kSlotFloats + token * C::kSlotStride + r;
        const float4 piece = *reinterpret_cast<const float4*>(from);
        sum[0] += piece.x, sum[1] += piece.y, sum[2] += piece.z, sum[3] += piece.w;
      }
      take(token, group * C::kGroupRows + r, sum);
    }
  }

  // The block's own tokens: the sums of all splits, in their order.
  __device__ __forceinline__ void add_splits_and_store() const {
    const int quads = groups_ * C::kGroupRows / 4, share = tokens_per_block(), first = split_ * share;
    for (int q = threadIdx.x; q < quads * min(share, tokens_ - first); q += C::kThreads) {
      const int token = q / quads, row = q % quads * 4;
      float sum[4] = {0.f, 0.f, 0.f, 0.f};
      for (int split = 0; split < splits_; ++split) {
        const float4 part = *reinterpret_cast<const float4*>(received(split, token, row));
        sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
      }
      store_outputs<T>(p_, token0_ + first + token, first_group_ * C::kGroupRows + row, sum);
    }
  }
};

}  // namespace tsld
