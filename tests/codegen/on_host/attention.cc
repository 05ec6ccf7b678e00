// The attention of a decoding step on the host, as a function for ctypes. TYPE, HEAD_DIM, HEADS, THREADS: macros.
#include "tsld/ptx.cuh"
#define asm(...) static_assert(true)
#include "tsld/decode_attention.cuh"
#undef asm

using Kernel = tsld::DecodeAttention<tsld::TYPE, HEAD_DIM, HEADS, THREADS>;

static tsld::AttentionParams params;
static Kernel::Shared shared;
static tsld::Vec16 ring[Kernel::kRingBytes / sizeof(tsld::Vec16)];

static void body() { Kernel::run(params, shared, ring); }

extern "C" int run(const tsld::AttentionParams* given, int size, int grid_x, int grid_y, int backwards) {
  if (size != static_cast<int>(sizeof(params))) return 1;
  params = *given;
  host::shared_base = reinterpret_cast<char*>(ring);
  gridDim = {grid_x, grid_y, 1};
  for (int x = 0; x < grid_x; ++x)
    for (int y = 0; y < grid_y; ++y) {
      std::memset(static_cast<void*>(&shared), 0x7F, sizeof(shared));  // garbage
      blockIdx = {x, y, 0};
      host::run_block(THREADS, body, backwards);
    }
  return 0;
}
