// How attention is cut into items of work, and the loop over blocks of keys. Shared by all instruction sets; everything
// has internal linkage because some of its users are compiled with wide instructions.
//
// An item is a group of queries of one (batch, head). Its worker goes over the keys in blocks, and keeps for each query
// the largest score so far, the sum of the exponentials relative to it and the weighted sum of the values (the "online"
// softmax): memory does not grow with the number of tokens. A query's result depends on nothing but its own numbers and
// the keys and values, so groups may be chosen by the number of workers.
//
// A row of the output is NaN throughout if its query, any key or any value of its head holds a NaN or an infinity.
#pragma once

#include <stdint.h>

#include "hqdit/kernels.h"
#include "kernel_table.h"

namespace hqdit {
namespace {

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }
constexpr int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows (tokens) of one batch and head of a tensor.
struct TokenRows {
  char* first;
  int64_t row_bytes;  // from one row to the next
  Element type;

  char* Row(int64_t row) const { return first + row * row_bytes; }
};

inline TokenRows RowsFrom(const AttentionTensor& tensor, Element type, int64_t batch, int64_t head, int64_t token) {
  const int64_t element_bytes = type == Element::kFloat32 ? 4 : 2;
  const int64_t offset = batch * tensor.batch_stride + token * tensor.token_stride + head * tensor.head_stride;
  return {static_cast<char*>(tensor.data) + offset * element_bytes, tensor.token_stride * element_bytes, type};
}

// Hands out parts of the scratch memory, 64-byte aligned; on null memory it only counts.
class ScratchParts {
 public:
  explicit ScratchParts(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* Take(int64_t count) {
    char* part = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += RoundUp(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(part);
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// Queries of an item: as many as allowed, because each item packs the keys and values anew, but every worker should get
// about two items or more. A whole number of tiles.
inline int64_t GroupQueries(const AttentionArgs& args, int64_t tile_queries, int64_t most_tiles, int64_t workers) {
  const int64_t tiles = CeilDiv(args.query_tokens, tile_queries);
  const int64_t wanted_groups = CeilDiv(2 * workers, args.batch * args.heads);
  const int64_t needed_groups = CeilDiv(tiles, most_tiles);
  const int64_t groups = wanted_groups > needed_groups ? wanted_groups : needed_groups;
  return CeilDiv(tiles, groups) * tile_queries;
}

// Keys of a block: all blocks but the last have the same number, a multiple of `step`.
inline int64_t BlockKeys(int64_t keys, int64_t most_keys, int64_t step) {
  const int64_t blocks = CeilDiv(keys, most_keys);
  return blocks == 0 ? step : RoundUp(CeilDiv(keys, blocks), step);
}

// `Engine` computes an item: Start(q, queries), then AddKeys(k, v, keys) for each block, then Finish(out).
template <typename Engine>
void RunAttention(const AttentionArgs& args, const Share& share) {
  if (args.batch <= 0 || args.heads <= 0 || args.query_tokens <= 0) return;
  const int64_t group = GroupQueries(args, Engine::kTileQueries, Engine::kMostTiles, share.workers);
  const int64_t block = BlockKeys(args.key_tokens, Engine::kMostKeys, Engine::kKeyStep);
  const int64_t groups = CeilDiv(args.query_tokens, group);
  const int64_t items = args.batch * args.heads * groups;
  Engine engine(args, share.scratch);
  for (;;) {
    const int64_t item = __atomic_fetch_add(share.next_item, 1, __ATOMIC_RELAXED);
    if (item >= items) return;
    const int64_t batch = item / groups / args.heads, head = item / groups % args.heads;
    const int64_t query = item % groups * group;
    engine.Start(RowsFrom(args.q, args.type, batch, head, query), Least(group, args.query_tokens - query));
    for (int64_t key = 0; key < args.key_tokens; key += block) {
      engine.AddKeys(RowsFrom(args.k, args.type, batch, head, key), RowsFrom(args.v, args.type, batch, head, key),
                     Least(block, args.key_tokens - key));
    }
    engine.Finish(RowsFrom(args.out, args.type, batch, head, query));
  }
}

}  // namespace
}  // namespace hqdit
