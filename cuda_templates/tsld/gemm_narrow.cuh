// y[m, n] = round_to_8_bits(x)[m, k] * ternary(weights)[n, k]^T with Hopper's wgmma (sm_90a), for very many tokens.
//
// gemm_wgmma.cuh for x of 8 bits, with what else a layer needs: the kernel rounds x itself. First all consumer warps
// round the tokens of the first tile that each block computes; the others follow beside the products, by the three warps
// that the producer's warp group has to spare. Tokens are taken from counters by whoever runs, so that no block ever
// waits for one that has not started; a producer waits until the tokens of its tile are there. K is not split.
//
// counters: first tokens taken | other tokens taken | blocks that have left | tokens done, for each token block.
#pragma once

#include "tsld/gemm_wgmma.cuh"

namespace tsld {

template <class Type_, int kTokens_, int kGroups_, int kRowTiles_, int kStages_>
struct NarrowConfig : WgmmaConfig<Type_, 2, 0, kTokens_, kGroups_, kRowTiles_, kStages_> {
  using Base = WgmmaConfig<Type_, 2, 0, kTokens_, kGroups_, kRowTiles_, kStages_>;
  static_assert(Type_::kBytes == 1 && kGroups_ == 2 && kTokens_ * kRowTiles_ == 256, "two consumer warp groups and a producer's");
  static constexpr bool kSplitsK = false;
};

template <class C>
class NarrowGemm : WgmmaGemm<C> {
  using Base = WgmmaGemm<C>;
  using T = typename C::Type;
  using Sum = typename T::Sum;
  using Work = typename Base::Work;
  using Ring = typename Base::Ring;
  using Base::empty, Base::full, Base::lane_, Base::p_, Base::row_blocks_, Base::token_blocks_, Base::warp_, Base::work,
      Base::work_count;

 public:
  using Base::Base;

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
      registers_decrease<88>();
      if (warp_ == C::kWarps) {
        produce();
      } else {
        sync_rounders<true>();
        take_tokens<8>(others_taken(), first_tokens(), p_.m);
      }
      __syncwarp();
    } else {
      registers_increase<208>();
      wait_for_previous_kernel();
      take_tokens<16>(first_taken(), 0, first_tokens());
      sync_rounders<false>();
      Base::consume();
    }
    __syncthreads();
    if (threadIdx.x == 0) leave_counters_zero();
  }

 private:
  // ---- rounding ----

  __device__ __forceinline__ int* first_taken() const { return p_.counters; }
  __device__ __forceinline__ int* others_taken() const { return p_.counters + 1; }
  __device__ __forceinline__ int* blocks_gone() const { return p_.counters + 2; }
  __device__ __forceinline__ int* tokens_done(int token_block) const { return p_.counters + 3 + token_block; }

  // Tokens of the token blocks in which all first tiles lie, but for a few blocks at the end.
  __device__ __forceinline__ int first_tokens() const {
    return min(p_.m, max(static_cast<int>(gridDim.x) / row_blocks_, 1) * C::kTokens);
  }

  // The spare warps start when the consumers' tokens have been read.
  template <bool kWaits>
  __device__ __forceinline__ static void sync_rounders() {
    constexpr int kThreads = C::kEpilogueThreads + 96;
    if constexpr (kWaits)
      asm volatile("bar.sync 4, %0;" ::"n"(kThreads) : "memory");
    else
      asm volatile("bar.arrive 4, %0;" ::"n"(kThreads) : "memory");
  }

  // A warp takes tokens from [begin, end) as long as there are any.
  template <int kBatch>
  __device__ __forceinline__ void take_tokens(int* taken, int begin, int end) const {
    const i64 ldq = static_cast<i64>(p_.chunks) * kChunk;
    for (;;) {
      int token = 0;
      if (lane_ == 0) token = begin + atomicAdd(taken, 1);
      token = __shfl_sync(~0u, token, 0);
      if (token >= end) break;
      quantize_token<T, kBatch>(TokenRow<T>(p_.x, p_.ldx, p_.x_narrow, ldq, token, p_.k), p_.x_scale + token);
      fence_generic_to_async();  // the tensor copies shall see it
      __threadfence();
      __syncwarp();
      if (lane_ == 0) atomicAdd(tokens_done(token / C::kTokens), 1);
    }
  }

  __device__ __forceinline__ void wait_for_tokens(int token_block) const {
    const int wanted = min(C::kTokens, p_.m - token_block * C::kTokens);
    while (load_acquire(tokens_done(token_block)) < wanted) {
    }
    fence_generic_to_async();
  }

  __device__ __forceinline__ void leave_counters_zero() const {
    if (atomicAdd(blocks_gone(), 1) != static_cast<int>(gridDim.x) - 1) return;
    for (int i = 0; i < 3 + token_blocks_; ++i) p_.counters[i] = 0;
  }

  // ---- products ----

  __device__ __forceinline__ void produce() const {
    if (lane_ == 0) prefetch_map(Base::x_map_);
    Ring ring;
    const Work first = work(blockIdx.x);
    const int ahead = min(C::kStages, p_.chunks);
    for (int i = 0; i < ahead; ++i) Base::copy_weights(i, first, i);  // does not depend on earlier kernels
    wait_for_previous_kernel();
    int filled = 0;
    for (int index = blockIdx.x; index < work_count(); index += gridDim.x) {
      const Work w = work(index);
      wait_for_tokens(w.token_block);
      for (int i = 0; i < w.chunks; ++i, ++filled) {
        if (filled >= C::kStages) barrier_wait(empty(ring.stage), ring.phase ^ 1);
        if (filled >= ahead) Base::copy_weights(ring.stage, w, i);
        Base::copy_x(ring.stage, w, i);
        ring.advance();
      }
    }
  }
};

}  // namespace tsld
