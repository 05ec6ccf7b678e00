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

#include "tsld/params.cuh"
#include "tsld/wgmma_config.cuh"
#include "tsld/wgmma_operand.cuh"
#include "tsld/wgmma_output.cuh"
#include "tsld/wgmma_splits.cuh"

namespace tsld {

template <class C>
class WgmmaGemm {
  using T = typename C::Type;
  using Sum = typename T::Sum;
  using Weights = typename C::Weights;
  using Meta = typename C::Meta;

  const GemmParams& p_;
  const TensorMap* x_map_;
  char* const memory_;
  const int warp_, lane_;
  const int row_blocks_, token_blocks_, splits_;

 public:
  __device__ __forceinline__ WgmmaGemm(const GemmParams& p, const TensorMap& x_map, void* shared)
      : p_(p),
        x_map_(&x_map),
        memory_(static_cast<char*>(shared)),
        warp_(__shfl_sync(~0u, threadIdx.x / 32, 0)),
        lane_(threadIdx.x % 32),
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
  // One output tile and one split of its inputs. Neighbours in time share tokens, so that x stays in L2.
  struct Work {
    int row_block, token_block, split, first_chunk, chunks;
  };
  __device__ __forceinline__ int work_count() const {
    return row_blocks_ * token_blocks_ * (C::kCluster ? 1 : splits_);
  }
  __device__ __forceinline__ Work work(int index) const {
    const int split = C::kCluster ? blockIdx.z : index / (row_blocks_ * token_blocks_), first = split * p_.chunks_per_split;
    return {index % row_blocks_, index / row_blocks_ % token_blocks_, split, first,
            min(p_.chunks_per_split, p_.chunks - first)};
  }

  __device__ __forceinline__ u32 full(int stage) const { return shared_address(memory_) + stage * 16; }
  __device__ __forceinline__ u32 empty(int stage) const { return full(stage) + 8; }
  __device__ __forceinline__ u32 x_stage(int stage) const {
    return shared_address(memory_) + C::kBarrierBytes + stage * C::kStageBytes;
  }
  __device__ __forceinline__ u32 weight_stage(int stage) const { return x_stage(stage) + C::kXBytes; }
  __device__ __forceinline__ u32 meta_stage(int stage) const { return x_stage(C::kStages) + stage * C::kMetaBytes; }

  __device__ __forceinline__ u32 buffer_full(int buffer) const { return shared_address(memory_) + 256 + buffer * 8; }
  __device__ __forceinline__ u32 weight_buffer(int buffer) const {
    return x_stage(C::kStages) + C::kStages * C::kMetaBytes + buffer * C::kBufferBytes;
  }

  // A position in a ring; it goes on from one work item to the next.
  template <int kCount>
  struct RingOf {
    int stage = 0, phase = 0;
    __device__ __forceinline__ void advance() {
      if (++stage == kCount) stage = 0, phase ^= 1;
    }
  };
  using Ring = RingOf<C::kStages>;
  using Buffers = RingOf<C::kAhead>;

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

  __device__ __forceinline__ void multiply(Sum (&acc)[C::kRowTiles][C::kTokenTiles][4], const Work& w,
                                           Ring& ring, Buffers& buffers) const {
    ZeroPoint<T, C::kBits> zero[C::kRowTiles];
    if constexpr (C::kGroup == 0 && C::kBits > 2) {
#pragma unroll
      for (int rt = 0; rt < C::kRowTiles; ++rt)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int tile = w.row_block * C::kBlockTiles + C::row_tile(warp_, rt);
          zero[rt].set(half, p_.row_zero[min(tile, p_.row_tiles - 1) * 16 + lane_ / 4 + 8 * half]);
        }
    }
    u32 a[C::kBatches][C::kSteps][4];
    u16 scale[C::kRowTiles][2];
    u32 factor[C::kRowTiles][2];
    if constexpr (C::kOwnScales) load_scales(scale, w, 0);
    int previous = -1;
    for (int i = 0; i < w.chunks; ++i) {
      if constexpr (C::kOwnScales) {
#pragma unroll
        for (int j = 0; j < 2 * C::kRowTiles; ++j) factor[j / 2][j % 2] = T::both(scale[j / 2][j % 2]);
        load_scales(scale, w, min(i + 1, w.chunks - 1));
      }
      if (C::kAhead != 0 && i % 4 == 0) barrier_wait(buffer_full(buffers.stage), buffers.phase);
      barrier_wait(full(ring.stage), ring.phase);
#pragma unroll
      for (int rt = 0; rt < C::kRowTiles; ++rt) {
        const int tile = C::row_tile(warp_, rt);
        const u32 weights = C::kAhead ? weight_buffer(buffers.stage) + (tile * 4 + i % 4) * Weights::kBytes
                                      : weight_stage(ring.stage) + tile * Weights::kBytes;
        Vec16 codes;
        if constexpr (C::kBatches == 4) codes = load_shared16(weights + lane_ * 16);
#pragma unroll
        for (int batch = 0; batch < C::kBatches; ++batch) {
          if constexpr (C::kBatches == 4)
            load_pair<C>(a[batch], codes.w[batch], zero[rt], factor[rt]);
          else
            load_operand<C>(a[batch], zero[rt], factor[rt], weights, meta_stage(ring.stage) + tile * Meta::kBytes, batch);
          if constexpr (T::kBytes == 1) pin(a[batch]);
          wgmma_fence();
          pin(acc[rt]);
          const int inputs = batch * C::kSteps * (32 / T::kBytes);  // before this batch
          const u64 panel = panel_descriptor(x_stage(ring.stage) + inputs * T::kBytes / 128 * C::kPanelBytes) +
                            inputs * T::kBytes % 128 / 16;
#pragma unroll
          for (int step = 0; step < C::kSteps; ++step) Wgmma<T, C::kTokenTiles>::run(acc[rt], a[batch][step], panel + 2 * step);
          wgmma_commit();
          pin(acc[rt]);
          wgmma_wait<C::kBatches - 1>();  // the registers of the next batch are free
          // ... and so is, after as many batches of this stage, the stage before
          if (rt == 0 && batch == C::kBatches - 2 && previous >= 0) release(previous);
        }
      }
      previous = ring.stage;
      ring.advance();
      if (C::kAhead != 0 && (i % 4 == 3 || i + 1 == w.chunks)) buffers.advance();
    }
    wgmma_wait<0>();
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt) pin(acc[rt]);
    release(previous);
  }

  // The warp has read all of a stage: its products are issued warp by warp, so that no lane is behind.
  __device__ __forceinline__ void release(int stage) const {
    if (lane_ == 0) barrier_arrive(empty(stage));
  }

  // From memory they would come later than a chunk ahead.
  __device__ __forceinline__ void prefetch_scales(const Work& w) const {
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt) {
      const int tile = min(w.row_block * C::kBlockTiles + C::row_tile(warp_, rt), p_.row_tiles - 1);
      const char* from =
          static_cast<const char*>(p_.meta) + (static_cast<i64>(tile) * p_.chunks + w.first_chunk) * Meta::kBytes;
      const int bytes = w.chunks * Meta::kBytes;
      for (int i = lane_ * 128; i < bytes + 128; i += 32 * 128) prefetch_l2(from + min(i, bytes - 1));
    }
  }

  // Scales of a lane's rows in a chunk.
  __device__ __forceinline__ void load_scales(u16 (&scale)[C::kRowTiles][2], const Work& w, int chunk) const {
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt) {
      const int tile = min(w.row_block * C::kBlockTiles + C::row_tile(warp_, rt), p_.row_tiles - 1);
      const u16* from = static_cast<const u16*>(p_.meta) +
                        (static_cast<i64>(tile) * p_.chunks + w.first_chunk + chunk) * (Meta::kBytes / 2) + lane_ / 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) scale[rt][half] = from[8 * half];
    }
  }
};

}  // namespace tsld
