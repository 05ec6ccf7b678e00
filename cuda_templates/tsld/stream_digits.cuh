// One or two tokens times ternary weights on the 8-bit tensor cores, as exact as on the 16-bit ones.
//
// What a stream kernel spends most instructions on is turning codes into operands. The activations stay exact to 28 bits
// below a token's largest: x = X * 2^-s with X = round(x * 2^s) = high * 2^15 + low, and high and low are two signed digits
// to the base 256 each. The digits take the place of tokens in the operand: an instruction multiplies with 8 columns, and
// one token would use one of them. Sums of each digit are exact 32-bit integers (up to 2^17 inputs); they meet in float32
// when a warp's share of a row is done.
//
// A byte of codes holds weights of four places: of rows g and g+8, of two inputs. One instruction makes operands of four
// bytes, without a shift: with 10 exchanged, codes 00, 01, 11 are 2 + weight, times 64, 16, 4 or 1. Rows and inputs of one
// place meet in accumulators of their own, which are scaled back and lose twice the sum of the digits when they are joined.
#pragma once

#include "tsld/layout.cuh"
#include "tsld/params.cuh"

namespace tsld {

constexpr int kDigitsOf = 4;

// Shared memory of one chunk of 128 inputs: [pairs of tokens][halves of the chunk][column][lane % 4][16 bytes], a column
// being a token's digit; halves and chunks are padded so that neighbours start in other banks.
template <int kTokens>
struct DigitLayout {
  static constexpr int kTiles = ceil_div(kTokens, 2);
  static constexpr int kColumns = kTokens == 1 ? kDigitsOf : 2 * kDigitsOf;
  static constexpr int kHalf = kColumns * 64 + 16;
  static constexpr int kTileBytes = 2 * kHalf;
  static constexpr int kChunkBytes = kTiles * kTileBytes + 32;
};

// Sums of one row tile and pair of tokens: [places][fragment]; places 0: the upper two of a byte.
struct DigitSum {
  int c[2][4];
};

// A warp's sums of one row group.
template <class C>
struct DigitSums {
  DigitSum of[C::kRowTiles][C::kTokenTiles];
  int twice[C::kTokenTiles][4];  // sums of the digits themselves
};

// What makes x of the sums of its digits: two factors (their product may be too small for a float), and whether all
// values are finite. One per token, behind the digits.
struct DigitScale {
  float first, second;
  int finite;
  int pad;
};

// 2^e, e from -126 to 127
__device__ __forceinline__ float power_of_two(int e) { return __uint_as_float(static_cast<u32>(e + 127) << 23); }

// The four codes at a place of four bytes as operands, place 0 the top one.
template <int kPlace>
__device__ __forceinline__ u32 codes_at(u32 word) {
  return xor_and(word, 0xAAAAAAAAu, 0xC0C0C0C0u >> 2 * kPlace);
}

// Where a lane reads digits of a chunk at `x`. Columns past the last repeat the others: never stored.
template <class C>
__device__ __forceinline__ u32 lane_columns(u32 x) {
  return x + threadIdx.x % 32 % (4 * DigitLayout<C::kTokens>::kColumns) * 16;
}

// A lane's codes of the row tiles of a chunk.
template <class C>
__device__ __forceinline__ void load_codes(Vec16 (&codes)[C::kRowTiles], u32 weights) {
#pragma unroll
  for (int rt = 0; rt < C::kRowTiles; ++rt)
    codes[rt] = load_shared16(weights + rt * C::Weights::kBytes + threadIdx.x % 32 * 16);
}

// of[rt][nt] += codes of row tile rt x digits of tokens 2*nt, 2*nt+1, over 128 inputs; twice[nt] += 2 x the digits. x: shared address of the chunk.
template <class C>
__device__ __forceinline__ void multiply_digits(DigitSums<C>& sums, u32 x, u32 weights) {
  auto& acc = sums.of;
  auto& twice = sums.twice;
  using Layout = DigitLayout<C::kTokens>;
  const u32 mine = lane_columns<C>(x);
  const u32 two[4] = {0x02020202u, 0x02020202u, 0x02020202u, 0x02020202u};
  Vec16 codes[C::kRowTiles];
  load_codes<C>(codes, weights);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Vec16 b[C::kTokenTiles];
#pragma unroll
    for (int nt = 0; nt < C::kTokenTiles; ++nt) b[nt] = load_shared16(mine + nt * Layout::kTileBytes + half * Layout::kHalf);
#pragma unroll
    for (int nt = 0; nt < C::kTokenTiles; ++nt) mma_unsigned(twice[nt], two, b[nt].w[0], b[nt].w[1]);
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt) {
      const u32 first = codes[rt].w[half * 2], second = codes[rt].w[half * 2 + 1];
      const u32 upper[4] = {codes_at<0>(first), codes_at<1>(first), codes_at<0>(second), codes_at<1>(second)};
      const u32 lower[4] = {codes_at<2>(first), codes_at<3>(first), codes_at<2>(second), codes_at<3>(second)};
#pragma unroll
      for (int nt = 0; nt < C::kTokenTiles; ++nt) {
        mma_unsigned(acc[rt][nt].c[0], upper, b[nt].w[0], b[nt].w[1]);
        mma_unsigned(acc[rt][nt].c[1], lower, b[nt].w[2], b[nt].w[3]);
      }
    }
#pragma unroll
    for (int nt = 0; nt < C::kTokenTiles; ++nt) mma_unsigned(twice[nt], two, b[nt].w[2], b[nt].w[3]);
  }
}

// A lane's sums of two digits for rows g and g+8, added to those of the block: `to` [row][digit].
template <class C>
__device__ __forceinline__ void add_digits(int* to, const DigitSums<C>& sums, int rt, int nt, bool wanted) {
  if (!wanted) return;
  const DigitSum& sum = sums.of[rt][nt];
  to += threadIdx.x % 2 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int upper = sum.c[0][2 * half + i] >> (half ? 4 : 6), lower = sum.c[1][2 * half + i] >> (half ? 0 : 2);
      atomicAdd(to + half * 8 * kDigitsOf + i, upper + lower - sums.twice[nt][i]);
    }
}

// The sums of a row's digits, or with groups of the two halves of x -> that of x
template <int kGroup>
__device__ __forceinline__ float join_digits(const int* sums, const DigitScale& scale) {
  const Vec16 d = *reinterpret_cast<const Vec16*>(sums);
  float v[kDigitsOf];
#pragma unroll
  for (int i = 0; i < kDigitsOf; ++i) v[i] = __int2float_rn(static_cast<int>(d.w[i]));
  if constexpr (kGroup != 0) return (v[0] * 32768.f + v[1]) * scale.first * scale.second;
  return ((v[0] * 8388608.f + v[1] * 32768.f) + (v[2] * 256.f + v[3])) * scale.first * scale.second;
}

// Inputs k0 .. end - 1 of a row and a token without digits, one product after another: 0 * Inf is NaN, as everywhere. Slow.
template <class T, int kGroup>
__device__ __forceinline__ float exact_row(const GemmParams& p, int token, int row, int k0, int end) {
  const u16* x = static_cast<const u16*>(p.x) + token * p.ldx;
  const u32* tile = static_cast<const u32*>(p.weights) + static_cast<i64>(row / 16) * p.chunks * 128;
  const u16* scales = static_cast<const u16*>(p.meta) + static_cast<i64>(row / 16) * p.chunks * 16 + row % 16;
  float sum = 0.f;
#pragma unroll 1
  for (int k = k0; k < end; ++k) {
    const int lane = row % 8 * 4 + k % 8 / 2, part = 4 * (k / 16 % 2) + 2 * (k / 8 % 2) + row / 8 % 2;
    const u32 code = tile[k / 128 * 128 + lane * 4 + k % 128 / 32] >> (14 - 2 * part + 16 * (k % 2)) & 3;
    const float weight = code == 1 ? 2.f : code == 3 ? -2.f : 0.f;
    sum += (kGroup ? weight * Fp16::to_float(scales[k / 128 * 16]) : weight) * T::to_float(x[k]);
  }
  return sum;
}

}  // namespace tsld
