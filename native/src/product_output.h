// From exact sums to outputs: scales, groups, bias, activation, gate, residual, in the order of float operations that
// kernels.h states. The same source for every instruction set.
#pragma once

#include <stdint.h>

#include "product_plan.h"
#include "vector.h"
#include "vector_math.h"

namespace hqdit {
namespace {

// Weight scales and biases of one panel, padded with zeros to whole vectors.
struct PanelFactors {
  PanelFactors(const ProductArgs& args, int64_t most_columns, Carver* carver)
      : columns(RoundUp(most_columns, kLanes)),
        scale(carver->Take<float>(GroupCount(args) * columns)),
        bias(carver->Take<float>(columns)) {}

  int64_t columns;
  float* scale;  // of (group, column of the panel) at group * columns + column
  float* bias;
};

inline void FillFactors(const ProductArgs& args, const Item& item, const PanelFactors& factors) {
  const Weight& weight = *item.weight;
  for (int64_t g = 0; g < GroupCount(args); ++g) {
    const float* scale = weight.scale + item.column * weight.scale_row_stride + g * weight.scale_group_stride;
    float* to = factors.scale + g * factors.columns;
    for (int64_t c = 0; c < factors.columns; ++c) to[c] = c < item.columns ? scale[c * weight.scale_row_stride] : 0.0f;
  }
  for (int64_t c = 0; c < factors.columns; ++c) {
    // x + -0 is x, also where x is a zero.
    factors.bias[c] = c < item.columns && weight.bias != nullptr ? weight.bias[item.column + c] : -0.0f;
  }
}

inline float TokenScale(const ProductArgs& args, int64_t row, int64_t group) {
  return args.token_scale[row * args.token_scale_stride + group * args.token_scale_group_stride];
}

HQDIT_INLINE Float16Lanes Scaled(const int32_t* sums, float token_scale, Float16Lanes weight_scale) {
  return ToFloat(Load(sums)) * Float16Lanes(token_scale) * weight_scale;
}

// A block of sums of consecutive tokens, or of its groups added up so far, and where it lies in the product.
struct Block {
  const Weight* weight;
  int64_t row;  // first token
  int64_t rows;
  int64_t column;  // first output channel, of the weight
  int64_t columns;
  const int32_t* sums;
  float* parts;        // only used where there are several groups
  int64_t stride;      // of both
  const float* scale;  // of the channels, for group 0
  int64_t scale_group_stride;
  const float* bias;
};

// The `columns` columns from `column` of the item's panel on, or as many as it has.
inline void SetBlockColumns(const Item& item, const PanelFactors& factors, int64_t column, int64_t columns,
                            Block* block) {
  block->weight = item.weight;
  block->column = item.column + column;
  block->columns = Min(columns, item.columns - column);
  block->scale = factors.scale + column;
  block->scale_group_stride = factors.columns;
  block->bias = factors.bias + column;
}

template <bool kIsFirst>
[[gnu::noinline]] void AddGroupAs(const ProductArgs& args, const Block& block, int64_t group) {
  const float* token_scales =
      args.token_scale + block.row * args.token_scale_stride + group * args.token_scale_group_stride;
  const int64_t rows = block.rows, columns = block.columns, stride = block.stride;
  const int64_t token_scale_stride = args.token_scale_stride;
  for (int64_t c = 0; c < columns; c += kLanes) {
    const Float16Lanes weight_scale = Load(block.scale + group * block.scale_group_stride + c);
    const int32_t* sums = block.sums + c;
    float* parts = block.parts + c;
    for (int64_t r = 0; r < rows; ++r) {
      const Float16Lanes part = Scaled(sums + r * stride, token_scales[r * token_scale_stride], weight_scale);
      Store(parts + r * stride, kIsFirst ? part : Load(parts + r * stride) + part);
    }
  }
}

// Adds the sums of group `group` to the block's parts; the first group sets them.
inline void AddGroup(const ProductArgs& args, const Block& block, int64_t group) {
  group == 0 ? AddGroupAs<true>(args, block, group) : AddGroupAs<false>(args, block, group);
}

template <Element kType>
HQDIT_INLINE Float16Lanes LoadElements(const void* from, int64_t index, int count) {
  if (kType == Element::kBFloat16) {
    const uint16_t* halves = static_cast<const uint16_t*>(from) + index;
    return count == kLanes ? LoadBFloat16(halves) : LoadBFloat16Partial(halves, count);
  }
  const float* floats = static_cast<const float*>(from) + index;
  return count == kLanes ? Load(floats) : LoadPartial(floats, count);
}

template <Element kType>
HQDIT_INLINE void StoreElements(void* to, int64_t index, Float16Lanes lanes, int count) {
  if (kType == Element::kBFloat16) {
    uint16_t* halves = static_cast<uint16_t*>(to) + index;
    count == kLanes ? StoreBFloat16(halves, lanes) : StoreBFloat16Partial(halves, lanes, count);
    return;
  }
  float* floats = static_cast<float*>(to) + index;
  count == kLanes ? Store(floats, lanes) : StorePartial(floats, lanes, count);
}

template <Activation kActivation>
HQDIT_INLINE Float16Lanes Activate(Float16Lanes y) {
  if (kActivation == Activation::kGeluTanh) return GeluTanh(y);
  if (kActivation == Activation::kGeluErf) return GeluErf(y);
  return y;
}

HQDIT_INLINE void PrefetchBytes(const void* from, int64_t bytes) {
  constexpr int64_t kLineBytes = 64;
  constexpr int kReadOnly = 0, kSecondLevel = 2;
  for (int64_t b = 0; b < bytes; b += kLineBytes) {
    __builtin_prefetch(static_cast<const char*>(from) + b, kReadOnly, kSecondLevel);
  }
}

// Brings the lines that FinishBlock will write, or read and write, into the second-level cache. Without it the stores
// to rows far apart wait for memory, and meanwhile keep the line buffers from the loads of the next sums. Always
// inlined because GCC 12 takes a call that only prefetches for one without effect.
HQDIT_INLINE void PrefetchOutput(const ProductArgs& args, const Block& block) {
  const Weight& weight = *block.weight;
  const int64_t element_bytes = args.out_type == Element::kBFloat16 ? 2 : 4;
  const bool has_residual = weight.residual != nullptr && weight.residual != weight.out;
  for (int64_t row = block.row; row < block.row + block.rows; ++row) {
    const int64_t at = (row * weight.out_stride + block.column) * element_bytes;
    PrefetchBytes(static_cast<const char*>(weight.out) + at, block.columns * element_bytes);
    if (!has_residual) continue;
    const int64_t residual_at = (row * weight.residual_stride + block.column) * element_bytes;
    PrefetchBytes(static_cast<const char*>(weight.residual) + residual_at, block.columns * element_bytes);
  }
}

template <Activation kActivation, Element kType>
[[gnu::noinline]] void FinishBlockAs(const ProductArgs& args, const Block& block) {
  const Weight& weight = *block.weight;
  const bool is_one_group = args.group_size == args.width;
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t row = block.row + r;
    const float token_scale = TokenScale(args, row, 0);
    const float* gate = nullptr;
    if (weight.gate != nullptr) gate = weight.gate + row / weight.tokens_per_gate * weight.gate_stride + block.column;
    const int64_t out = row * weight.out_stride + block.column;
    const int64_t residual = row * weight.residual_stride + block.column;
    const int64_t at = r * block.stride;
    for (int64_t c = 0; c < block.columns; c += kLanes) {
      const int count = static_cast<int>(Min(block.columns - c, kLanes));
      Float16Lanes y =
          is_one_group ? Scaled(block.sums + at + c, token_scale, Load(block.scale + c)) : Load(block.parts + at + c);
      y = Activate<kActivation>(y + Load(block.bias + c));
      if (gate != nullptr) {
        y = y * (count == kLanes ? Load(gate + c) : LoadPartial(gate + c, count));
        y = y + LoadElements<kType>(weight.residual, residual + c, count);
      }
      StoreElements<kType>(weight.out, out + c, y, count);
    }
  }
}

template <Activation kActivation>
inline void FinishBlockWith(const ProductArgs& args, const Block& block) {
  args.out_type == Element::kFloat32 ? FinishBlockAs<kActivation, Element::kFloat32>(args, block)
                                     : FinishBlockAs<kActivation, Element::kBFloat16>(args, block);
}

// Writes the outputs of a block, from the sums of the only group or, where there are several groups, from the parts.
inline void FinishBlock(const ProductArgs& args, const Block& block) {
  if (args.activation == Activation::kGeluTanh) return FinishBlockWith<Activation::kGeluTanh>(args, block);
  if (args.activation == Activation::kGeluErf) return FinishBlockWith<Activation::kGeluErf>(args, block);
  FinishBlockWith<Activation::kNone>(args, block);
}

}  // namespace
}  // namespace hqdit
