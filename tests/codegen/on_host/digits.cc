// One digits kernel on the host, as a function for ctypes. TYPE, GROUP, TOKENS, WARPS, ROW_TILES, STAGES, HOPPER: macros.
#include "tsld/ptx.cuh"
#define asm(...) static_assert(true)
#include "tsld/gemm_digits.cuh"
#undef asm

using Config = tsld::DigitsConfig<tsld::TYPE, 2, GROUP, TOKENS, WARPS, ROW_TILES, STAGES, HOPPER>;

static tsld::GemmParams params;

static void body() {
  void* shared = host::shared_base + host::current->block * host::block_bytes;
  tsld::DigitsGemm<Config>(params, shared).run(shared);
}

extern "C" int run(const tsld::GemmParams* given, int size, int grid_x, int grid_y, int grid_z, int shared, int backwards) {
  if (size != static_cast<int>(sizeof(params))) return 1;
  params = *given;
  gridDim = {grid_x, grid_y, grid_z};
  const int cluster = HOPPER ? grid_z : 1;
  host::block_bytes = (shared + 1023) / 1024 * 1024;
  std::vector<char> bytes(cluster * host::block_bytes + 1024);
  for (int x = 0; x < grid_x; ++x)
    for (int y = 0; y < grid_y; ++y)
      for (int z = 0; z < grid_z; z += cluster) {
        std::memset(bytes.data(), 0x7F, bytes.size());  // garbage
        host::shared_base = bytes.data() + (1024 - reinterpret_cast<uintptr_t>(bytes.data()) % 1024) % 1024;
        blockIdx = {x, y, z};
        host::run_block(Config::kThreads, body, backwards, cluster);
      }
  return 0;
}
