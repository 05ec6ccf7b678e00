// What gemm_digits.cuh keeps in registers: products of codes and bytes of x, with wgmma on Hopper, else with mma.sync.
#pragma once

#include "tsld/multiply.cuh"
#include "tsld/wgmma.cuh"

namespace tsld {

template <class Type_, int kBits_, int kGroup_, int kTokens_, int kWarps_, int kRowTiles_, int kStages_, bool kHopper_>
struct DigitsConfig {
  static_assert(kBits_ == 2 && (kGroup_ == 0 || kGroup_ == 128), "ternary, one scale per row or per 128 inputs");
  static_assert(kTokens_ % 8 == 0, "whole tiles of eight tokens");
  using Type = Type_;
  static constexpr int kGroup = kGroup_;
  static constexpr int kTokens = kTokens_, kWarps = kWarps_, kRowTiles = kRowTiles_, kStages = kStages_;
  static constexpr bool kHopper = kHopper_;
  static constexpr int kTeam = kHopper ? 4 : 1;  // warps that work together: each has kTiles row tiles
  static constexpr int kTeams = kWarps / kTeam, kTiles = kRowTiles / kTeam;
  // Chunks that a team takes at once. With groups more: the sums of one are scaled while the next is multiplied, which
  // ptxas allows within a unit only.
  static constexpr int kUnit = !kHopper ? 1 : kGroup ? 4 : 2;
  static_assert(!kHopper || (kWarps % 4 == 0 && kTiles == 1), "a warp group takes 64 rows");
  static constexpr int kTokenTiles = kTokens / 8;
  static constexpr int kThreads = 32 * kWarps;
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  using Weights = WeightLayout<2>;
  using Meta = MetaLayout<2, kGroup>;
  static constexpr int kGroupRows = kRowTiles * kTileRows;
  static constexpr int kStageBytes = kTiles * kUnit * (Weights::kBytes + Meta::kBytes);  // of a warp
  static constexpr int kSlotStride = kGroupRows + 4;  // integers per token, padded against bank conflicts
  static constexpr int kSlot = kTokens * kSlotStride;
  static constexpr int kSharedBytes = imax(kWarps * kStages * kStageBytes, kTeams * kSlot * 4);  // plus the shape's
  // x: [64 inputs][tokens / 8][high, low][token][lane % 4][16 bytes], for wgmma [16 inputs][tokens / 8][high, low][token]
  // [16 bytes]; each [inputs] padded against bank conflicts
  static constexpr int kColumns = 2 * kTokens;
  static constexpr int kInputsOf = kHopper ? 16 : 64;
  static constexpr int kInputsBytes = kInputsOf * kColumns + 16;
  static constexpr int kChunkBytes = kChunk / kInputsOf * kInputsBytes;
  static constexpr int kTileBytes = kInputsOf * 8;    // of a byte of eight tokens
  static constexpr int kUnitBytes = kUnit * kChunkBytes;
  static constexpr int kMetaAt = kTiles * kUnit * Weights::kBytes;  // in a stage
};

template <class C>
class DigitsProducts {
  using T = typename C::Type;
  using Weights = typename C::Weights;
  using Meta = typename C::Meta;
  // [high and low bytes of eight tokens, the next eight, ...]; with groups, of the two chunks that are under way
  using Products = int[C::kHopper && C::kGroup ? 2 : 1][C::kTiles][C::kTokenTiles * 2][4];
  using Totals = float[C::kTiles][C::kTokenTiles][4];    // with groups: products times their scales

  Products products_;
  Totals totals_;
  float factor_[2][2];    // scales of the lane's rows in the chunks under way
  u32 operand_[2][4][4];  // weights on their way to wgmma
  const int warp_, lane_;

 public:
  __device__ __forceinline__ DigitsProducts() : factor_{}, warp_(threadIdx.x / 32), lane_(threadIdx.x % 32) { clear(); }

  // Adds the codes of a stage of the ring x the bytes of all tokens. On Hopper, wgmma may still be at it afterwards.
  __device__ __forceinline__ void multiply(u32 stage, u32 x) {
    Vec16 codes[C::kTiles * C::kUnit];
#pragma unroll
    for (int i = 0; i < C::kTiles * C::kUnit; ++i) codes[i] = load_shared16(stage + i * Weights::kBytes + lane_ * 16);
    if constexpr (C::kHopper) {
      // rows of 16 bytes, eight rows to 128 bytes; not swizzled
      const u32 panel = static_cast<u32>(C::kInputsBytes >> 4) << 16 | (x & 0x3FFFF) >> 4;
      const u64 first = static_cast<u64>(128 >> 4) << 32 | panel;
#pragma unroll
      for (int u = 0; u < C::kUnit; ++u) {
        auto& products = products_[C::kGroup ? u % 2 : 0][0];
        auto& operand = operand_[u % 2];
        wgmma_wait<1>();  // for the batch that read this operand
        if (C::kGroup != 0 && u > 1) {
          pin(products);
          scale(products, totals_[0], factor_[u % 2]);
        }
#pragma unroll
        for (int word = 0; word < 4; ++word) dequant_narrow(operand[word], codes[u].w[word]);
        pin(operand);
        if (C::kGroup != 0 && u == 0) scale_last();
        if constexpr (C::kGroup != 0) load_scales(factor_[u % 2], stage, u);
        wgmma_fence();
        const u64 chunk = first + u * (8 * C::kInputsBytes >> 4);
        using Product = Wgmma<Int8<T>, C::kTokenTiles * 2>;
        Product::template run<C::kGroup == 0>(products, operand[0], chunk);
#pragma unroll
        for (int word = 1; word < 4; ++word)
          Product::run(products, operand[word], chunk + word * (2 * C::kInputsBytes >> 4));
        wgmma_commit();
      }
      if constexpr (C::kGroup != 0) {
        wgmma_wait<1>();
        pin(products_[0][0]);
        scale(products_[0][0], totals_[0], factor_[0]);
      }
    } else {
      auto& products = products_[0];
      if constexpr (C::kGroup != 0) clear(products);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Vec16 b[C::kTokenTiles * 2];
#pragma unroll
        for (int nt = 0; nt < C::kTokenTiles * 2; ++nt)
          b[nt] = load_shared16(x + half * C::kInputsBytes + nt * C::kTileBytes + lane_ * 16);
#pragma unroll
        for (int word = 0; word < 2; ++word)
#pragma unroll
          for (int rt = 0; rt < C::kTiles; ++rt) {
            u32 a[4];
            dequant_narrow(a, codes[rt].w[half * 2 + word]);
#pragma unroll
            for (int nt = 0; nt < C::kTokenTiles * 2; ++nt)
              mma_int8(products[rt][nt], a, b[nt].w[2 * word], b[nt].w[2 * word + 1]);
          }
      }
      if constexpr (C::kGroup != 0) {
#pragma unroll
        for (int rt = 0; rt < C::kTiles; ++rt) {
          load_scales(factor_[0], stage, rt);
          scale(products[rt], totals_[rt], factor_[0]);
        }
      }
    }
  }

  __device__ __forceinline__ void finish() {
    if constexpr (C::kHopper && C::kGroup == 0) {
      wgmma_wait<0>();
      pin(products_[0][0]);
    } else if constexpr (C::kHopper) {
      scale_last();
      factor_[1][0] = factor_[1][1] = 0.f;
    }
  }

  // The warp's sums of one row group, in units of X, go to `to`, and start again at zero.
  __device__ __forceinline__ void put(int* to) {
    const int tile = warp_ % C::kTeam * C::kTiles;
    const auto& products = products_[0];
#pragma unroll
    for (int rt = 0; rt < C::kTiles; ++rt)
#pragma unroll
      for (int nt = 0; nt < C::kTokenTiles; ++nt)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = nt * 8 + lane_ % 4 * 2 + i % 2, row = (tile + rt) * kTileRows + lane_ / 4 + i / 2 * 8;
          to[token * C::kSlotStride + row] = C::kGroup ? __float_as_int(totals_[rt][nt][i] * (1.f / 64.f))
                                                       : join(products[rt][2 * nt][i], products[rt][2 * nt + 1][i]);
        }
    clear();
  }

 private:
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& chunk : products_) clear(chunk);
#pragma unroll
    for (auto& tile : totals_)
#pragma unroll
      for (auto& tokens : tile)
#pragma unroll
        for (float& total : tokens) total = 0.f;
  }
  static __device__ __forceinline__ void clear(int (&products)[C::kTiles][C::kTokenTiles * 2][4]) {
#pragma unroll
    for (auto& tile : products)
#pragma unroll
      for (auto& bytes : tile)
#pragma unroll
        for (int& product : bytes) product = 0;
  }

  // Both bytes of a product, in units of X: codes are +-64.
  static __device__ __forceinline__ int join(int high, int low) { return high * 4 + (low >> 6); }

  // What wgmma was still at: the last chunk of a unit.
  __device__ __forceinline__ void scale_last() {
    constexpr int kLast = C::kGroup ? 1 : 0;
    wgmma_wait<0>();
    pin(products_[kLast][0]);
    scale(products_[kLast][0], totals_[0], factor_[kLast]);
  }

  // Of the lane's rows g and g+8 in block `index` of the stage's scales.
  __device__ __forceinline__ void load_scales(float (&scales)[2], u32 stage, int index) const {
    const u32 meta = stage + C::kMetaAt + index * Meta::kBytes + lane_ / 4 * 2;
    scales[0] = Fp16::to_float(load_shared2(meta)), scales[1] = Fp16::to_float(load_shared2(meta + 16));
  }

  // The products of a row tile and chunk, 64 times too large, times the scales of its rows go to the totals.
  __device__ __forceinline__ static void scale(const int (&products)[C::kTokenTiles * 2][4],
                                               float (&totals)[C::kTokenTiles][4], const float (&scales)[2]) {
#pragma unroll
    for (int nt = 0; nt < C::kTokenTiles; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        totals[nt][i] += scales[i / 2] * __int2float_rn(products[2 * nt][i] * 256 + products[2 * nt + 1][i]);
  }
};

}  // namespace tsld
