// The product for a few tokens, bound by reading the weights: k lies along the lanes, 64 codes are decoded in registers
// and multiplied by the levels of every token, and each packed byte is read once, in the order of memory.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "product_decode_avx512.h"
#include "product_dots_avx512.h"
#include "product_output.h"
#include "product_plan.h"

namespace hqdit {
namespace {

constexpr int kFewRows = 8;
constexpr int kFewRowsColumns = 64;  // of an item

constexpr PlanShape kFewRowsShape = {/*row_tile=*/kFewRows,
                                     /*panel_step=*/kFewRowsColumns,
                                     /*panel_max=*/kFewRowsColumns,
                                     /*chunk_max=*/kFewRows,
                                     /*decode_rows=*/0,
                                     /*chunk_bytes=*/kNoLimit,
                                     /*columns_to_hide=*/0};

// Adding up lanes for every group and token costs more than a panel where groups are small.
inline bool IsForFewRows(const ProductArgs& args) {
  return args.tokens <= kFewRows && (args.group_size == args.width || args.group_size >= 128 + 32 * args.tokens);
}

struct FewRowsScratch {
  FewRowsScratch(const ProductArgs& args, void* memory)
      : carver(memory),
        starts(carver.Take<int32_t>(GroupCount(args) * kFewRows)),
        factors(args, kFewRowsColumns, &carver) {}

  Carver carver;
  int32_t* starts;
  PanelFactors factors;
};

// The sums of the lanes of each of 16 vectors, as one vector.
inline __m512i SumLanes(const __m512i (&v)[kLanes]) {
  __m512i pairs[8], quads[4], halves[2];
  for (int i = 0; i < 8; ++i) {
    pairs[i] =
        _mm512_add_epi32(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
  }
  // In each 128-bit lane: what that lane adds to four of the sums.
  for (int i = 0; i < 4; ++i) {
    quads[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(pairs[2 * i], pairs[2 * i + 1]),
                                _mm512_unpackhi_epi64(pairs[2 * i], pairs[2 * i + 1]));
  }
  for (int i = 0; i < 2; ++i) {
    halves[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(quads[2 * i], quads[2 * i + 1], 0x44),
                                 _mm512_shuffle_i32x4(quads[2 * i], quads[2 * i + 1], 0xee));
  }
  return _mm512_add_epi32(_mm512_shuffle_i32x4(halves[0], halves[1], 0x88),
                          _mm512_shuffle_i32x4(halves[0], halves[1], 0xdd));
}

// Levels k0 to k0 + count of all tokens times the same of one output channel; lanes[r] gets token r's sum in 16 parts.
template <int kRows, bool kUnsigned>
inline void DotChannel(const ProductArgs& args, const uint8_t* packed, __m512i table, int64_t k0, int64_t count,
                       __m512i (*lanes)[kLanes], int lane) {
  constexpr int64_t kStep = 64;
  constexpr int64_t kPrefetchBytes = 2048;
  const uint8_t* levels = static_cast<const uint8_t*>(args.levels) + k0;
  __m512i sums[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sums[r] = _mm512_setzero_si512();
  int64_t k = 0;
  for (; k + kStep <= count; k += kStep) {
    _mm_prefetch(reinterpret_cast<const char*>(packed + k / 2 + kPrefetchBytes), _MM_HINT_T0);
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed + k / 2));
    const __m512i weights = _mm512_shuffle_epi8(table, SpreadNibbles(_mm512_cvtepu8_epi16(bytes)));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      AddDots<kUnsigned>(sums[r], _mm512_loadu_si512(levels + r * args.levels_stride + k), weights);
    }
  }
  if (k < count) {
    const __mmask32 bytes_left = (__mmask32{1} << ((count - k) / 2)) - 1;
    const __m256i bytes = _mm256_maskz_loadu_epi8(bytes_left, packed + k / 2);
    const __m512i weights = _mm512_shuffle_epi8(table, SpreadNibbles(_mm512_cvtepu8_epi16(bytes)));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* from = levels + r * args.levels_stride + k;
      AddDots<kUnsigned>(sums[r], _mm512_maskz_loadu_epi8(FirstBytes(count - k), from), weights);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) lanes[r][lane] = sums[r];
}

inline __m512i TableOf(const ProductArgs& args, const Weight& weight, int64_t row) {
  const int format = weight.format_index == nullptr ? 0 : weight.format_index[row];
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight.level_tables + format * 16));
  return _mm512_broadcast_i32x4(_mm_xor_si128(table, _mm_set1_epi8(static_cast<char>(WeightFlip(args)))));
}

// Group `group` of 16 output channels from `column` of the weight on: sums[r * kLanes + channel].
template <int kRows, bool kUnsigned>
void SumChannels(const ProductArgs& args, const Item& item, int64_t column, int64_t group, const int32_t* starts,
                 int32_t* sums) {
  const Weight& weight = *item.weight;
  const int64_t channels = Min(kLanes, weight.rows - column);
  const int64_t k0 = group * args.group_size;
  __m512i lanes[kRows][kLanes];
  memset(lanes, 0, sizeof(lanes));
  for (int64_t i = 0; i < channels; ++i) {
    const uint8_t* packed = weight.packed + (column + i) * weight.row_bytes + k0 / 2;
    DotChannel<kRows, kUnsigned>(args, packed, TableOf(args, weight, column + i), k0, args.group_size, lanes,
                                 static_cast<int>(i));
  }
  for (int r = 0; r < kRows; ++r) {
    const __m512i start = _mm512_set1_epi32(starts[r * GroupCount(args) + group]);
    _mm512_store_si512(sums + r * kLanes, _mm512_add_epi32(start, SumLanes(lanes[r])));
  }
}

template <int kRows, bool kUnsigned>
void MultiplyFewRows(const ProductArgs& args, const Item& item, const FewRowsScratch& scratch) {
  alignas(64) int32_t sums[kRows * kLanes];
  alignas(64) float parts[kRows * kLanes];
  const int64_t groups = GroupCount(args);
  for (int64_t column = 0; column < item.columns; column += kLanes) {
    Block block = {};
    SetBlockColumns(item, scratch.factors, column, kLanes, &block);
    block.rows = kRows;
    block.sums = sums;
    block.parts = parts;
    block.stride = kLanes;
    for (int64_t g = 0; g < groups; ++g) {
      SumChannels<kRows, kUnsigned>(args, item, item.column + column, g, scratch.starts, sums);
      if (groups > 1) AddGroup(args, block, g);
    }
    FinishBlock(args, block);
  }
}

template <bool kUnsigned>
void FewRowsItem(const ProductArgs& args, const Item& item, const FewRowsScratch& scratch) {
  constexpr void (*kMultiply[])(const ProductArgs&, const Item&, const FewRowsScratch&) = {
      MultiplyFewRows<1, kUnsigned>, MultiplyFewRows<2, kUnsigned>, MultiplyFewRows<3, kUnsigned>,
      MultiplyFewRows<4, kUnsigned>, MultiplyFewRows<5, kUnsigned>, MultiplyFewRows<6, kUnsigned>,
      MultiplyFewRows<7, kUnsigned>, MultiplyFewRows<8, kUnsigned>};
  kMultiply[item.rows - 1](args, item, scratch);
}

inline void FewRowsProduct(const ProductArgs& args, const Share& share) {
  const Plan plan = MakePlan(args, kFewRowsShape, share.workers);
  const FewRowsScratch scratch(args, share.scratch);
  bool has_starts = false;
  for (int64_t i; (i = TakeItem(share)) < plan.items();) {
    const Item item = ItemAt(args, plan, i);
    if (!has_starts) FillStarts(args, item, scratch.starts);
    has_starts = true;
    FillFactors(args, item, scratch.factors);
    (args.levels_unsigned ? FewRowsItem<true> : FewRowsItem<false>)(args, item, scratch);
  }
}

}  // namespace
}  // namespace hqdit
