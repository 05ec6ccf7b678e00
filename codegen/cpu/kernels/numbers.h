// Numbers as the kernels see them: bits of floats, and vectors.
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

// Sixteen values at once: vector types of GNU C++, which compilers lower to what the level has.
typedef float Floats16 __attribute__((vector_size(64)));
typedef int32_t Ints16 __attribute__((vector_size(64)));
typedef uint32_t Words16 __attribute__((vector_size(64)));
typedef uint16_t Halves16 __attribute__((vector_size(32)));
typedef int8_t Bytes16 __attribute__((vector_size(16)));
typedef uint8_t Codes16 __attribute__((vector_size(16)));

static TSLD_INLINE int load32(const void* from) {
  int value;
  memcpy(&value, from, 4);
  return value;
}

}  // namespace tsld_cpu
