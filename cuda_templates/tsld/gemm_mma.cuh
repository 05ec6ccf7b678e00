// y[m, n] = x[m, k] * dequantised(weights)[n, k]^T with mma.sync.m16n8k16 (sm_80 and later).
//
// The weights are the 16-row operand of the tensor cores, also for a single token: one AND and one shift per two
// ternary weights is all that the other instructions do. A block computes kBlockRows x kBlockTokens outputs. Its
// warps are laid out kWarpsN (rows) x kWarpsM (tokens) x kWarpsK (each takes every kWarpsK-th chunk of 128 inputs;
// their sums meet in shared memory). Further blocks (grid.z) split K again when the output has few tiles.
//
// Per iteration, all through a ring of kStages buffers filled by cp.async:
//   weights  a warp copies the 512-byte blocks that its own lanes will read back
//   x        kTokens rows x (kWarpsK * 128) inputs, rows padded by 16 bytes so that ldmatrix hits all banks
#pragma once

#include "tsld/epilogue.cuh"
#include "tsld/multiply.cuh"

namespace tsld {

template <class Type_, int kBits_, int kGroup_, int kTokens_, int kWarpsN_, int kWarpsM_, int kWarpsK_, int kRowTiles_,
          int kStages_>
struct MmaConfig {
  using Type = Type_;
  static constexpr int kBits = kBits_, kGroup = kGroup_, kStages = kStages_;
  static constexpr int kTokens = kTokens_;      // rows of x that are staged
  static constexpr int kWarpsN = kWarpsN_, kWarpsM = kWarpsM_, kWarpsK = kWarpsK_;
  static constexpr int kRowTiles = kRowTiles_;  // 16-row tiles per warp
  static constexpr int kTokenTiles = ceil_div(kTokens, 8 * kWarpsM);  // 8-token tiles per warp
  static constexpr int kThreads = 32 * kWarpsN * kWarpsM * kWarpsK;
  static constexpr int kEpilogueThreads = kThreads;
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  static constexpr int kBlockRows = kWarpsN * kRowTiles * kTileRows;
  static constexpr int kBlockTokens = kWarpsM * kTokenTiles * 8;
  static constexpr int kStageInputs = kWarpsK * kChunk;

  static __device__ __forceinline__ constexpr int row_tile(int warp_n, int rt) { return warp_n * kRowTiles + rt; }

  using Weights = WeightLayout<kBits>;
  using Meta = MetaLayout<kBits, kGroup>;
  static constexpr int kXStride = kStageInputs * 2 + 16;  // bytes
  static constexpr int kXBytes = ceil_div(kTokens * kXStride, 128) * 128;
  static constexpr int kWarpTiles = kWarpsN * kWarpsK * kRowTiles;
  static constexpr int kWeightBytes = kWarpTiles * Weights::kBytes;
  static constexpr int kStageBytes = kXBytes + kWeightBytes + ceil_div(kWarpTiles * Meta::kBytes, 128) * 128;
  static constexpr int kReduceBytes = kThreads / 32 * kTokenTiles * 8 * kPadRows * 4;
  static constexpr int kSharedBytes = imax(kStages * kStageBytes, kReduceBytes);
};

template <class C>
class MmaGemm {
  using T = typename C::Type;
  using Weights = typename C::Weights;
  using Meta = typename C::Meta;

  const GemmParams& p_;
  const u32 shared_;
  const int warp_, lane_, warp_n_, warp_m_, warp_k_;
  const int first_chunk_, end_chunk_;
  const int token0_;
  const u64 policy_;
  i64 tile_block_[C::kRowTiles];  // index of each row tile's first (tile, chunk)

 public:
  __device__ __forceinline__ MmaGemm(const GemmParams& p, void* shared)
      : p_(p),
        shared_(shared_address(shared)),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        warp_n_(warp_ % C::kWarpsN),
        warp_m_(warp_ / C::kWarpsN % C::kWarpsM),
        warp_k_(warp_ / (C::kWarpsN * C::kWarpsM)),
        first_chunk_(blockIdx.z * p.chunks_per_split),
        end_chunk_(min(first_chunk_ + p.chunks_per_split, p.chunks)),
        token0_(blockIdx.y * C::kBlockTokens),
        policy_(evict_first_policy()) {
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt) tile_block_[rt] = static_cast<i64>(row_tile(rt)) * p.chunks;
  }

  __device__ __forceinline__ void run(void* shared) {
    const int iterations = (end_chunk_ - first_chunk_ + C::kWarpsK - 1) / C::kWarpsK;
    allow_next_kernel();
#pragma unroll
    for (int s = 0; s < C::kStages - 1; ++s) load_weights(s, s);  // does not depend on earlier kernels
    prefetch_scales(p_, blockIdx.x * C::kBlockRows, C::kBlockRows);
    wait_for_previous_kernel();
#pragma unroll
    for (int s = 0; s < C::kStages - 1; ++s) {
      load_x(s, s);
      cp_async_commit();
    }
    ZeroPoint<T, C::kBits> zero[C::kRowTiles];
    if constexpr (C::kGroup == 0 && C::kBits > 2) load_row_zeros(zero);

    float acc[C::kRowTiles][C::kTokenTiles][4] = {};
    for (int i = 0; i < iterations; ++i) {
      cp_async_wait<C::kStages - 2>();
      __syncthreads();  // stage i is there for all; all have finished with stage i-1
      const int next = i + C::kStages - 1;
      load_weights(next % C::kStages, next);
      load_x(next % C::kStages, next);
      cp_async_commit();
      if (first_chunk_ + i * C::kWarpsK + warp_k_ < end_chunk_) {
        const int stage = i % C::kStages;
        multiply_chunk<C>(acc, zero, x_stage(stage) + warp_k_ * kChunk * 2, C::kXStride, warp_m_ * C::kTokenTiles * 8,
                          weight_stage(stage, 0), meta_stage(stage, 0));
      }
    }
    cp_async_wait<0>();
    reduce_and_store<C>(p_, static_cast<float*>(shared), acc, warp_n_, warp_k_, warp_m_);
  }

 private:
  __device__ __forceinline__ u32 x_stage(int stage) const { return shared_ + stage * C::kStageBytes; }
  __device__ __forceinline__ u32 weight_stage(int stage, int rt) const {
    return x_stage(stage) + C::kXBytes + ((warp_k_ * C::kWarpsN + warp_n_) * C::kRowTiles + rt) * Weights::kBytes;
  }
  __device__ __forceinline__ u32 meta_stage(int stage, int rt) const {
    return x_stage(stage) + C::kXBytes + C::kWeightBytes +
           ((warp_k_ * C::kWarpsN + warp_n_) * C::kRowTiles + rt) * Meta::kBytes;
  }
  // Tiles past the last are computed like the last and never stored.
  __device__ __forceinline__ int row_tile(int rt) const {
    return min(static_cast<int>(blockIdx.x) * (C::kBlockRows / kTileRows) + C::row_tile(warp_n_, rt), p_.row_tiles - 1);
  }

  __device__ __forceinline__ void load_weights(int stage, int iteration) const {
    const int chunk = first_chunk_ + iteration * C::kWarpsK + warp_k_;
    if (chunk >= end_chunk_) return;
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt) {
      const i64 block = tile_block_[rt] + chunk;
      const char* from = static_cast<const char*>(p_.weights) + block * Weights::kBytes + lane_ * 16;
#pragma unroll
      for (int v = 0; v < Weights::kVecs; ++v)  // the warps along M share the copy
        if ((rt * Weights::kVecs + v) % C::kWarpsM == warp_m_)
          cp_async_stream(weight_stage(stage, rt) + v * 512 + lane_ * 16, from + v * 512, policy_);
      if constexpr (C::kGroup != 0) {
        if (rt % C::kWarpsM == warp_m_ && lane_ < Meta::kBytes / 16)
          cp_async_stream(meta_stage(stage, rt) + lane_ * 16,
                          static_cast<const char*>(p_.meta) + block * Meta::kBytes + lane_ * 16, policy_);
      }
    }
  }

  // Every thread keeps its column and walks down the rows, so that addresses cost few registers.
  __device__ __forceinline__ void load_x(int stage, int iteration) const {
    constexpr int kRowVecs = C::kStageInputs / 8;  // 16-byte vectors per row
    constexpr int kPassRows = C::kThreads / kRowVecs;
    static_assert(C::kThreads % kRowVecs == 0, "threads must fill whole rows");
    const int row0 = threadIdx.x / kRowVecs, column = threadIdx.x % kRowVecs;
    const int k = (first_chunk_ + iteration * C::kWarpsK) * kChunk + column * 8;
    if (k >= end_chunk_ * kChunk) return;
    const int bytes = max(0, min(16, (p_.k - k) * 2));  // inputs past the last become zeros
    const char* from = static_cast<const char*>(p_.x) + ((token0_ + row0) * p_.ldx + (bytes > 0 ? k : 0)) * 2;
    u32 to = x_stage(stage) + row0 * C::kXStride + column * 16;
    const i64 step = p_.ldx * (2 * kPassRows);
    int rows_left = min(p_.m - token0_, C::kTokens) - row0;
#pragma unroll
    for (int pass = 0; pass < ceil_div(C::kTokens, kPassRows); ++pass) {
      if (rows_left > 0) cp_async_zfill(to, from, bytes);
      from += step, to += kPassRows * C::kXStride, rows_left -= kPassRows;
    }
  }

  __device__ __forceinline__ void load_row_zeros(ZeroPoint<T, C::kBits> (&zero)[C::kRowTiles]) const {
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt)
#pragma unroll
      for (int half = 0; half < 2; ++half) zero[rt].set(half, p_.row_zero[row_tile(rt) * 16 + lane_ / 4 + 8 * half]);
  }
};

}  // namespace tsld
