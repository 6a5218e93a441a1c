// The factor P of the rotation: y_p = sum_j x_j P[j][p], for a matrix of +-1 that is only known at run time.
//
// Sixteen rows at a time, one in each lane. The order of the float operations, the same on every instruction set:
//   - Inputs are taken in groups of three: (+-a +- b) +- c, and these sums over the groups, ascending. Each of the 8
//     sign patterns of a group is computed once and serves every output that needs it, so that an output costs a third
//     of the additions.
//   - If P consists of 2 x 2 blocks +-[[1, 1], [1, -1]], but [[1, -1], [-1, -1]] on the diagonal (Paley's second
//     construction; looked for in the matrix), then with u_j = x_2j + x_2j+1, v_j = x_2j - x_2j+1 and c the signs of
//     the blocks, c_ii = 1: y_2i = sum_j c_ji u_j - 2 x_2i+1 and y_2i+1 = sum_j c_ji v_j - 2 x_2i. The sums over u and
//     over v are taken as above, with half as many terms.
#pragma once

#include "hqdit/kernels.h"
#include "vector.h"

namespace hqdit {
namespace {

constexpr int kPatternGroup = 3;               // terms taken together
constexpr int kPatterns = 1 << kPatternGroup;  // their sign patterns
constexpr int kOutputsAtATime = 4;

// Sizes of a P and where its tables and its intermediate numbers lie.
struct PaleyPlan {
  int64_t order;       // of P
  bool is_paired;      // of the second form above
  int64_t terms;       // of a sum: order, or order / 2 if paired
  int64_t groups;      // of terms; the last one is filled up with zeros
  int32_t* selectors;  // (groups, padded terms): where, in floats, a sum finds its part of the group in `patterns`
  float* inputs;       // vectors of the inputs, with zeros behind them for the last group
  float* patterns;     // groups * kPatterns vectors, twice as many if paired: those of v follow those of u
  float* outputs;      // vectors of the outputs, where they do not go right into the row
};

HQDIT_INLINE int64_t RoundUp(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// a + factor * b for a factor of +-1 or +-2, which is exact in either form.
HQDIT_INLINE Float16Lanes AddExact(Float16Lanes a, Float16Lanes factor, Float16Lanes b) {
#if defined(__FMA__)
  return Fma(factor, b, a);
#else
  return a + factor * b;
#endif
}

// ---- the plan -------------------------------------------------------------------------------------------------------

// The sign of block (j, i), or 0 if it is none of the form wanted there.
inline int PairSign(const int8_t* matrix, int64_t order, int64_t j, int64_t i) {
  const int8_t* upper = matrix + 2 * j * order + 2 * i;
  const int8_t* lower = upper + order;
  if (i == j) return upper[0] > 0 && upper[1] < 0 && lower[0] < 0 && lower[1] < 0 ? 1 : 0;
  const int sign = upper[0] > 0 ? 1 : -1;
  return upper[1] == sign && lower[0] == sign && lower[1] == -sign ? sign : 0;
}

inline bool IsPaired(const int8_t* matrix, int64_t order) {
  if (order % kOutputsAtATime != 0) return false;
  for (int64_t j = 0; j < order / 2; ++j) {
    for (int64_t i = 0; i < order / 2; ++i) {
      if (PairSign(matrix, order, j, i) == 0) return false;
    }
  }
  return true;
}

// Takes the plan's memory from `arena`, enough for either form.
template <typename Arena>
inline PaleyPlan DividePaley(int64_t order, Arena* arena) {
  const int64_t padded = RoundUp(order, 2 * kPatternGroup * kOutputsAtATime);
  PaleyPlan plan = {};
  plan.order = order;
  plan.selectors = arena->template Take<int32_t>(padded / kPatternGroup * padded);
  plan.inputs = arena->template Take<float>(padded * kLanes);
  plan.patterns = arena->template Take<float>(padded / kPatternGroup * kPatterns * kLanes);
  plan.outputs = arena->template Take<float>(padded * kLanes);
  return plan;
}

// Fills in the tables of a plan whose memory is set.
inline void PreparePaley(const int8_t* matrix, PaleyPlan* plan) {
  const int64_t order = plan->order;
  plan->is_paired = IsPaired(matrix, order);
  plan->terms = plan->is_paired ? order / 2 : order;
  plan->groups = RoundUp(plan->terms, kPatternGroup) / kPatternGroup;
  const int64_t group_floats = kPatterns * kLanes * (plan->is_paired ? 2 : 1);
  int32_t* selector = plan->selectors;
  for (int64_t group = 0; group < plan->groups; ++group) {
    for (int64_t i = 0; i < RoundUp(plan->terms, kOutputsAtATime); ++i) {
      int pattern = 0;
      for (int r = 0; r < kPatternGroup; ++r) {
        const int64_t j = group * kPatternGroup + r;
        if (i >= plan->terms || j >= plan->terms) continue;
        const int sign = plan->is_paired ? PairSign(matrix, order, j, i) : matrix[j * order + i];
        if (sign < 0) pattern |= 1 << r;
      }
      *selector++ = int32_t(group * group_floats + pattern * kLanes);
    }
  }
  for (int64_t j = order; j < RoundUp(order, 2 * kPatternGroup); ++j)
    Store(plan->inputs + j * kLanes, Float16Lanes(0.0f));
}

// ---- sixteen rows ---------------------------------------------------------------------------------------------------

// All sums of three terms: bit r of a pattern says that term r is subtracted.
HQDIT_INLINE void StorePatterns(Float16Lanes a, Float16Lanes b, Float16Lanes c, float* to) {
  const Float16Lanes pairs[4] = {a + b, b - a, a - b, -(a + b)};
  for (int i = 0; i < 4; ++i) {
    Store(to + i * kLanes, pairs[i] + c);
    Store(to + (4 + i) * kLanes, pairs[i] - c);
  }
}

HQDIT_INLINE void MultiplyRows(const PaleyPlan& plan, int64_t groups, float* outputs) {
  for (int64_t group = 0; group < groups; ++group) {
    const float* from = plan.inputs + group * kPatternGroup * kLanes;
    StorePatterns(Load(from), Load(from + kLanes), Load(from + 2 * kLanes), plan.patterns + group * kPatterns * kLanes);
  }
  const int64_t padded = RoundUp(plan.terms, kOutputsAtATime);
  for (int64_t p = 0; p < padded; p += kOutputsAtATime) {
    const int32_t* selector = plan.selectors + p;
    Float16Lanes sums[kOutputsAtATime];
    for (int i = 0; i < kOutputsAtATime; ++i) sums[i] = Load(plan.patterns + selector[i]);
    for (int64_t group = 1; group < groups; ++group) {
      selector += padded;
      for (int i = 0; i < kOutputsAtATime; ++i) sums[i] = sums[i] + Load(plan.patterns + selector[i]);
    }
    for (int i = 0; i < kOutputsAtATime; ++i) Store(outputs + (p + i) * kLanes, sums[i]);
  }
}

HQDIT_INLINE void MultiplyPairedRows(const PaleyPlan& plan, int64_t groups, float* outputs) {
  constexpr int64_t kOther = kPatterns * kLanes;  // from the patterns of u to those of v
  for (int64_t group = 0; group < groups; ++group) {
    const float* from = plan.inputs + 2 * group * kPatternGroup * kLanes;
    Float16Lanes u[kPatternGroup], v[kPatternGroup];
    for (int r = 0; r < kPatternGroup; ++r) {
      const Float16Lanes first = Load(from + 2 * r * kLanes), second = Load(from + (2 * r + 1) * kLanes);
      u[r] = first + second;
      v[r] = first - second;
    }
    float* to = plan.patterns + 2 * group * kOther;
    StorePatterns(u[0], u[1], u[2], to);
    StorePatterns(v[0], v[1], v[2], to + kOther);
  }
  const int64_t padded = RoundUp(plan.terms, kOutputsAtATime);
  for (int64_t i = 0; i < plan.terms; i += 2) {
    const int32_t* selector = plan.selectors + i;
    Float16Lanes sums[4] = {};
    for (int64_t group = 0; group < groups; ++group, selector += padded) {
      const float* first = plan.patterns + selector[0];
      const float* second = plan.patterns + selector[1];
      const Float16Lanes parts[4] = {Load(first), Load(first + kOther), Load(second), Load(second + kOther)};
      for (int p = 0; p < 4; ++p) sums[p] = group == 0 ? parts[p] : sums[p] + parts[p];
    }
    for (int p = 0; p < 4; ++p) {
      // Input p ^ 1: the other one of the pair.
      const Float16Lanes other = Load(plan.inputs + (2 * i + (p ^ 1)) * kLanes);
      Store(outputs + (2 * i + p) * kLanes, AddExact(sums[p], -2.0f, other));
    }
  }
}

// With the number of groups as a constant for the orders 36 and 12, so that the loops over them are unrolled.
inline void MultiplyBySixGroups(const PaleyPlan& plan, float* outputs) { MultiplyPairedRows(plan, 6, outputs); }
inline void MultiplyByFourGroups(const PaleyPlan& plan, float* outputs) { MultiplyRows(plan, 4, outputs); }
inline void MultiplyByGroups(const PaleyPlan& plan, float* outputs) {
  plan.is_paired ? MultiplyPairedRows(plan, plan.groups, outputs) : MultiplyRows(plan, plan.groups, outputs);
}

// The products of plan.inputs, `order` vectors. Up to three more are written where the order is no multiple of four.
HQDIT_INLINE void Multiply(const PaleyPlan& plan, float* outputs) {
  if (plan.is_paired && plan.groups == 6) return MultiplyBySixGroups(plan, outputs);
  if (!plan.is_paired && plan.groups == 4) return MultiplyByFourGroups(plan, outputs);
  MultiplyByGroups(plan, outputs);
}

// ---- rows to lanes and back -----------------------------------------------------------------------------------------

// Within each run of four lanes: lane c of v[r] goes to lane r of v[c].
HQDIT_INLINE void TransposeFours(Float16Lanes (&v)[4]) {
  for (int i = 0; i < kParts; ++i) {
    IntPart low, high, low_pairs, high_pairs;
    for (int lane = 0; lane < kPartLanes; ++lane) {
      const int first = lane & ~3, within = lane & 3, other = (within & 1) * kPartLanes;
      low[lane] = first + within / 2 + other;
      high[lane] = low[lane] + 2;
      low_pairs[lane] = first + (within & 1) + (within / 2) * kPartLanes;
      high_pairs[lane] = low_pairs[lane] + 2;
    }
    const FloatPart ab_low = __builtin_shuffle(v[0].part[i], v[1].part[i], low);
    const FloatPart ab_high = __builtin_shuffle(v[0].part[i], v[1].part[i], high);
    const FloatPart cd_low = __builtin_shuffle(v[2].part[i], v[3].part[i], low);
    const FloatPart cd_high = __builtin_shuffle(v[2].part[i], v[3].part[i], high);
    v[0].part[i] = __builtin_shuffle(ab_low, cd_low, low_pairs);
    v[1].part[i] = __builtin_shuffle(ab_low, cd_low, high_pairs);
    v[2].part[i] = __builtin_shuffle(ab_high, cd_high, low_pairs);
    v[3].part[i] = __builtin_shuffle(ab_high, cd_high, high_pairs);
  }
}

// Four lanes from each of four places `stride` floats apart.
HQDIT_INLINE Float16Lanes LoadFours(const float* from, int64_t stride) {
  Float16Lanes out;
#if defined(__AVX512F__)
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(from));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(from + stride), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(from + 2 * stride), 2);
  out.part[0] = FloatPart(_mm512_insertf32x4(v, _mm_loadu_ps(from + 3 * stride), 3));
#elif defined(__AVX2__)
  for (int i = 0; i < kParts; ++i) {
    const float* pair = from + 2 * i * stride;
    const __m256 low = _mm256_castps128_ps256(_mm_loadu_ps(pair));
    out.part[i] = FloatPart(_mm256_insertf128_ps(low, _mm_loadu_ps(pair + stride), 1));
  }
#else
  for (int i = 0; i < kParts; ++i) __builtin_memcpy(&out.part[i], from + i * stride, kPartBytes);
#endif
  return out;
}

HQDIT_INLINE void StoreFours(float* to, int64_t stride, Float16Lanes a) {
#if defined(__AVX512F__)
  const __m512 v = __m512(a.part[0]);
  _mm_storeu_ps(to, _mm512_castps512_ps128(v));
  _mm_storeu_ps(to + stride, _mm512_extractf32x4_ps(v, 1));
  _mm_storeu_ps(to + 2 * stride, _mm512_extractf32x4_ps(v, 2));
  _mm_storeu_ps(to + 3 * stride, _mm512_extractf32x4_ps(v, 3));
#elif defined(__AVX2__)
  for (int i = 0; i < kParts; ++i) {
    float* pair = to + 2 * i * stride;
    _mm_storeu_ps(pair, _mm256_castps256_ps128(__m256(a.part[i])));
    _mm_storeu_ps(pair + stride, _mm256_extractf128_ps(__m256(a.part[i]), 1));
  }
#else
  for (int i = 0; i < kParts; ++i) __builtin_memcpy(to + i * stride, &a.part[i], kPartBytes);
#endif
}

// The inputs of 16 rows that lie one after another, one row a lane. kRows = 2 or 4 also does the stages of S over 1 and
// 2 rows, which cost least here; `order` is then a multiple of four.
template <int kRows>
inline void GatherFours(const float* rows, const PaleyPlan& plan) {
  const int64_t order = plan.order;
  for (int64_t column = 0; column < order; column += 4) {
    Float16Lanes v[4];
    for (int i = 0; i < 4; ++i) v[i] = LoadFours(rows + i * order + column, 4 * order);
    if (kRows > 1) {
      const Float16Lanes sums[4] = {v[0] + v[1], v[0] - v[1], v[2] + v[3], v[2] - v[3]};
      for (int i = 0; i < 4; ++i) v[i] = sums[i];
    }
    if (kRows > 2) {
      const Float16Lanes sums[4] = {v[0] + v[2], v[1] + v[3], v[0] - v[2], v[1] - v[3]};
      for (int i = 0; i < 4; ++i) v[i] = sums[i];
    }
    // Lane 4 q + c of v[i] is column c of row 4 q + i.
    TransposeFours(v);
    for (int i = 0; i < 4; ++i) Store(plan.inputs + (column + i) * kLanes, v[i]);
  }
}

inline void GatherRows(const float* rows, int64_t stage_rows, const PaleyPlan& plan) {
  const int64_t order = plan.order;
  if (order % 4 == 0) {
    switch (stage_rows) {
      case 1: return GatherFours<1>(rows, plan);
      case 2: return GatherFours<2>(rows, plan);
      default: return GatherFours<4>(rows, plan);
    }
  }
  for (int64_t column = 0; column < order; ++column) {
    for (int lane = 0; lane < kLanes; ++lane) plan.inputs[column * kLanes + lane] = rows[lane * order + column];
  }
}

inline void ScatterRows(const PaleyPlan& plan, float* rows) {
  const int64_t order = plan.order;
  if (order % 4 != 0) {
    for (int64_t column = 0; column < order; ++column) {
      for (int lane = 0; lane < kLanes; ++lane) rows[lane * order + column] = plan.outputs[column * kLanes + lane];
    }
    return;
  }
  for (int64_t column = 0; column < order; column += 4) {
    Float16Lanes v[4];
    for (int i = 0; i < 4; ++i) v[i] = Load(plan.outputs + (column + i) * kLanes);
    TransposeFours(v);
    for (int i = 0; i < 4; ++i) StoreFours(rows + i * order + column, 4 * order, v[i]);
  }
}

// Inputs that lie `inner` numbers apart: columns are the lanes already.
inline void MultiplyColumns(const PaleyPlan& plan, int64_t width, int64_t inner, float* row) {
  for (int64_t at = 0; at < width; at += plan.order * inner) {
    for (int64_t column = 0; column < inner; column += kLanes) {
      float* base = row + at + column;
      const int64_t left = inner - column;
      for (int64_t j = 0; j < plan.order; ++j) Store(plan.inputs + j * kLanes, Load(base + j * inner));
      Multiply(plan, plan.outputs);
      for (int64_t p = 0; p < plan.order; ++p) {
        StorePartial(base + p * inner, Load(plan.outputs + p * kLanes), left < kLanes ? int(left) : kLanes);
      }
    }
  }
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

// Taking rows to lanes and back costs more than the product. So where nothing else depends on the order of channels,
// the row stays in tiles until its levels are bytes: number (r, p) of `order` columns lies at vector r / 16 * order +
// p, lane r % 16. Rows that fill up the last tile are 0.
HQDIT_INLINE bool UsesTiles(const RotateQuantizeArgs& args) {
  return args.paley > 1 && args.paley % 4 == 0 && args.inner == 1 && args.group_size == args.width;
}

// Floats of a tiled row.
HQDIT_INLINE int64_t TiledWidth(const RotateQuantizeArgs& args) { return RoundUp(args.width, kLanes * args.paley); }

HQDIT_INLINE int64_t TiledIndex(int64_t channel, int64_t order) {
  const int64_t row = channel / order, column = channel % order;
  return (row / kLanes * order + column) * kLanes + row % kLanes;
}

// A square of a tile: 16 bytes of each of its 16 rows, which go to `to`, `stride` bytes apart.
#if defined(__AVX512F__)
HQDIT_INLINE void StoreSixteen(uint8_t* to, __m128i bytes) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes); }

HQDIT_INLINE void UntileSixteen(const uint8_t* tile, int64_t stride, uint8_t* to) {
  // Quarter q of a vector gets rows 4 q .. 4 q + 3 of its four columns; the bytes then become runs of four columns.
  const __m512i quarters = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i runs = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  Float16Lanes v[4];
  for (int i = 0; i < 4; ++i) {
    const __m512i columns = _mm512_permutexvar_epi32(quarters, _mm512_loadu_si512(tile + i * 4 * kLanes));
    v[i].part[0] = FloatPart(_mm512_shuffle_epi8(columns, runs));
  }
  // Quarter q of v[i] becomes row 4 q + i.
  TransposeFours(v);
  for (int i = 0; i < 4; ++i) {
    const __m512i rows = __m512i(v[i].part[0]);
    StoreSixteen(to + i * stride, _mm512_castsi512_si128(rows));
    StoreSixteen(to + (4 + i) * stride, _mm512_extracti32x4_epi32(rows, 1));
    StoreSixteen(to + (8 + i) * stride, _mm512_extracti32x4_epi32(rows, 2));
    StoreSixteen(to + (12 + i) * stride, _mm512_extracti32x4_epi32(rows, 3));
  }
}
#else
typedef uint8_t Bytes16 __attribute__((vector_size(16)));

HQDIT_INLINE void UntileSixteen(const uint8_t* tile, int64_t stride, uint8_t* to) {
  // Byte c of v[r] goes to byte r of v[c], by interleaving each vector with the one 8 further, four times.
  constexpr Bytes16 kLow = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  constexpr Bytes16 kHigh = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  Bytes16 v[16];
  __builtin_memcpy(v, tile, sizeof(v));
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
    Bytes16 next[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      next[2 * i] = __builtin_shuffle(v[i], v[i + 8], kLow);
      next[2 * i + 1] = __builtin_shuffle(v[i], v[i + 8], kHigh);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) v[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) __builtin_memcpy(to + i * stride, &v[i], sizeof(v[i]));
}
#endif

// Part of a tile, byte by byte.
inline void UntileSome(const uint8_t* tile, int64_t lanes, int64_t order, uint8_t* to) {
  for (int64_t lane = 0; lane < lanes; ++lane) {
    for (int64_t column = 0; column < order; ++column) to[lane * order + column] = tile[column * kLanes + lane];
  }
}

// The bytes of a tiled row, in order: `rows` rows of `order` bytes.
inline void UntileBytes(const uint8_t* tiles, int64_t rows, int64_t order, uint8_t* to) {
  constexpr int64_t kSquare = 16;
  for (int64_t row = 0; row < rows; row += kLanes, tiles += kLanes * order, to += kLanes * order) {
    if (order < kSquare || rows - row < kLanes) {
      UntileSome(tiles, rows - row < kLanes ? rows - row : kLanes, order, to);
      continue;
    }
    for (int64_t column = 0; column + kSquare <= order; column += kSquare) {
      UntileSixteen(tiles + column * kLanes, order, to + column);
    }
    // What is left overlaps the columns before it.
    const int64_t last = order - kSquare;
    if (order % kSquare != 0) UntileSixteen(tiles + last * kLanes, order, to + last);
  }
}

// ---- all of it ------------------------------------------------------------------------------------------------------

// Of S, the order that is left to P: the lowest bits of the row index.
HQDIT_INLINE int64_t SylvesterWithinPaley(const RotateQuantizeArgs& args) {
  if (args.paley == 1 || args.paley % 4 != 0 || args.inner > 1) return 1;
  return args.sylvester < 4 ? args.sylvester : 4;
}

// In place; the last tile may hold rows beyond the width, for which the row has room.
inline void MultiplyByPaley(const RotateQuantizeArgs& args, const PaleyPlan& plan, float* row) {
  if (args.inner > 1) return MultiplyColumns(plan, args.width, args.inner, row);
  const bool uses_tiles = UsesTiles(args);
  // Of the token before, tiled numbers lie here.
  if (uses_tiles) __builtin_memset(row + args.width, 0, size_t(TiledWidth(args) - args.width) * sizeof(float));
  for (int64_t at = 0; at < args.width; at += kLanes * plan.order) {
    GatherRows(row + at, SylvesterWithinPaley(args), plan);
    Multiply(plan, uses_tiles ? row + at : plan.outputs);
    if (!uses_tiles) ScatterRows(plan, row + at);
  }
}

}  // namespace
}  // namespace hqdit
