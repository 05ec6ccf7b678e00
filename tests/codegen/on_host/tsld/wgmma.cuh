// Stands in for cuda_templates/tsld/wgmma.cuh. Matrix instructions run as late as they may: when a wait asks for their
// group. So operands that change too early, and sums that are read too early, give wrong results.
#pragma once

#include <deque>
#include <map>

#include "tsld/narrow.cuh"

namespace tsld {

// 8-bit integers; PTX ISA, "Shared Memory Matrix Layout" without swizzle: cores of 8 columns x 16 bytes.
struct HostProduct {
  int (*d)[4];
  const u32 (*a)[4];
  u64 panel;
  int tiles;
  bool add;

  void run() const {
    u32 weights[32][4];
    for (int r = 0; r < 4; ++r)
      host::exchange((*a)[r], [&](const uint64_t* all) {
        for (int i = 0; i < 32; ++i) weights[i][r] = static_cast<u32>(all[i]);
      });
    const size_t own = host::current->block * host::block_bytes;  // the descriptor has 18 bits of the address
    const char* start = host::shared_base + own + ((panel & 0x3FFF) * 16 - own) % (1 << 18);
    const i64 next_inputs = (panel >> 16 & 0x3FFF) * 16, next_columns = (panel >> 32 & 0x3FFF) * 16;
    const int g = host::current->index % 32 / 4, t = host::current->index % 4;
    for (int tile = 0; tile < tiles; ++tile)
      for (int i = 0; i < 4; ++i) {
        const int row = g + i / 2 * 8, column = 2 * t + i % 2;
        int sum = add ? d[tile][i] : 0;
        for (int k = 0; k < 32; ++k)
          sum += static_cast<signed char>(weights[row % 8 * 4 + k % 16 / 4][row / 8 + 2 * (k / 16)] >> k % 4 * 8) *
                 static_cast<signed char>(start[k / 16 * next_inputs + tile * next_columns + column * 16 + k % 16]);
        d[tile][i] = sum;
      }
  }
};

struct HostProducts {
  std::vector<HostProduct> open;
  std::deque<std::vector<HostProduct>> groups;
};
inline std::map<int, HostProducts> host_products;  // of each thread

inline HostProducts& mine() { return host_products[host::current->index]; }
inline void wgmma_fence() {}
inline void wgmma_commit() {
  mine().groups.push_back(mine().open);
  mine().open.clear();
}
template <int Pending>
inline void wgmma_wait() {
  while (mine().groups.size() > Pending) {
    for (const HostProduct& product : mine().groups.front()) product.run();
    mine().groups.pop_front();
  }
}
template <class Sums>
inline void pin(Sums&) {}

template <class T, int kTiles>
struct Wgmma {
  template <int kAdd = 1>
  static void run(int (&d)[kTiles][4], const u32 (&a)[4], u64 panel) {
    mine().open.push_back({d, &a, panel, kTiles, kAdd != 0});
  }
};

inline void fence_generic_to_async() {}

}  // namespace tsld
