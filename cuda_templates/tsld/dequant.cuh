// Codes -> fragment registers (two 16-bit floats each). One call turns a lane's codes of 32 inputs x 16 rows into
// the A operands of two mma.m16n8k16 steps. The results are exact: small integers, scaled later in fp32.
#pragma once

#include "tsld/layout.cuh"

namespace tsld {

// Zero points of the lane's rows g and g+8 in the form that the subtraction wants.
template <class T, int kBits>
struct ZeroPoint;

// ---- ternary: 00 = 0, 01 = +1, 11 = -1. In the two top bits of a half, 01 is 0x4000 = +2.0 and 11 is 0xC000 = -2.0
// in fp16 and in bf16 alike, so one shift and one AND give two weights. The factor 2 is folded into the scale.
// Register j (0..7) of the word: first input at bits 14-2j, second at bits 30-2j.
template <class T>
struct ZeroPoint<T, 2> {
  __device__ __forceinline__ void set(int, u32) {}
};

template <class T>
__device__ __forceinline__ void dequant_pair(u32 (&a)[2][4], const u32 (&words)[1], const ZeroPoint<T, 2>&) {
#pragma unroll
  for (int j = 0; j < 8; ++j) a[j / 4][j % 4] = (words[0] << (2 * j)) & 0xC000C000u;
}

// ---- 4 bits: or-ing a code into the mantissa of 1024 (fp16) or 128 (bf16) adds it; subtract that + zero point.
// Register j (0..3) of word s (step s): first input at bits 4j, second at bits 16+4j. In fp16 the odd registers (row
// g+8) take their codes where they lie, four bits higher: (1024 + 16 code) / 16 - (64 + zero), exact as well.

// (word & mask) | base, in one instruction: left to itself, the compiler takes two, with a constant each
__device__ __forceinline__ u32 and_or(u32 word, u32 mask, u32 base) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(word), "r"(mask), "r"(base));
  return r;
}

template <>
struct ZeroPoint<Fp16, 4> {
  u32 v[2];  // 1024 + zero; -(64 + zero)
  __device__ __forceinline__ void set(int half, u32 zero) {
    v[half] = half == 0 ? 0x64006400u | zero | (zero << 16) : 0xD400D400u | (zero << 4) | (zero << 20);
  }
};

template <>
struct ZeroPoint<Bf16, 4> {
  u32 v[2];
  __device__ __forceinline__ void set(int half, u32 zero) { v[half] = 0x43004300u | zero | (zero << 16); }
};

__device__ __forceinline__ void dequant_pair(u32 (&a)[2][4], const u32 (&words)[2], const ZeroPoint<Fp16, 4>& zero) {
#pragma unroll
  for (int s = 0; s < 2; ++s)
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const u32 word = words[s] >> (4 * j);
      a[s][j] = Fp16::sub2(and_or(word, 0x000F000Fu, 0x64006400u), zero.v[0]);
      a[s][j + 1] = Fp16::fma2(and_or(word, 0x00F000F0u, 0x64006400u), 0x2C002C00u, zero.v[1]);  // x 1/16
    }
}

__device__ __forceinline__ void dequant_pair(u32 (&a)[2][4], const u32 (&words)[2], const ZeroPoint<Bf16, 4>& zero) {
#pragma unroll
  for (int s = 0; s < 2; ++s)
#pragma unroll
    for (int j = 0; j < 4; ++j) a[s][j] = Bf16::sub2(and_or(words[s] >> (4 * j), 0x000F000Fu, 0x43004300u), zero.v[j % 2]);
}

// ---- 8 bits: a byte permutation builds 1024 + code in fp16; bf16 has too few mantissa bits for that, so it goes
// through fp32 (2^23 + code). code - zero lies in [-255, 255], exact in both types.
// Word 2s+h of step s holds registers 2h and 2h+1: bytes (first, second) input of each.
template <>
struct ZeroPoint<Fp16, 8> {
  u32 v[2];
  __device__ __forceinline__ void set(int half, u32 zero) { v[half] = 0x64006400u | zero | (zero << 16); }
};

template <>
struct ZeroPoint<Bf16, 8> {
  float v[2];
  __device__ __forceinline__ void set(int half, u32 zero) { v[half] = __uint_as_float(0x4B000000u | zero); }
};

__device__ __forceinline__ void dequant_pair(u32 (&a)[2][4], const u32 (&words)[4], const ZeroPoint<Fp16, 8>& zero) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 low = __byte_perm(words[i], 0x64646464u, 0x4140);
    const u32 high = __byte_perm(words[i], 0x64646464u, 0x4342);
    a[i / 2][2 * (i % 2)] = Fp16::sub2(low, zero.v[0]);
    a[i / 2][2 * (i % 2) + 1] = Fp16::sub2(high, zero.v[1]);
  }
}

__device__ __forceinline__ void dequant_pair(u32 (&a)[2][4], const u32 (&words)[4], const ZeroPoint<Bf16, 8>& zero) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float f[4];
#pragma unroll
    for (int b = 0; b < 4; ++b)
      f[b] = __uint_as_float(__byte_perm(words[i], 0x4B000000u, 0x7540 + b)) - zero.v[b / 2];
    a[i / 2][2 * (i % 2)] = Bf16::pack2(f[0], f[1]);
    a[i / 2][2 * (i % 2) + 1] = Bf16::pack2(f[2], f[3]);
  }
}

}  // namespace tsld
