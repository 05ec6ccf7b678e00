// Clusters of blocks (sm_90): barriers and stores into the shared memory of other blocks. Reference: PTX ISA, sections
// "barrier.cluster" and "mapa". Without clusters nobody calls these; the code for older targets is empty.
#pragma once

#include "tsld/ptx.cuh"

namespace tsld {

// Every thread of every block of the cluster arrives, then waits; what was written before the one is visible after the
// other, shared memory of other blocks included.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

// The same for writes to the block's own shared memory alone; a fence for all writes takes longer.
__device__ __forceinline__ void cluster_arrive_with_shared() {
#if __CUDA_ARCH__ >= 900
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1208
  asm volatile("fence.release.sync_restrict::shared::cta.cluster;\nbarrier.cluster.arrive.relaxed;" ::: "memory");
#else
  cluster_arrive();
#endif
#endif
}

// Where nothing that was written before is meant for other blocks: that a block has started, or reads no more.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// A barrier in the shared memory of the cluster's first block, for stores of all its blocks to that memory: no block waits
// for another but the first one, and no store for memory beyond the cluster.

// By one thread of the first block, before it arrives: `bytes` will be stored.
__device__ __forceinline__ void expect_stores(u64* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  const u32 at = shared_address(barrier);
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
#endif
}

// *to = v in the first block; `to` and `barrier` are the places in this block's own shared memory. All blocks have arrived.
__device__ __forceinline__ void store_to_first_block(float* to, float v, u64* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .b32 there, at;\nmapa.shared::cluster.u32 there, %0, 0;\nmapa.shared::cluster.u32 at, %1, 0;\n"
               "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], %2, [at];\n}\n"
               ::"r"(shared_address(to)), "r"(shared_address(barrier)), "f"(v) : "memory");
#endif
}

// In the first block: until all stores are there.
__device__ __forceinline__ void wait_for_stores(u64* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .pred done;\nagain%=: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
               "@!done bra again%=;\n}\n" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Writes to `to`, a place in this block's own shared memory, in that of the block `rank`.
__device__ __forceinline__ void store_remote(const float* to, int rank, const float (&v)[4]) {
#if __CUDA_ARCH__ >= 900
  u32 remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(to)), "r"(rank));
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(remote), "f"(v[0]), "f"(v[1]), "f"(v[2]),
               "f"(v[3])
               : "memory");
#endif
}

// The address of the same place in the shared memory of the block `rank`.
__device__ __forceinline__ u32 shared_of_block(u32 address, int rank) {
  u32 remote = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
#endif
  return remote;
}

// 16 bytes of the shared memory of any block of the cluster.
__device__ __forceinline__ Vec16 load_cluster16(u32 address) {
  Vec16 v = {};
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "r"(address)
               : "memory");
#endif
  return v;
}

}  // namespace tsld
