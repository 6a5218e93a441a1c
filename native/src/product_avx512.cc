// The product with vpdpbusd: panels of 48 output channels, decoded to bytes in the second-level cache, times 8 tokens
// in registers.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kernel_table.h"
#include "product_decode_avx512.h"
#include "product_dots_avx512.h"
#include "product_few_rows_avx512.h"
#include "product_output.h"
#include "product_plan.h"

namespace hqdit {
namespace avx512 {
namespace {

constexpr int kRows = 8;
constexpr int kVectors = 3;  // 8 x 3 sums, 3 weights and a broadcast: 28 of the 32 registers
constexpr int kColumns = kVectors * kLanes;
constexpr int64_t kUnitStride = kVectors * kUnitBytes;

constexpr PlanShape kShape = {/*row_tile=*/kRows,
                              /*panel_step=*/kColumns,
                              /*panel_max=*/kColumns,
                              /*chunk_max=*/kMostChunkRows,
                              /*decode_rows=*/7,
                              /*chunk_bytes=*/kNoLimit,
                              /*columns_to_hide=*/0};

struct Scratch {
  Scratch(const ProductArgs& args, void* memory)
      : carver(memory),
        panel(carver.Take<uint8_t>(CeilDiv(args.width, kUnit) * kUnitStride)),
        starts(carver.Take<int32_t>(GroupCount(args) * Min(args.tokens, kMostChunkRows))),
        factors(args, kColumns, &carver) {}

  Carver carver;
  uint8_t* panel;
  int32_t* starts;  // of (token of the chunk, group) at token * groups + group
  PanelFactors factors;
};

template <int kBytes>
inline __m512i BroadcastLevels(const uint8_t* levels) {
  int32_t unit = 0;
  memcpy(&unit, levels, kBytes);
  return _mm512_set1_epi32(unit);
}

// sums += levels of one unit (its first kBytes bytes) * weights of one unit
template <int kTileRows, bool kUnsigned, int kBytes>
inline void AddUnit(const uint8_t* levels, int64_t levels_stride, const uint8_t* panel,
                    __m512i (&sums)[kTileRows][kVectors]) {
  __m512i weights[kVectors];
  for (int v = 0; v < kVectors; ++v) weights[v] = _mm512_load_si512(panel + v * kUnitBytes);
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
    const __m512i unit = BroadcastLevels<kBytes>(levels + r * levels_stride);
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) AddDots<kUnsigned>(sums[r][v], unit, weights[v]);
  }
}

struct Tile {
  const uint8_t* levels;
  int64_t levels_stride;
  const uint8_t* panel;
  int64_t width;  // levels of each row
  const int32_t* starts;
  int64_t starts_stride;
};

// sums[r][c] = starts[r] + sum over k of levels[r][k] * weights[k][c]
template <int kTileRows, bool kUnsigned>
void SumTile(const Tile& tile, int32_t* out) {
  __m512i sums[kTileRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_set1_epi32(tile.starts[r * tile.starts_stride]);
  }
  const uint8_t* levels = tile.levels;
  const uint8_t* panel = tile.panel;
  for (int64_t units = tile.width / kUnit; units > 0; --units) {
    AddUnit<kTileRows, kUnsigned, kUnit>(levels, tile.levels_stride, panel, sums);
    levels += kUnit;
    panel += kUnitStride;
  }
  if (tile.width % kUnit != 0) AddUnit<kTileRows, kUnsigned, 2>(levels, tile.levels_stride, panel, sums);
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) _mm512_store_si512(out + r * kColumns + v * kLanes, sums[r][v]);
  }
}

template <bool kUnsigned>
void SumRows(const Tile& tile, int64_t rows, int32_t* out) {
  constexpr void (*kTiles[])(const Tile&, int32_t*) = {
      SumTile<1, kUnsigned>, SumTile<2, kUnsigned>, SumTile<3, kUnsigned>, SumTile<4, kUnsigned>,
      SumTile<5, kUnsigned>, SumTile<6, kUnsigned>, SumTile<7, kUnsigned>, SumTile<8, kUnsigned>};
  kTiles[rows - 1](tile, out);
}

void DecodePanel(const ProductArgs& args, const Item& item, uint8_t* panel) {
  for (int64_t column = 0; column < item.columns; column += kLanes) {
    const Channels channels = MakeChannels(*item.weight, item.column + column, WeightFlip(args));
    Decode(channels, 0, args.width / 2, panel + column * kUnit, kUnitStride);
  }
}

// `rows` tokens (at most 8) from `row` on, all groups.
void MultiplyRows(const ProductArgs& args, const Item& item, const Scratch& scratch, int64_t row, int64_t rows) {
  alignas(64) int32_t sums[kRows * kColumns];
  alignas(64) float parts[kRows * kColumns];
  const int64_t groups = GroupCount(args);
  Block block = {};
  SetBlockColumns(item, scratch.factors, 0, kColumns, &block);
  block.row = row;
  block.rows = rows;
  block.sums = sums;
  block.parts = parts;
  block.stride = kColumns;
  PrefetchOutput(args, block);
  Tile tile = {static_cast<const uint8_t*>(args.levels) + row * args.levels_stride,
               args.levels_stride,
               scratch.panel,
               args.group_size,
               scratch.starts + (row - item.row) * groups,
               groups};
  for (int64_t g = 0; g < groups; ++g) {
    (args.levels_unsigned ? SumRows<true> : SumRows<false>)(tile, rows, sums);
    if (groups > 1) AddGroup(args, block, g);
    tile.levels += args.group_size;
    tile.panel += args.group_size / kUnit * kUnitStride;
    tile.starts += 1;
  }
  FinishBlock(args, block);
}

}  // namespace

int64_t ProductScratch(const ProductArgs& args) {
  return Max(Scratch(args, nullptr).carver.used(), FewRowsScratch(args, nullptr).carver.used());
}

void Product(const ProductArgs& args, const Share& share) {
  if (IsForFewRows(args)) return FewRowsProduct(args, share);
  const Plan plan = MakePlan(args, kShape, share.workers);
  const Scratch scratch(args, share.scratch);
  int64_t chunk_row = -1;
  for (int64_t i; (i = TakeItem(share)) < plan.items();) {
    const Item item = ItemAt(args, plan, i);
    if (item.row != chunk_row) FillStarts(args, item, scratch.starts);
    chunk_row = item.row;
    DecodePanel(args, item, scratch.panel);
    FillFactors(args, item, scratch.factors);
    for (int64_t r = 0; r < item.rows; r += kRows) {
      MultiplyRows(args, item, scratch, item.row + r, Min(kRows, item.rows - r));
    }
  }
}

}  // namespace avx512
}  // namespace hqdit
