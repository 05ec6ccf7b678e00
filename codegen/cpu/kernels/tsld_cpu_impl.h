// Defines the functions of tsld_cpu.h; include it in exactly one translation unit. See there for the flags.
#pragma once
#include "layout.h"
#include "numbers.h"

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 10 : __GNUC__ >= 9)
#define TSLD_CPU_X86 1
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define TSLD_CPU_HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#ifndef TSLD_CPU_AHEAD
#define TSLD_CPU_AHEAD 4096  // bytes of prefetch
#endif

namespace tsld_cpu {

namespace portable {
#define TSLD_TARGET
#include "portable.inc.h"
#include "add.inc.h"
#include "quantize.inc.h"
#undef TSLD_TARGET
}  // namespace portable

#ifdef TSLD_CPU_X86
namespace avx2 {
#define TSLD_TARGET __attribute__((target("avx2")))
#include "avx2.inc.h"
#include "add.inc.h"
#include "quantize.inc.h"
#undef TSLD_TARGET
}  // namespace avx2

namespace avx512 {
#define TSLD_AVX512 "avx2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prefer-vector-width=512"
#define TSLD_TARGET __attribute__((target(TSLD_AVX512)))
#include "avx512.inc.h"
#include "quantize.inc.h"
#ifdef TSLD_CPU_HAS_AMX
#define TSLD_AMX_TARGET __attribute__((target(TSLD_AVX512 ",amx-tile,amx-int8")))
#include "amx.inc.h"
#endif
#undef TSLD_TARGET
}  // namespace avx512

static inline bool amx_granted() {
#ifdef TSLD_CPU_HAS_AMX
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
  return false;
#endif
}

static inline int detect() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2")) return TSLD_CPU_PORTABLE;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vnni"))
    return TSLD_CPU_AVX2;
  return amx_granted() ? TSLD_CPU_AMX : TSLD_CPU_AVX512;
}
#else
static inline int detect() { return TSLD_CPU_PORTABLE; }
#endif

static inline const Weights& head(const void* weights) { return *static_cast<const Weights*>(weights); }

}  // namespace tsld_cpu

extern "C" {

int tsld_cpu_level(void) {
  static const int level = tsld_cpu::detect();
  return level;
}

int64_t tsld_cpu_packed_bytes(int bits, int64_t n, int64_t k, int64_t group_size, int has_zeros) {
  return tsld_cpu::geometry(bits, n, k, group_size, has_zeros).bytes;
}

void tsld_cpu_pack(int bits, int64_t n, int64_t k, int64_t group_size, const uint8_t* packed, const float* scales,
                   int scales_per_row, const uint8_t* zeros, void* out) {
  tsld_cpu::pack(bits, n, k, group_size, packed, scales, scales_per_row != 0, zeros, out);
}

int64_t tsld_cpu_panels(const void* weights) { return tsld_cpu::head(weights).rows / tsld_cpu::kPanel; }

int64_t tsld_cpu_workspace_bytes(const void* weights, int level, int activations, int64_t tokens) {
  return tsld_cpu::Workspace(tsld_cpu::head(weights), level, activations, tokens).bytes;
}

void tsld_cpu_quantize(const void* weights, int level, int activations, const void* x, int dtype, int64_t ldx,
                       int64_t tokens, void* workspace, int64_t t0, int64_t t1) {
  const tsld_cpu::Weights& w = tsld_cpu::head(weights);
#ifdef TSLD_CPU_X86
  if (level >= TSLD_CPU_AVX512)
    return tsld_cpu::avx512::quantize(w, level, activations, x, dtype, ldx, tokens, workspace, t0, t1);
  if (level == TSLD_CPU_AVX2)
    return tsld_cpu::avx2::quantize(w, level, activations, x, dtype, ldx, tokens, workspace, t0, t1);
#endif
  tsld_cpu::portable::quantize(w, level, activations, x, dtype, ldx, tokens, workspace, t0, t1);
}

void tsld_cpu_multiply(const void* weights, int level, int activations, int64_t tokens, const void* workspace,
                       const float* bias, void* y, int dtype, int64_t ldy, int64_t t0, int64_t t1, int64_t p0,
                       int64_t p1) {
  const tsld_cpu::Weights& w = tsld_cpu::head(weights);
  const tsld_cpu::Workspace layout(w, level, activations, tokens);
#ifdef TSLD_CPU_HAS_AMX
  if (layout.tiles && tsld_cpu_level() == TSLD_CPU_AMX)  // it also asks the system for the tiles
    return tsld_cpu::avx512::multiply_amx(w, layout, workspace, bias, y, dtype, ldy, t0, t1, p0, p1);
#endif
#ifdef TSLD_CPU_X86
  if (level >= TSLD_CPU_AVX512)
    return tsld_cpu::avx512::multiply(w, layout, workspace, bias, y, dtype, ldy, t0, t1, p0, p1);
  if (level == TSLD_CPU_AVX2)
    return tsld_cpu::avx2::multiply(w, layout, workspace, bias, y, dtype, ldy, t0, t1, p0, p1);
#endif
  tsld_cpu::portable::multiply(w, layout, workspace, bias, y, dtype, ldy, t0, t1, p0, p1);
}

}  // extern "C"
