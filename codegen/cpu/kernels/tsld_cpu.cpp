// The shared library that tsld_fx loads: the kernels, and tsld_cpu_linear, which splits a call over torch's threads.
#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "tsld_cpu_impl.h"

namespace {

constexpr int64_t kRound = 256;       // tokens whose workspace is in use at once
constexpr int64_t kAlone = 1 << 18;   // bytes of codes times tokens that one thread does sooner than several

struct Buffer {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Buffer() { free(data); }
  void* of(int64_t wanted) {
    if (wanted > bytes) {
      free(data);
      bytes = (wanted + 4095) / 4096 * 4096;
      data = aligned_alloc(64, static_cast<size_t>(bytes));
      if (!data) bytes = 0;
    }
    return data;
  }
};

}  // namespace

extern "C" {

// The OpenMP runtime that torch runs on, by address: GOMP_parallel, omp_get_thread_num, GOMP_barrier.
struct tsld_cpu_pool {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread)(void);
  int (*threads)(void);
  void (*barrier)(void);
};

struct tsld_cpu_call {
  const void* weights;
  const tsld_cpu_pool* pool;
  const void* x;
  const float* bias;
  void* y;
  int64_t ldx, ldy, tokens;
  int32_t level, activations, dtype, threads;
};

}  // extern "C"

namespace {

struct Round {
  const tsld_cpu_call* call;
  const char* x;
  char* y;
  void* workspace;
  int64_t tokens, panels;
  bool quantized;
};

int64_t share(int64_t items, int part, int parts) { return items * part / parts; }

void work(const Round& r, int part, int parts, void (*barrier)(void)) {
  const tsld_cpu_call& c = *r.call;
  const int64_t steps = (r.tokens + TSLD_CPU_TOKEN_STEP - 1) / TSLD_CPU_TOKEN_STEP;
  if (!r.quantized) {
    tsld_cpu_quantize(c.weights, c.level, c.activations, r.x, c.dtype, c.ldx, r.tokens, r.workspace,
                      share(r.tokens, part, parts), share(r.tokens, part + 1, parts));
    if (barrier) barrier();
  }
  // whole panels where there are enough, else pieces of (panels x tokens)
  const int64_t cuts = r.panels >= 2 * parts ? 1 : steps, pieces = cuts * r.panels;
  for (int64_t i = share(pieces, part, parts), end = share(pieces, part + 1, parts); i < end;) {
    const int64_t cut = i / r.panels, p0 = i % r.panels, p1 = p0 + end - i < r.panels ? p0 + end - i : r.panels;
    const int64_t t0 = share(steps, static_cast<int>(cut), static_cast<int>(cuts)) * TSLD_CPU_TOKEN_STEP;
    const int64_t t1 = share(steps, static_cast<int>(cut) + 1, static_cast<int>(cuts)) * TSLD_CPU_TOKEN_STEP;
    tsld_cpu_multiply(c.weights, c.level, c.activations, r.tokens, r.workspace, c.bias, r.y, c.dtype, c.ldy, t0,
                      t1 < r.tokens ? t1 : r.tokens, p0, p1);
    i += p1 - p0;
  }
}

void body(void* data) {
  const Round& r = *static_cast<const Round*>(data);
  const tsld_cpu_pool& pool = *r.call->pool;
  work(r, pool.thread(), pool.threads(), pool.barrier);
}

}  // namespace

extern "C" {

// Asks for large pages under what will hold weights: their stream then misses the TLB less. A hint, no more.
void tsld_cpu_large_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = 2 << 20, from = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

// y [tokens, n] = x [tokens, k] W^T + bias on call->threads threads. Returns 0, or 1 when memory ran out.
int tsld_cpu_linear(const tsld_cpu_call* call) {
  static thread_local Buffer buffer;
  const tsld_cpu::Weights& w = tsld_cpu::head(call->weights);
  const int64_t size = call->dtype == TSLD_CPU_F32 ? 4 : 2, volume = w.rows * w.k_pad * w.bits / 8 * call->tokens;
  const unsigned threads = call->pool && volume > kAlone ? static_cast<unsigned>(call->threads) : 1;
  for (int64_t first = 0; first < call->tokens; first += kRound) {
    Round r;
    r.call = call;
    r.tokens = call->tokens - first < kRound ? call->tokens - first : kRound;
    r.x = static_cast<const char*>(call->x) + first * call->ldx * size;
    r.y = static_cast<char*>(call->y) + first * call->ldy * size;
    r.panels = tsld_cpu_panels(call->weights);
    r.workspace =
        buffer.of(tsld_cpu_workspace_bytes(call->weights, call->level, call->activations, r.tokens));
    if (!r.workspace) return 1;
    r.quantized = threads <= 1 || r.tokens * w.k < 65536;  // sooner done than a barrier
    if (r.quantized)
      tsld_cpu_quantize(call->weights, call->level, call->activations, r.x, call->dtype, call->ldx, r.tokens,
                        r.workspace, 0, r.tokens);
    if (threads > 1) call->pool->parallel(body, &r, threads, 0);
    else work(r, 0, 1, nullptr);
  }
  return 0;
}

}  // extern "C"
