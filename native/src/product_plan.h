// How a product is cut into items of work, and how each worker's scratch memory is laid out. Shared by all instruction
// sets; everything has internal linkage because some of its users are compiled with wide instructions.
//
// An item is a panel (some output channels of one weight) times a chunk (some tokens). A worker decodes the panel's
// codes to levels once per item and uses them for every token of the chunk.
#pragma once

#include <stdint.h>

#include "hqdit/kernels.h"
#include "kernel_table.h"

namespace hqdit {
namespace {

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

inline int64_t GroupCount(const ProductArgs& args) { return args.width / args.group_size; }

constexpr int64_t kNoLimit = int64_t{1} << 48;

// Tokens of a chunk: their rows of outputs lie in as many pages of memory, and with more of them than the second-level
// TLB holds, writing takes several times as long.
constexpr int64_t kMostChunkRows = 512;

// What one instruction set's kernel likes.
struct PlanShape {
  int64_t row_tile;         // tokens of a register tile: chunks are whole multiples of it
  int64_t panel_step;       // output channels of a register tile: panels are whole multiples of it
  int64_t panel_max;        // most output channels of a panel
  int64_t chunk_max;        // most tokens of a chunk
  int64_t decode_rows;      // decoding a panel takes as long as multiplying this many tokens by it
  int64_t chunk_bytes;      // levels of a chunk that stay in the second-level cache
  int64_t columns_to_hide;  // output channels that a panel needs to hide reading a larger chunk from further away
};

struct Plan {
  int64_t panel_columns;
  int64_t chunk_rows;
  int64_t panels;  // of all weights together
  int64_t chunks;
  int64_t items() const { return panels * chunks; }
};

struct Item {
  const Weight* weight;
  int64_t column;   // first output channel
  int64_t columns;  // at most Plan::panel_columns, fewer at the end of the weight
  int64_t row;      // first token
  int64_t rows;
};

inline int64_t PanelCount(const ProductArgs& args, int64_t panel_columns) {
  int64_t panels = 0;
  for (int64_t i = 0; i < args.weight_count; ++i) panels += CeilDiv(args.weights[i].rows, panel_columns);
  return panels;
}

// The time of the busiest worker, in (token, output channel) pairs.
inline int64_t PlanCost(const ProductArgs& args, const Plan& plan, const PlanShape& shape, int64_t workers) {
  const bool stays_in_cache = plan.chunk_rows * args.width <= shape.chunk_bytes;
  const int64_t columns = stays_in_cache ? plan.panel_columns : Max(plan.panel_columns, shape.columns_to_hide);
  const int64_t item_cost = columns * plan.chunk_rows + plan.panel_columns * shape.decode_rows;
  return CeilDiv(plan.items(), workers) * item_cost;
}

// The cheapest plan; of equally cheap ones the first, which has the widest panels and the largest chunks. A function of
// its arguments only: all workers of a call come to the same plan.
inline Plan MakePlan(const ProductArgs& args, const PlanShape& shape, int64_t workers) {
  Plan best = {};
  int64_t best_cost = INT64_MAX;
  for (int64_t columns = shape.panel_max; columns > 0; columns -= shape.panel_step) {
    const int64_t panels = PanelCount(args, columns);
    for (int64_t wanted = Max(1, CeilDiv(args.tokens, shape.chunk_max));; wanted *= 2) {
      const int64_t rows = RoundUp(CeilDiv(args.tokens, wanted), shape.row_tile);
      const Plan plan = {columns, rows, panels, rows > 0 ? CeilDiv(args.tokens, rows) : 0};
      const int64_t cost = PlanCost(args, plan, shape, workers);
      if (cost < best_cost) {
        best = plan;
        best_cost = cost;
      }
      if (rows <= shape.row_tile) break;
    }
  }
  return best;
}

// Consecutive items read the same chunk of tokens, so that it stays in the cache.
inline Item ItemAt(const ProductArgs& args, const Plan& plan, int64_t index) {
  int64_t panel = index % plan.panels;
  const Weight* weight = args.weights;
  for (int64_t panels; panel >= (panels = CeilDiv(weight->rows, plan.panel_columns)); ++weight) panel -= panels;
  const int64_t column = panel * plan.panel_columns;
  const int64_t row = index / plan.panels * plan.chunk_rows;
  return {weight, column, Min(plan.panel_columns, weight->rows - column), row, Min(plan.chunk_rows, args.tokens - row)};
}

inline int64_t TakeItem(const Share& share) { return __atomic_fetch_add(share.next_item, 1, __ATOMIC_RELAXED); }

// Hands out pieces of a worker's scratch memory, each 64-byte aligned. Without memory it only counts bytes, so that one
// function can both measure and lay out.
class Carver {
 public:
  explicit Carver(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* Take(int64_t count) {
    char* piece = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ = RoundUp(used_ + count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(piece);
  }

  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace hqdit
