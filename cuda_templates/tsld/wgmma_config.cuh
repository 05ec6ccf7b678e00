// Tile shapes and shared memory of the kernels for many tokens on Hopper (gemm_wgmma.cuh).
#pragma once

#include "tsld/layout.cuh"
#include "tsld/wgmma.cuh"

namespace tsld {

template <class Type_, int kBits_, int kGroup_, int kTokens_, int kGroups_, int kRowTiles_, int kStages_,
          bool kCluster_ = false, int kAhead_ = 0>
struct WgmmaConfig {
  using Type = Type_;
  static_assert(Type::kBytes == 2 || (kBits_ == 2 && kGroup_ == 0), "8-bit activations: ternary, one scale per row");
  static constexpr int kBits = kBits_, kGroup = kGroup_, kStages = kStages_, kTokens = kTokens_;
  static constexpr int kGroups = kGroups_;                    // consumer warp groups
  static constexpr bool kCluster = kCluster_;  // the blocks that split K form a cluster of 1, 2, 4 or 8
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
  // The inputs of a chunk are multiplied in batches, of which all but one may be under way: dequantising one takes about
  // as long as multiplying 64 inputs with few tokens, so that two batches alone would leave the tensor cores idle.
  static constexpr int kBatches = kBits == 2 && Type::kBytes == 2 && (kGroup == 0 || kGroup == 128) && kTokens <= 64 ? 4 : 2;
  static constexpr int kSteps = 4 * Type::kBytes / kBatches;  // matrix instructions per batch
  static constexpr int kWeightBytes = kBlockTiles * Weights::kBytes;
  // Ternary groups of 128 have one scale per row and chunk: consumers read these themselves, a chunk ahead.
  static constexpr bool kOwnScales = kBits == 2 && kGroup == 128;
  // With few tokens the sums of a chunk take them, with many the weights: half the accumulators.
  static constexpr bool kScaleSums = kOwnScales && kRowTiles == 1 && kBatches == 4;
  static constexpr int kMetaBytes = kOwnScales ? 0 : kBlockTiles * Meta::kBytes;  // of a stage, behind all stages
  // Few tokens: weights have a ring of their own, of kAhead buffers of four chunks, because memory takes longer than L2.
  static constexpr int kAhead = kAhead_;
  static_assert(kAhead == 0 || (kBatches == 4 && kStages <= 4 * kAhead - 3), "the ring of x must not outrun the weights");
  static constexpr int kBufferBytes = 4 * kWeightBytes;
  static constexpr int kStageBytes = kXBytes + (kAhead ? 0 : kWeightBytes);  // a multiple of 1024: panels stay aligned
  static constexpr int kBarrierBytes = 1024;                  // at the start, so that panels stay aligned
  // Tokens that go through shared memory at once, where that memory does not cost a block per multiprocessor.
  static constexpr int kSlab = kTokens * (3 - Type::kBytes) > 64 ? 32 : 0;
  static constexpr int kStoreStride = 64 * 2 + 16;            // bytes of a token's rows, padded against bank conflicts
  static constexpr int kStoreBytes = 2 * kSlab * kStoreStride; // two buffers of a warp group
  static constexpr int kScaleBytes = Type::kBytes == 1 ? kTokens * 4 : 0;  // the tokens' scales, of a warp group
  static constexpr int kReceivedBytes = kCluster ? kBlockRows * kTokens * 4 : 0;  // sums of the other blocks
  static constexpr int kSharedBytes =
      kBarrierBytes + kStages * (kStageBytes + kMetaBytes) + kAhead * kBufferBytes + kReceivedBytes + kGroups * (kStoreBytes + kScaleBytes);
  static_assert(!kCluster || (kSlab == 0 && !kMoveRegisters && Type::kBytes == 2), "clusters: up to 64 tokens of 16 bits");
};

}  // namespace tsld
