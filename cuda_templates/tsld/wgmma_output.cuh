// From the accumulators of wgmma to y: sums times the scales of rows (and of 8-bit tokens), plus bias, rounded once.
#pragma once

#include "tsld/epilogue.cuh"
#include "tsld/params.cuh"
#include "tsld/wgmma.cuh"

namespace tsld {

// One output tile. C: the kernel's configuration. acc[rt][nt] is the fragment of row tile C::row_tile(warp, rt), tokens
// 8nt .. 8nt+7. Scales are read when this is made, while the products run. Those of the tile's tokens (8-bit x) are laid
// into shared memory by `store`: read from global memory by each lane of each slab, they would cost a sixth of its time.
template <class C>
class WgmmaOutput {
  using T = typename C::Type;
  using Sum = typename T::Sum;
  static constexpr int kMine = T::kBytes == 1 ? ceil_div(C::kTokens, 128) : 1;

  const GemmParams& p_;
  const u32 buffers_;  // shared memory for slabs, C::kStoreBytes a warp group
  float* const scales_;  // shared memory for the tokens' scales
  const int warp_, lane_, first_token_, first_tile_;
  float mine_[kMine];
  float row_scale_[C::kRowTiles][2];

 public:
  __device__ __forceinline__ WgmmaOutput(const GemmParams& p, u32 buffers, char* memory, int warp, int lane, int first_token,
                                         int first_tile)
      : p_(p),
        buffers_(buffers),
        scales_(reinterpret_cast<float*>(memory + C::kSharedBytes - C::kGroups * C::kScaleBytes) +
                warp / 4 * C::kTokens),
        warp_(warp),
        lane_(lane),
        first_token_(first_token),
        first_tile_(first_tile) {
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt) {
      const int tile = min(first_tile + C::row_tile(warp, rt), p.row_tiles - 1);
      if (p.bias != nullptr) prefetch_l2(static_cast<const u16*>(p.bias) + min(tile * kTileRows, p.n - 1));
#pragma unroll
      for (int half = 0; half < 2; ++half)
        row_scale_[rt][half] = load_early(p.row_scale + tile * kTileRows + lane / 4 + 8 * half);
    }
    if constexpr (T::kBytes == 1) {
#pragma unroll
      for (int i = 0; i < kMine; ++i)
        mine_[i] = __ldcg(p.x_scale + min(first_token + i * 128 + static_cast<int>(threadIdx.x) % 128, p.m - 1));
    }
  }

  // Of all token tiles, or of those in [begin, end) where they are stored directly.
  __device__ __forceinline__ void store(const Sum (&acc)[C::kRowTiles][C::kTokenTiles][4], int begin = 0,
                                        int end = C::kTokenTiles) {
    if constexpr (T::kBytes == 1) publish_scales();
    const u16* bias = static_cast<const u16*>(p_.bias);
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt) {
      const int tile = first_tile_ + C::row_tile(warp_, rt);
      const float scale[2] = {row_scale_[rt][0] * T::kWeight, row_scale_[rt][1] * T::kWeight};
      float shift[2] = {0.f, 0.f};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile * kTileRows + lane_ / 4 + 8 * half;
        if (bias != nullptr && row < p_.n) shift[half] = T::Out::to_float(bias[row]);
      }
      if constexpr (C::kSlab == 0)
        store_directly(acc[rt], tile, first_token_, scale, shift, begin, end);
      else
        store_slabs(acc[rt], rt, tile, first_token_, scale, shift);
    }
  }

 private:
  __device__ __forceinline__ void publish_scales() const {
    const int thread = threadIdx.x % 128;
#pragma unroll
    for (int i = 0; i < kMine; ++i)
      if (i * 128 + thread < C::kTokens) scales_[i * 128 + thread] = mine_[i];
    C::sync_group(warp_ / 4);
  }

  __device__ __forceinline__ float token_scale(int token) const {
    return T::kBytes == 1 ? scales_[token - first_token_] : 1.f;
  }

  // Two neighbouring tokens of a row: the sums times the scales, plus bias, rounded.
  __device__ __forceinline__ static u32 finish(Sum first, Sum second, float scale, float shift, const float (&token)[2]) {
    return T::Out::pack2(static_cast<float>(first) * scale * token[0] + shift,
                         static_cast<float>(second) * scale * token[1] + shift);
  }

  // Few tokens: 8x8 blocks are turned around in registers; a lane then holds two neighbouring rows of a token.
  __device__ __forceinline__ void store_directly(const Sum (&acc)[C::kTokenTiles][4], int tile, int token0,
                                                 const float (&scale)[2], const float (&shift)[2], int begin,
                                                 int end) const {
    u16* y = static_cast<u16*>(p_.y);
#pragma unroll
    for (int nt = 0; nt < C::kTokenTiles; ++nt) {
      if (nt < begin || nt >= end) continue;
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
      const u32 buffer = buffers_ + group * C::kStoreBytes + (rt * kSlabs + slab) % 2 * (C::kStoreBytes / 2);
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
          store_rows(p_, token0 + token, row, load_shared16(buffer + token * C::kStoreStride + threadIdx.x % 8 * 16));
      }
    }
  }
};

}  // namespace tsld
