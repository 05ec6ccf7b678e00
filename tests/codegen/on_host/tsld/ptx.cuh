// Stands in for cuda_templates/tsld/ptx.cuh so that a kernel runs on the host: the threads of a block, or of the blocks of
// a cluster, are coroutines that take turns at barriers and warp instructions. Copies happen at once. Only what kernels
// over digits need. Blocks of a cluster lie side by side in memory, so that addresses say whose they are.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static

using std::max;
using std::min;

struct dim3 {
  int x, y, z;
};
struct uint4 {
  unsigned int x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned int x, y;
};
inline uint2 make_uint2(unsigned int x, unsigned int y) { return {x, y}; }

inline dim3 threadIdx, blockIdx, gridDim;

namespace host {

constexpr int kStack = 256 * 1024;

struct Barrier {
  int arrived = 0;
  long generation = 0;
};

struct Fiber {
  ucontext_t context;
  int index, block = 0, thread = 0;
  bool done = false;
  std::vector<char> stack;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline Fiber* current;
inline std::vector<Barrier> barriers;  // of the cluster, its blocks, then the warps
inline int block_threads, blocks;
inline size_t block_bytes;             // of shared memory
inline std::vector<uint64_t> lanes;    // what each thread shows its warp
inline char* shared_base;
inline void (*body)();

inline void arrive_and_wait(Barrier& barrier, int count) {
  const long generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0, ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) swapcontext(&current->context, &scheduler);
}
inline void sync_cluster() { arrive_and_wait(barriers[0], static_cast<int>(fibers.size())); }
inline void sync_block() { arrive_and_wait(barriers[1 + current->block], block_threads); }
inline void sync_warp() { arrive_and_wait(barriers[1 + blocks + current->index / 32], 32); }

// Every lane shows a value; f(value of lane i) for the lanes of this warp.
template <class F>
inline void exchange(uint64_t mine, F f) {
  lanes[current->index] = mine;
  sync_warp();
  f(&lanes[current->index / 32 * 32]);
  sync_warp();
}

inline void enter() {
  body();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

// Runs the blocks of a cluster along z (one without clusters), from blockIdx on; `backwards`: the last thread goes first.
inline void run_block(int threads, void (*f)(), bool backwards, int cluster = 1) {
  body = f, block_threads = threads, blocks = cluster;
  const dim3 first = blockIdx;
  fibers = std::vector<Fiber>(threads * cluster);
  barriers.assign(1 + cluster + fibers.size() / 32, {});
  lanes.assign(fibers.size(), 0);
  for (int i = 0; i < static_cast<int>(fibers.size()); ++i) {
    Fiber& fiber = fibers[i];
    fiber.index = i, fiber.block = i / threads, fiber.thread = i % threads, fiber.stack.resize(kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, enter, 0);
  }
  for (size_t left = fibers.size(); left > 0;)
    for (size_t n = 0; n < fibers.size(); ++n) {
      Fiber& fiber = fibers[backwards ? fibers.size() - 1 - n : n];
      if (fiber.done) continue;
      current = &fiber, threadIdx = {fiber.thread, 0, 0}, blockIdx = {first.x, first.y, first.z + fiber.block};
      swapcontext(&scheduler, &fiber.context);
      left -= fiber.done;
    }
}

}  // namespace host

inline void __syncthreads() { host::sync_block(); }
inline void __syncwarp() { host::sync_warp(); }
inline void __threadfence() {}
inline int atomicAdd(int* to, int v) { return (*to += v) - v; }
inline int arrive_at(int* counter) { return (*counter)++; }
inline float __uint_as_float(unsigned int v) {
  float f;
  std::memcpy(&f, &v, 4);
  return f;
}
inline int __float_as_int(float v) {
  int i;
  std::memcpy(&i, &v, 4);
  return i;
}
inline unsigned int __float_as_uint(float v) {
  unsigned int u;
  std::memcpy(&u, &v, 4);
  return u;
}
inline int __shfl_sync(unsigned, int v, int from) {
  host::exchange(v, [&](const uint64_t* all) { v = static_cast<int>(all[from]); });
  return v;
}
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
template <class V>
inline V __shfl_xor_sync(unsigned, V v, int step) {
  static_assert(sizeof(V) == 4);
  unsigned mine, found = 0;
  std::memcpy(&mine, &v, 4);
  const int from = threadIdx.x % 32 ^ step;
  host::exchange(mine, [&](const uint64_t* all) { found = static_cast<unsigned>(all[from]); });
  std::memcpy(&v, &found, 4);
  return v;
}
inline unsigned __vmaxu2(unsigned a, unsigned b) { return max(a >> 16, b >> 16) << 16 | max(a & 0xFFFF, b & 0xFFFF); }
inline unsigned __reduce_max_sync(unsigned, unsigned v) {
  unsigned most = 0;
  host::exchange(v, [&](const uint64_t* all) {
    for (int i = 0; i < 32; ++i) most = max(most, static_cast<unsigned>(all[i]));
  });
  return most;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<unsigned>(both >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
  return out;
}
inline int __float2int_rn(float v) {
  if (!(std::fabs(v) < 2147483648.f)) return v > 0 ? INT32_MAX : v < 0 ? INT32_MIN : 0;
  return static_cast<int>(std::nearbyint(v));
}
inline float __int2float_rn(int v) { return static_cast<float>(v); }
inline float fmaf(float a, float b, float c) { return std::fma(a, b, c); }
template <class V>
inline V __ldcg(const V* p) {
  return *p;
}
inline void __stcg(float* p, float v) { *p = v; }
inline float __expf(float v) { return std::exp(v); }
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }

namespace tsld {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

template <bool kWhich, class A, class B>
struct If {
  using type = A;
};
template <class A, class B>
struct If<false, A, B> {
  using type = B;
};

struct alignas(16) Vec16 {
  u32 w[4];
};

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int imax(int a, int b) { return a > b ? a : b; }
constexpr int imin(int a, int b) { return a < b ? a : b; }

inline u32 shared_address(const void* p) { return static_cast<u32>(static_cast<const char*>(p) - host::shared_base); }
inline u64 evict_first_policy() { return 0; }
inline void cp_async_stream(u32 to, const void* from, u64) { std::memcpy(host::shared_base + to, from, 16); }
inline void cp_async_zfill(u32 to, const void* from, int bytes) {
  std::memset(host::shared_base + to, 0, 16);
  std::memcpy(host::shared_base + to, from, bytes);
}
inline void cp_async_commit() {}
template <int Pending>
inline void cp_async_wait() {}
inline Vec16 load_shared16(u32 address) {
  Vec16 v;
  std::memcpy(&v, host::shared_base + address, 16);
  return v;
}
inline Vec16 load16_early(const void* p) { return *static_cast<const Vec16*>(p); }
inline float power_of_two_of(float v) { return std::exp2(v); }
inline u16 load_shared2(u32 address) {
  u16 v;
  std::memcpy(&v, host::shared_base + address, 2);
  return v;
}
inline u32 xor_and(u32 a, u32 b, u32 c) { return (a ^ b) & c; }
inline void ldmatrix_x4(u32 (&)[4], u32) { std::abort(); }
inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}
inline void prefetch_l2(const void*) {}
inline void store_float4_l2(float* p, const float (&v)[4]) { std::memcpy(p, v, 16); }
inline void load_float4_l2(float (&v)[4], const float* p) { std::memcpy(v, p, 16); }

// PTX ISA, "Matrix Fragments for mma.m16n8k32", 8-bit types.
template <class A>
inline void mma_bytes(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  u32 all_a[32][4], all_b[32][2];
  for (int r = 0; r < 6; ++r)
    host::exchange(r < 4 ? a[r] : r == 4 ? b0 : b1, [&](const uint64_t* all) {
      for (int i = 0; i < 32; ++i) (r < 4 ? all_a[i][r] : all_b[i][r - 4]) = static_cast<u32>(all[i]);
    });
  const int g = host::current->index % 32 / 4, t = host::current->index % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    for (int k = 0; k < 32; ++k)
      c[i] += static_cast<A>(all_a[row % 8 * 4 + k % 16 / 4][row / 8 + 2 * (k / 16)] >> k % 4 * 8) *
              static_cast<signed char>(all_b[column * 4 + k % 16 / 4][k / 16] >> k % 4 * 8);
  }
}
inline void mma_unsigned(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_bytes<u8>(c, a, b0, b1); }
inline void mma_int8(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_bytes<signed char>(c, a, b0, b1); }

struct Fp16 {
  using Out = Fp16;
  using Sum = float;
  static constexpr bool kLargeExponents = false;
  static constexpr int kBytes = 2;
  static constexpr float kWeight = 1.f;
  static void mma(float (&)[4], const u32 (&)[4], u32, u32) { std::abort(); }
  static u32 max_magnitude2(u32 a, u32 b) { return __vmaxu2(a, b & 0x7FFF7FFFu); }  // NaN is larger than Inf
  static u32 sub2(u32, u32) { std::abort(); }
  static u32 mul2(u32, u32) { std::abort(); }
  static u32 fma2(u32, u32, u32) { std::abort(); }
  static u16 bits(float v) {
    const _Float16 h = static_cast<_Float16>(v);
    u16 found;
    std::memcpy(&found, &h, 2);
    return found;
  }
  static u32 pack2(float low, float high) { return bits(low) | static_cast<u32>(bits(high)) << 16; }
  static float to_float(u16 v) {
    _Float16 h;
    std::memcpy(&h, &v, 2);
    return static_cast<float>(h);
  }
};

struct Bf16 {
  using Out = Bf16;
  using Sum = float;
  static constexpr bool kLargeExponents = true;
  static constexpr int kBytes = 2;
  static constexpr float kWeight = 1.f;
  static void mma(float (&)[4], const u32 (&)[4], u32, u32) { std::abort(); }
  static u32 max_magnitude2(u32 a, u32 b) { return __vmaxu2(a, b & 0x7FFF7FFFu); }  // NaN is larger than Inf
  static u32 sub2(u32, u32) { std::abort(); }
  static u32 mul2(u32, u32) { std::abort(); }
  static u32 fma2(u32, u32, u32) { std::abort(); }
  static u16 bits(float v) {
    const u32 u = __float_as_uint(v);
    return v != v ? 0x7FFF : static_cast<u16>((u + 0x7FFF + (u >> 16 & 1)) >> 16);
  }
  static u32 pack2(float low, float high) { return bits(low) | static_cast<u32>(bits(high)) << 16; }
  static float to_float(u16 v) { return __uint_as_float(static_cast<u32>(v) << 16); }
};

}  // namespace tsld
