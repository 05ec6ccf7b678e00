// Where the stages of a block of gemm_wgmma.cuh lie in shared memory, and what it works on.
#pragma once

#include "tsld/params.cuh"
#include "tsld/wgmma_config.cuh"

namespace tsld {

template <class C>
class WgmmaStages {
 protected:
  using Weights = typename C::Weights;
  using Meta = typename C::Meta;

  const GemmParams& p_;
  char* const memory_;
  const int warp_, lane_;

  __device__ __forceinline__ WgmmaStages(const GemmParams& p, void* shared)
      : p_(p),
        memory_(static_cast<char*>(shared)),
        warp_(__shfl_sync(~0u, threadIdx.x / 32, 0)),
        lane_(threadIdx.x % 32) {}

  // One output tile and one split of its inputs. Neighbours in time share tokens, so that x stays in L2.
  struct Work {
    int row_block, token_block, split, first_chunk, chunks;
  };
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
};

}  // namespace tsld
