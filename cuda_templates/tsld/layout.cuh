// The kernel layout of weights, and the compile-time sizes that follow from it.
//
// Weights are cut into tiles of 16 output rows and chunks of 128 inputs. One (tile, chunk) is kBits/2 blocks of
// 32 lanes x 16 bytes, in the order in which a warp feeds mma.m16n8k16 with the weights as the 16-row operand:
// a lane's 16 bytes are exactly its own fragments, so a warp reads 512 contiguous bytes and shuffles nothing.
//
//   weights: [row_tiles][chunks][kBits/2][32 lanes][16 bytes]
//   meta   : [row_tiles][chunks]{ half scale[128/G][16 rows]; u8 zero[128/G][16 rows] (bits > 2) }, groups of G
//
// Lane l holds rows g = l/4 and g+8, inputs 2t, 2t+1, 2t+8, 2t+9 (t = l%4) of each step of 16 inputs:
//   register a0 = (g, 2t..), a1 = (g+8, 2t..), a2 = (g, 2t+8..), a3 = (g+8, 2t+8..).
// How codes sit within a 32-bit word is in dequant.cuh; `codegen/layout.py` writes this layout.
#pragma once

#include "tsld/ptx.cuh"

namespace tsld {

constexpr int kTileRows = 16;
constexpr int kChunk = 128;        // inputs per chunk
constexpr int kPairs = kChunk / 32; // a "pair" is two mma steps of 16 inputs: one word of ternary codes a lane

template <int kBits>
struct WeightLayout {
  static_assert(kBits == 2 || kBits == 4 || kBits == 8, "bits: 2 (ternary), 4 or 8");
  static constexpr int kVecs = kBits / 2;              // 16-byte vectors of a lane per (tile, chunk)
  static constexpr int kBytes = kVecs * 512;           // bytes of a (tile, chunk)
  static constexpr int kWordsPerPair = kBits / 2;      // 32-bit words of a lane per 32 inputs
};

template <int kBits, int kGroup>
struct MetaLayout {
  static_assert(kGroup == 0 || kGroup == 32 || kGroup == 64 || kGroup == 128, "group: 0 (row), 32, 64 or 128");
  static constexpr int kGroups = kGroup ? kChunk / kGroup : 0;   // groups in a chunk
  static constexpr int kScaleBytes = kGroups * kTileRows * 2;
  static constexpr int kBytes = kScaleBytes + (kBits > 2 ? kGroups * kTileRows : 0);
};

// Where a share begins of `total` items in `parts` contiguous shares whose sizes differ by one at most.
__device__ __forceinline__ int share_start(int total, int parts, int part) {
  return static_cast<u32>(total) * part / parts;
}

}  // namespace tsld
