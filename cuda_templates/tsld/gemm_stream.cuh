// y[m, n] = x[m, k] * dequantised(weights)[n, k]^T for a few tokens, where reading the weights is all that counts.
//
// The grid fills the machine once. A block keeps its inputs of x in shared memory for good and walks over its share
// of the rows; its warps never wait for each other on the way. The work of a block, (group of kRowTiles row tiles,
// chunk of 128 inputs) in memory order, is cut into equal contiguous shares, one per warp. A warp streams its share
// through a private ring of kStages buffers: a lane copies and reads back its own 16 bytes, so the ring needs no
// barrier. Where a share ends within a row tile, the pieces meet in shared memory at the end, in a fixed order:
// warp w's piece of row group g has slot g + w, which is unique because both only grow along the work.
//
// Shared memory: ring | x slice | slots | row scales | row zero points. All but the ring depend on the shape.
#pragma once

#include "tsld/epilogue.cuh"
#include "tsld/multiply.cuh"
#include "tsld/digit_staging.cuh"
#include "tsld/digit_totals.cuh"

namespace tsld {

// kNorm, kGated: x is normalised, or the outputs are gated, on the way (stream_fusion.cuh); without a split only.
// kDigits: x as digits of 8 bits (stream_digits.cuh); up to two tokens, ternary with a scale per row or 128 inputs.
template <class Type_, int kBits_, int kGroup_, int kTokens_, int kWarps_, int kRowTiles_, int kStages_,
          bool kNorm_ = false, bool kGated_ = false, bool kDigits_ = false>
struct StreamConfig {
  using Type = Type_;
  static constexpr bool kNorm = kNorm_, kGated = kGated_, kDigits = kDigits_;
  static constexpr int kBits = kBits_, kGroup = kGroup_, kTokens = kTokens_, kWarps = kWarps_;
  static constexpr int kRowTiles = kRowTiles_, kStages = kStages_;
  static_assert(!kDigits || (kBits == 2 && kGroup % 128 == 0 && kTokens <= 2), "digits: ternary, a scale per row or chunk");
  static constexpr int kTokenTiles = kDigits ? DigitLayout<kTokens>::kTiles : ceil_div(kTokens, 8);
  static constexpr int kThreads = 32 * kWarps, kEpilogueThreads = kThreads;
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  using Weights = WeightLayout<kBits>;
  using Meta = MetaLayout<kBits, kGroup>;
  static constexpr int kGroupRows = kRowTiles * kTileRows;
  static constexpr int kStageBytes = kRowTiles * (Weights::kBytes + Meta::kBytes);
  static constexpr int kRingBytes = kWarps * kStages * kStageBytes;
  static constexpr int kSlotStride = kGroupRows + 4;             // floats per token, padded against bank conflicts
  static constexpr int kSlotFloats = kTokens * kSlotStride;
  static constexpr int kSharedBytes = kRingBytes;                // plus what depends on the shape
};

template <class C>
class StreamGemm {
  using Digits = DigitLayout<C::kTokens>;
  using T = typename C::Type;
  using Weights = typename C::Weights;
  using Meta = typename C::Meta;

  const GemmParams& p_;
  char* const memory_;
  const int warp_, lane_;
  const int first_chunk_, chunks_;  // the block's inputs
  const int first_group_, groups_;  // the block's rows
  const int token0_;
  const int x_stride_;              // bytes between tokens in shared memory
  const u64 policy_;

 public:
  __device__ __forceinline__ StreamGemm(const GemmParams& p, void* shared)
      : p_(p),
        memory_(static_cast<char*>(shared)),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        first_chunk_(blockIdx.z * p.chunks_per_split),
        chunks_(min(p.chunks_per_split, p.chunks - first_chunk_)),
        first_group_(share_start(all_groups(), gridDim.x, blockIdx.x)),
        groups_(share_start(all_groups(), gridDim.x, blockIdx.x + 1) - first_group_),
        token0_(blockIdx.y * C::kTokens),
        x_stride_(p.chunks_per_split * kChunk * 2 + 16),
        policy_(evict_first_policy()) {}

  __device__ __forceinline__ void run(void*) {
    const int begin = warp_start(warp_), end = warp_start(warp_ + 1);
    int group = begin / chunks_, chunk = begin % chunks_;
    Source source = {p_.weights, p_.meta, group, chunk, *this};
    allow_next_kernel();
    u32 filled = ring();
    DigitStaging<C> staging(p_, token0_, first_chunk_, chunks_, raw());
    if constexpr (C::kDigits) staging.fetch_weight();
    stage_row_scales();
#pragma unroll
    for (int s = 0; s < C::kStages - 1; ++s) load_unit(source, filled, begin + s < end);
    if constexpr (C::kGroup == 0 && C::kBits > 2) stage_row_zeros();
    if constexpr (C::kDigits) {
      digit_totals().clear();
      wait_for_previous_kernel();
      staging.stage(x_memory(), scales(), scratch());
    } else if constexpr (C::kNorm) {
      NormStaging<C> norm(p_, token0_);
      norm.fetch_weight();
      wait_for_previous_kernel();
      norm.stage(x_memory(), x_stride_, slots());
    } else {
      wait_for_previous_kernel();
      stage_x();
    }
    if constexpr (!C::kDigits) {
      cp_async_wait<0>();
      __syncthreads();
    }

    ZeroPoint<T, C::kBits> zero[C::kRowTiles];
    typename If<C::kDigits, typename DigitTotals<C>::Sums, FloatSums>::type acc = {};
    u32 at = ring();
    for (int unit = begin; unit < end; ++unit) {
      cp_async_wait<C::kStages - 2>();
      if constexpr (C::kGroup != 0) __syncwarp();  // group scales were copied by other lanes
      load_unit(source, filled, unit + C::kStages - 1 < end);
      if constexpr (C::kGroup == 0 && C::kBits > 2) {
        if (unit == begin || chunk == 0) load_row_zeros(zero, group);
      }
      if constexpr (C::kDigits)
        multiply_digits<C>(acc, x_address() + chunk * Digits::kChunkBytes, at);
      else
        multiply_chunk<C>(acc.of, zero, x_address() + chunk * kChunk * 2, x_stride_, 0, at,
                          at + C::kRowTiles * Weights::kBytes);
      at = next_stage(at);
      ++chunk;
      if (chunk == chunks_ || unit == end - 1) {
        put_piece(acc, group);
        chunk = 0, ++group;
      }
    }
    cp_async_wait<0>();
    __syncthreads();
    if constexpr (C::kDigits)
      digit_totals().store(token0_);
    else
      add_pieces_and_store();
  }

 private:
  struct FloatSums {
    float of[C::kRowTiles][C::kTokenTiles][4];
  };

  // Where a lane copies from next. Reads up to kRowTiles - 1 tiles past the last: the packed weights have such room.
  struct Source {
    const char* weights;
    const char* meta;
    int chunk;

    __device__ __forceinline__ Source(const void* all_weights, const void* all_meta, int group, int first,
                                      const StreamGemm& gemm)
        : chunk(first) {
      const i64 tile = (gemm.first_group_ + group) * C::kRowTiles;
      const i64 block = tile * gemm.p_.chunks + gemm.first_chunk_ + first;
      weights = static_cast<const char*>(all_weights) + block * Weights::kBytes + gemm.lane_ * 16;
      meta = static_cast<const char*>(all_meta) + block * Meta::kBytes;
    }
    __device__ __forceinline__ void advance(const StreamGemm& gemm) {
      int blocks = 1;
      if (++chunk == gemm.chunks_) chunk = 0, blocks += C::kRowTiles * gemm.p_.chunks - gemm.chunks_;
      weights += static_cast<i64>(blocks) * Weights::kBytes;
      if constexpr (C::kGroup != 0) meta += static_cast<i64>(blocks) * Meta::kBytes;
    }
  };

  __device__ __forceinline__ int all_groups() const { return (p_.row_tiles + C::kRowTiles - 1) / C::kRowTiles; }
  __device__ __forceinline__ int warp_start(int warp) const { return share_start(groups_ * chunks_, C::kWarps, warp); }
  // The warp whose share holds a unit.
  __device__ __forceinline__ int warp_of(int unit) const {
    return (static_cast<u32>(unit + 1) * C::kWarps - 1) / (groups_ * chunks_);
  }

  __device__ __forceinline__ u32 ring() const {  // the warp's first stage
    return shared_address(memory_) + warp_ * (C::kStages * C::kStageBytes);
  }
  __device__ __forceinline__ u32 next_stage(u32 stage) const {
    return stage == ring() + (C::kStages - 1) * C::kStageBytes ? ring() : stage + C::kStageBytes;
  }
  __device__ __forceinline__ char* x_memory() const { return memory_ + C::kRingBytes; }
  __device__ __forceinline__ u32 x_address() const { return shared_address(x_memory()); }
  __device__ __forceinline__ DigitScale* scales() const {
    return reinterpret_cast<DigitScale*>(x_memory() + p_.chunks_per_split * Digits::kChunkBytes);
  }
  __device__ __forceinline__ char* raw() const { return reinterpret_cast<char*>(scales() + C::kTokens); }
  __device__ __forceinline__ Vec16* scratch() const {
    return reinterpret_cast<Vec16*>(raw() + p_.chunks_per_split * kChunk * (C::kNorm ? 4 : 2));
  }
  __device__ __forceinline__ int* sums() const { return reinterpret_cast<int*>(scratch() + C::kWarps); }
  __device__ __forceinline__ DigitTotals<C> digit_totals() const {
    return {p_, sums(), scales(), row_scales(), first_group_, groups_};
  }
  __device__ __forceinline__ float* slots() const { return reinterpret_cast<float*>(x_memory() + C::kTokens * x_stride_); }
  __device__ __forceinline__ float* row_scales() const {
    return C::kDigits ? reinterpret_cast<float*>(sums() + groups_ * C::kGroupRows * C::kTokens * kDigitsOf)
                      : slots() + (groups_ + C::kWarps) * C::kSlotFloats;
  }
  __device__ __forceinline__ u8* row_zeros() const {
    return reinterpret_cast<u8*>(row_scales() + groups_ * C::kGroupRows);
  }

  __device__ __forceinline__ void load_unit(Source& source, u32& stage, bool wanted) const {
    if (wanted) {
      const u32 to = stage + lane_ * 16;
#pragma unroll
      for (int rt = 0; rt < C::kRowTiles; ++rt) {
        const i64 tile = static_cast<i64>(rt) * p_.chunks;
#pragma unroll
        for (int v = 0; v < Weights::kVecs; ++v)
          cp_async_stream(to + rt * Weights::kBytes + v * 512, source.weights + tile * Weights::kBytes + v * 512,
                          policy_);
      }
      constexpr int kMeta = imax(Meta::kBytes, 1), kAll = C::kRowTiles * Meta::kBytes;  // of the row tiles, one after another
#pragma unroll
      for (int at = lane_ * 16; at < kAll; at += 512)
        cp_async_stream(stage + C::kRowTiles * Weights::kBytes + at,
                        source.meta + at / kMeta * static_cast<i64>(p_.chunks) * kMeta + at % kMeta, policy_);
      source.advance(*this);
      stage = next_stage(stage);
    }
    cp_async_commit();
  }

  // Inputs past the last become zeros; tokens past the last are left out: their columns are never stored.
  __device__ __forceinline__ void stage_x() const {
    const int row_vecs = chunks_ * (kChunk / 8), tokens = min(C::kTokens, p_.m - token0_);
    const int k0 = first_chunk_ * kChunk;
    const u16* x = static_cast<const u16*>(p_.x) + token0_ * p_.ldx + k0;
    for (int v = threadIdx.x; v < row_vecs; v += C::kThreads) {
      const int bytes = max(0, min(16, (p_.k - k0 - v * 8) * 2));
      const u16* from = x + (bytes > 0 ? v * 8 : 0);
      u32 to = x_address() + v * 16;
      for (int token = 0; token < tokens; ++token, from += p_.ldx, to += x_stride_) cp_async_zfill(to, from, bytes);
    }
    cp_async_commit();
  }

  // They would come from DRAM when the sums are ready.
  __device__ __forceinline__ void stage_row_scales() const {
    const int first = first_group_ * C::kGroupRows, rows = min(groups_ * C::kGroupRows, p_.row_tiles * kTileRows - first);
#pragma unroll 1
    for (int r = threadIdx.x * 4; r < rows; r += C::kThreads * 4)
      cp_async_zfill(shared_address(row_scales() + r), p_.row_scale + first + r, 16);
  }

  __device__ __forceinline__ void stage_row_zeros() const {
    const int first = first_group_ * C::kGroupRows, rows = groups_ * C::kGroupRows;
    for (int r = threadIdx.x; r < rows; r += C::kThreads)
      row_zeros()[r] = p_.row_zero[min(first + r, p_.row_tiles * kTileRows - 1)];
  }

  __device__ __forceinline__ void load_row_zeros(ZeroPoint<T, C::kBits> (&zero)[C::kRowTiles], int group) const {
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        zero[rt].set(half, row_zeros()[group * C::kGroupRows + rt * kTileRows + lane_ / 4 + 8 * half]);
  }

  // The warp's sums of one row group go to their slot, and start again at zero.
  __device__ __forceinline__ void put_piece(typename DigitTotals<C>::Sums& acc, int group) const {
    digit_totals().add(acc, group);
  }
  __device__ __forceinline__ void put_piece(FloatSums& acc, int group) const {
    float* to = slots() + (group + warp_) * C::kSlotFloats + lane_ / 4;
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt)
#pragma unroll
      for (int nt = 0; nt < C::kTokenTiles; ++nt)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = nt * 8 + lane_ % 4 * 2 + i % 2;
          if (token < C::kTokens) to[token * C::kSlotStride + rt * kTileRows + i / 2 * 8] = acc.of[rt][nt][i];
        }
    acc = {};
  }

  // Sums of rows r .. r+3 of a row group, over the warps that hold pieces of it.
  __device__ __forceinline__ void add_pieces(float (&sum)[4], int token, int group, int r) const {
    const int first = warp_of(group * chunks_), last = warp_of(group * chunks_ + chunks_ - 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = 0.f;
    for (int warp = first; warp <= last; warp += 4) {  // four loads at once
      float4 piece[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const bool any = warp + w <= last && warp_start(warp + w) < warp_start(warp + w + 1);  // some have no share
        const float* from = slots() + (group + warp + w) * C::kSlotFloats + token * C::kSlotStride + r;
        piece[w] = any ? *reinterpret_cast<const float4*>(from) : float4{};
      }
#pragma unroll
      for (int w = 0; w < 4; ++w)
        sum[0] += piece[w].x, sum[1] += piece[w].y, sum[2] += piece[w].z, sum[3] += piece[w].w;
    }
  }

  __device__ __forceinline__ void add_pieces_and_store() const {
    constexpr int kRowQuads = C::kGroupRows / 4 / (C::kGated ? 2 : 1);
    const int tokens = min(C::kTokens, p_.m - token0_), quads = groups_ * kRowQuads;
    const bool split = gridDim.z > 1;
    for (int q = threadIdx.x; q < quads * tokens; q += C::kThreads) {
      const int token = q / quads, group = q % quads / kRowQuads, quad = q % kRowQuads;
      const int r = C::kGated ? quad / 2 * kTileRows + quad % 2 * 4 : quad * 4;
      const int row = (first_group_ + group) * C::kGroupRows + r;
      if (row >= p_.row_tiles * kTileRows) continue;
      const float* scale = row_scales() + group * C::kGroupRows + r;
      float sum[4];
      add_pieces(sum, token, group, r);
      if constexpr (C::kGated) {
        float up[4];
        add_pieces(up, token, group, r + 8);
        store_gated<T>(p_, token0_ + token, row, sum, up, scale);
      } else if (split) {
        store_float4_l2(partial_sum(p_, blockIdx.z, token0_ + token, row), sum);
      } else {
        store_outputs<T>(p_, token0_ + token, row, sum, scale);
      }
    }
    if (C::kGated || !split || !last_block_of_tile<C>(p_, *reinterpret_cast<int*>(memory_))) return;
    for (int q = threadIdx.x; q < quads * tokens; q += C::kThreads) {
      const int row = first_group_ * C::kGroupRows + q % quads * 4;
      if (row < p_.row_tiles * kTileRows) add_splits_and_store<T>(p_, token0_ + q / quads, row);
    }
  }
};

}  // namespace tsld
