// One stream kernel on the host, as a function for ctypes. TYPE, GROUP, TOKENS, WARPS, ROW_TILES, STAGES, NORM, GATED: macros.
#include "tsld/ptx.cuh"
#define asm(...) static_assert(true)
#include "tsld/gemm_stream.cuh"
#undef asm

using Config = tsld::StreamConfig<tsld::TYPE, 2, GROUP, TOKENS, WARPS, ROW_TILES, STAGES, NORM, GATED, true>;

static tsld::GemmParams params;
static void* memory;

static void body() { tsld::StreamGemm<Config>(params, memory).run(memory); }

extern "C" int run(const tsld::GemmParams* given, int size, int grid_x, int grid_y, int grid_z, int shared, int backwards) {
  if (size != static_cast<int>(sizeof(params))) return 1;
  params = *given;
  gridDim = {grid_x, grid_y, grid_z};
  std::vector<char> bytes(shared + 1024);
  for (int x = 0; x < grid_x; ++x)
    for (int y = 0, z = 0; y < grid_y; z + 1 < grid_z ? ++z : (z = 0, ++y)) {
      std::memset(bytes.data(), 0x7F, bytes.size());  // garbage
      memory = bytes.data() + (1024 - reinterpret_cast<uintptr_t>(bytes.data()) % 1024) % 1024;
      host::shared_base = static_cast<char*>(memory);
      blockIdx = {x, y, z};
      host::run_block(Config::kThreads, body, backwards);
    }
  return 0;
}
