// Hopper's warp-group matrix instruction with the weights in registers and x in shared memory, and the asynchronous
// copies that feed it (sm_90a). Reference: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions", "mbarrier",
// "cp.async.bulk".
#pragma once

#include "tsld/narrow.cuh"

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
__device__ __forceinline__ void pin(float& d) { asm volatile("" : "+f"(d)::"memory"); }
__device__ __forceinline__ void pin(int& d) { asm volatile("" : "+r"(d)::"memory"); }
template <class Sum, int kTokenTiles>
__device__ __forceinline__ void pin(Sum (&d)[kTokenTiles][4]) {
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) pin(d[j][i]);
}

// Keeps the compiler from making operands between the matrix instructions of a batch.
template <int kSteps>
__device__ __forceinline__ void pin(u32 (&a)[kSteps][4]) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[step][i])::"memory");
}

// Shared-memory descriptor of a K-major panel: rows of 128 bytes, 128-byte swizzle, 8 rows to 1024 bytes.
__device__ __forceinline__ u64 panel_descriptor(u32 address) {
  return (static_cast<u64>(1) << 62) | (static_cast<u64>(1024 >> 4) << 32) | (static_cast<u64>(1) << 16) |
         ((address & 0x3FFFF) >> 4);
}

// d[64 rows x 8 * kTokenTiles tokens] += a[64 x inputs] * panel^T over 32 bytes of inputs (16 of 16-bit types, 32 of
// 8-bit types). d[j] is the fragment of tokens 8j .. 8j+7. kAdd = 0: d = the product alone.
template <class T, int kTokenTiles>
struct Wgmma;

#define TSLD_D1(C, j) C(d[j][0]), C(d[j][1]), C(d[j][2]), C(d[j][3])
#define TSLD_D2(C, j) TSLD_D1(C, j), TSLD_D1(C, j + 1)
#define TSLD_D4(C, j) TSLD_D2(C, j), TSLD_D2(C, j + 2)
#define TSLD_D8(C, j) TSLD_D4(C, j), TSLD_D4(C, j + 4)
#define TSLD_D16(C, j) TSLD_D8(C, j), TSLD_D8(C, j + 8)
#define TSLD_D32(C, j) TSLD_D16(C, j), TSLD_D16(C, j + 16)
#define TSLD_FLOAT(x) "+f"(x)
#define TSLD_INT(x) "+r"(x)

// T: template parameters and type; K: inputs of a step; TYPES: of d, a and b; TAIL: what else the types take.
#define TSLD_WGMMA(PARAMETERS, T, SUM, C, TILES, N, K, TYPES, TAIL, D, A)                                            \
  template <PARAMETERS>                                                                                             \
  struct Wgmma<T, TILES> {                                                                                          \
    template <int kAdd = 1>                                                                                         \
    static __device__ __forceinline__ void run(SUM (&d)[TILES][4], const u32 (&a)[4], u64 panel) {                  \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k" K "." TYPES " {" D "}, {" A TAIL ";"                   \
                   : TSLD_D##TILES(C, 0)                                                                            \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(panel), "n"(kAdd));                             \
    }                                                                                                               \
  };
#define TSLD_REGISTERS_8 "%0, %1, %2, %3"
#define TSLD_OPERANDS_8 "%4, %5, %6, %7}, %8, %9"
#define TSLD_REGISTERS_16 \
  "%0, %1, %2, %3, %4, %5, %6, %7"
#define TSLD_OPERANDS_16 "%8, %9, %10, %11}, %12, %13"
#define TSLD_REGISTERS_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define TSLD_OPERANDS_32 "%16, %17, %18, %19}, %20, %21"
#define TSLD_REGISTERS_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TSLD_OPERANDS_64 "%32, %33, %34, %35}, %36, %37"
#define TSLD_REGISTERS_128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, " \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TSLD_OPERANDS_128 "%64, %65, %66, %67}, %68, %69"
#define TSLD_REGISTERS_256 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, " \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, " \
  "%72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, " \
  "%90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, " \
  "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, " \
  "%126, %127"
#define TSLD_OPERANDS_256 "%128, %129, %130, %131}, %132, %133"

#define TSLD_TYPES_OF(TILES, N)                                                                                      \
  TSLD_WGMMA(, Fp16, float, TSLD_FLOAT, TILES, #N, "16", "f32.f16.f16", ", 1, 1, 0", TSLD_REGISTERS_##N,          \
             TSLD_OPERANDS_##N)                                                                                     \
  TSLD_WGMMA(, Bf16, float, TSLD_FLOAT, TILES, #N, "16", "f32.bf16.bf16", ", 1, 1, 0", TSLD_REGISTERS_##N,        \
             TSLD_OPERANDS_##N)                                                                                     \
  TSLD_WGMMA(class Out, Int8<Out>, int, TSLD_INT, TILES, #N, "32", "s32.s8.s8", "", TSLD_REGISTERS_##N,           \
             TSLD_OPERANDS_##N)                                                                                     \
  TSLD_WGMMA(class Out, Fp8<Out>, float, TSLD_FLOAT, TILES, #N, "32", "f32.e4m3.e4m3", ", 1, 1",                  \
             TSLD_REGISTERS_##N, TSLD_OPERANDS_##N)
TSLD_TYPES_OF(1, 8)
TSLD_TYPES_OF(2, 16)
TSLD_TYPES_OF(4, 32)
TSLD_TYPES_OF(8, 64)
TSLD_TYPES_OF(16, 128)
TSLD_TYPES_OF(32, 256)

#undef TSLD_D1
#undef TSLD_D2
#undef TSLD_D4
#undef TSLD_D8
#undef TSLD_D16
#undef TSLD_D32
#undef TSLD_FLOAT
#undef TSLD_INT
#undef TSLD_WGMMA
#undef TSLD_TYPES_OF
#undef TSLD_REGISTERS_8
#undef TSLD_REGISTERS_16
#undef TSLD_REGISTERS_32
#undef TSLD_REGISTERS_64
#undef TSLD_REGISTERS_128
#undef TSLD_REGISTERS_256
#undef TSLD_OPERANDS_8
#undef TSLD_OPERANDS_16
#undef TSLD_OPERANDS_32
#undef TSLD_OPERANDS_64
#undef TSLD_OPERANDS_128
#undef TSLD_OPERANDS_256

// Four 8x8 matrices of 16-bit elements, transposed on the way; lane l gives the address of row l%8 of matrix l/8.
__device__ __forceinline__ void store_matrices_transposed(u32 address, const u32 (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// What generic stores wrote is seen by matrix instructions that are issued later.
__device__ __forceinline__ void fence_generic_to_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
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

// The description of a tensor is fetched before the first copy needs it.
__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void copy_tensor(u32 dst, const TensorMap* map, int column, int row, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      ::"r"(dst), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}
__device__ __forceinline__ void copy_bytes(u32 dst, const void* src, int bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      ::"r"(dst), "l"(src), "r"(bytes), "r"(barrier) : "memory");
}

}  // namespace tsld
