// Stands in for cuda_templates/tsld/cluster.cuh: other blocks of the cluster lie `host::block_bytes` apart.
#pragma once

#include "tsld/ptx.cuh"

namespace tsld {

// Attention runs without clusters here.
inline void cluster_arrive() { std::abort(); }
inline void expect_stores(u64*, int) { std::abort(); }
inline void store_to_first_block(float*, float, u64*) { std::abort(); }
inline void wait_for_stores(u64*) { std::abort(); }

inline void cluster_arrive_with_shared() {}
inline void cluster_arrive_relaxed() {}
inline void cluster_wait() { host::sync_cluster(); }
inline u32 shared_of_block(u32 address, int rank) { return address % host::block_bytes + rank * host::block_bytes; }
inline Vec16 load_cluster16(u32 address) { return load_shared16(address); }

}  // namespace tsld
