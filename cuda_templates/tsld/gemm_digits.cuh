// y[m, n] = x[m, k] * ternary(weights)[n, k]^T for some tens of tokens on the 8-bit tensor cores of sm_80 and later.
//
// A block turns its inputs of x into integers X = round(x * 2^s) of 16 bits, s the largest that a token's inputs of the
// block allow, and keeps them in shared memory for good, as two signed digits to the base 256: x is off by 2^-15 of the
// token's largest there, at most. A digit is a column of the 8-bit tensor cores, so an AND and a shift give four weights
// instead of two, with as many matrix instructions as for 16 bits. Sums are exact integers.
//
// As in gemm_stream.cuh, the grid fills the machine once, and teams (warps; warp groups on Hopper) stream equal
// contiguous shares of (group of kRowTiles row tiles, one or two chunks of 128 inputs) through rings of their own,
// without waiting for each other. The sums of a group that a team completes go to the group's slot; what it leaves
// unfinished goes where the rings were. Blocks that split K add their sums in global memory; on Hopper they form a
// cluster, and block r reads the sums of every kTokens / splits-th part of the tokens in the shared memory of all.
//
// Shared memory: ring, later unfinished sums | digits of x | scales of tokens | of rows | slots.
#pragma once

#include "tsld/cluster.cuh"
#include "tsld/digits_products.cuh"
#include "tsld/epilogue.cuh"
#include "tsld/token_digits.cuh"

namespace tsld {

template <class C>
class DigitsGemm {
  using T = typename C::Type;
  using Weights = typename C::Weights;
  using Meta = typename C::Meta;

  const GemmParams& p_;
  char* const memory_;
  const int warp_, lane_, team_;
  const int first_chunk_, chunks_;  // the block's inputs
  const int units_;                 // of a row group, in all blocks; zeros of x fill them up
  const int first_group_, groups_;  // the block's rows
  const u64 policy_;

 public:
  __device__ __forceinline__ DigitsGemm(const GemmParams& p, void* shared)
      : p_(p),
        memory_(static_cast<char*>(shared)),
        warp_(threadIdx.x / 32),  // not shuffled: nvcc 13.0 turns a uniform ring address into an illegal LDGSTS
        lane_(threadIdx.x % 32),
        team_(__shfl_sync(~0u, threadIdx.x / (32 * C::kTeam), 0)),  // known to be the same in all lanes
        first_chunk_(blockIdx.z * p.chunks_per_split),
        chunks_(min(p.chunks_per_split, p.chunks - first_chunk_)),
        units_(ceil_div(p.chunks_per_split, C::kUnit)),
        first_group_(share_start(all_groups(), gridDim.x, blockIdx.x)),
        groups_(share_start(all_groups(), gridDim.x, blockIdx.x + 1) - first_group_),
        policy_(evict_first_policy()) {}

  __device__ __forceinline__ void run(void*) {
    allow_next_kernel();
    const int begin = team_start(team_), end = team_start(team_ + 1);
    const int group = begin / units_, unit = begin % units_;
    Source source = {*this, group, unit};
    u32 filled = ring();
    fetch_scales();
#pragma unroll
    for (int s = 0; s < C::kStages - 1; ++s) load_unit(source, filled, begin + s < end);
    wait_for_previous_kernel();
    TokenDigits<C> digits(p_, token0(), tokens(), first_chunk_, chunks_, units_ * C::kUnit);
    digits.stage(x_memory(), scales());
    if constexpr (C::kHopper) fence_generic_to_async();
    __syncthreads();

    DigitsProducts<C> acc;
    const u32 first_x = shared_address(x_memory()), last_x = first_x + (units_ - 1) * C::kUnitBytes;
    u32 at = ring(), x = first_x + unit * C::kUnitBytes;
    int* slot = slots() + group * C::kSlot;
    for (int left = end - begin; left > 0; --left) {
      cp_async_wait<C::kStages - 2>();
      if constexpr (C::kGroup != 0) __syncwarp();  // scales were copied by other lanes, who may still read the stage before
      load_unit(source, filled, left >= C::kStages);
      acc.multiply(at, x);
      at = next_stage(at);
      if (x == last_x) {
        acc.finish();
        acc.put(slot);
        if constexpr (!C::kHopper) slot[C::kGroupRows] = team_;  // in the padding
        x = first_x, slot += C::kSlot;
      } else {
        x += C::kUnitBytes;
      }
    }
    acc.finish();
    cp_async_wait<0>();
    __syncthreads();
    if (x != first_x) acc.put(unfinished(team_));  // zeros from a team without a share
    if (C::kHopper && splits() > 1) {
      cluster_arrive_with_shared();
      cluster_wait();
    } else {
      __syncthreads();
    }
    if constexpr (C::kHopper) {
      add_pieces_and_store();
      if (splits() > 1) {  // no block leaves while others read its sums
        cluster_arrive_relaxed();
        cluster_wait();
      }
    } else if (splits() == 1) {
      add_pieces([&](int token, int row, const float(&sum)[4]) { store(token, row, sum); });
    } else {
      add_pieces([&](int token, int row, const float(&sum)[4]) {
        store_float4_l2(partial_sum(p_, split(), token0() + token, first_group_ * C::kGroupRows + row), sum);
      });
      if (last_block_of_tile<C>(p_, *reinterpret_cast<int*>(memory_))) add_partial_sums_and_store();
    }
  }

 private:
  // Where a lane loads from next. Reads up to kRowTiles - 1 tiles past the last: the packed weights have such room.
  struct Source {
    const char* weights;
    const char* meta;
    int unit;

    __device__ __forceinline__ Source(const DigitsGemm& gemm, int group, int first) : unit(first) {
      const i64 tile = (gemm.first_group_ + group) * C::kRowTiles + gemm.warp_ % C::kTeam * C::kTiles;
      const i64 block = tile * gemm.p_.chunks + gemm.first_chunk_ + first * C::kUnit;
      weights = static_cast<const char*>(gemm.p_.weights) + block * Weights::kBytes + gemm.lane_ * 16;
      meta = static_cast<const char*>(gemm.p_.meta) + block * Meta::kBytes + gemm.lane_ * 16;
    }

    __device__ __forceinline__ void advance(const DigitsGemm& gemm) {
      int blocks = C::kUnit;
      if (++unit == gemm.units_) unit = 0, blocks += C::kRowTiles * gemm.p_.chunks - gemm.units_ * C::kUnit;
      weights += static_cast<i64>(blocks) * Weights::kBytes;
      if constexpr (C::kGroup != 0) meta += static_cast<i64>(blocks) * Meta::kBytes;
    }
  };

  // Read again where they are wanted: the loop needs the registers.
  static __device__ __forceinline__ int split() { return blockIdx.z; }
  static __device__ __forceinline__ int splits() { return gridDim.z; }
  static __device__ __forceinline__ int token0() { return blockIdx.y * C::kTokens; }
  __device__ __forceinline__ int tokens() const { return min(C::kTokens, p_.m - token0()); }

  __device__ __forceinline__ int all_groups() const { return (p_.row_tiles + C::kRowTiles - 1) / C::kRowTiles; }
  __device__ __forceinline__ int team_start(int team) const { return share_start(groups_ * units_, C::kTeams, team); }

  __device__ __forceinline__ u32 ring() const {  // the warp's first stage
    return shared_address(memory_) + warp_ * (C::kStages * C::kStageBytes);
  }
  __device__ __forceinline__ u32 next_stage(u32 stage) const {
    return stage == ring() + (C::kStages - 1) * C::kStageBytes ? ring() : stage + C::kStageBytes;
  }
  __device__ __forceinline__ int* unfinished(int team) const { return reinterpret_cast<int*>(memory_) + team * C::kSlot; }
  __device__ __forceinline__ char* x_memory() const { return memory_ + C::kSharedBytes; }
  __device__ __forceinline__ DigitScale* scales() const {
    return reinterpret_cast<DigitScale*>(x_memory() + ceil_div(p_.chunks_per_split, C::kUnit) * C::kUnitBytes);
  }
  __device__ __forceinline__ float* row_scales() const { return reinterpret_cast<float*>(scales() + C::kTokens); }
  __device__ __forceinline__ int* slots() const {
    return reinterpret_cast<int*>(row_scales() + groups_ * C::kGroupRows);
  }
  // What the end of the kernel needs: scales into shared memory, biases into L2.
  __device__ __forceinline__ void fetch_scales() const {
    const int first = first_group_ * C::kGroupRows, rows = min(groups_ * C::kGroupRows, p_.row_tiles * kTileRows - first);
    for (int row = threadIdx.x * 4; row < rows; row += C::kThreads * 4) {
      cp_async_zfill(shared_address(row_scales() + row), p_.row_scale + first + row, 16);
      if (p_.bias != nullptr && row % 32 == 0 && first + row < p_.n)
        prefetch_l2(static_cast<const u16*>(p_.bias) + first + row);
    }
  }

  __device__ __forceinline__ void store(int token, int row, const float (&sum)[4]) const {
    store_outputs<T>(p_, token0() + token, first_group_ * C::kGroupRows + row, sum, row_scales() + row);
  }

  __device__ __forceinline__ void load_unit(Source& source, u32& stage, bool wanted) const {
    if (wanted) {
      const u32 to = stage + lane_ * 16;
      const int last = max(1, min(C::kUnit, chunks_ - source.unit * C::kUnit)) - 1;  // chunks past it stand for any: x is zero
#pragma unroll
      for (int rt = 0; rt < C::kTiles; ++rt) {
        const i64 tile = static_cast<i64>(rt) * p_.chunks;
#pragma unroll
        for (int u = 0; u < C::kUnit; ++u)
          cp_async_stream(to + (rt * C::kUnit + u) * Weights::kBytes,
                          source.weights + (tile + min(u, last)) * Weights::kBytes, policy_);
        if constexpr (C::kGroup != 0) {
          const int over = max(0, lane_ * 16 / Meta::kBytes - last);
          if (lane_ < C::kUnit * Meta::kBytes / 16)
            cp_async_stream(to + C::kMetaAt + rt * C::kUnit * Meta::kBytes, source.meta + (tile - over) * Meta::kBytes,
                            policy_);
        }
      }
      source.advance(*this);
      stage = next_stage(stage);
    }
    cp_async_commit();
  }

  struct Quad {
    typename If<C::kGroup == 0, int, float>::type v[4];

    __device__ __forceinline__ Quad(const Vec16& bits) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (C::kGroup == 0)
          v[i] = static_cast<int>(bits.w[i]);
        else
          v[i] = __uint_as_float(bits.w[i]);
      }
    }
    __device__ __forceinline__ void add(const Quad& other) {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] += other.v[i];
    }
  };

  // On Hopper: y for this block's part of the tokens, from the sums of all splits, in their order. What other blocks have is
  // read in their shared memory: all loads of two splits at once, without a branch between, so that they wait once.
  __device__ __forceinline__ void add_pieces_and_store() const {
    constexpr int kRowQuads = C::kGroupRows / 4;
    const int share = C::kTokens >> (31 - __clz(splits())), bits = 31 - __clz(share);  // splits: 1, 2, 4 or 8
    const u32 memory = shared_address(memory_), slots_at = shared_address(slots()) - memory;
    const u32 scales_at = shared_address(scales()) - memory;
    for (int i = threadIdx.x / kRowQuads; i < groups_ << bits; i += C::kThreads / kRowQuads) {
      const int group = i >> bits, token = split() * share + (i & (share - 1)), r = threadIdx.x % kRowQuads * 4;
      if (token >= tokens()) continue;
      const u32 at = (token * C::kSlotStride + r) * 4;
      float sum[4] = {};
      u32 finite = 1;
#pragma unroll 2
      for (int s = 0; s < splits(); ++s) {
        const u32 there = shared_of_block(memory, s);
        const Vec16 scale = load_cluster16(there + scales_at + token * 16);
        Quad piece = load_cluster16(there + slots_at + group * (C::kSlot * 4) + at);
#pragma unroll
        for (int team = 0; team < C::kTeams - 1; ++team)  // those that left this group unfinished
          if (static_cast<u32>(team_start(team + 1) - group * units_ - 1) < static_cast<u32>(units_ - 1))
            piece.add(load_cluster16(there + team * (C::kSlot * 4) + at));
        finite &= scale.w[2];
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] += static_cast<float>(piece.v[j]) * __uint_as_float(scale.w[0]);
      }
      const int row = group * C::kGroupRows + r, global = first_group_ * C::kGroupRows + row;
      if (!finite && global < p_.n) exact_rows(sum, token0() + token, global, 0, p_.k);
      store(token, row, sum);
    }
  }

  // Elsewhere: calls take(token, row of the block, sum of four rows) for every four rows and token.
  template <class Take>
  __device__ __forceinline__ void add_pieces(const Take& take) const {
    constexpr int kRowQuads = C::kGroupRows / 4, kAtOnce = 3;
    for (int q = threadIdx.x; q < groups_ * kRowQuads * C::kTokens; q += C::kThreads) {
      const int r = q % kRowQuads * 4, token = q / kRowQuads % C::kTokens, group = q / kRowQuads / C::kTokens;
      const int row = group * C::kGroupRows + r, global = first_group_ * C::kGroupRows + row;
      if (token >= tokens() || global >= p_.row_tiles * kTileRows) continue;
      const int at = token * C::kSlotStride + r, total = groups_ * units_;
      // the team that completed the group has put it into its slot, those before it have pieces
      int team = slots()[group * C::kSlot + C::kGroupRows];
      Quad piece = *reinterpret_cast<const Vec16*>(slots() + group * C::kSlot + at);
      const DigitScale scale = scales()[token];
#pragma unroll 1
      for (bool more = true; more; team -= kAtOnce) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          more = team - i > 0 && share_start(total, C::kTeams, team - i) > group * units_;
          if (more) piece.add(*reinterpret_cast<const Vec16*>(unfinished(team - i - 1) + at));
        }
      }
      float sum[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = static_cast<float>(piece.v[i]) * scale.first;
      const int k0 = first_chunk_ * kChunk;
      if (!scale.finite) exact_rows(sum, token0() + token, global, k0, min(p_.k, k0 + p_.chunks_per_split * kChunk));
      take(token, row, sum);
    }
  }

  // A token that has no digits, some inputs of four rows.
  __device__ __forceinline__ void exact_rows(float (&sum)[4], int token, int row, int k0, int end) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = exact_row<T, C::kGroup>(p_, token, row + i, k0, end);
  }

  // In the order of the splits; several loads at once.
  __device__ __forceinline__ void add_partial_sums_and_store() const {
    constexpr int kRowQuads = C::kGroupRows / 4, kBatch = 4;
    const int rows = p_.row_tiles * kTileRows - first_group_ * C::kGroupRows;
    for (int first = threadIdx.x; first < groups_ * kRowQuads * C::kTokens; first += kBatch * C::kThreads) {
      float4 sum[kBatch] = {};
      int row[kBatch], token[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int q = first + b * C::kThreads;
        token[b] = q / kRowQuads % C::kTokens;
        row[b] = q / (kRowQuads * C::kTokens) * C::kGroupRows + q % kRowQuads * 4;
        if (row[b] >= min(rows, groups_ * C::kGroupRows) || token[b] >= tokens()) row[b] = -1;
      }
#pragma unroll 2
      for (int split = 0; split < splits(); ++split) {
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          if (row[b] < 0) continue;
          const float4 part = __ldcg(reinterpret_cast<const float4*>(
              partial_sum(p_, split, token0() + token[b], first_group_ * C::kGroupRows + row[b])));
          sum[b].x += part.x, sum[b].y += part.y, sum[b].z += part.z, sum[b].w += part.w;
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const float out[4] = {sum[b].x, sum[b].y, sum[b].z, sum[b].w};
        if (row[b] >= 0) store(token[b], row[b], out);
      }
    }
  }
};

}  // namespace tsld
