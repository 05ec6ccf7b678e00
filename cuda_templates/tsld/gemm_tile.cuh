// y[m, n] = x[m, k] * ternary(weights)[n, k]^T with mma.sync.m16n8k16 (sm_80 and later), for many tokens: one scale per
// row.
//
// A block computes kBlockRows x kTokens outputs with kWarpsN x kWarpsM warps, each kRowTiles * 16 rows x kTokenTiles * 8
// tokens; where these are 64 x 64, a step of 16 inputs is 32 matrix instructions, 4 loads of x and 31 integer
// instructions. Stages of 64 inputs go through a ring of kStages buffers filled by cp.async, with one barrier each. A
// warp loads its fragments of x one step ahead of the matrix instructions, across stages too.
//
//   x     rows of 128 bytes per token; vector c of row r lies at place c ^ (r % 8), so that ldmatrix hits all banks
//   codes whole chunks of 128 inputs, in a ring of their own
#pragma once

#include "tsld/dequant.cuh"
#include "tsld/epilogue.cuh"

namespace tsld {

template <class Type_, int kBits_, int kGroup_, int kTokens_, int kWarpsN_, int kWarpsM_, int kWarpsK_, int kRowTiles_,
          int kStages_>
struct TileConfig {
  static_assert(kBits_ == 2 && kGroup_ == 0 && kWarpsK_ == 1, "ternary, one scale per row");
  using Type = Type_;
  static constexpr int kTokens = kTokens_, kWarpsN = kWarpsN_, kWarpsM = kWarpsM_, kWarpsK = 1;
  static constexpr int kRowTiles = kRowTiles_, kStages = kStages_;
  static constexpr int kTokenTiles = kTokens / (8 * kWarpsM);
  static_assert(kTokens == kTokenTiles * 8 * kWarpsM && kTokenTiles % 2 == 0, "tokens: a multiple of 16 per warp");
  static constexpr int kThreads = 32 * kWarpsN * kWarpsM;
  static constexpr int kEpilogueThreads = kThreads;
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  static constexpr int kBlockRows = kWarpsN * kRowTiles * kTileRows;
  static constexpr int kBlockTokens = kTokens;
  static __device__ __forceinline__ constexpr int row_tile(int warp_n, int rt) { return warp_n * kRowTiles + rt; }

  using Weights = WeightLayout<2>;
  static constexpr int kStageInputs = 64, kStageSteps = kStageInputs / 16;
  static constexpr int kXBytes = kTokens * kStageInputs * 2;
  static constexpr int kBlockTiles = kWarpsN * kRowTiles;
  static constexpr int kCodeBytes = kBlockTiles * Weights::kBytes;
  static constexpr int kCodeSlots = kStages / 2 + 1;  // a chunk is two stages
  static constexpr int kStoreStride = kRowTiles * kTileRows * 2 + 16;  // bytes of a token's rows of a warp, padded
  static constexpr int kReduceBytes = kThreads / 32 * kTokenTiles * 8 * imax(kPadRows * 4, kStoreStride);
  static constexpr int kSharedBytes = imax(kStages * kXBytes + kCodeSlots * kCodeBytes, kReduceBytes);
};

template <class C>
class TileGemm {
  using T = typename C::Type;
  using Weights = typename C::Weights;
  using Fragments = u32[C::kTokenTiles][2];  // of x, one step
  using Codes = u32[C::kRowTiles][2];        // of a stage

  const GemmParams& p_;
  const u32 shared_;
  const int lane_, warp_n_, warp_m_;
  const int first_chunk_, stages_;
  const int token0_;

 public:
  __device__ __forceinline__ TileGemm(const GemmParams& p, void* shared)
      : p_(p),
        shared_(shared_address(shared)),
        lane_(threadIdx.x % 32),
        warp_n_(threadIdx.x / 32 % C::kWarpsN),
        warp_m_(threadIdx.x / 32 / C::kWarpsN),
        first_chunk_(blockIdx.z * p.chunks_per_split),
        stages_(2 * min(p.chunks_per_split, p.chunks - first_chunk_)),
        token0_(blockIdx.y * C::kTokens) {}

  __device__ __forceinline__ void run(void* shared) {
    float acc[C::kRowTiles][C::kTokenTiles][4] = {};
    allow_next_kernel();
    wait_for_previous_kernel();
    // Blocks whose tokens and inputs end within a tile or a vector take a copy of the loop with more conditions.
    if (token0_ + C::kTokens <= p_.m && p_.k % 8 == 0 && (p_.k >= (first_chunk_ * 2 + stages_) * C::kStageInputs))
      multiply_all<true>(acc);
    else
      multiply_all<false>(acc);
    if (gridDim.z > 1)
      reduce_and_store<C>(p_, static_cast<float*>(shared), acc, warp_n_, 0, warp_m_);
    else
      store(acc);
  }

 private:
  template <bool kWhole>
  __device__ __forceinline__ void multiply_all(float (&acc)[C::kRowTiles][C::kTokenTiles][4]) const {
    Source<kWhole> source(*this);
#pragma unroll
    for (int s = 0; s < C::kStages - 1; ++s) {
      source.copy_x(*this);
      if (s % 2 == 0) source.copy_codes(*this);
      source.advance();
    }
    cp_async_wait<C::kStages - 2>();
    __syncthreads();

    Fragments x[2];
    Codes codes, next;
    u32 x_from = shared_, codes_from = first_codes();
    load_codes(codes, codes_from, 0);
    load_x(x[0], x_from, 0);
    for (int stage = 0; stage < stages_; stage += 2) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int step = 0; step < C::kStageSteps; ++step) {
          if (step + 1 < C::kStageSteps) {
            load_x(x[(step + 1) % 2], x_from, step + 1);
            source.copy_x(*this, step, C::kStageSteps - 1);  // to where the stage before was
            if (step + 2 == C::kStageSteps) {
              if ((half + C::kStages - 1) % 2 == 0) source.copy_codes(*this);
              source.advance();
            }
          } else {
            cp_async_wait<C::kStages - 2>();
            __syncthreads();  // the next stage is there for all; all hold their fragments of this one
            x_from = after(x_from, C::kXBytes, shared_, C::kStages);
            if (half == 1) codes_from = after(codes_from, C::kCodeBytes, first_codes(), C::kCodeSlots);
            load_codes(next, codes_from, 1 - half);
            load_x(x[(step + 1) % 2], x_from, 0);
          }
          multiply(acc, codes, x[step % 2], step);
        }
#pragma unroll
        for (int rt = 0; rt < C::kRowTiles; ++rt) codes[rt][0] = next[rt][0], codes[rt][1] = next[rt][1];
      }
    }
    cp_async_wait<0>();
  }

  __device__ __forceinline__ u32 first_codes() const { return shared_ + C::kStages * C::kXBytes; }
  // The next of `count` buffers of so many bytes.
  static __device__ __forceinline__ u32 after(u32 at, int bytes, u32 first, int count) {
    return at == first + (count - 1) * bytes ? first : at + bytes;
  }

  // What a thread copies: one 16-byte column of x, down the rows; the codes of some row tiles. kWhole: no token and no
  // vector of inputs is missing.
  template <bool kWhole>
  struct Source {
    static constexpr int kPassRows = C::kThreads / 8;  // rows of x copied at once
    static constexpr int kPasses = ceil_div(C::kTokens, kPassRows);
    static constexpr int kCodeVecs = C::kCodeBytes / 16;
    const char* x;
    const char* codes;
    i64 pass_bytes;
    u32 x_to, codes_to;
    int rows, k, left;  // rows of x and inputs from here; stages to be copied
    int slot = 0;

    __device__ __forceinline__ explicit Source(const TileGemm& gemm) {
      const int row = threadIdx.x / 8, column = threadIdx.x % 8;
      k = gemm.p_.k - (gemm.first_chunk_ * kChunk + column * 8);
      rows = gemm.p_.m - gemm.token0_ - row;
      left = gemm.stages_;
      pass_bytes = gemm.p_.ldx * (2 * kPassRows);
      x = static_cast<const char*>(gemm.p_.x) +
          ((gemm.token0_ + row) * gemm.p_.ldx + gemm.first_chunk_ * kChunk + column * 8) * 2;
      x_to = gemm.shared_ + row * 128 + (column ^ row % 8) * 16;
      const i64 block = static_cast<i64>(first_tile(gemm)) * gemm.p_.chunks + gemm.first_chunk_;
      codes = static_cast<const char*>(gemm.p_.weights) + block * Weights::kBytes + threadIdx.x % 32 * 16;
      codes_to = gemm.first_codes() + threadIdx.x * 16;
    }

    // Tiles past the last are computed like the last and never stored.
    static __device__ __forceinline__ int first_tile(const TileGemm& gemm) {
      return min(static_cast<int>(blockIdx.x) * C::kBlockTiles + static_cast<int>(threadIdx.x) / 32,
                 gemm.p_.row_tiles - 1);
    }

    // Part `part` of `parts` of a stage.
    __device__ __forceinline__ void copy_x(const TileGemm& gemm, int part = 0, int parts = 1) const {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        if (pass * parts / kPasses != part) continue;
        const u32 to = x_to + pass * kPassRows * 128;
        if constexpr (kWhole) {
          cp_async_if(to, x + pass * pass_bytes, left > 0);
        } else if (left > 0 && pass * kPassRows < rows) {
          const int bytes = max(0, min(16, k * 2));  // inputs past the last become zeros
          cp_async_zfill(to, bytes > 0 ? x + pass * pass_bytes : static_cast<const char*>(gemm.p_.x), bytes);
        }
      }
    }

    __device__ __forceinline__ void copy_codes(const TileGemm& gemm) {
      const i64 tile_bytes = static_cast<i64>(gemm.p_.chunks) * Weights::kBytes;
      const int tiles_left = gemm.p_.row_tiles - 1 - first_tile(gemm);
#pragma unroll
      for (int i = 0; i < ceil_div(kCodeVecs, C::kThreads); ++i) {
        const int tiles = min(i * (C::kThreads / 32), tiles_left);
        const bool mine = kCodeVecs % C::kThreads == 0 || i * C::kThreads + static_cast<int>(threadIdx.x) < kCodeVecs;
        cp_async_if(codes_to + i * C::kThreads * 16, codes + tiles * tile_bytes, mine && left > 0);
      }
      codes += Weights::kBytes;
      codes_to = after(codes_to, C::kCodeBytes, gemm.first_codes() + threadIdx.x * 16, C::kCodeSlots);
    }

    // To the next stage.
    __device__ __forceinline__ void advance() {
      cp_async_commit();
      x += C::kStageInputs * 2, k -= C::kStageInputs, --left;
      x_to += C::kXBytes;
      if (++slot == C::kStages) slot = 0, x_to -= C::kStages * C::kXBytes;
    }
  };

  // The lane's codes of 64 inputs.
  __device__ __forceinline__ void load_codes(Codes& codes, u32 slot, int half) const {
    const u32 from = slot + warp_n_ * C::kRowTiles * Weights::kBytes + lane_ * 16 + half * 8;
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt)
      asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];"
                   : "=r"(codes[rt][0]), "=r"(codes[rt][1])
                   : "r"(from + rt * Weights::kBytes)
                   : "memory");
  }

  // The warp's tokens x 16 inputs: an ldmatrix takes 16 tokens.
  __device__ __forceinline__ void load_x(Fragments& x, u32 stage, int step) const {
    const int row = warp_m_ * C::kTokenTiles * 8 + lane_ / 16 * 8 + lane_ % 8, half = lane_ / 8 % 2;
    const u32 from = stage + row * 128 + ((half ^ lane_ % 8) * 16 ^ step * 32);
#pragma unroll
    for (int nt = 0; nt < C::kTokenTiles; nt += 2) {
      u32 r[4];
      ldmatrix_x4(r, from + nt * 8 * 128);
      x[nt][0] = r[0], x[nt][1] = r[1], x[nt + 1][0] = r[2], x[nt + 1][1] = r[3];
    }
  }

  __device__ __forceinline__ void multiply(float (&acc)[C::kRowTiles][C::kTokenTiles][4], const Codes& codes,
                                           const Fragments& x, int step) const {
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt) {
      u32 a[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) a[j] = (codes[rt][step / 2] << (8 * (step % 2) + 2 * j)) & 0xC000C000u;
#pragma unroll
      for (int nt = 0; nt < C::kTokenTiles; ++nt) T::mma(acc[rt][nt], a, x[nt][0], x[nt][1]);
    }
  }

  // Scale, bias, rounding; 8x8 blocks are turned around in registers, so that a token's rows lie side by side in the
  // warp's part of shared memory and leave as 16-byte vectors.
  __device__ __forceinline__ void store(const float (&acc)[C::kRowTiles][C::kTokenTiles][4]) const {
    constexpr int kWarpTokens = C::kTokenTiles * 8, kRowVecs = 2 * C::kRowTiles, kPassTokens = 32 / kRowVecs;
    const u32 buffer = shared_ + threadIdx.x / 32 * (kWarpTokens * C::kStoreStride);
    const int row0 = (static_cast<int>(blockIdx.x) * C::kBlockTiles + warp_n_ * C::kRowTiles) * kTileRows;
    const u16* bias = static_cast<const u16*>(p_.bias);
    __syncthreads();  // nobody reads the ring any more
#pragma unroll
    for (int rt = 0; rt < C::kRowTiles; ++rt)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0 + rt * kTileRows + half * 8 + lane_ / 4;
        const float scale = row < p_.row_tiles * kTileRows ? p_.row_scale[row] : 0.f;
        const float shift = bias != nullptr && row < p_.n ? T::to_float(bias[row]) : 0.f;
#pragma unroll
        for (int nt = 0; nt < C::kTokenTiles; ++nt) {
          const float(&v)[4] = acc[rt][nt];
          const u32 two = transpose8x8(T::pack2(v[2 * half] * scale + shift, v[2 * half + 1] * scale + shift));
          const u32 to = buffer + (nt * 8 + lane_ / 4) * C::kStoreStride + (rt * kTileRows + half * 8 + lane_ % 4 * 2) * 2;
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(two) : "memory");
        }
      }
    __syncwarp();
    const int row = row0 + lane_ % kRowVecs * 8, token0 = token0_ + warp_m_ * kWarpTokens;
#pragma unroll
    for (int i = 0; i < kWarpTokens / kPassTokens; ++i) {
      const int token = i * kPassTokens + lane_ / kRowVecs;
      if (token0 + token < p_.m && row < p_.n)
        store_rows(p_, token0 + token, row, load_shared16(buffer + token * C::kStoreStride + lane_ % kRowVecs * 16));
    }
  }
};

}  // namespace tsld
