// Eight 16-bit values as one 16-byte vector, and roundings to their type.
#pragma once

#include "tsld/ptx.cuh"

namespace tsld {

template <class T>
__device__ __forceinline__ float round_to(float v) {
  return T::to_float(static_cast<u16>(T::pack2(v, 0.f)));
}

template <class T>
__device__ __forceinline__ void unpack8(float (&v)[8], const Vec16& from) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = T::to_float(static_cast<u16>(from.w[i]));
    v[2 * i + 1] = T::to_float(static_cast<u16>(from.w[i] >> 16));
  }
}

template <class T>
__device__ __forceinline__ Vec16 pack8(const float (&v)[8]) {
  Vec16 out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.w[i] = T::pack2(v[2 * i], v[2 * i + 1]);
  return out;
}

// silu(v), rounded
template <class T>
__device__ __forceinline__ float rounded_silu(float v) {
  return round_to<T>(v / (1.f + __expf(-v)));
}

}  // namespace tsld
