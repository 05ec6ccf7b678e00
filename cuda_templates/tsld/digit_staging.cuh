// How stream kernels turn x into digits (stream_digits.cuh), normalising it first where the kernel does that too.
//
// What the blocks of a kernel do before and after the products is most of a small product's time: few instructions, loops
// that stay rolled (their code has to be fetched as well), and x in shared memory between the two passes over it.
#pragma once

#include "tsld/stream_digits.cuh"
#include "tsld/stream_fusion.cuh"

namespace tsld {

// Writes the digits of x, normalised where C::kNorm says so (stream_fusion.cuh), and their scales.
template <class C>
class DigitStaging {
  using T = typename C::Type;
  using Layout = DigitLayout<C::kTokens>;
  static constexpr int kAtOnce = C::kNorm ? 2 : 4;  // vectors of eight inputs that a thread loads at once
  static constexpr u32 kMagic = 0x4B400000u;        // 1.5 * 2^23: floats from here on are integers

  const GemmParams& p_;
  const int token0_, tokens_;
  const int k0_, vecs_;   // the block's inputs: all of them where x is normalised
  char* const raw_;       // of a token, 16 bits each; then the norm's weight
  u32 most_weight_ = 0;   // largest magnitude of the weights that this thread has seen

 public:
  __device__ __forceinline__ DigitStaging(const GemmParams& p, int token0, int first_chunk, int chunks, char* raw)
      : p_(p), token0_(token0), tokens_(min(C::kTokens, p.m - token0)), k0_(first_chunk * kChunk), vecs_(chunks * 16), raw_(raw) {}

  // Before the copies of weights, behind which it would come late.
  __device__ __forceinline__ void fetch_weight() const {
    if constexpr (C::kNorm) {
#pragma unroll 1
      for (int v = threadIdx.x; v < vecs_; v += C::kThreads) {
        const bool any = v < p_.k / 8;
        const Vec16* weight = static_cast<const Vec16*>(p_.norm_weight) + (any ? v : 0);
        cp_async_zfill(shared_address(raw_ + (vecs_ + v) * 16), weight, any ? 16 : 0);
      }
      cp_async_commit();
    }
  }

  // scratch: kWarps vectors. Ends with a barrier.
  __device__ __forceinline__ void stage(char* x, DigitScale* scales, Vec16* scratch) {
#pragma unroll 1
    for (int t = 0; t < tokens_; ++t) stage_token(t, x, scales[t], scratch);
  }

 private:
  // Inputs of a vector, zeros past the last.
  __device__ __forceinline__ Vec16 load(const u16* x, int v) const {
    Vec16 found = {};
    const int k = k0_ + v * 8;
    if (v >= vecs_ || k >= p_.k) return found;
    if constexpr (C::kNorm) return load16_early(x + k);
    if (k + 8 <= p_.k) return *reinterpret_cast<const Vec16*>(x + k);
#pragma unroll 1
    for (int i = 7; i >= 0; --i) {
      const u16 last = k + i < p_.k ? x[k + i] : 0;
#pragma unroll
      for (int j = 3; j >= 0; --j) found.w[j] = found.w[j] << 16 | (j > 0 ? found.w[j - 1] >> 16 : last);
    }
    return found;
  }

  // Largest magnitude so far of both halves, as 16 bits each: NaN is larger than Inf.
  static __device__ __forceinline__ u32 larger(u32 largest, const Vec16& v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = __vmaxu2(largest, v.w[i] & 0x7FFF7FFFu);
    return largest;
  }

  __device__ __forceinline__ void stage_token(int token, char* x, DigitScale& scale, Vec16* scratch) {
    const u16* from = static_cast<const u16*>(p_.x) + (token0_ + token) * p_.ldx;
    u32 largest = 0;
    float squares = 0.f;
#pragma unroll 1
    for (int first = threadIdx.x; first < vecs_; first += kAtOnce * C::kThreads) {
      Vec16 raw[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) raw[i] = load(from, first + i * C::kThreads);
      if constexpr (C::kNorm) prepare(raw, token, first);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        largest = larger(largest, raw[i]);
        if constexpr (C::kNorm) {
          float s[8];
          unpack8<T>(s, raw[i]);
#pragma unroll
          for (int j = 0; j < 8; ++j) squares += s[j] * s[j];
        }
        if (first + i * C::kThreads < vecs_) reinterpret_cast<Vec16*>(raw_)[first + i * C::kThreads] = raw[i];
      }
    }
    if (threadIdx.x == 0) scale.finite = 1;
    const float norm = gather(largest, squares, scratch);

    float most = T::to_float(static_cast<u16>(largest)) * norm;
    if constexpr (C::kNorm) most = (most + T::to_float(1)) * T::to_float(static_cast<u16>(largest >> 16)) * 1.02f + T::to_float(1);  // rounded twice
    const bool finite = most <= 3.402823466e38f;   // false for NaN too
    const int exponent = finite && most > 0.f ? static_cast<int>(__float_as_uint(most) >> 23) - 127 : 0;
    const int shift = 13 - exponent;               // |high| < 2^14
    const int half = T::kLargeExponents ? shift / 2 : 0;  // 2^shift may be too large for a float
    const float up[2] = {power_of_two(half), power_of_two(shift - half)};
    if (threadIdx.x == 0) {                        // row_scale expects codes of +-2; here they are +-1
      scale.first = power_of_two(1 - shift / 2), scale.second = power_of_two(shift / 2 - shift) / 32768.f;
    }
    u32 strange = 0;
    char* to = x + token / 2 * Layout::kTileBytes + token % 2 * (kDigitsOf * 64);
#pragma unroll 1
    for (int item = threadIdx.x; item < vecs_; item += C::kThreads) write(item, norm, up, to, strange);
    if (!finite || strange >> 23) scale.finite = 0;  // after the barrier that set it
    __syncthreads();
  }

  // Adds the residual to vectors of x; looks at the norm's weight while both come.
  __device__ __forceinline__ void prepare(Vec16 (&raw)[kAtOnce], int token, int first) {
    const i64 row = static_cast<i64>(token0_ + token) * p_.k;
    Vec16 other[kAtOnce] = {};
    if (p_.residual != nullptr)
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) other[i] = load(static_cast<const u16*>(p_.residual) + row, first + i * C::kThreads);
    cp_async_wait<C::kStages - 1>();  // for the weight, which was the first copy
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * C::kThreads < vecs_)
        most_weight_ = larger(most_weight_, reinterpret_cast<const Vec16*>(raw_)[vecs_ + first + i * C::kThreads]);
    if (p_.residual == nullptr) return;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float s[8], r[8];
      unpack8<T>(s, raw[i]);
      unpack8<T>(r, other[i]);
#pragma unroll
      for (int j = 0; j < 8; ++j) s[j] += r[j];
      raw[i] = pack8<T>(s);
      const int v = first + i * C::kThreads;
      if (blockIdx.x == 0 && v < p_.k / 8) reinterpret_cast<Vec16*>(static_cast<u16*>(p_.total) + row)[v] = raw[i];
    }
  }

  // Over the block, in a fixed order: largest magnitudes of x and (upper half) of the weight; returns what normalises x.
  __device__ __forceinline__ float gather(u32& largest, float squares, Vec16* scratch) const {
    largest = __reduce_max_sync(~0u, max(largest & 0xFFFFu, largest >> 16));
    u32 weight = 0;
    if constexpr (C::kNorm) {
      weight = __reduce_max_sync(~0u, max(most_weight_ & 0xFFFFu, most_weight_ >> 16));
#pragma unroll
      for (int step = 16; step; step /= 2) squares += __shfl_xor_sync(~0u, squares, step);
    }
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = {largest, weight, __float_as_uint(squares), 0};
    __syncthreads();
    squares = 0.f;
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) {
      const Vec16 found = scratch[w];
      largest = max(largest, found.w[0]);
      weight = max(weight, found.w[1]);
      squares += __uint_as_float(found.w[2]);
    }
    largest |= weight << 16;
    return C::kNorm ? rsqrtf(squares / p_.k + p_.eps) : 1.f;
  }

  static __device__ __forceinline__ void unpack4(float (&v)[4], const uint2& raw) {
    v[0] = T::to_float(static_cast<u16>(raw.x)), v[1] = T::to_float(static_cast<u16>(raw.x >> 16));
    v[2] = T::to_float(static_cast<u16>(raw.y)), v[3] = T::to_float(static_cast<u16>(raw.y >> 16));
  }
  static __device__ __forceinline__ uint2 pack4(const float (&v)[4]) {
    return make_uint2(T::pack2(v[0], v[1]), T::pack2(v[2], v[3]));
  }

  // Digits of an item to their places: 8 inputs, four of them 16 inputs behind the others, which fill whole words of the
  // operand (narrow.cuh says which input goes where). `strange` gets bits from 23 on where a value is no such integer.
  __device__ __forceinline__ void write(int item, float norm, const float (&up)[2], char* to, u32& strange) const {
    const int word = item / 4 % 4, h = item / 2 % 2, t = item % 2 * 2;
    const char* from = raw_ + item / 4 * 64 + item % 4 * 8;
    to += item / 16 * Layout::kChunkBytes + word / 2 * Layout::kHalf + t * 16 + (h * 2 + word % 2) * 4;
    u32 high[2][4], low[2][4];  // bytes 0 and 1 are digits + 128
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      float s[4], w[4];
      unpack4(s, *reinterpret_cast<const uint2*>(from + step * 32));
      if constexpr (C::kNorm) {
        unpack4(w, *reinterpret_cast<const uint2*>(from + vecs_ * 16 + step * 32));
#pragma unroll
        for (int j = 0; j < 4; ++j) s[j] *= norm;
        unpack4(s, pack4(s));
#pragma unroll
        for (int j = 0; j < 4; ++j) s[j] *= w[j];
        unpack4(s, pack4(s));
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float magic = __uint_as_float(kMagic + 0x8080u), wide = T::kLargeExponents ? s[j] * up[0] : s[j];
        const float whole = fmaf(wide, up[1], magic), rest = fmaf(wide, up[1], magic - whole);
        high[step][j] = __float_as_uint(whole), low[step][j] = __float_as_uint(fmaf(rest, 32768.f, magic));
        if constexpr (C::kNorm) strange |= high[step][j] ^ kMagic;  // elsewhere `finite` says it
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      u32* column = reinterpret_cast<u32*>(to + i * 16);
      put_digits(column, high, i);
      put_digits(column + 32, low, i);
    }
  }

  // Words of the operand, more significant digits first; a column is 16 words.
  static __device__ __forceinline__ void put_digits(u32* column, const u32 (&digits)[2][4], int i) {
    const u32 first = __byte_perm(digits[1][2 * i], digits[0][2 * i], 0x5140);
    const u32 second = __byte_perm(digits[1][2 * i + 1], digits[0][2 * i + 1], 0x5140);
    column[0] = __byte_perm(first, second, 0x7632) ^ 0x80808080u;
    column[16] = __byte_perm(first, second, 0x5410) ^ 0x80808080u;
  }
};

}  // namespace tsld
