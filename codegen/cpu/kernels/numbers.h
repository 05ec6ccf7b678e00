// float16 and bfloat16 from and to float32, in integer arithmetic that compilers vectorise; exact, ties to even.
#pragma once
#include <stdint.h>
#include <string.h>

#define TSLD_INLINE inline __attribute__((always_inline))

namespace tsld_cpu {

static TSLD_INLINE float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static TSLD_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static TSLD_INLINE float from_bf16(uint16_t h) { return as_float(static_cast<uint32_t>(h) << 16); }

static TSLD_INLINE float from_f16(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13, sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f);  // subnormals come out right, too
  return as_float(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}

static TSLD_INLINE uint16_t to_bf16(float value) {
  const uint32_t bits = as_bits(value), rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40 : rounded);
}

static TSLD_INLINE uint16_t to_f16(float value) {
  const uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  const uint32_t tiny = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;  // below 2^-14: 0.5 has the ulp of 2^-24
  uint32_t half = magnitude < 0x38800000u ? tiny : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return static_cast<uint16_t>(sign | half);
}

}  // namespace tsld_cpu
