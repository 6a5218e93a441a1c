// The product in plain C++, for every CPU: one token and one output channel at a time, in 16 bits, which the compiler
// turns into multiply-add instructions where the baseline has them.
#include <stdint.h>

#include "kernel_table.h"
#include "product_output.h"
#include "product_plan.h"

namespace hqdit {
namespace portable {
namespace {

constexpr int kColumns = 16;

constexpr PlanShape kShape = {/*row_tile=*/1,
                              /*panel_step=*/kColumns,
                              /*panel_max=*/kColumns,
                              /*chunk_max=*/kMostChunkRows,
                              /*decode_rows=*/2,
                              /*chunk_bytes=*/kNoLimit,
                              /*columns_to_hide=*/0};

struct Scratch {
  Scratch(const ProductArgs& args, void* memory)
      : carver(memory),
        panel(carver.Take<int16_t>(args.width * kColumns)),
        levels(carver.Take<int16_t>(args.width)),
        factors(args, kColumns, &carver) {}

  Carver carver;
  int16_t* panel;   // of (output channel, k) at channel * width + k
  int16_t* levels;  // of one token
  PanelFactors factors;
};

void DecodePanel(const ProductArgs& args, const Item& item, int16_t* panel) {
  const Weight& weight = *item.weight;
  for (int64_t row = item.column; row < item.column + item.columns; ++row) {
    const uint8_t* packed = weight.packed + row * weight.row_bytes;
    const int8_t* table = weight.level_tables + (weight.format_index == nullptr ? 0 : weight.format_index[row]) * 16;
    for (int64_t i = 0; i < args.width / 2; ++i) {
      *panel++ = table[packed[i] & 15];
      *panel++ = table[packed[i] >> 4];
    }
  }
}

template <typename Level>
void Widen(const void* from, int64_t count, int16_t* to) {
  const Level* levels = static_cast<const Level*>(from);
  for (int64_t k = 0; k < count; ++k) to[k] = levels[k];
}

int32_t Dot(const int16_t* a, const int16_t* b, int64_t count) {
  int32_t sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += a[k] * b[k];
  return sum;
}

void MultiplyRow(const ProductArgs& args, const Item& item, const Scratch& scratch, int64_t row) {
  const char* levels = static_cast<const char*>(args.levels) + row * args.levels_stride;
  (args.levels_unsigned ? Widen<uint8_t> : Widen<int8_t>)(levels, args.width, scratch.levels);
  int32_t sums[kColumns] = {};
  float parts[kColumns];
  Block block = {};
  SetBlockColumns(item, scratch.factors, 0, kColumns, &block);
  block.row = row;
  block.rows = 1;
  block.sums = sums;
  block.parts = parts;
  for (int64_t g = 0; g < GroupCount(args); ++g) {
    const int64_t k = g * args.group_size;
    for (int64_t c = 0; c < item.columns; ++c) {
      sums[c] = Dot(scratch.levels + k, scratch.panel + c * args.width + k, args.group_size);
    }
    AddGroup(args, block, g);
  }
  FinishBlock(args, block);
}

}  // namespace

int64_t ProductScratch(const ProductArgs& args) { return Scratch(args, nullptr).carver.used(); }

void Product(const ProductArgs& args, const Share& share) {
  const Plan plan = MakePlan(args, kShape, share.workers);
  const Scratch scratch(args, share.scratch);
  for (int64_t i; (i = TakeItem(share)) < plan.items();) {
    const Item item = ItemAt(args, plan, i);
    DecodePanel(args, item, scratch.panel);
    FillFactors(args, item, scratch.factors);
    for (int64_t row = item.row; row < item.row + item.rows; ++row) MultiplyRow(args, item, scratch, row);
  }
}

}  // namespace portable
}  // namespace hqdit
