// The product with vpmaddwd: levels and weights as 16-bit numbers, because the byte multiplication of AVX2 saturates.
// Panels of 16 output channels times 6 tokens in registers; for a few tokens k lies along the lanes instead, and the
// weights are decoded in registers.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kernel_table.h"
#include "product_output.h"
#include "product_plan.h"
#include "vector.h"

namespace hqdit {
namespace avx2 {
namespace {

constexpr int kPair = 2;  // levels that one lane of vpmaddwd multiplies: those of one packed byte
constexpr int kRows = 6;  // 6 x 2 sums, 2 weights, a broadcast and a product fill the 16 registers
constexpr int kVectors = 2;
constexpr int kVectorLanes = 8;
constexpr int kColumns = kVectors * kVectorLanes;
constexpr int64_t kPairStride = kColumns * kPair;  // of the panel, in 16-bit numbers
constexpr int kFewRows = 4;
constexpr int kFewRowsStep = 32;  // codes of 16 packed bytes

constexpr PlanShape kShape = {/*row_tile=*/kRows,
                              /*panel_step=*/kColumns,
                              /*panel_max=*/kColumns,
                              /*chunk_max=*/kMostChunkRows,
                              /*decode_rows=*/4,
                              /*chunk_bytes=*/kNoLimit,
                              /*columns_to_hide=*/0};

struct Scratch {
  Scratch(const ProductArgs& args, void* memory)
      : carver(memory),
        panel(carver.Take<int16_t>(args.width * kColumns)),
        levels_stride(RoundUp(args.width, kFewRowsStep)),
        levels(carver.Take<int16_t>(kRows * levels_stride)),
        factors(args, kColumns, &carver) {}

  Carver carver;
  int16_t* panel;  // of (k, column) at k / 2 * kPairStride + column * 2 + k % 2
  int64_t levels_stride;
  int16_t* levels;  // of the tokens at work, each with zeros behind it
  PanelFactors factors;
};

__m128i TableOf(const Weight& weight, int64_t row) {
  const int format = weight.format_index == nullptr ? 0 : weight.format_index[row];
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight.level_tables + format * 16));
}

// The levels of the 16 codes in the low half of `packed`.
__m256i DecodeLow(__m128i packed, __m128i table) {
  const __m128i nibble = _mm_set1_epi8(15);
  const __m128i low = _mm_and_si128(packed, nibble);
  const __m128i high = _mm_and_si128(_mm_srli_epi16(packed, 4), nibble);
  return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(table, _mm_unpacklo_epi8(low, high)));
}

// Columns of an 8 x 8 matrix of 32-bit numbers become rows.
void Transpose(__m256i (&rows)[8]) {
  __m256i pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int half = 0; half < 2; ++half) {
      quads[i + 2 * half] = _mm256_unpacklo_epi64(pairs[i + half], pairs[i + 2 + half]);
      quads[i + 2 * half + 1] = _mm256_unpackhi_epi64(pairs[i + half], pairs[i + 2 + half]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x31);
  }
}

// Packed bytes [byte, byte + count), at most 8, of the 8 channels from `row` on, into the panel.
void DecodeEight(const Weight& weight, int64_t row, int64_t byte, int64_t count, int16_t* panel) {
  __m256i levels[kVectorLanes];
  for (int lane = 0; lane < kVectorLanes; ++lane) {
    const int64_t existing = Min(row + lane, weight.rows - 1);
    uint64_t packed = 0;
    memcpy(&packed, weight.packed + existing * weight.row_bytes + byte, static_cast<size_t>(count));
    levels[lane] = DecodeLow(_mm_cvtsi64_si128(static_cast<int64_t>(packed)), TableOf(weight, existing));
  }
  Transpose(levels);
  for (int64_t i = 0; i < count; ++i) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(panel + i * kPairStride), levels[i]);
  }
}

void DecodePanel(const ProductArgs& args, const Item& item, int16_t* panel) {
  const int64_t bytes = args.width / kPair;
  for (int64_t column = 0; column < kColumns; column += kVectorLanes) {
    int16_t* to = panel + column * kPair;
    int64_t byte = 0;
    for (; byte + 8 <= bytes; byte += 8)
      DecodeEight(*item.weight, item.column + column, byte, 8, to + byte * kPairStride);
    if (byte < bytes) DecodeEight(*item.weight, item.column + column, byte, bytes - byte, to + byte * kPairStride);
  }
}

template <typename Level>
void Widen(const ProductArgs& args, const Scratch& scratch, int64_t row, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    const Level* levels = static_cast<const Level*>(args.levels) + (row + r) * args.levels_stride;
    int16_t* to = scratch.levels + r * scratch.levels_stride;
    for (int64_t k = 0; k < args.width; ++k) to[k] = levels[k];
    for (int64_t k = args.width; k < scratch.levels_stride; ++k) to[k] = 0;
  }
}

void WidenRows(const ProductArgs& args, const Scratch& scratch, int64_t row, int64_t rows) {
  (args.levels_unsigned ? Widen<uint8_t> : Widen<int8_t>)(args, scratch, row, rows);
}

// out[r * kColumns + c] = sum over `pairs` pairs of levels[r] * panel column c
template <int kTileRows>
void SumTile(const int16_t* levels, int64_t levels_stride, const int16_t* panel, int64_t pairs, int32_t* out) {
  __m256i sums[kTileRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
  for (int64_t i = 0; i < pairs; ++i) {
    const __m256i* weights = reinterpret_cast<const __m256i*>(panel + i * kPairStride);
    const __m256i low = _mm256_load_si256(weights), high = _mm256_load_si256(weights + 1);
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
      int32_t pair;
      memcpy(&pair, levels + r * levels_stride + i * kPair, sizeof(pair));
      const __m256i level = _mm256_set1_epi32(pair);
      sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(level, low));
      sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(level, high));
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows; ++r) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * kColumns), sums[r][0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * kColumns + kVectorLanes), sums[r][1]);
  }
}

void SumRows(const Scratch& scratch, int64_t k, int64_t count, int64_t rows, int32_t* out) {
  constexpr void (*kTiles[])(const int16_t*, int64_t, const int16_t*, int64_t, int32_t*) = {
      SumTile<1>, SumTile<2>, SumTile<3>, SumTile<4>, SumTile<5>, SumTile<6>};
  kTiles[rows - 1](scratch.levels + k, scratch.levels_stride, scratch.panel + k / kPair * kPairStride, count / kPair,
                   out);
}

// `rows` tokens (at most 6) from `row` on, all groups.
void MultiplyRows(const ProductArgs& args, const Item& item, const Scratch& scratch, int64_t row, int64_t rows) {
  alignas(32) int32_t sums[kRows * kColumns];
  alignas(32) float parts[kRows * kColumns];
  Block block = {};
  SetBlockColumns(item, scratch.factors, 0, kColumns, &block);
  block.row = row;
  block.rows = rows;
  block.sums = sums;
  block.parts = parts;
  block.stride = kColumns;
  WidenRows(args, scratch, row, rows);
  const int64_t groups = GroupCount(args);
  for (int64_t g = 0; g < groups; ++g) {
    SumRows(scratch, g * args.group_size, args.group_size, rows, sums);
    if (groups > 1) AddGroup(args, block, g);
  }
  FinishBlock(args, block);
}

int32_t SumLanes(__m256i v) {
  const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  const __m128i quarter = _mm_add_epi32(half, _mm_unpackhi_epi64(half, half));
  return _mm_cvtsi128_si32(_mm_add_epi32(quarter, _mm_shuffle_epi32(quarter, 1)));
}

// One output channel times the tokens in `levels`: sums[r * kColumns].
template <int kTileRows>
void SumChannel(const ProductArgs& args, const Weight& weight, int64_t row, const Scratch& scratch, int32_t* out) {
  const uint8_t* packed = weight.packed + row * weight.row_bytes;
  const __m128i table = TableOf(weight, row);
  __m256i sums[kTileRows];
#pragma GCC unroll 4
  for (int r = 0; r < kTileRows; ++r) sums[r] = _mm256_setzero_si256();
  for (int64_t k = 0; k < args.width; k += kFewRowsStep) {
    __m128i bytes = _mm_setzero_si128();
    if (k + kFewRowsStep <= args.width) {
      bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + k / kPair));
    } else {
      memcpy(&bytes, packed + k / kPair, static_cast<size_t>(args.width - k) / kPair);
    }
    const __m256i low = DecodeLow(bytes, table), high = DecodeLow(_mm_unpackhi_epi64(bytes, bytes), table);
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) {
      const __m256i* levels = reinterpret_cast<const __m256i*>(scratch.levels + r * scratch.levels_stride + k);
      sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(low, _mm256_load_si256(levels)));
      sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(high, _mm256_load_si256(levels + 1)));
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kTileRows; ++r) out[r * kColumns] = SumLanes(sums[r]);
}

// All tokens, which `levels` holds.
void MultiplyFewRows(const ProductArgs& args, const Item& item, const Scratch& scratch) {
  constexpr void (*kSums[])(const ProductArgs&, const Weight&, int64_t, const Scratch&, int32_t*) = {
      SumChannel<1>, SumChannel<2>, SumChannel<3>, SumChannel<4>};
  alignas(32) int32_t sums[kFewRows * kColumns] = {};
  for (int64_t c = 0; c < item.columns; ++c) {
    kSums[args.tokens - 1](args, *item.weight, item.column + c, scratch, sums + c);
  }
  Block block = {};
  SetBlockColumns(item, scratch.factors, 0, kColumns, &block);
  block.rows = args.tokens;
  block.sums = sums;
  block.stride = kColumns;
  FinishBlock(args, block);
}

}  // namespace

int64_t ProductScratch(const ProductArgs& args) { return Scratch(args, nullptr).carver.used(); }

void Product(const ProductArgs& args, const Share& share) {
  const Plan plan = MakePlan(args, kShape, share.workers);
  const Scratch scratch(args, share.scratch);
  const bool has_few_rows = args.tokens <= kFewRows && args.group_size == args.width;
  if (has_few_rows) WidenRows(args, scratch, 0, args.tokens);
  for (int64_t i; (i = TakeItem(share)) < plan.items();) {
    const Item item = ItemAt(args, plan, i);
    FillFactors(args, item, scratch.factors);
    if (has_few_rows) {
      MultiplyFewRows(args, item, scratch);
      continue;
    }
    DecodePanel(args, item, scratch.panel);
    for (int64_t r = 0; r < item.rows; r += kRows) {
      MultiplyRows(args, item, scratch, item.row + r, Min(kRows, item.rows - r));
    }
  }
}

}  // namespace avx2
}  // namespace hqdit
