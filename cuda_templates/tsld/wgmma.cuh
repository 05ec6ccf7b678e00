// Hopper's warp-group matrix instruction with the weights in registers and x in shared memory, and the asynchronous
// copies that feed it (sm_90a). Reference: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions", "mbarrier",
// "cp.async.bulk".
#pragma once

#include "tsld/ptx.cuh"

namespace tsld {

// ---- wgmma -----------------------------------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Moves registers between warp groups (all warps of a group execute it).
template <int kCount>
__device__ __forceinline__ void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Keeps the compiler from moving accumulators while an asynchronous product still writes them.
template <int kTokenTiles>
__device__ __forceinline__ void pin(float (&d)[kTokenTiles][4]) {
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[j][i])::"memory");
}

// Shared-memory descriptor of a K-major panel: rows of 128 bytes, 128-byte swizzle, 8 rows to 1024 bytes.
__device__ __forceinline__ u64 panel_descriptor(u32 address) {
  return (static_cast<u64>(1) << 62) | (static_cast<u64>(1024 >> 4) << 32) | (static_cast<u64>(1) << 16) |
         ((address & 0x3FFFF) >> 4);
}

// d[64 rows x 8 * kTokenTiles tokens] += a[64 x 16] * panel^T. d[j] is the fragment of tokens 8j .. 8j+7.
template <class T, int kTokenTiles>
struct Wgmma;

#define TSLD_D1(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define TSLD_D4(j) TSLD_D1(j), TSLD_D1(j + 1), TSLD_D1(j + 2), TSLD_D1(j + 3)
#define TSLD_D16(j) TSLD_D4(j), TSLD_D4(j + 4), TSLD_D4(j + 8), TSLD_D4(j + 12)

#define TSLD_WGMMA_32(T, NAME)                                                                    \
  template <>                                                                                     \
  struct Wgmma<T, 4> {                                                                          \
    static __device__ __forceinline__ void run(float (&d)[4][4], const u32 (&a)[4], u64 panel) { \
      asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." NAME "." NAME " {"               \
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
            "}, {%16, %17, %18, %19}, %20, 1, 1, 1, 0;"                                      \
            : TSLD_D4(0)                                                                         \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(panel));                            \
    }                                                                                             \
  };
TSLD_WGMMA_32(Fp16, "f16")
TSLD_WGMMA_32(Bf16, "bf16")

#define TSLD_WGMMA_64(T, NAME)                                                                    \
  template <>                                                                                     \
  struct Wgmma<T, 8> {                                                                          \
    static __device__ __forceinline__ void run(float (&d)[8][4], const u32 (&a)[4], u64 panel) { \
      asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " {"               \
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
            "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
            "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"                                      \
            : TSLD_D4(0), TSLD_D4(4)                                                                         \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(panel));                            \
    }                                                                                             \
  };
TSLD_WGMMA_64(Fp16, "f16")
TSLD_WGMMA_64(Bf16, "bf16")

#define TSLD_WGMMA_128(T, NAME)                                                                    \
  template <>                                                                                     \
  struct Wgmma<T, 16> {                                                                          \
    static __device__ __forceinline__ void run(float (&d)[16][4], const u32 (&a)[4], u64 panel) { \
      asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " {"               \
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
            "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, " \
            "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, " \
            "%56, %57, %58, %59, %60, %61, %62, %63" \
            "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"                                      \
            : TSLD_D16(0)                                                                         \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(panel));                            \
    }                                                                                             \
  };
TSLD_WGMMA_128(Fp16, "f16")
TSLD_WGMMA_128(Bf16, "bf16")

#define TSLD_WGMMA_256(T, NAME)                                                                    \
  template <>                                                                                     \
  struct Wgmma<T, 32> {                                                                          \
    static __device__ __forceinline__ void run(float (&d)[32][4], const u32 (&a)[4], u64 panel) { \
      asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." NAME "." NAME " {"               \
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
            "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, " \
            "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, " \
            "%56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, " \
            "%74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, " \
            "%92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, " \
            "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, " \
            "%123, %124, %125, %126, %127" \
            "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 0;"                                      \
            : TSLD_D16(0), TSLD_D16(16)                                                                         \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(panel));                            \
    }                                                                                             \
  };
TSLD_WGMMA_256(Fp16, "f16")
TSLD_WGMMA_256(Bf16, "bf16")

#undef TSLD_D1
#undef TSLD_D4
#undef TSLD_D16
#undef TSLD_WGMMA_32
#undef TSLD_WGMMA_64
#undef TSLD_WGMMA_128
#undef TSLD_WGMMA_256

// Transposes an 8x8 matrix of 16-bit elements held two to a lane (row l/4, columns 2*(l%4), +1).
__device__ __forceinline__ u32 transpose8x8(u32 v) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

// ---- mbarrier --------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again%=;\n}\n" ::"r"(barrier), "r"(parity) : "memory");
}

// ---- bulk copies, completing on a barrier ------------------------------------------------------------------

struct alignas(64) TensorMap {
  u64 opaque[16];
};

__device__ __forceinline__ void copy_tensor(u32 dst, const TensorMap* map, int column, int row, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      ::"r"(dst), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}
__device__ __forceinline__ void copy_bytes(u32 dst, const void* src, int bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      ::"r"(dst), "l"(src), "r"(bytes), "r"(barrier) : "memory");
}

}  // namespace tsld
