// Sums of AMX blocks to outputs, in the time that the tile unit multiplies the next blocks. Included only by
// product_amx.cc.
#pragma once

#include <stdint.h>

#include "product_amx_tiles.h"
#include "product_output.h"
#include "product_plan.h"

namespace hqdit {
namespace {

// Up to 32 tokens as two tiles of 16. Where fewer are left, the second tile starts earlier, so that no tile reaches
// beyond the last token; tokens that both tiles have are written from the first.
struct Rows {
  Rows() = default;
  Rows(const ProductArgs& args, const Item& item, int64_t first_row) : first(first_row) {
    count = Min(kBlock, item.row + item.rows - first);
    const int64_t last_start = Max(0, args.tokens - kTileRows);
    starts[0] = Min(first, last_start);
    starts[1] = Min(first + kTileRows, last_start);
  }

  bool has_two_tiles() const { return count > kTileRows; }

  int64_t first = 0;
  int64_t count = 0;
  int64_t starts[2] = {0, 0};
};

// One group of one block, on its way from sums to outputs.
struct WriterTask {
  Block block = {};  // the tokens at work; the rest stays for all of them
  int64_t next = 0;  // token: that of the first tile, of the second one, or `end`
  int64_t end = 0;
  int64_t second_tile = 0;      // first token that is written from the second tile
  int64_t row_of_sums[2] = {};  // of the first token of each tile
  int64_t group = 0;
};

// Takes a task for each block and does it a tile at a time. The latest task waits until the one before it is done
// and the next block is under way, because its sums are still being stored.
//
// No struct is copied while blocks are multiplied: to load it whole right after its fields were stored one by one means
// to wait until all stores before, those of the tiles too, have reached the cache.
class Writer {
 public:
  // `sums`: memory of two blocks; `parts`: of one block, for the groups so far.
  Writer(const ProductArgs& args, int32_t* sums, float* parts)
      : args_(args), groups_(GroupCount(args)), sums_(sums), parts_(parts) {}

  // Where the sums of the next task have to be stored, free now.
  int32_t* NextSums() {
    Finish(&tasks_[turn_]);
    return sums_ + turn_ * kBlockSums;
  }

  // Follows NextSums: the block of `rows` and of the 32 channels from `column` of the item's panel on.
  void Add(const Item& item, const PanelFactors& factors, const Rows& rows, int64_t column, int64_t group) {
    WriterTask& task = tasks_[turn_];
    SetBlockColumns(item, factors, column, kBlock, &task.block);
    task.block.stride = kBlock;
    task.next = rows.first;
    task.end = rows.first + rows.count;
    task.second_tile = rows.first + kTileRows;
    task.row_of_sums[0] = rows.first - rows.starts[0];
    task.row_of_sums[1] = kTileRows + task.second_tile - rows.starts[1];
    task.group = group;
    turn_ ^= 1;
  }

  // One of the two tiles of tokens, if any is left.
  void WriteTile() {
    WriterTask& task = tasks_[turn_];
    if (task.next < task.end) WriteTile(&task);
  }

  void FinishAll() {
    Finish(&tasks_[turn_]);
    Finish(&tasks_[turn_ ^ 1]);
  }

 private:
  void Finish(WriterTask* task) {
    while (task->next < task->end) WriteTile(task);
  }

  void WriteTile(WriterTask* task) {
    const bool is_second = task->next == task->second_tile;
    const int64_t end = is_second ? task->end : Min(task->end, task->second_tile);
    const int64_t at = task->row_of_sums[is_second] * kBlock;
    Block& block = task->block;
    block.row = task->next;
    block.rows = end - task->next;
    block.sums = sums_ + (task - tasks_) * kBlockSums + at;
    block.parts = parts_ + at;
    task->next = end;
    if (groups_ > 1) AddGroup(args_, block, task->group);
    if (task->group == groups_ - 1) FinishBlock(args_, block);
  }

  const ProductArgs& args_;
  const int64_t groups_;
  int32_t* const sums_;
  float* const parts_;
  WriterTask tasks_[2];
  int turn_ = 0;  // the task at work, and then the next one to be replaced
};

}  // namespace
}  // namespace hqdit
