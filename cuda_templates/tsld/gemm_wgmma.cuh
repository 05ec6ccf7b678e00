// y[m, n] = x[m, k] * dequantised(weights)[n, k]^T with Hopper's wgmma (sm_90a), for nine tokens and more.
//
// The weights are the register operand: a warp of a warp group holds 16 of its 64 rows, which is the fragment layout
// of mma.m16n8k16, so the same packed weights serve both kernels. x is the shared-memory operand, brought by the
// tensor copy engine in panels of 64 inputs (128-byte rows, 128-byte swizzle).
//
// A block: kGroups consumer warp groups, each with kRowTiles tiles of 64 rows x kTokens tokens, and one producer warp
// that keeps a ring of kStages buffers of 128 inputs filled. While the tensor cores multiply one batch (32 or 64 inputs
// of one row tile), the same warps dequantise the next into other registers. Blocks are persistent: they walk over the
// output tiles (and their splits of K), and the producer runs ahead while the consumers store.
#pragma once

#include "tsld/params.cuh"
#include "tsld/wgmma_config.cuh"
#include "tsld/wgmma_operand.cuh"
#include "tsld/wgmma_output.cuh"

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
      barrier_init_done();
    }
    allow_next_kernel();
    __syncthreads();
    if (warp_ >= C::kWarps) {
      if constexpr (C::kMoveRegisters) registers_decrease<24>();
      if (warp_ == C::kWarps) produce();
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
  __device__ __forceinline__ int work_count() const { return row_blocks_ * token_blocks_ * splits_; }
  __device__ __forceinline__ Work work(int index) const {
    const int split = index / (row_blocks_ * token_blocks_), first = split * p_.chunks_per_split;
    return {index % row_blocks_, index / row_blocks_ % token_blocks_, split, first,
            min(p_.chunks_per_split, p_.chunks - first)};
  }

  __device__ __forceinline__ u32 full(int stage) const { return shared_address(memory_) + stage * 16; }
  __device__ __forceinline__ u32 empty(int stage) const { return full(stage) + 8; }
  __device__ __forceinline__ int& arrival_flag() const { return *reinterpret_cast<int*>(memory_ + 512); }
  __device__ __forceinline__ u32 x_stage(int stage) const {
    return shared_address(memory_) + C::kBarrierBytes + stage * C::kStageBytes;
  }
  __device__ __forceinline__ u32 weight_stage(int stage) const { return x_stage(stage) + C::kXBytes; }
  __device__ __forceinline__ u32 meta_stage(int stage) const { return x_stage(C::kStages) + stage * C::kMetaBytes; }

  // A position in the ring; it goes on from one work item to the next.
  struct Ring {
    int stage = 0, phase = 0;
    __device__ __forceinline__ void advance() {
      if (++stage == C::kStages) stage = 0, phase ^= 1;
    }
  };

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

  // ---- consumer warp groups ----

  __device__ __forceinline__ void consume() const {
    Ring ring;
    bool waited = false;
    for (int index = blockIdx.x; index < work_count(); index += gridDim.x) {
      const Work w = work(index);
      if constexpr (T::kBytes == 1) barrier_wait(full(ring.stage), ring.phase);  // x is there, so are its scales
      WgmmaOutput<C> output(p_, meta_stage(C::kStages), memory_, warp_, lane_, w.token_block * C::kTokens,
                            w.row_block * C::kBlockTiles);
      if constexpr (C::kOwnScales) prefetch_scales(w);
      Sum acc[C::kRowTiles][C::kTokenTiles][4] = {};
      multiply(acc, w, ring);
      if (!waited) wait_for_previous_kernel();  // before anything is written
      waited = true;
      if (splits_ == 1 || add_splits(acc, w)) output.store(acc);
    }
  }

  __device__ __forceinline__ void multiply(Sum (&acc)[C::kRowTiles][C::kTokenTiles][4], const Work& w,
                                           Ring& ring) const {
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
      barrier_wait(full(ring.stage), ring.phase);
#pragma unroll
      for (int rt = 0; rt < C::kRowTiles; ++rt) {
        const int tile = C::row_tile(warp_, rt);
        const u32 weights = weight_stage(ring.stage) + tile * Weights::kBytes;
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

  // Split K: every block leaves its sums in the order of its registers; the last to arrive adds them up in the order
  // of the splits and returns true. The counter is left at zero for the next launch.
  __device__ __forceinline__ bool add_splits(Sum (&acc)[C::kRowTiles][C::kTokenTiles][4], const Work& w) const {
    constexpr int kFloats = C::kBlockRows * C::kTokens;  // of a tile
    const int tile = w.token_block * row_blocks_ + w.row_block;
    float* mine = p_.partial + static_cast<i64>(tile) * splits_ * kFloats + threadIdx.x * 4;
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt)
#pragma unroll
      for (int nt = 0; nt < C::kTokenTiles; ++nt)
        store_float4_l2(mine + static_cast<i64>(w.split) * kFloats + (rt * C::kTokenTiles + nt) * C::kEpilogueThreads * 4,
                        acc[rt][nt]);
    C::sync();
    if (threadIdx.x == 0) {  // the barrier before and this fence publish the sums of all threads
      __threadfence();
      arrival_flag() = atomicAdd(p_.counters + tile, 1);
      if (arrival_flag() == splits_ - 1) p_.counters[tile] = 0;
      __threadfence();
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
};

}  // namespace tsld
