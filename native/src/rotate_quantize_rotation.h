// The rotation of one token, in place in a row of scratch memory: y = x H without the normalization. S is here, P in
// rotate_quantize_paley.h.
//
// H = S (x) P acts on x seen as (blocks, sylvester, paley, inner). The order of the float operations, the same on every
// instruction set: first S, a stage of sums and differences for each bit of the row index. Where paley = inner = 1 a
// row is one number, and the stages within a vector come first, over distances 8, 4, 2, 1; then 16, 32, ... Else the
// stages go over 1, 2, 4, ... rows; but where inner = 1 and paley is a multiple of four, those over 1 and 2 rows come
// last. Then P.
#pragma once

#include "hqdit/kernels.h"
#include "rotate_quantize_paley.h"
#include "vector.h"

namespace hqdit {
namespace {

// ---- S where a row is one number: within vectors, then between them -------------------------------------------------

// 1 in the lanes whose bit `distance` is clear, -1 in the others.
HQDIT_INLINE Float16Lanes LaneSigns(int distance) {
  float signs[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) signs[lane] = lane & distance ? -1.0f : 1.0f;
  return Load(signs);
}

constexpr int kBlockVectors = 8;  // the largest block that is transformed in registers: 128 numbers

struct LaneStages {
  Float16Lanes signs1 = LaneSigns(1), signs2 = LaneSigns(2), signs4 = LaneSigns(4), signs8 = LaneSigns(8);
};

// The stages of an order of kOrder, at most kLanes, within each vector.
template <int kOrder>
HQDIT_INLINE Float16Lanes TransformLanes(Float16Lanes v, const LaneStages& stages) {
  if (kOrder > 8) v = AddExact(SwapLanes<8>(v), stages.signs8, v);
  if (kOrder > 4) v = AddExact(SwapLanes<4>(v), stages.signs4, v);
  if (kOrder > 2) v = AddExact(SwapLanes<2>(v), stages.signs2, v);
  if (kOrder > 1) v = AddExact(SwapLanes<1>(v), stages.signs1, v);
  return v;
}

// The stages of order kRows between vectors.
template <int kRows>
HQDIT_INLINE void TransformRows(Float16Lanes (&v)[kRows]) {
#pragma GCC unroll 4
  for (int half = 1; half < kRows; half *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      if (i & half) continue;
      const Float16Lanes low = v[i], high = v[i + half];
      v[i] = low + high;
      v[i + half] = low - high;
    }
  }
}

// A block of kVectors * kLaneOrder numbers; kLaneOrder = 16 unless kVectors = 1.
template <int kVectors, int kLaneOrder>
HQDIT_INLINE void TransformBlock(Float16Lanes (&v)[kVectors], const LaneStages& stages) {
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) v[i] = TransformLanes<kLaneOrder>(v[i], stages);
  TransformRows(v);
}

template <int kVectors, int kLaneOrder>
inline void TransformBlocks(float* row, int64_t width) {
  const LaneStages stages;
  for (int64_t at = 0; at < width; at += kVectors * kLanes) {
    Float16Lanes v[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) v[i] = Load(row + at + i * kLanes);
    TransformBlock<kVectors, kLaneOrder>(v, stages);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) Store(row + at + i * kLanes, v[i]);
  }
}

// ---- S where a row is a run of numbers ------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kMostRows = 16;  // what 32 registers hold
#else
constexpr int kMostRows = 8;
#endif

// The stages of order kRows between rows `run` apart, on all their columns.
template <int kRows>
inline void TransformColumns(float* base, int64_t run) {
  for (int64_t column = 0; column < run; column += kLanes) {
    const int64_t left = run - column;
    Float16Lanes v[kRows];
    // A partial chunk reads on into what follows, which the scratch row has room for, and does not write it.
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) v[i] = Load(base + i * run + column);
    TransformRows(v);
    if (left >= kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) Store(base + i * run + column, v[i]);
    } else {
      for (int i = 0; i < kRows; ++i) StorePartial(base + i * run + column, v[i], int(left));
    }
  }
}

template <int kRows>
inline void TransformAllColumns(float* row, int64_t width, int64_t run) {
  for (int64_t at = 0; at < width; at += kRows * run) TransformColumns<kRows>(row + at, run);
}

// `order` rows of `run` numbers each, for every block of order * run.
inline void SylvesterRows(float* row, int64_t width, int64_t order, int64_t run) {
  while (order > 1) {
    const int64_t rows = order < kMostRows ? order : kMostRows;
    switch (rows) {
      case 16: TransformAllColumns<kMostRows>(row, width, run); break;
      case 8: TransformAllColumns<8>(row, width, run); break;
      case 4: TransformAllColumns<4>(row, width, run); break;
      default: TransformAllColumns<2>(row, width, run); break;
    }
    order /= rows;
    run *= rows;
  }
}

inline void SylvesterNumbers(float* row, int64_t width, int64_t order) {
  switch (order) {
    case 1: return;
    case 2: return TransformBlocks<1, 2>(row, width);
    case 4: return TransformBlocks<1, 4>(row, width);
    case 8: return TransformBlocks<1, 8>(row, width);
    case 16: return TransformBlocks<1, kLanes>(row, width);
    case 32: return TransformBlocks<2, kLanes>(row, width);
    case 64: return TransformBlocks<4, kLanes>(row, width);
    default: break;
  }
  TransformBlocks<kBlockVectors, kLanes>(row, width);
  SylvesterRows(row, width, order / (kBlockVectors * kLanes), kBlockVectors * kLanes);
}

// ---- all of it ------------------------------------------------------------------------------------------------------

// The row must be followed by RotationPadding(paley) floats.
HQDIT_INLINE int64_t RotationPadding(int64_t paley) { return kLanes * (paley + 1); }

inline void Rotate(const RotateQuantizeArgs& args, const PaleyPlan& paley, float* row) {
  if (args.paley * args.inner == 1) return SylvesterNumbers(row, args.width, args.sylvester);
  const int64_t within = SylvesterWithinPaley(args);
  SylvesterRows(row, args.width, args.sylvester / within, within * args.paley * args.inner);
  if (args.paley > 1) MultiplyByPaley(args, paley, row);
}

}  // namespace
}  // namespace hqdit
