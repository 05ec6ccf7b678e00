// Codes of the stages of gemm_wgmma.cuh x the activations there: what a consumer warp group of it does.
#pragma once

#include "tsld/wgmma_operand.cuh"
#include "tsld/wgmma_stages.cuh"

namespace tsld {

template <class C>
class WgmmaProducts : protected WgmmaStages<C> {
 protected:
  using Base = WgmmaStages<C>;
  using T = typename C::Type;
  using Sum = typename T::Sum;
  using typename Base::Buffers, typename Base::Meta, typename Base::Ring, typename Base::Weights, typename Base::Work;
  using Base::buffer_full, Base::empty, Base::full, Base::lane_, Base::meta_stage, Base::p_, Base::warp_,
      Base::weight_buffer, Base::weight_stage, Base::x_stage;

  __device__ __forceinline__ WgmmaProducts(const GemmParams& p, void* shared) : Base(p, shared) {}

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
    const u16* scales[C::kRowTiles];
    u16 scale[C::kRowTiles][2];
    u32 factor[C::kRowTiles][2];
    const auto load_scales = [&](int chunk) {  // there is room behind those of the last chunk
#pragma unroll
      for (int rt = 0; rt < C::kRowTiles; ++rt) {
        scales[rt] = chunk == 0 ? scales_of(w, rt) : scales[rt] + 16;
        scale[rt][0] = scales[rt][0], scale[rt][1] = scales[rt][8];
      }
    };
    if constexpr (C::kOwnScales) load_scales(0);
    int previous = -1;
    for (int i = 0; i < w.chunks; ++i) {
      if constexpr (C::kOwnScales) {
#pragma unroll
        for (int j = 0; j < 2 * C::kRowTiles; ++j) factor[j / 2][j % 2] = T::both(scale[j / 2][j % 2]);
        load_scales(i + 1);
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

  using Products = float[C::kTokenTiles][4];

  // Groups of 128: the products of a chunk, times the scales of its rows, go to the sums. While the tensor cores are at
  // them, the operands of the next chunk are made.
  __device__ __forceinline__ void multiply_groups(Products& acc, const Work& w, Ring& ring, Buffers& buffers) const {
    Products products = {};
    float factor[2] = {0.f, 0.f};
    u32 a[4][2][4];
    const int tile = C::row_tile(warp_, 0);
    const u16* from = scales_of(w, 0);
    u16 scale[2] = {from[0], from[8]};
    int previous = -1;
    for (int i = 0; i < w.chunks; ++i) {
      if (C::kAhead != 0 && i % 4 == 0) barrier_wait(buffer_full(buffers.stage), buffers.phase);
      barrier_wait(full(ring.stage), ring.phase);
      const Vec16 codes = load_shared16((C::kAhead ? weight_buffer(buffers.stage) + (tile * 4 + i % 4) * Weights::kBytes
                                                   : weight_stage(ring.stage) + tile * Weights::kBytes) +
                                        lane_ * 16);
      load_free_pair<3>(a[0], codes.w[0]);
      load_free_pair<2>(a[1], codes.w[1]);
      load_free_pair<1>(a[2], codes.w[2]);
      load_free_pair<0>(a[3], codes.w[3]);
      add_products(acc, products, factor);
      if (previous >= 0) release(previous);
      factor[0] = Fp16::to_float(scale[0]), factor[1] = Fp16::to_float(scale[1]);
      from += 16;  // those of the last tile's last chunk have room behind them
      scale[0] = from[0], scale[1] = from[8];
      wgmma_fence();
      pin(products);
#pragma unroll
      for (int batch = 0; batch < 4; ++batch) {
        const u64 panel = panel_descriptor(x_stage(ring.stage) + batch / 2 * C::kPanelBytes) + batch % 2 * 4;
        if (batch == 0)
          Wgmma<T, C::kTokenTiles>::template run<0>(products, a[batch][0], panel);
        else
          Wgmma<T, C::kTokenTiles>::run(products, a[batch][0], panel);
        Wgmma<T, C::kTokenTiles>::run(products, a[batch][1], panel + 2);
        wgmma_commit();
      }
      pin(products);
      previous = ring.stage;
      ring.advance();
      if (C::kAhead != 0 && (i % 4 == 3 || i + 1 == w.chunks)) buffers.advance();
    }
    wgmma_wait<0>();
    add_products(acc, products, factor);
    release(previous);
  }

  // Operands of 32 inputs, once all but kPending batches are through.
  template <int kPending>
  __device__ __forceinline__ static void load_free_pair(u32 (&a)[2][4], u32 word) {
    wgmma_wait<kPending>();
    load_pair<C>(a, word, ZeroPoint<T, 2>{}, {0, 0});
    pin(a);
  }

  // acc += products * the scales of the lane's two rows
  __device__ __forceinline__ static void add_products(Products& acc, Products& products, const float (&factor)[2]) {
    pin(products);
#pragma unroll
    for (int nt = 0; nt < C::kTokenTiles; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[nt][i] += factor[i / 2] * products[nt][i];
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

  // A lane's scales of rows g and, 8 further, g+8 in the first chunk; those of the next follow 16 further. Groups of 128.
  __device__ __forceinline__ const u16* scales_of(const Work& w, int rt) const {
    const int tile = min(w.row_block * C::kBlockTiles + C::row_tile(warp_, rt), p_.row_tiles - 1);
    return static_cast<const u16*>(p_.meta) + (static_cast<i64>(tile) * p_.chunks + w.first_chunk) * 16 + lane_ / 4;
  }
};

}  // namespace tsld
