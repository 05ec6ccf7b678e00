// Arguments of every kernel of the family, passed by value. `codegen/cuda_gemm.py` mirrors this structure.
#pragma once

#include "tsld/ptx.cuh"

namespace tsld {

struct GemmParams {
  const void* x;          // [m, ldx] fp16, bf16 or 8-bit values (narrow.cuh), 16-byte aligned rows
  const void* weights;    // fragment-order codes, see layout.cuh
  const void* meta;       // group scales (and zero points) per row tile and chunk; null for one scale per row
  const float* row_scale; // [16 * row_tiles] fp32, folded with the constant of the code
  const u8* row_zero;     // [16 * row_tiles] zero points where one holds for a whole row (bits > 2)
  const void* bias;       // [n] of x's type, or null
  void* y;                // [m, n] of x's type, contiguous
  float* partial;         // split-K: [splits, m, 16 * row_tiles] fp32
  int* counters;          // split-K: one per output tile, zero before and after every launch
  i64 ldx;                // elements between rows of x, a multiple of 8
  int m, n, k;            // tokens, output features, input features
  int row_tiles;          // ceil(n / 16)
  int chunks;             // ceil(k / 128)
  int chunks_per_split;   // chunks that one block of grid.z works on
  float* x_scale;         // [m] scales of quantised tokens (narrow.cuh); null for 16-bit x
  const void* norm_weight;  // [k] of x's type, for kernels that normalise x (stream_fusion.cuh)
  const void* residual;     // [m, k], added to x before; or null
  void* total;              // [m, k]: x + residual; null without a residual
  float eps;                // of the norm
};

}  // namespace tsld
