// The tile instructions as the product uses them: a block of 2 x 2 tiles of sums, 32 tokens x 32 output channels.
// Included only by product_amx.cc.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "product_decode_avx512.h"
#include "product_plan.h"
#include "vector.h"

namespace hqdit {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;  // of a row of a tile
constexpr int kBlock = 2 * kTileRows;
constexpr int kBlockSums = kBlock * kBlock;
constexpr int64_t kSumsStride = kBlock * sizeof(int32_t);

// The memory format of ldtilecfg.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 hold sums, 4 and 5 levels of `tokens` tokens (16 if there are more), 6 and 7 weights of `units` units.
inline void ConfigureTiles(int64_t tokens, int64_t units) {
  TileConfig config;
  for (int tile = 0; tile < 6; ++tile) {
    config.rows[tile] = static_cast<uint8_t>(Min(tokens, kTileRows));
    config.row_bytes[tile] = static_cast<uint16_t>(tile < 4 ? kTileBytes : units * kUnit);
  }
  for (int tile = 6; tile < 8; ++tile) {
    config.rows[tile] = static_cast<uint8_t>(units);
    config.row_bytes[tile] = kTileBytes;
  }
  asm volatile("ldtilecfg %0" ::"m"(config));  // the intrinsic of GCC 12 names only the first 8 bytes as its input
}

// The tile intrinsics of GCC 12 do not say that they read memory: whatever was written is in memory after this.
inline void FinishWrites() { asm volatile("" ::: "memory"); }

// Tile kSums += tile kLevels * tile kWeights.
template <bool kUnsigned, int kSums, int kLevels, int kWeights>
HQDIT_INLINE void MultiplyTile() {
  if (kUnsigned) {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLevels), "i"(kWeights));
  } else {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLevels), "i"(kWeights));
  }
}

// What one step multiplies: two tiles of levels, two of weights.
struct Operands {
  const uint8_t* levels[2];
  int64_t levels_stride;
  const uint8_t* weights[2];
};

template <bool kUnsigned, bool kTwoTiles>
HQDIT_INLINE void MultiplyTiles(const Operands& o) {
  _tile_loadd(6, o.weights[0], kTileBytes);
  _tile_loadd(4, o.levels[0], o.levels_stride);
  MultiplyTile<kUnsigned, 0, 4, 6>();
  _tile_loadd(7, o.weights[1], kTileBytes);
  MultiplyTile<kUnsigned, 1, 4, 7>();
  if (!kTwoTiles) return;
  _tile_loadd(5, o.levels[1], o.levels_stride);
  MultiplyTile<kUnsigned, 2, 5, 6>();
  MultiplyTile<kUnsigned, 3, 5, 7>();
}

inline void ZeroSums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

template <bool kTwoTiles>
inline void LoadSums(const int32_t* sums) {
  _tile_loadd(0, sums, kSumsStride);
  _tile_loadd(1, sums + kTileRows, kSumsStride);
  if (!kTwoTiles) return;
  _tile_loadd(2, sums + kTileRows * kBlock, kSumsStride);
  _tile_loadd(3, sums + kTileRows * kBlock + kTileRows, kSumsStride);
}

template <bool kTwoTiles>
inline void StoreSums(int32_t* sums) {
  _tile_stored(0, sums, kSumsStride);
  _tile_stored(1, sums + kTileRows, kSumsStride);
  if (!kTwoTiles) return;
  _tile_stored(2, sums + kTileRows * kBlock, kSumsStride);
  _tile_stored(3, sums + kTileRows * kBlock + kTileRows, kSumsStride);
}

}  // namespace
}  // namespace hqdit
