// Attention in float32, for every instruction set without a matrix unit. Included by attention_<set>.cc, which say how
// many sums fit into the registers.
//
// Everything is kept with queries in the lanes: scores are rows of keys, outputs are rows of dimensions. Maximum, sum
// and scaling are then operations between vectors, no vector has unused lanes when the head's dimension is not a
// multiple of 16, and both products are the same function: rows of left numbers, each broadcast, times vectors of
// queries.
//
// Products are summed with FMA where the machine has it, so results differ between instruction sets in the last bits.
#pragma once

#include <stdint.h>

#include "attention_driver.h"
#include "attention_transpose.h"
#include "kernel_table.h"
#include "vector.h"

namespace hqdit {
namespace {

HQDIT_INLINE Float16Lanes MultiplyAdd(Float16Lanes a, Float16Lanes b, Float16Lanes c) {
#if defined(__FMA__)
  return Fma(a, b, c);
#else
  return a * b + c;
#endif
}

// e^x for x <= 0, relative error below 1.5e-7, for what softmax needs: below -87 it is 1e-38 instead of less, so
// -infinity needs no care; exactly 1 at 0, or sums over many blocks of keys would drift. Cheaper than Exp of
// vector_math.h, which is within 1 ulp everywhere and slow without FMA instructions.
HQDIT_INLINE Float16Lanes SoftmaxExp(Float16Lanes x) {
  constexpr float kLowest = -87.0f;
  constexpr float kInverseLn2 = 0x1.715476p+0f;
  constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;  // products of the high one with n are exact
  constexpr float kRoundingShift = 0x1.8p23f;  // leaves the nearest integer in the low bits of the mantissa
  constexpr int kMantissaBits = 23;

  x = Max(Float16Lanes(kLowest), x);
  const Float16Lanes shifted = MultiplyAdd(x, kInverseLn2, kRoundingShift);
  const Float16Lanes n = shifted - kRoundingShift;
  Float16Lanes r = MultiplyAdd(n, -kLn2High, x);
  r = MultiplyAdd(n, -kLn2Low, r);
  Float16Lanes p = 0x1.0fa834p-7f;
  p = MultiplyAdd(p, r, 0x1.573a54p-5f);
  p = MultiplyAdd(p, r, 0x1.555a6ap-3f);
  p = MultiplyAdd(p, r, 0x1.fffdc6p-2f);
  p = MultiplyAdd(p, r, 0x1.fffff6p-1f);
  p = MultiplyAdd(p, r, 1.0f);
  return FloatFromBits(BitsOf(p) + (BitsOf(shifted) << kMantissaBits));
}

HQDIT_INLINE Float16Lanes LoadElements(const TokenRows& rows, int64_t row, int64_t first, int count) {
  if (rows.type == Element::kFloat32) {
    const float* from = reinterpret_cast<const float*>(rows.Row(row)) + first;
    return count >= kLanes ? Load(from) : LoadPartial(from, count);
  }
  const uint16_t* from = reinterpret_cast<const uint16_t*>(rows.Row(row)) + first;
  return count >= kLanes ? LoadBFloat16(from) : LoadBFloat16Partial(from, count);
}

HQDIT_INLINE void StoreElements(const TokenRows& rows, int64_t row, int64_t first, int count, Float16Lanes x) {
  if (rows.type == Element::kFloat32) {
    float* to = reinterpret_cast<float*>(rows.Row(row)) + first;
    count >= kLanes ? Store(to, x) : StorePartial(to, x, count);
  } else {
    uint16_t* to = reinterpret_cast<uint16_t*>(rows.Row(row)) + first;
    count >= kLanes ? StoreBFloat16(to, x) : StoreBFloat16Partial(to, x, count);
  }
}

// 0 where x is finite, a NaN elsewhere.
HQDIT_INLINE Float16Lanes NaNUnlessFinite(Float16Lanes x) { return x - x; }

// ---- the product ----------------------------------------------------------------------------------------------------

// Number (row, i) of the left side at left + row * row_step + i * depth_step.
struct Left {
  const float* numbers;
  int64_t row_step, depth_step;
};

// Row r of `out`: the sum over i < depth of left(r, i) times row i of `right`, plus, if there is a `rescale`, what is
// there times it. Rows of `right` and `out` hold `width` floats, of which kVectors vectors are used.
template <int kRows, int kVectors>
HQDIT_INLINE void MultiplyTile(Left left, const float* right, int64_t depth, int64_t width, const float* rescale,
                               float* out) {
  Float16Lanes sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Float16Lanes(0.0f);
  }
  const float* from = left.numbers;
  for (int64_t i = 0; i < depth; ++i, from += left.depth_step, right += width) {
    Float16Lanes x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = Load(right + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Float16Lanes number(from[r * left.row_step]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = MultiplyAdd(number, x[v], sums[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      float* to = out + r * width + v * kLanes;
      const Float16Lanes sum = sums[r][v];
      Store(to, rescale == nullptr ? sum : MultiplyAdd(Load(to), Load(rescale + v * kLanes), sum));
    }
  }
}

// The last rows, fewer than kRows + 1.
template <int kRows, int kVectors>
HQDIT_INLINE void MultiplyRest(int64_t rows, Left left, const float* right, int64_t depth, int64_t width,
                               const float* rescale, float* out) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      MultiplyTile<kRows, kVectors>(left, right, depth, width, rescale, out);
    } else {
      MultiplyRest<kRows - 1, kVectors>(rows, left, right, depth, width, rescale, out);
    }
  }
}

template <int kRows, int kVectors>
void MultiplyVectors(int64_t rows, Left left, const float* right, int64_t depth, int64_t width, const float* rescale,
                     float* out) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows, left.numbers += kRows * left.row_step) {
    MultiplyTile<kRows, kVectors>(left, right, depth, width, rescale, out + row * width);
  }
  MultiplyRest<kRows - 1, kVectors>(rows - row, left, right, depth, width, rescale, out + row * width);
}

// ---- the engine -----------------------------------------------------------------------------------------------------

// Register tiles of kRows x kMostVectors sums.
template <int kRows, int kMostVectors>
class FloatEngine {
 public:
  static constexpr int kTileQueries = kMostVectors * kLanes;
  static constexpr int kMostTiles = 256 / kTileQueries;
  static constexpr int kMostKeys = 128;
  static constexpr int kKeyStep = 8;

  FloatEngine(const AttentionArgs& args, void* scratch) : dims_(args.head_dim), scale_(args.softmax_scale) {
    ScratchParts parts(scratch);
    keys_ = parts.Take<float>(kMostKeys * dims_);
    values_ = parts.Take<float>(kMostKeys * dims_);
    scores_ = parts.Take<float>(kMostKeys * kTileQueries);
    for (Tile& tile : tiles_) {
      tile.queries = parts.Take<float>(dims_ * kTileQueries);
      tile.output = parts.Take<float>(dims_ * kTileQueries);
      tile.largest = parts.Take<float>(kTileQueries);
      tile.sum = parts.Take<float>(kTileQueries);
      tile.poison = parts.Take<float>(kTileQueries);
    }
    rescale_ = parts.Take<float>(kTileQueries);
    scratch_bytes_ = parts.used();
  }
  int64_t scratch_bytes() const { return scratch_bytes_; }

  void Start(const TokenRows& q, int64_t queries) {
    queries_ = queries;
    poison_ = 0.0f;
    for (int64_t first = 0; first < queries; first += kTileQueries) {
      Tile& tile = tiles_[first / kTileQueries];
      for (int v = 0; v < Vectors(first); ++v) StartVector(q, first + v * kLanes, v * kLanes, &tile);
    }
  }

  void AddKeys(const TokenRows& k, const TokenRows& v, int64_t keys) {
    poison_ += Pack(k, keys, keys_) + Pack(v, keys, values_);
    for (int64_t first = 0; first < queries_; first += kTileQueries) {
      const int vectors = Vectors(first);
      Tile* tile = &tiles_[first / kTileQueries];
      Multiply(vectors, keys, {keys_, dims_, 1}, tile->queries, dims_, nullptr, scores_);
      for (int vector = 0; vector < vectors; ++vector) ExponentiateScores(keys, vector * kLanes, tile);
      Multiply(vectors, dims_, {values_, 1, dims_}, scores_, keys, rescale_, tile->output);
    }
  }

  void Finish(const TokenRows& out) const {
    for (int64_t first = 0; first < queries_; first += kTileQueries) {
      for (int v = 0; v < Vectors(first); ++v) {
        FinishVector(tiles_[first / kTileQueries], v * kLanes, out, first + v * kLanes);
      }
    }
  }

 private:
  // Rows of kTileQueries floats, one for each dimension or just one.
  struct Tile {
    float* queries;  // times the scale
    float* output;
    float* largest;  // score so far
    float* sum;      // of the exponentials relative to it
    float* poison;   // 0, or a NaN for queries that are not finite
  };

  // Vectors that are computed for the tile that starts with query `first`; their unused lanes hold queries of zeros.
  int Vectors(int64_t first) const { return queries_ - first <= kLanes ? 1 : kMostVectors; }

  static void Multiply(int vectors, int64_t rows, Left left, const float* right, int64_t depth, const float* rescale,
                       float* out) {
    if (vectors == 1) {
      MultiplyVectors<kRows, 1>(rows, left, right, depth, kTileQueries, rescale, out);
    } else {
      MultiplyVectors<kRows, kMostVectors>(rows, left, right, depth, kTileQueries, rescale, out);
    }
  }

  void StartVector(const TokenRows& q, int64_t first, int64_t column, Tile* tile) const {
    const int count = static_cast<int>(Least(kLanes, queries_ - first));
    Float16Lanes poison(0.0f);
    for (int64_t dim = 0; dim < dims_; dim += kLanes) {
      const int dims = static_cast<int>(Least(kLanes, dims_ - dim));
      Float16Lanes block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] = i < count ? LoadElements(q, first + i, dim, dims) * Float16Lanes(scale_) : Float16Lanes(0.0f);
      }
      Transpose(block);
      for (int i = 0; i < dims; ++i) {
        poison = poison + NaNUnlessFinite(block[i]);
        Store(tile->queries + (dim + i) * kTileQueries + column, block[i]);
        Store(tile->output + (dim + i) * kTileQueries + column, Float16Lanes(0.0f));
      }
    }
    Store(tile->largest + column, Float16Lanes(-__builtin_inff()));
    Store(tile->sum + column, Float16Lanes(0.0f));
    Store(tile->poison + column, poison);
  }

  // Copies rows as float32, one after the other; returns a NaN if one is not finite, else 0.
  float Pack(const TokenRows& rows, int64_t count, float* to) const {
    Float16Lanes poison(0.0f);
    for (int64_t row = 0; row < count; ++row, to += dims_) {
      for (int64_t dim = 0; dim < dims_; dim += kLanes) {
        const int dims = static_cast<int>(Least(kLanes, dims_ - dim));
        const Float16Lanes x = LoadElements(rows, row, dim, dims);
        poison = poison + NaNUnlessFinite(x);
        dims == kLanes ? Store(to + dim, x) : StorePartial(to + dim, x, dims);
      }
    }
    return HorizontalSum(poison);
  }

  // Turns one vector of queries' scores into exponentials relative to their largest score.
  void ExponentiateScores(int64_t keys, int64_t column, Tile* tile) {
    float* scores = scores_ + column;
    const Float16Lanes before = Load(tile->largest + column);
    Float16Lanes largest = before, sum(0.0f);
    for (int64_t key = 0; key < keys; ++key) largest = Max(largest, Load(scores + key * kTileQueries));
    for (int64_t key = 0; key < keys; ++key) {
      const Float16Lanes exponential = SoftmaxExp(Load(scores + key * kTileQueries) - largest);
      sum = sum + exponential;
      Store(scores + key * kTileQueries, exponential);
    }
    const Float16Lanes rescale = SoftmaxExp(before - largest);
    Store(rescale_ + column, rescale);
    Store(tile->sum + column, MultiplyAdd(Load(tile->sum + column), rescale, sum));
    Store(tile->largest + column, largest);
  }

  void FinishVector(const Tile& tile, int64_t column, const TokenRows& out, int64_t first) const {
    const int count = static_cast<int>(Least(kLanes, queries_ - first));
    const Float16Lanes poison = Load(tile.poison + column) + Float16Lanes(poison_);
    const Float16Lanes factor = Float16Lanes(1.0f) / Load(tile.sum + column) + poison;
    for (int64_t dim = 0; dim < dims_; dim += kLanes) {
      const int dims = static_cast<int>(Least(kLanes, dims_ - dim));
      Float16Lanes block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] = i < dims ? Load(tile.output + (dim + i) * kTileQueries + column) * factor : Float16Lanes(0.0f);
      }
      Transpose(block);
      for (int i = 0; i < count; ++i) StoreElements(out, first + i, dim, dims, block[i]);
    }
  }

  int64_t dims_;
  float scale_;
  int64_t queries_ = 0;
  float poison_ = 0.0f;  // 0, or a NaN once a key or a value was not finite
  float* keys_;
  float* values_;
  float* scores_;
  float* rescale_;
  Tile tiles_[kMostTiles];
  int64_t scratch_bytes_;
};

}  // namespace
}  // namespace hqdit
