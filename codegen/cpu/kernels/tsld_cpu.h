// Low-bit linear layers on CPUs: y = x W^T + b with W of 2 (ternary), 4 or 8 bits. The C interface.
//
// #include "tsld_cpu.h" declares it, one translation unit with #include "tsld_cpu_impl.h" defines it (header only, no
// dependency but the C++ library). Compile that unit with
//     g++ (>= 9) or clang++ (>= 10)  -std=c++17 -O3 -ffp-contract=off      (no -m flags: each level carries its own)
// -ffp-contract=off is part of the contract: with it, all levels give the same bits.
//
// Nothing here starts threads, allocates or keeps state (but for the permission to use AMX, asked once a process): the
// caller splits the work. A layer runs as
//     weights: tsld_cpu_pack(...) once, into tsld_cpu_packed_bytes(...) bytes aligned to 64, on any machine
//     level   = tsld_cpu_level()
//     ws      = tsld_cpu_workspace_bytes(weights, level, activations, tokens) bytes aligned to 64
//     tsld_cpu_quantize(..., ws, t0, t1)    for ranges of tokens that cover [0, tokens), in any order, in parallel
//     -- barrier --
//     tsld_cpu_multiply(..., t0, t1, p0, p1) for ranges of tokens and of panels (64 output rows each) that cover
//                                            [0, tokens) x [0, tsld_cpu_panels(weights)), in any order, in parallel
// Cut token ranges at multiples of 32 (TSLD_CPU_TOKEN_STEP); results do not depend on the cuts, nor on the level. Keep
// `tokens` of one round below about 256: the workspace then stays in the cache.
//
// Activations: a16 two int8 limbs per value, three for float32 and for rows whose largest value exceeds 6 times their
// root mean square; int8 one limb; scaled by the row's largest magnitude. Sums are exact integers. add: float32 additions and
// subtractions only (ternary without zero points; other layers run a16). A row of x that holds NaN or Inf gives NaN
// throughout.
//
// Kernel layout of the weights, one for all levels: panels of 64 output rows; in a panel, for each step of 4 * 8/bits
// inputs, four blocks of 64 bytes, each for 16 rows. Byte 4 * row + i of a block holds, for s = 0 .. 8/bits - 1, the
// code of input 4 * s + i of the step at bit s * bits. Inputs are padded with code 0 per group of scales, to whole
// steps (to 64 where the group is a multiple of 64 or at least 512), rows to a multiple of 64.
#pragma once
#include <stdint.h>

#define TSLD_CPU_TOKEN_STEP 32

#ifdef __cplusplus
extern "C" {
#endif

enum { TSLD_CPU_PORTABLE = 0, TSLD_CPU_AVX2 = 1, TSLD_CPU_AVX512 = 2, TSLD_CPU_AMX = 3 };  // level
enum { TSLD_CPU_A16 = 0, TSLD_CPU_INT8 = 1, TSLD_CPU_ADD = 2 };                            // activations
enum { TSLD_CPU_F32 = 0, TSLD_CPU_BF16 = 1, TSLD_CPU_F16 = 2 };                            // dtype of x and y

// The highest level that this CPU and its operating system serve. AVX512 means F, BW, VL, DQ and VNNI; AMX adds int8 tiles.
int tsld_cpu_level(void);

// Bytes of the kernel layout. group_size: inputs per scale, 1 .. k, a divisor of k (k for one scale per row or tensor).
int64_t tsld_cpu_packed_bytes(int bits, int64_t n, int64_t k, int64_t group_size, int has_zeros);

// Canonical -> kernel layout. packed: uint8 [n, ceil(k * bits / 8)], codes least significant bits first.
// scales: float32 [n, k / group_size], or one value for all with scales_per_row = 0 (then zeros is one value too).
// zeros: uint8, as scales, or NULL for 1 (2 bits), 8 (4 bits), 128 (8 bits). out: 64-byte aligned.
void tsld_cpu_pack(int bits, int64_t n, int64_t k, int64_t group_size, const uint8_t* packed, const float* scales,
                   int scales_per_row, const uint8_t* zeros, void* out);

// Number of panels of 64 output rows.
int64_t tsld_cpu_panels(const void* weights);

int64_t tsld_cpu_workspace_bytes(const void* weights, int level, int activations, int64_t tokens);

// Rows t0 <= t < t1 of x [tokens, k] (row stride ldx elements) into the workspace.
void tsld_cpu_quantize(const void* weights, int level, int activations, const void* x, int dtype, int64_t ldx,
                       int64_t tokens, void* workspace, int64_t t0, int64_t t1);

// Panels p0 <= p < p1 of y [tokens, n] (row stride ldy elements) for rows t0 <= t < t1; same level, activations and
// tokens as tsld_cpu_quantize. bias: float32 [n] or NULL. float32 sums, rounded once to dtype.
void tsld_cpu_multiply(const void* weights, int level, int activations, int64_t tokens, const void* workspace,
                       const float* bias, void* y, int dtype, int64_t ldy, int64_t t0, int64_t t1, int64_t p0,
                       int64_t p1);

#ifdef __cplusplus
}
#endif
