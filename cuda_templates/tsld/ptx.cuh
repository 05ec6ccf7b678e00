// Thin wrappers of the PTX instructions that the kernels use. No CUDA header is included anywhere in this
// folder: the same source compiles under nvcc and under NVRTC without an include path of the toolkit.
// Reference: PTX ISA (docs.nvidia.com/cuda/parallel-thread-execution), sections named beside each group.
#pragma once

namespace tsld {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

struct alignas(16) Vec16 {
  u32 w[4];
};

template <bool kWhich, class A, class B>
struct If {
  using type = A;
};
template <class A, class B>
struct If<false, A, B> {
  using type = B;
};

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int imax(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int imin(int a, int b) { return a < b ? a : b; }

__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// ---- cp.async (sm_80): 16 bytes from global to shared memory, past L1 -------------------------------------

// Weights are read once per call: evict-first keeps them from pushing activations out of L2.
__device__ __forceinline__ u64 evict_first_policy() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void cp_async_stream(u32 dst, const void* src, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "l"(policy)
               : "memory");
}

// Copies `bytes` (0 to 16) and fills the rest of the 16 with zeros.
__device__ __forceinline__ void cp_async_zfill(u32 dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}

// Copies 16 bytes, or nothing.
__device__ __forceinline__ void cp_async_if(u32 dst, const void* src, bool wanted) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p cp.async.cg.shared.global [%0], [%1], 16;\n}\n" ::"r"(dst), "l"(src),
               "r"(static_cast<int>(wanted))
               : "memory");
}

// Brings 32 bytes or more from memory to L2: what is read at a kernel's end would come late otherwise.
__device__ __forceinline__ void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p) : "memory");
}

// Loads a constant of the layer now, whatever the compiler thinks, because it is needed at the end.
__device__ __forceinline__ float load_early(const float* p) {
  float v;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}

// Loads 16 bytes here; the compiler moves other loads to where they are used, behind branches.
__device__ __forceinline__ Vec16 load16_early(const void* p) {
  Vec16 v;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p)
               : "memory");
  return v;
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` of this thread's committed groups are still in flight.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ---- shared memory -> registers ---------------------------------------------------------------------------

__device__ __forceinline__ Vec16 load_shared16(u32 address) {
  Vec16 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ u16 load_shared2(u32 address) {
  u16 v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
  return v;
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l%8 of matrix l/8.
__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Transposes an 8x8 matrix of 16-bit elements held two to a lane (row l/4, columns 2*(l%4), +1).
__device__ __forceinline__ u32 transpose8x8(u32 v) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

// ---- programmatic dependent launch (sm_90): no effect in a launch without the attribute --------------------

// Everything that earlier kernels of the stream wrote is visible after this.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream start its prologue (it must itself wait before it touches our results).
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- global memory across blocks (split-K) ----------------------------------------------------------------

__device__ __forceinline__ void store_float4_l2(float* p, const float (&v)[4]) {
  asm volatile("st.global.cg.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(p), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
               : "memory");
}

// The same for sums of integers, bit for bit.
__device__ __forceinline__ void store_float4_l2(float* p, const int (&v)[4]) {
  const float f[4] = {__int_as_float(v[0]), __int_as_float(v[1]), __int_as_float(v[2]), __int_as_float(v[3])};
  store_float4_l2(p, f);
}

__device__ __forceinline__ void load_float4_l2(float (&v)[4], const float* p) {
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "l"(p)
               : "memory");
}

__device__ __forceinline__ void load_float4_l2(int (&v)[4], const float* p) {
  float f[4];
  load_float4_l2(f, p);
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = __float_as_int(f[i]);
}

// Counts a block in and returns how many came before. What the block wrote before a barrier is visible to those that come
// later. (__threadfence would wait for more.)
__device__ __forceinline__ int arrive_at(int* counter) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// 2^v; exp2f takes care of denormal results in three more instructions
__device__ __forceinline__ float power_of_two_of(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// (a ^ b) & c in one instruction
__device__ __forceinline__ u32 xor_and(u32 a, u32 b, u32 c) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0x28;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// ---- int8: c[16 rows x 8 columns] += a[16 x 32] * b[32 x 8], exact ----------------------------------------

__device__ __forceinline__ void mma_int8(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with bytes of a from 0 to 255.
__device__ __forceinline__ void mma_unsigned(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- half precision types: what differs between fp16 and bf16 ----------------------------------------------

struct Fp16 {
  using Out = Fp16;   // type of y
  using Sum = float;  // of the accumulators
  static constexpr bool kLargeExponents = false;
  static constexpr int kBytes = 2;
  static constexpr float kWeight = 1.f;  // what row_scale has to be multiplied with
  // c[16 rows x 8 tokens] += a[16 x 16] * b[16 x 8]: mma.m16n8k16, fp32 accumulation
  static __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  static __device__ __forceinline__ u32 sub2(u32 a, u32 b) {
    u32 r;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
  }
  static __device__ __forceinline__ u32 mul2(u32 a, u32 b) {
    u32 r;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
  }
  static __device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
  }
  static __device__ __forceinline__ u32 pack2(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  // The larger of a and |b|, NaN if one is.
  static __device__ __forceinline__ u32 max_magnitude2(u32 a, u32 b) {
    u32 r;
    asm("{\n.reg .b32 t;\nabs.f16x2 t, %2;\nmax.NaN.f16x2 %0, %1, t;\n}\n" : "=r"(r) : "r"(a), "r"(b));
    return r;
  }
  // an fp16 value, twice
  static __device__ __forceinline__ u32 both(u16 v) { return v * 0x10001u; }
  static __device__ __forceinline__ float to_float(u16 v) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
    return r;
  }
};

struct Bf16 {
  using Out = Bf16;
  using Sum = float;
  static constexpr bool kLargeExponents = true;
  static constexpr int kBytes = 2;
  static constexpr float kWeight = 1.f;
  static __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  // sm_80 has no bf16 subtraction: a - b = fma(b, -1, a), exact for the small integers used here
  static __device__ __forceinline__ u32 sub2(u32 a, u32 b) {
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(b), "r"(0xBF80BF80u), "r"(a));
    return r;
  }
  static __device__ __forceinline__ u32 mul2(u32 a, u32 b) {
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000u));
    return r;
  }
  static __device__ __forceinline__ u32 pack2(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  static __device__ __forceinline__ u32 max_magnitude2(u32 a, u32 b) {
    u32 r;
    asm("{\n.reg .b32 t;\nabs.bf16x2 t, %2;\nmax.NaN.bf16x2 %0, %1, t;\n}\n" : "=r"(r) : "r"(a), "r"(b));
    return r;
  }
  static __device__ __forceinline__ u32 both(u16 v) {  // of an fp16 value
    const float f = Fp16::to_float(v);
    return pack2(f, f);
  }
  static __device__ __forceinline__ float to_float(u16 v) { return __uint_as_float(static_cast<u32>(v) << 16); }
};

}  // namespace tsld
