// One or two tokens times ternary weights on the 8-bit tensor cores, as exact as on the 16-bit ones.
//
// What a stream kernel spends most instructions on is turning codes into operands. As int8, an AND and a shift give four
// weights (narrow.cuh) instead of two. The activations stay exact to 30 bits below a token's largest: x = X * 2^-s with
// X = round(x * 2^s), a 32-bit integer of four signed digits to the base 256. The digits take the place of tokens in the
// operand: an instruction multiplies with 8 columns, and one token would use one of them. Sums of each digit are exact
// 32-bit integers (up to 2^17 inputs); they meet in float32 when a warp's share of a row is done.
#pragma once

#include "tsld/narrow.cuh"
#include "tsld/stream_fusion.cuh"

namespace tsld {

constexpr int kDigitsOf = 4;

// Shared memory of one chunk of 128 inputs: [pairs of tokens][halves of the chunk][column][lane % 4][16 bytes], a column
// being a token's digit; padded so that neighbouring chunks start in other banks.
template <int kTokens>
struct DigitLayout {
  static constexpr int kTiles = ceil_div(kTokens, 2);
  static constexpr int kColumns = kTokens == 1 ? kDigitsOf : 2 * kDigitsOf;
  static constexpr int kHalf = kColumns * 64;
  static constexpr int kChunkBytes = kTiles * 2 * kHalf + 16;
};

// What makes x of the sums of its digits: two factors (their product may be too small for a float), and whether all
// values are finite. One per token, behind the digits.
struct DigitScale {
  float first, second;
  int finite;
  int pad;
};

// acc[rt][nt] += codes of row tile rt x digits of tokens 2*nt, 2*nt+1, over 128 inputs. x: shared address of the chunk.
template <class C>
__device__ __forceinline__ void multiply_digits(int (&acc)[C::kRowTiles][C::kTokenTiles][4], u32 x, u32 weights) {
  using Layout = DigitLayout<C::kTokens>;
  const int lane = threadIdx.x % 32;
  const u32 mine = x + lane % (4 * Layout::kColumns) * 16;  // columns past the last repeat the others: never stored
  Vec16 codes[C::kRowTiles];
#pragma unroll
  for (int rt = 0; rt < C::kRowTiles; ++rt)
    codes[rt] = load_shared16(weights + rt * C::Weights::kBytes + lane * 16);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Vec16 b[C::kTokenTiles];
#pragma unroll
    for (int nt = 0; nt < C::kTokenTiles; ++nt) b[nt] = load_shared16(mine + (nt * 2 + half) * Layout::kHalf);
#pragma unroll
    for (int word = 0; word < 2; ++word)
#pragma unroll
      for (int rt = 0; rt < C::kRowTiles; ++rt) {
        u32 a[4];
        dequant_narrow(a, codes[rt].w[half * 2 + word]);
#pragma unroll
        for (int nt = 0; nt < C::kTokenTiles; ++nt)
          mma_int8(acc[rt][nt], a, b[nt].w[2 * word], b[nt].w[2 * word + 1]);
      }
  }
}

// 2^e, e from -126 to 127
__device__ __forceinline__ float power_of_two(int e) { return __uint_as_float(static_cast<u32>(e + 127) << 23); }

// Writes the digits of x, normalised first where C::kNorm says so (stream_fusion.cuh), and their scales.
//
// An item is what one thread takes at once: 16 inputs of a token, those at 8*h and at 8*(h + 2) of 32 inputs, which fill
// whole words of the operand (narrow.cuh says which input goes where).
template <class C>
class DigitStaging {
  using T = typename C::Type;
  using Layout = DigitLayout<C::kTokens>;
  static constexpr int kKept = 2;  // items of a token that a thread keeps in registers; others are read again

  struct Item {
    Vec16 v[2];
  };

  const GemmParams& p_;
  const int token0_, tokens_;
  const int k0_, items_;  // the block's inputs: all of them where x is normalised
  Item weight_[C::kNorm ? kKept : 1];

 public:
  __device__ __forceinline__ DigitStaging(const GemmParams& p, int token0, int first_chunk, int chunks)
      : p_(p), token0_(token0), tokens_(min(C::kTokens, p.m - token0)), k0_(first_chunk * kChunk), items_(chunks * 8) {}

  // Before the wait for earlier kernels.
  __device__ __forceinline__ void fetch_weight() {
    if constexpr (C::kNorm) {
#pragma unroll
      for (int n = 0; n < kKept; ++n) weight_[n] = weight_of(threadIdx.x + n * C::kThreads);
    }
  }

  // scratch: 3 * kWarps words. Ends with a barrier.
  __device__ __forceinline__ void stage(char* x, DigitScale* scales, u32* scratch) const {
#pragma unroll
    for (int t = 0; t < C::kTokens; ++t)
      if (t < tokens_) stage_token(t, x, scales[t], scratch);
  }

 private:
  __device__ __forceinline__ int first_input(int item, int q) const {
    return k0_ + item / 2 * 32 + (item % 2 + 2 * q) * 8;
  }

  __device__ __forceinline__ Item weight_of(int item) const {
    Item found = {};
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int k = first_input(item, q);
      if (item < items_ && k < p_.k) found.v[q] = static_cast<const Vec16*>(p_.norm_weight)[k / 8];
    }
    return found;
  }

  // x (+ residual) of an item, zeros past the last input.
  __device__ __forceinline__ Item load(int token, int item) const {
    Item found = {};
    const u16* x = static_cast<const u16*>(p_.x) + (token0_ + token) * p_.ldx;
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int k = first_input(item, q);
      if (item >= items_ || k >= p_.k) continue;
      if (k + 8 <= p_.k) {
        found.v[q] = *reinterpret_cast<const Vec16*>(x + k);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (k + i < p_.k) found.v[q].w[i / 2] |= static_cast<u32>(x[k + i]) << (16 * (i % 2));
      }
    }
    if constexpr (C::kNorm) {
      if (p_.residual != nullptr) {
        const i64 row = static_cast<i64>(token0_ + token) * p_.k;
        Item other = {};
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          const int k = first_input(item, q);
          if (item < items_ && k < p_.k) other.v[q] = *reinterpret_cast<const Vec16*>(static_cast<const u16*>(p_.residual) + row + k);
        }
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          float s[8], r[8];
          unpack8<T>(s, found.v[q]);
          unpack8<T>(r, other.v[q]);
#pragma unroll
          for (int j = 0; j < 8; ++j) s[j] = round_to<T>(s[j] + r[j]);
          found.v[q] = pack8<T>(s);
          const int k = first_input(item, q);
          if (blockIdx.x == 0 && item < items_ && k < p_.k)
            *reinterpret_cast<Vec16*>(static_cast<u16*>(p_.total) + row + k) = found.v[q];
        }
      }
    }
    return found;
  }

  // Largest magnitude (as bits without sign: NaN is larger than Inf) and sum of squares.
  __device__ __forceinline__ static void look_at(const Item& item, u32& largest, float& squares) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        largest = max(largest, max(item.v[q].w[i] & 0x7FFFu, item.v[q].w[i] >> 16 & 0x7FFFu));
      if constexpr (C::kNorm) {
        float s[8];
        unpack8<T>(s, item.v[q]);
#pragma unroll
        for (int j = 0; j < 8; ++j) squares += s[j] * s[j];
      }
    }
  }

  __device__ __forceinline__ void stage_token(int token, char* x, DigitScale& scale, u32* scratch) const {
    Item kept[kKept];
    u32 largest = 0, largest_weight = 0;
    float squares = 0.f, unused = 0.f;
#pragma unroll
    for (int n = 0; n < kKept; ++n) {
      kept[n] = load(token, threadIdx.x + n * C::kThreads);
      look_at(kept[n], largest, squares);
    }
    for (int item = threadIdx.x + kKept * C::kThreads; item < items_; item += C::kThreads)
      look_at(load(token, item), largest, squares);
    if constexpr (C::kNorm) {
#pragma unroll
      for (int n = 0; n < kKept; ++n) look_at(weight_[n], largest_weight, unused);
      for (int item = threadIdx.x + kKept * C::kThreads; item < items_; item += C::kThreads)
        look_at(weight_of(item), largest_weight, unused);
    }
    const int warp = threadIdx.x / 32;
    largest = __reduce_max_sync(~0u, largest);
    if constexpr (C::kNorm) {
      largest_weight = __reduce_max_sync(~0u, largest_weight);
#pragma unroll
      for (int step = 16; step; step /= 2) squares += __shfl_xor_sync(~0u, squares, step);
    }
    if (threadIdx.x % 32 == 0) {
      scratch[warp] = largest;
      scratch[C::kWarps + warp] = largest_weight;
      scratch[2 * C::kWarps + warp] = __float_as_uint(squares);
    }
    if (threadIdx.x == 0) scale.finite = 1;
    __syncthreads();
    squares = 0.f;
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) {
      largest = max(largest, scratch[w]);
      if constexpr (C::kNorm) {
        largest_weight = max(largest_weight, scratch[C::kWarps + w]);
        squares += __uint_as_float(scratch[2 * C::kWarps + w]);
      }
    }
    float norm = 1.f, bound = T::to_float(static_cast<u16>(largest));
    if constexpr (C::kNorm) {
      norm = rsqrtf(squares / p_.k + p_.eps);
      const float tiny = T::to_float(1), weight = T::to_float(static_cast<u16>(largest_weight));
      bound = ((bound * norm + tiny) * weight + tiny) * 1.02f;  // of the products, which are rounded twice
    }
    const bool finite = bound <= 3.402823466e38f;  // false for NaN too
    const int exponent = finite && bound > 0.f ? static_cast<int>(__float_as_uint(bound) >> 23) - 127 : 0;
    const int shift = 29 - exponent;               // |X| < 2^30
    const float up[2] = {power_of_two(shift / 2), power_of_two(shift - shift / 2)};
    const float down[2] = {power_of_two(-(shift / 2)), power_of_two(shift / 2 - shift)};
    if (threadIdx.x == 0) {
      scale.first = down[0] / 32.f, scale.second = down[1];  // row_scale expects codes of +-2; here they are +-64
      if (!finite) scale.finite = 0;
    }
    bool all_finite = true;
#pragma unroll
    for (int n = 0; n < kKept; ++n)
      write(kept[n], C::kNorm ? weight_[C::kNorm ? n : 0] : kept[n], norm, up, token, threadIdx.x + n * C::kThreads, x, all_finite);
    for (int item = threadIdx.x + kKept * C::kThreads; item < items_; item += C::kThreads) {
      const Item again = load(token, item);
      write(again, C::kNorm ? weight_of(item) : again, norm, up, token, item, x, all_finite);
    }
    if (C::kNorm && !all_finite) scale.finite = 0;  // after the barrier that set it
    __syncthreads();
  }

  // Digits of an item to their places.
  __device__ __forceinline__ void write(const Item& item, const Item& weight, float norm, const float (&up)[2], int token,
                                        int number, char* x, bool& all_finite) const {
    if (number >= items_) return;
    u32 digits[2][8];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      float s[8], w[8];
      unpack8<T>(s, item.v[q]);
      if constexpr (C::kNorm) unpack8<T>(w, weight.v[q]);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if constexpr (C::kNorm) {
          s[j] = round_to<T>(w[j] * round_to<T>(s[j] * norm));
          all_finite = all_finite && fabsf(s[j]) <= 3.402823466e38f;
        }
        const u32 whole = static_cast<u32>(__float2int_rn(s[j] * up[0] * up[1]));
        digits[q][j] = (whole + 0x00808080u) ^ 0x00808080u;  // bytes: signed digits, the most significant on top
      }
    }
    const int group = number / 2, h = number % 2, word = group % 4;
    char* to = x + group / 4 * Layout::kChunkBytes + (token / 2 * 2 + word / 2) * Layout::kHalf +
               token % 2 * (kDigitsOf * 64) + (word % 2 * 2 + h) * 4;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const u32 a = digits[1][2 * t], b = digits[0][2 * t], c = digits[1][2 * t + 1], d = digits[0][2 * t + 1];
      const u32 low_ab = __byte_perm(a, b, 0x5140), high_ab = __byte_perm(a, b, 0x7362);
      const u32 low_cd = __byte_perm(c, d, 0x5140), high_cd = __byte_perm(c, d, 0x7362);
      u32* column = reinterpret_cast<u32*>(to + t * 16);
      column[0] = __byte_perm(high_ab, high_cd, 0x7632);
      column[16] = __byte_perm(high_ab, high_cd, 0x5410);
      column[32] = __byte_perm(low_ab, low_cd, 0x7632);
      column[48] = __byte_perm(low_ab, low_cd, 0x5410);
    }
  }
};

// The sums of a lane's digits of rows g and g+8 -> x's part of both, in the lanes of both pairs of digits.
__device__ __forceinline__ void join_digits(float (&v)[2], const int (&c)[4]) {
  const bool low = threadIdx.x % 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    v[half] = low ? __int2float_rn(c[2 * half]) * 256.f + __int2float_rn(c[2 * half + 1])
                  : __int2float_rn(c[2 * half]) * 16777216.f + __int2float_rn(c[2 * half + 1]) * 65536.f;
    v[half] += __shfl_xor_sync(~0u, v[half], 1);
  }
}

// Inputs k0 .. end-1 of a row and a token that is not finite, one product after another: 0 * Inf is NaN, as everywhere.
// Slow.
template <class T>
__device__ __forceinline__ float exact_row(const GemmParams& p, int token, int row, int k0, int end) {
  const u16* x = static_cast<const u16*>(p.x) + token * p.ldx;
  const u32* tile = static_cast<const u32*>(p.weights) + static_cast<i64>(row / 16) * p.chunks * 128;
  float sum = 0.f;
  for (int k = k0; k < end; ++k) {
    const int lane = row % 8 * 4 + k % 8 / 2, part = 4 * (k / 16 % 2) + 2 * (k / 8 % 2) + row / 8 % 2;
    const u32 code = tile[k / 128 * 128 + lane * 4 + k % 128 / 32] >> (14 - 2 * part + 16 * (k % 2)) & 3;
    sum += (code == 1 ? 2.f : code == 3 ? -2.f : 0.f) * T::to_float(x[k]);
  }
  return sum;
}

}  // namespace tsld
