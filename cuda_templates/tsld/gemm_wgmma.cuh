// y[m, n] = x[m, k] * dequantised(weights)[n, k]^T with Hopper's wgmma (sm_90a), for many tokens.
//
// The weights are the register operand: a warp of a warp group holds 16 of its 64 rows, which is the fragment layout
// of mma.m16n8k16, so the same packed weights serve both kernels. x is the shared-memory operand, brought by the
// tensor copy engine in panels of 64 inputs (128-byte rows, 128-byte swizzle).
//
// A block: kGroups consumer warp groups, each with kRowTiles tiles of 64 rows x kTokens tokens, and one producer warp
// that keeps a ring of kStages buffers of 128 inputs filled. While the tensor cores multiply one batch (64 inputs of
// one row tile), the same warps dequantise the next into the other register buffer. Blocks are persistent: they walk
// over the output tiles (and their splits of K), and the producer runs ahead while the consumers store.
#pragma once

#include "tsld/multiply.cuh"
#include "tsld/params.cuh"
#include "tsld/wgmma.cuh"

namespace tsld {

template <class Type_, int kBits_, int kGroup_, int kTokens_, int kGroups_, int kRowTiles_, int kStages_>
struct WgmmaConfig {
  using Type = Type_;
  static_assert(Type::kBytes == 2 || (kBits_ == 2 && kGroup_ == 0), "8-bit activations: ternary, one scale per row");
  static constexpr int kBits = kBits_, kGroup = kGroup_, kStages = kStages_, kTokens = kTokens_;
  static constexpr int kGroups = kGroups_;                    // consumer warp groups
  static constexpr bool kSplitsK = true;
  static constexpr int kRowTiles = kRowTiles_;                // 64-row tiles per warp group, a 16-row tile per warp
  static constexpr int kWarps = 4 * kGroups;
  static constexpr int kTokenTiles = kTokens / 8;
  // Many accumulators: the producer becomes a whole warp group that gives its registers to the consumers.
  static constexpr bool kMoveRegisters = kRowTiles * kTokenTiles * 4 > 96;
  static constexpr int kThreads = 128 * kGroups + (kMoveRegisters ? 128 : 32);
  static constexpr int kEpilogueThreads = 128 * kGroups;
  static __device__ __forceinline__ void sync() {  // of the consumers
    asm volatile("bar.sync 1, %0;" ::"n"(kEpilogueThreads) : "memory");
  }
  static __device__ __forceinline__ void sync_group(int group) {  // of one consumer warp group
    asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory");
  }
  static constexpr int kBlockRows = kGroups * kRowTiles * 64;
  static constexpr int kBlockTokens = kTokens;
  static constexpr int kBlockTiles = kBlockRows / kTileRows;  // 16-row tiles of the packed weights
  static __device__ __forceinline__ constexpr int row_tile(int warp, int rt) {
    return (warp / 4 * kRowTiles + rt) * 4 + warp % 4;
  }

  using Weights = WeightLayout<kBits>;
  using Meta = MetaLayout<kBits, kGroup>;
  static constexpr int kPanelBytes = kTokens * 128;           // 64 inputs of every token, 128 of 8-bit types
  static constexpr int kXBytes = Type::kBytes * kPanelBytes;
  static constexpr int kSteps = 2 * Type::kBytes;             // matrix instructions per batch of 64 inputs
  static constexpr int kWeightBytes = kBlockTiles * Weights::kBytes;
  // Ternary groups of 128 have one scale per row and chunk: consumers read these themselves, a chunk ahead.
  static constexpr bool kOwnScales = kBits == 2 && kGroup == 128;
  static constexpr int kMetaBytes = kOwnScales ? 0 : kBlockTiles * Meta::kBytes;  // of a stage, behind all stages
  static constexpr int kStageBytes = kXBytes + kWeightBytes;  // a multiple of 1024, so that panels stay aligned
  static constexpr int kBarrierBytes = 1024;                  // at the start, so that panels stay aligned
  // Tokens that go through shared memory at once, where that memory does not cost a block per multiprocessor.
  static constexpr int kSlab = kTokens * (3 - Type::kBytes) > 64 ? 32 : 0;
  static constexpr int kStoreStride = 64 * 2 + 16;            // bytes of a token's rows, padded against bank conflicts
  static constexpr int kStoreBytes = 2 * kSlab * kStoreStride; // two buffers of a warp group
  static constexpr int kScaleBytes = Type::kBytes == 1 ? kTokens * 4 : 0;  // the tokens' scales, of a warp group
  static constexpr int kSharedBytes =
      kBarrierBytes + kStages * (kStageBytes + kMetaBytes) + kGroups * (kStoreBytes + kScaleBytes);
};

template <class C>
class WgmmaGemm {
 protected:
  using T = typename C::Type;
  using Sum = typename T::Sum;
  using Weights = typename C::Weights;
  using Meta = typename C::Meta;

  const GemmParams& p_;
  const TensorMap* x_map_;
  char* const memory_;
  const int warp_, lane_;
  const int row_blocks_, token_blocks_, splits_;
  const float* x_scale_;  // of all tokens

 public:
  __device__ __forceinline__ WgmmaGemm(const GemmParams& p, const TensorMap& x_map, void* shared)
      : p_(p),
        x_map_(&x_map),
        memory_(static_cast<char*>(shared)),
        warp_(__shfl_sync(~0u, threadIdx.x / 32, 0)),
        lane_(threadIdx.x % 32),
        row_blocks_(ceil_div(p.row_tiles, C::kBlockTiles)),
        token_blocks_(ceil_div(p.m, C::kTokens)),
        splits_(ceil_div(p.chunks, p.chunks_per_split)),
        x_scale_(p.x_scale) {}

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

 protected:
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

  __device__ __forceinline__ u32 store_buffer(int group, int which) const {
    return meta_stage(C::kStages) + group * C::kStoreBytes + which * (C::kStoreBytes / 2);
  }

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

  __device__ __forceinline__ void consume() {
    Ring ring;
    bool waited = false;
    for (int index = blockIdx.x; index < work_count(); index += gridDim.x) {
      const Work w = work(index);
      if constexpr (T::kBytes == 1) barrier_wait(full(ring.stage), ring.phase);  // x is there, so are its scales
      TokenScales scales(*this, w);
      Sum acc[C::kRowTiles][C::kTokenTiles][4] = {};
      multiply(acc, w, ring);
      if (!waited) wait_for_previous_kernel();  // before anything is written
      waited = true;
      if (!C::kSplitsK || splits_ == 1 || add_splits(acc, w)) {
        scales.publish(*this, w);
        store(acc, w);
      }
    }
  }

  // The scales of a tile's tokens, of 8-bit x: read while the products run, then laid into shared memory, where `store`
  // finds them. Read from global memory by each lane of each slab, they would cost it a sixth of its time.
  struct TokenScales {
    static constexpr int kMine = T::kBytes == 1 ? ceil_div(C::kTokens, 128) : 1;
    float mine[kMine];

    __device__ __forceinline__ TokenScales(const WgmmaGemm& gemm, const Work& w) {
      if constexpr (T::kBytes == 1) {
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
          const int token = w.token_block * C::kTokens + i * 128 + static_cast<int>(threadIdx.x) % 128;
          mine[i] = __ldcg(gemm.p_.x_scale + min(token, gemm.p_.m - 1));
        }
      }
    }

    __device__ __forceinline__ void publish(WgmmaGemm& gemm, const Work& w) const {
      if constexpr (T::kBytes == 1) {
        const int group = gemm.warp_ / 4, thread = threadIdx.x % 128;
        float* scales = reinterpret_cast<float*>(gemm.memory_ + C::kSharedBytes - C::kGroups * C::kScaleBytes) +
                        group * C::kTokens;
#pragma unroll
        for (int i = 0; i < kMine; ++i)
          if (i * 128 + thread < C::kTokens) scales[i * 128 + thread] = mine[i];
        C::sync_group(group);
        gemm.x_scale_ = scales - w.token_block * C::kTokens;
      }
    }
  };

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
    u32 a[2][C::kSteps][4];  // two batches of 64 inputs
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
      for (int rt = 0; rt < C::kRowTiles; ++rt)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          dequant_batch(a[half], zero[rt], factor[rt], ring.stage, rt, half);
          if constexpr (T::kBytes == 1) pin(a[half]);
          wgmma_fence();
          pin(acc[rt]);
          const u64 panel = T::kBytes == 2 ? panel_descriptor(x_stage(ring.stage) + half * C::kPanelBytes)
                                           : panel_descriptor(x_stage(ring.stage)) + 4 * half;  // 64 bytes on
#pragma unroll
          for (int step = 0; step < C::kSteps; ++step) Wgmma<T, C::kTokenTiles>::run(acc[rt], a[half][step], panel + 2 * step);
          wgmma_commit();
          pin(acc[rt]);
          wgmma_wait<1>();  // the other register buffer is free; so is, at the start of a stage, the stage before
          if (rt == 0 && half == 0 && previous >= 0) release(previous);
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
    __threadfence();
    C::sync();
    if (threadIdx.x == 0) {
      arrival_flag() = atomicAdd(p_.counters + tile, 1);
      if (arrival_flag() == splits_ - 1) p_.counters[tile] = 0;
      __threadfence();
    }
    C::sync();
    const bool last = arrival_flag() == splits_ - 1;
    C::sync();  // the flag may be written again
    if (!last) return false;
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt)
#pragma unroll
      for (int nt = 0; nt < C::kTokenTiles; ++nt) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[rt][nt][i] = 0;
        for (int split = 0; split < splits_; ++split) {
          Sum part[4];
          load_float4_l2(part, mine + static_cast<i64>(split) * kFloats +
                                   (rt * C::kTokenTiles + nt) * C::kEpilogueThreads * 4);
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[rt][nt][i] += part[i];
        }
      }
    return true;
  }

  __device__ __forceinline__ float token_scale(int token) const {
    return T::kBytes == 1 ? x_scale_[min(token, p_.m - 1)] : 1.f;
  }

  // Two neighbouring tokens of a row: the sums times the scales, plus bias, rounded.
  __device__ __forceinline__ static u32 finish(Sum first, Sum second, float scale, float shift, const float (&token)[2]) {
    return T::Out::pack2(static_cast<float>(first) * scale * token[0] + shift,
                         static_cast<float>(second) * scale * token[1] + shift);
  }

  __device__ __forceinline__ void store(const Sum (&acc)[C::kRowTiles][C::kTokenTiles][4], const Work& w) const {
    const u16* bias = static_cast<const u16*>(p_.bias);
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt) {
      const int tile = w.row_block * C::kBlockTiles + C::row_tile(warp_, rt);
      float scale[2] = {0.f, 0.f}, shift[2] = {0.f, 0.f};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile * kTileRows + lane_ / 4 + 8 * half;
        if (tile < p_.row_tiles) scale[half] = p_.row_scale[row] * T::kWeight;
        if (bias != nullptr && row < p_.n) shift[half] = T::Out::to_float(bias[row]);
      }
      if constexpr (C::kSlab == 0)
        store_directly(acc[rt], tile, w.token_block * C::kTokens, scale, shift);
      else
        store_slabs(acc[rt], rt, tile, w.token_block * C::kTokens, scale, shift);
    }
  }

  // Few tokens: 8x8 blocks are turned around in registers; a lane then holds two neighbouring rows of a token.
  __device__ __forceinline__ void store_directly(const Sum (&acc)[C::kTokenTiles][4], int tile, int token0,
                                                 const float (&scale)[2], const float (&shift)[2]) const {
    u16* y = static_cast<u16*>(p_.y);
#pragma unroll
    for (int nt = 0; nt < C::kTokenTiles; ++nt) {
      const int first = token0 + nt * 8, token = first + lane_ / 4;
      const float scales[2] = {token_scale(first + lane_ % 4 * 2), token_scale(first + lane_ % 4 * 2 + 1)};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const u32 two = transpose8x8(finish(acc[nt][2 * half], acc[nt][2 * half + 1], scale[half], shift[half], scales));
        const int row = tile * kTileRows + 8 * half + lane_ % 4 * 2;
        if (token >= p_.m || row >= p_.n) continue;
        u16* to = y + static_cast<i64>(token) * p_.n + row;
        if (p_.n % 2 == 0) {
          *reinterpret_cast<u32*>(to) = two;
        } else {
          to[0] = static_cast<u16>(two);
          if (row + 1 < p_.n) to[1] = static_cast<u16>(two >> 16);
        }
      }
    }
  }

  // Many tokens: a slab of them at a time goes through shared memory, transposed, so that the 64 rows of a warp group
  // leave as 128 contiguous bytes per token.
  __device__ __forceinline__ void store_slabs(const Sum (&acc)[C::kTokenTiles][4], int rt, int tile, int first_token,
                                              const float (&scale)[2], const float (&shift)[2]) const {
    constexpr int kSlabTiles = C::kSlab / 8, kSlabs = C::kTokens / imax(C::kSlab, 1);
    const int group = warp_ / 4, row = (tile - warp_ % 4) * kTileRows + threadIdx.x % 8 * 8;
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      const int token0 = first_token + slab * C::kSlab;
      const u32 buffer = store_buffer(group, (rt * kSlabs + slab) % 2);
      float scales[kSlabTiles][2];  // of the tokens whose sums this lane holds
#pragma unroll
      for (int nt = 0; nt < kSlabTiles; ++nt)
#pragma unroll
        for (int i = 0; i < 2; ++i) scales[nt][i] = token_scale(token0 + nt * 8 + lane_ % 4 * 2 + i);
#pragma unroll
      for (int pair = 0; pair < kSlabTiles / 2; ++pair) {
        u32 blocks[4];  // of 8 rows x 8 tokens: two of rows for each eight tokens
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int nt = 2 * pair + i / 2, half = i % 2;
          const Sum(&v)[4] = acc[slab * kSlabTiles + nt];
          blocks[i] = finish(v[2 * half], v[2 * half + 1], scale[half], shift[half], scales[nt]);
        }
        const int token = pair * 16 + lane_ / 16 * 8 + lane_ % 8;
        store_matrices_transposed(buffer + token * C::kStoreStride + warp_ % 4 * 32 + lane_ / 8 % 2 * 16, blocks);
      }
      C::sync_group(group);
#pragma unroll
      for (int i = 0; i < C::kSlab / 16; ++i) {  // 16 tokens at once
        const int token = i * 16 + threadIdx.x % 128 / 8;
        if (token0 + token < p_.m && row < p_.n)
          store_rows(token0 + token, row, load_shared16(buffer + token * C::kStoreStride + threadIdx.x % 8 * 16));
      }
    }
  }

  __device__ __forceinline__ void store_rows(int token, int row, const Vec16& v) const {
    u16* to = static_cast<u16*>(p_.y) + static_cast<i64>(token) * p_.n + row;
    if (p_.n % 8 == 0) {
      *reinterpret_cast<Vec16*>(to) = v;
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (row + i < p_.n) to[i] = static_cast<u16>(v.w[i / 2] >> (16 * (i % 2)));
  }

  // Codes of 64 inputs of one row tile -> the A operands of the steps; group scales are multiplied in here.
  __device__ __forceinline__ void dequant_batch(u32 (&a)[C::kSteps][4], ZeroPoint<T, C::kBits>& zero,
                                                const u32 (&factor)[2], int stage, int rt, int half) const {
    constexpr int kWords = Weights::kWordsPerPair;
    const int tile = C::row_tile(warp_, rt);
    const u32 from = weight_stage(stage) + tile * Weights::kBytes;
    u32 words[2 * kWords];
    if constexpr (C::kBits == 2) {  // 8 bytes of the lane's 16
      asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];"
                   : "=r"(words[0]), "=r"(words[1])
                   : "r"(from + lane_ * 16 + half * 8)
                   : "memory");
    } else {
#pragma unroll
      for (int v = 0; v < kWords / 2; ++v) {
        const Vec16 codes = load_shared16(from + (half * (kWords / 2) + v) * 512 + lane_ * 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) words[4 * v + i] = codes.w[i];
      }
    }
    if constexpr (T::kBytes == 1) {
#pragma unroll
      for (int step = 0; step < 2; ++step) dequant_narrow(a[step], words[step]);
    } else {
      dequant_wide(a, zero, factor, words, stage, tile, half);
    }
  }

  __device__ __forceinline__ void dequant_wide(u32 (&a)[4][4], ZeroPoint<T, C::kBits>& zero, const u32 (&factor)[2],
                                               const u32 (&words)[2 * Weights::kWordsPerPair], int stage, int tile,
                                               int half) const {
    constexpr int kWords = Weights::kWordsPerPair;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const int group = C::kGroup ? (half * 64 + pair * 32) / (C::kGroup ? C::kGroup : 1) : 0;
      const u32 meta = meta_stage(stage) + tile * Meta::kBytes;
      if constexpr (C::kGroup != 0 && C::kBits > 2) load_group_zeros<C>(zero, meta, group);
      u32 pair_words[kWords];
#pragma unroll
      for (int i = 0; i < kWords; ++i) pair_words[i] = words[pair * kWords + i];
      u32 pair_a[2][4];
      dequant_pair(pair_a, pair_words, zero);
      if constexpr (C::kGroup != 0 && !C::kOwnScales) scale_weights<C>(pair_a, meta, group);
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          a[2 * pair + step][j] = C::kOwnScales ? T::mul2(pair_a[step][j], factor[j % 2]) : pair_a[step][j];
    }
  }
};

}  // namespace tsld
