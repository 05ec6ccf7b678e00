// y[m, n] = x[m, k] * dequantised(weights)[n, k]^T with Hopper's wgmma (sm_90a), for nine tokens and more.
//
// The weights are the register operand: a warp of a warp group holds 16 of its 64 rows, which is the fragment layout
// of mma.m16n8k16, so the same packed weights serve both kernels. x is the shared-memory operand, brought by the
// tensor copy engine in panels of 64 inputs (128-byte rows, 128-byte swizzle).
//
// A block: kGroups consumer warp groups, each with kRowTiles tiles of 64 rows x kTokens tokens, and one producer warp
// that keeps a ring of kStages buffers of 128 inputs filled; with few tokens weights may have a ring of their own, which
// reaches further ahead, because memory takes longer to answer than L2, where x is. While the tensor cores multiply one batch (32 or 64 inputs
// of one row tile), the same warps dequantise the next into other registers. Blocks are persistent: they walk over the
// output tiles (and their splits of K), and the producer runs ahead while the consumers store.
#pragma once

#include "tsld/wgmma_output.cuh"
#include "tsld/wgmma_products.cuh"
#include "tsld/wgmma_splits.cuh"

namespace tsld {

template <class C>
class WgmmaGemm : WgmmaProducts<C> {
  using Base = WgmmaProducts<C>;
  using typename Base::T, typename Base::Sum, typename Base::Weights, typename Base::Meta;
  using typename Base::Work, typename Base::Ring, typename Base::Buffers;
  using Base::p_, Base::memory_, Base::warp_, Base::lane_;
  using Base::full, Base::empty, Base::x_stage, Base::weight_stage, Base::meta_stage, Base::buffer_full, Base::weight_buffer;
  using Base::prefetch_scales, Base::multiply, Base::multiply_groups;

  const TensorMap* x_map_;
  const int row_blocks_, token_blocks_, splits_;

 public:
  __device__ __forceinline__ WgmmaGemm(const GemmParams& p, const TensorMap& x_map, void* shared)
      : Base(p, shared),
        x_map_(&x_map),
        row_blocks_(ceil_div(p.row_tiles, C::kBlockTiles)),
        token_blocks_(ceil_div(p.m, C::kTokens)),
        splits_(ceil_div(p.chunks, p.chunks_per_split)) {}

  __device__ __forceinline__ void run(void*) {
    if (threadIdx.x == 0) {
      for (int s = 0; s < C::kStages; ++s) {
        barrier_init(full(s), 1);
        barrier_init(empty(s), C::kWarps);
      }
      for (int b = 0; b < C::kAhead; ++b) barrier_init(buffer_full(b), 1);
      barrier_init_done();
    }
    if constexpr (C::kCluster) cluster_arrive_relaxed();  // this block has started
    allow_next_kernel();
    __syncthreads();
    if (warp_ >= C::kWarps) {
      if constexpr (C::kMoveRegisters) registers_decrease<24>();
      if (warp_ == C::kWarps) {
        if constexpr (C::kAhead != 0)
          produce_apart();
        else
          produce();
      }
      if constexpr (C::kCluster) {
        __syncwarp();
        cluster_wait();
        cluster_arrive();
        cluster_wait();
      }
    } else {
      if constexpr (C::kMoveRegisters) registers_increase<240>();
      consume();
    }
  }

 private:
  __device__ __forceinline__ int work_count() const {
    return row_blocks_ * token_blocks_ * (C::kCluster ? 1 : splits_);
  }
  __device__ __forceinline__ Work work(int index) const {
    const int split = C::kCluster ? blockIdx.z : index / (row_blocks_ * token_blocks_), first = split * p_.chunks_per_split;
    return {index % row_blocks_, index / row_blocks_ % token_blocks_, split, first,
            min(p_.chunks_per_split, p_.chunks - first)};
  }

  // ---- producer warp ----

  __device__ __forceinline__ void copy_weights(int stage, const Work& w, int chunk) const {
    if (lane_ == 0) barrier_expect(full(stage), C::kXBytes + C::kWeightBytes + C::kMetaBytes);
    __syncwarp();
    static_assert(C::kBlockTiles <= 32, "one lane copies one row tile");
    if (lane_ < C::kBlockTiles) {  // tiles past the last are computed like the last and never stored
      const int tile = min(w.row_block * C::kBlockTiles + lane_, p_.row_tiles - 1);
      const i64 block = static_cast<i64>(tile) * p_.chunks + w.first_chunk + chunk;
      copy_bytes(weight_stage(stage) + lane_ * Weights::kBytes,
                 static_cast<const char*>(p_.weights) + block * Weights::kBytes, Weights::kBytes, full(stage));
      if constexpr (C::kMetaBytes != 0)
        copy_bytes(meta_stage(stage) + lane_ * Meta::kBytes, static_cast<const char*>(p_.meta) + block * Meta::kBytes,
                   Meta::kBytes, full(stage));
    }
  }

  __device__ __forceinline__ void copy_x(int stage, const Work& w, int chunk) const {
    if (lane_ < T::kBytes)  // inputs and tokens past the last arrive as zeros
      copy_tensor(x_stage(stage) + lane_ * C::kPanelBytes, x_map_, (w.first_chunk + chunk) * kChunk + lane_ * 64,
                  w.token_block * C::kTokens, full(stage));
  }

  __device__ __forceinline__ void produce() const {
    if (lane_ == 0) prefetch_map(x_map_);
    Ring ring;
    const Work first = work(blockIdx.x);
    const int ahead = min(C::kStages, first.chunks);
    for (int i = 0; i < ahead; ++i) copy_weights(i, first, i);  // does not depend on earlier kernels
    wait_for_previous_kernel();
    for (int i = 0; i < ahead; ++i) {
      copy_x(i, first, i);
      ring.advance();
    }
    int filled = ahead;
    for (int index = blockIdx.x; index < work_count(); index += gridDim.x) {
      const Work w = work(index);
      for (int i = index == static_cast<int>(blockIdx.x) ? ahead : 0; i < w.chunks; ++i, ++filled) {
        if (filled >= C::kStages) barrier_wait(empty(ring.stage), ring.phase ^ 1);
        copy_weights(ring.stage, w, i);
        copy_x(ring.stage, w, i);
        ring.advance();
      }
    }
  }

  // Four chunks of weights, or what is left of them.
  __device__ __forceinline__ void copy_buffer(int buffer, const Work& w, int first) const {
    const int bytes = min(4, w.chunks - first) * Weights::kBytes;
    if (lane_ == 0) barrier_expect(buffer_full(buffer), C::kBlockTiles * bytes);
    __syncwarp();
    if (lane_ < C::kBlockTiles) {
      const int tile = min(w.row_block * C::kBlockTiles + lane_, p_.row_tiles - 1);
      const i64 block = static_cast<i64>(tile) * p_.chunks + w.first_chunk + first;
      copy_bytes(weight_buffer(buffer) + lane_ * (4 * Weights::kBytes),
                 static_cast<const char*>(p_.weights) + block * Weights::kBytes, bytes, buffer_full(buffer));
    }
  }

  // Weights in buffers of their own. That x has been read says the same of its weights.
  __device__ __forceinline__ void produce_apart() const {
    if (lane_ == 0) prefetch_map(x_map_);
    Ring ring, last;
    Buffers buffers;
    int filled = 0;
    for (int index = blockIdx.x; index < work_count(); index += gridDim.x) {
      const Work w = work(index);
      if (filled > 0) barrier_wait(empty(last.stage), last.phase);  // all weights of the item before have been read
      int copied = 0;                                               // chunks
      for (; copied < min(4 * C::kAhead, w.chunks); copied += 4) {
        copy_buffer(buffers.stage, w, copied);
        buffers.advance();
      }
      if (filled == 0) wait_for_previous_kernel();
      for (int i = 0; i < w.chunks; ++i, ++filled) {
        if (filled >= C::kStages) {
          barrier_wait(empty(ring.stage), ring.phase ^ 1);
          const int read = i - C::kStages + 1;  // chunks of this item
          if (read > 0 && read % 4 == 0 && copied < w.chunks) {
            copy_buffer(buffers.stage, w, copied);
            buffers.advance();
            copied += 4;
          }
        }
        if (lane_ == 0) barrier_expect(full(ring.stage), C::kXBytes);
        __syncwarp();
        copy_x(ring.stage, w, i);
        last = ring;
        ring.advance();
      }
    }
  }

  // ---- consumer warp groups ----

  __device__ __forceinline__ void consume() const {
    Ring ring;
    Buffers buffers;
    bool waited = false;
    for (int index = blockIdx.x; index < work_count(); index += gridDim.x) {
      const Work w = work(index);
      if constexpr (T::kBytes == 1) barrier_wait(full(ring.stage), ring.phase);  // x is there, so are its scales
      WgmmaOutput<C> output(p_, meta_stage(C::kStages), memory_, warp_, lane_, w.token_block * C::kTokens,
                            w.row_block * C::kBlockTiles);
      if constexpr (C::kOwnScales) prefetch_scales(w);
      Sum acc[C::kRowTiles][C::kTokenTiles][4] = {};
      if constexpr (C::kScaleSums)
        multiply_groups(acc[0], w, ring, buffers);
      else
        multiply(acc, w, ring, buffers);
      if (!waited) wait_for_previous_kernel();  // before anything is written
      waited = true;
      const WgmmaSplits<C> splits(p_, memory_, splits_);
      if constexpr (C::kCluster) {
        const int share = splits.exchange(acc, w.split);
        output.store(acc, w.split * share, (w.split + 1) * share);
      } else if (splits_ == 1 || splits.add(acc, w.split, w.token_block * row_blocks_ + w.row_block)) {
        output.store(acc);
      }
    }
  }
};

}  // namespace tsld
