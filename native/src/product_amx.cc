// The product with AMX tiles: panels of up to 128 output channels, decoded to bytes in the second-level cache, times
// blocks of 32 tokens x 32 channels, the sums of which fill four of the eight tiles.
//
// A tile multiplication takes 16 cycles of a unit of its own and few instructions, so the vector units are idle for
// most of the time: the sums of a block are scaled and written out between the tile multiplications of the blocks after
// it.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kernel_table.h"
#include "product_amx_tiles.h"
#include "product_amx_writer.h"
#include "product_decode_avx512.h"
#include "product_few_rows_avx512.h"
#include "product_output.h"
#include "product_plan.h"

namespace hqdit {
namespace amx {
namespace {

constexpr int64_t kMostPanelColumns = 128;
constexpr int64_t kPanelBytes = 768 * 1024;  // more would push the activations out of the second-level cache

// Steps after which the sums make room for those of the next block, so that the levels of 32 tokens stay in the
// first-level cache while they are multiplied by all the panel's channels.
constexpr int64_t kSegmentSteps = 9;

int64_t MostPanelColumns(const ProductArgs& args) {
  const int64_t fitting = kPanelBytes / args.width / kBlock * kBlock;
  return Max(kBlock, Min(fitting, kMostPanelColumns));
}

// The third-level cache gives a core about 9 bytes a cycle while the tile unit multiplies 1024: fewer than 112 channels
// to a panel would wait for levels that do not stay in the second-level cache.
PlanShape ShapeFor(const ProductArgs& args) {
  return {/*row_tile=*/kBlock,
          /*panel_step=*/kBlock,
          /*panel_max=*/MostPanelColumns(args),
          /*chunk_max=*/kMostChunkRows,
          /*decode_rows=*/60,
          /*chunk_bytes=*/1200 * 1024,
          /*columns_to_hide=*/112};
}

// How k is cut into tile multiplications: each group into equal steps, the last one filled up with zero weights.
struct Steps {
  explicit Steps(const ProductArgs& args) : groups(GroupCount(args)) {
    const int64_t group_units = CeilDiv(args.group_size, kUnit);
    per_group = CeilDiv(group_units, kTileRows);
    units = CeilDiv(group_units, per_group);
    group_bytes = per_group * units * kUnitBytes;
    tile_column_bytes = groups * group_bytes;
    overrun = per_group * units * kUnit - args.group_size;
  }

  int64_t groups;
  int64_t per_group;
  int64_t units;              // of a step, at most 16
  int64_t group_bytes;        // of 16 decoded channels
  int64_t tile_column_bytes;  // all groups of 16 decoded channels
  int64_t overrun;            // levels that the last step of a group reads beyond it
};

struct Scratch {
  Scratch(const ProductArgs& args, void* memory)
      : carver(memory),
        panel(carver.Take<uint8_t>(MostPanelColumns(args) / kLanes * Steps(args).tile_column_bytes)),
        segment_sums(carver.Take<int32_t>(kBlock * MostPanelColumns(args))),
        sums(carver.Take<int32_t>(2 * kBlockSums)),
        parts(carver.Take<float>(kBlockSums)),
        tail(carver.Take<uint8_t>(kBlock * kTileBytes)),
        factors(args, MostPanelColumns(args), &carver) {}

  Carver carver;
  uint8_t* panel;
  int32_t* segment_sums;  // of the segments so far, for each block of the panel
  int32_t* sums;          // of the writer
  float* parts;           // of the writer
  uint8_t* tail;          // levels of the last step, with zeros behind the last level, of both tiles of tokens
  PanelFactors factors;
};

void DecodeChannels(const ProductArgs& args, const Steps& steps, const Channels& channels, uint8_t* out) {
  if (steps.overrun == 0) {
    Decode(channels, 0, args.width / 2, out, kUnitBytes);
    return;
  }
  const int64_t used = CeilDiv(args.group_size, kUnit) * kUnitBytes;
  for (int64_t g = 0; g < steps.groups; ++g, out += steps.group_bytes) {
    Decode(channels, g * args.group_size / 2, args.group_size / 2, out, kUnitBytes);
    memset(out + used, 0, static_cast<size_t>(steps.group_bytes - used));
  }
}

void DecodePanel(const ProductArgs& args, const Steps& steps, const Item& item, uint8_t* panel) {
  const int64_t tile_columns = CeilDiv(item.columns, kBlock) * 2;
  for (int64_t i = 0; i < tile_columns; ++i) {
    const Channels channels = MakeChannels(*item.weight, item.column + i * kLanes, 0);
    DecodeChannels(args, steps, channels, panel + i * steps.tile_column_bytes);
  }
}

// Consecutive steps of one group, for one block.
struct Segment {
  int64_t group;
  int64_t first;  // step of the group
  int64_t count;
  bool is_first;  // of the group
  bool is_last;
  int64_t column;  // of the block, in the panel
};

template <bool kUnsigned>
class Multiplier {
 public:
  Multiplier(const ProductArgs& args, const Steps& steps, const Scratch& scratch)
      : args_(args), steps_(steps), scratch_(scratch), writer_(args, scratch.sums, scratch.parts) {}

  void Multiply(const Item& item) {
    for (int64_t row = item.row; row < item.row + item.rows; row += kBlock) {
      const Rows rows(args_, item, row);
      if (steps_.overrun > 0) CopyTail(rows);
      steps_.groups == 1 ? MultiplyOneGroup(item, rows) : MultiplyGroups(item, rows);
    }
    writer_.FinishAll();
  }

 private:
  void MultiplyOneGroup(const Item& item, const Rows& rows) {
    for (int64_t first = 0; first < steps_.per_group; first += kSegmentSteps) {
      const int64_t count = Min(kSegmentSteps, steps_.per_group - first);
      for (int64_t column = 0; column < item.columns; column += kBlock) {
        SumBlock(item, rows, {0, first, count, first == 0, first + count == steps_.per_group, column});
      }
    }
  }

  void MultiplyGroups(const Item& item, const Rows& rows) {
    for (int64_t column = 0; column < item.columns; column += kBlock) {
      for (int64_t g = 0; g < steps_.groups; ++g) SumBlock(item, rows, {g, 0, steps_.per_group, true, true, column});
    }
  }

  // The last step of the last group would read beyond the end of the row.
  void CopyTail(const Rows& rows) {
    const int64_t used = kUnit * steps_.units - steps_.overrun;
    memset(scratch_.tail, 0, kBlock * kTileBytes);
    for (int64_t i = 0; i < kBlock; ++i) {
      const int64_t row = rows.starts[i / kTileRows] + i % kTileRows;
      if (row >= args_.tokens) continue;
      memcpy(scratch_.tail + i * kTileBytes, LevelsAt(row) + args_.width - used, static_cast<size_t>(used));
    }
  }

  void SumBlock(const Item& item, const Rows& rows, const Segment& segment) {
    rows.has_two_tiles() ? SumTiles<true>(rows, segment) : SumTiles<false>(rows, segment);
    if (segment.is_last) writer_.Add(item, scratch_.factors, rows, segment.column, segment.group);
  }

  template <bool kTwoTiles>
  [[gnu::noinline]] void SumTiles(const Rows& rows, const Segment& segment) {
    int32_t* segment_sums = scratch_.segment_sums + segment.column * kBlock;
    FinishWrites();
    segment.is_first ? ZeroSums() : LoadSums<kTwoTiles>(segment_sums);
    Operands o = OperandsAt(rows, segment);
    const bool has_tail = steps_.overrun > 0 && segment.is_last && segment.group == steps_.groups - 1;
    for (int64_t i = has_tail; i < segment.count; ++i) {
      MultiplyTiles<kUnsigned, kTwoTiles>(o);
      for (int tile = 0; tile < 2; ++tile) {
        o.levels[tile] += steps_.units * kUnit;
        o.weights[tile] += steps_.units * kUnitBytes;
      }
      writer_.WriteTile();
    }
    if (has_tail) {
      MultiplyTiles<kUnsigned, kTwoTiles>(
          {{scratch_.tail, scratch_.tail + kTileRows * kTileBytes}, kTileBytes, {o.weights[0], o.weights[1]}});
    }
    StoreSums<kTwoTiles>(segment.is_last ? writer_.NextSums() : segment_sums);
  }

  Operands OperandsAt(const Rows& rows, const Segment& segment) const {
    const int64_t k = segment.group * args_.group_size + segment.first * steps_.units * kUnit;
    const uint8_t* weights = scratch_.panel + segment.column / kLanes * steps_.tile_column_bytes +
                             segment.group * steps_.group_bytes + segment.first * steps_.units * kUnitBytes;
    return {{LevelsAt(rows.starts[0]) + k, LevelsAt(rows.starts[1]) + k},
            args_.levels_stride,
            {weights, weights + steps_.tile_column_bytes}};
  }

  const uint8_t* LevelsAt(int64_t row) const {
    return static_cast<const uint8_t*>(args_.levels) + row * args_.levels_stride;
  }

  const ProductArgs& args_;
  const Steps& steps_;
  const Scratch& scratch_;
  Writer writer_;
};

template <bool kUnsigned>
void TakeItems(const ProductArgs& args, const Share& share) {
  const Plan plan = MakePlan(args, ShapeFor(args), share.workers);
  const Steps steps(args);
  const Scratch scratch(args, share.scratch);
  Multiplier<kUnsigned> multiplier(args, steps, scratch);
  ConfigureTiles(args.tokens, steps.units);
  for (int64_t i; (i = TakeItem(share)) < plan.items();) {
    const Item item = ItemAt(args, plan, i);
    DecodePanel(args, steps, item, scratch.panel);
    FillFactors(args, item, scratch.factors);
    multiplier.Multiply(item);
  }
  _tile_release();
}

}  // namespace

int64_t ProductScratch(const ProductArgs& args) {
  return Max(Scratch(args, nullptr).carver.used(), FewRowsScratch(args, nullptr).carver.used());
}

void Product(const ProductArgs& args, const Share& share) {
  if (args.tokens == 0) return;  // tiles of no rows cannot be configured
  if (IsForFewRows(args)) return FewRowsProduct(args, share);
  args.levels_unsigned ? TakeItems<true>(args, share) : TakeItems<false>(args, share);
}

}  // namespace amx
}  // namespace hqdit
