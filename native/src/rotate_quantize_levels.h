// From numbers to levels: the highest rung whose threshold is not above y, found in one of several ways. The thresholds
// decide at the start of a call which ways are exact for them; all of these give the same bytes.
#pragma once

#include "hqdit/kernels.h"
#include "vector.h"

namespace hqdit {
namespace {

enum class Rounding {
  kNearest,              // consecutive integers, ties to even: a conversion does it
  kQuarterBytes,         // thresholds at halves, within a narrow range: one shuffle looks 64 bytes up
  kBoundedQuarterBytes,  // the same for numbers that are within the range by themselves
  kSearch16,             // at most 16 rungs: a binary search with shuffles
  kQuarterTable,         // thresholds at halves: look up one by one
  kSearch,               // anything: a binary search in memory
};

// Levels are rounded this many at a time.
constexpr int kChunk = 64;
constexpr int kChunkVectors = kChunk / kLanes;

// Enough for levels from -128 to 127: 4 * 255 + 1 quarters.
constexpr int kMostQuarters = 1024;
constexpr int kMostRungs = 256;

struct LevelPlan {
  Rounding rounding;
  bool is_unsigned;
  float lowest, highest;  // numbers beyond these saturate
  float inverse_factor;   // what 1 / scale is multiplied with before rounding, a power of two
  int32_t first_quarter;  // of quarter_levels[0]
  uint8_t quarter_levels[kMostQuarters];
  float thresholds[kMostRungs];     // filled up with infinities
  uint8_t rung_levels[kMostRungs];  // filled up with the highest level
};

// ---- which way: runs once a call, on plain numbers ------------------------------------------------------------------

// The next float above; `x` is finite and not -0.
HQDIT_INLINE float NextAbove(float x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  bits += x >= 0 ? 1 : -1;
  __builtin_memcpy(&x, &bits, sizeof(bits));
  return x;
}

HQDIT_INLINE int LevelOfRung(const RotateQuantizeArgs& args, int64_t rung) {
  return args.levels_unsigned ? int(uint8_t(args.rung_levels[rung])) : int(args.rung_levels[rung]);
}

inline bool IsRoundToNearestEven(const RotateQuantizeArgs& args) {
  for (int64_t rung = 1; rung < args.rungs; ++rung) {
    const int level = LevelOfRung(args, rung);
    if (level != LevelOfRung(args, rung - 1) + 1) return false;
    const float midpoint = float(level) - 0.5f;
    if (args.thresholds[rung - 1] != (level % 2 == 0 ? midpoint : NextAbove(midpoint))) return false;
  }
  return true;
}

// The quarter from which on a number lies above the threshold, where `y` is in quarter floor(2 y) + ceil(2 y): an even
// one if y is a multiple of 1/2, an odd one if it lies between two. False if halves do not decide.
inline bool QuarterOfThreshold(float threshold, int32_t* quarter) {
  if (!(threshold >= -256.0f && threshold <= 256.0f)) return false;
  int32_t doubled = int32_t(threshold * 2.0f);
  if (float(doubled) > threshold * 2.0f) --doubled;
  const float half = float(doubled) * 0.5f;
  *quarter = 2 * doubled + (threshold != half ? 1 : 0);
  return threshold == half || threshold == NextAbove(half);
}

// Fills quarter_levels for the quarters of all numbers within the clamp; false if the thresholds are not at halves.
inline bool PrepareQuarters(const RotateQuantizeArgs& args, LevelPlan* plan) {
  int32_t quarter_of_threshold[kMostRungs];
  for (int64_t i = 0; i < args.rungs - 1; ++i) {
    if (!QuarterOfThreshold(args.thresholds[i], &quarter_of_threshold[i])) return false;
  }
  plan->lowest = float(LevelOfRung(args, 0));
  plan->highest = float(LevelOfRung(args, args.rungs - 1));
  // The clamp moves no number across a threshold, because thresholds lie between levels.
  if (args.thresholds[0] <= plan->lowest || args.thresholds[args.rungs - 2] > plan->highest) return false;
  plan->first_quarter = 4 * LevelOfRung(args, 0);
  int64_t rung = 0;
  for (int i = 0; i < kMostQuarters; ++i) {
    while (rung < args.rungs - 1 && quarter_of_threshold[rung] <= plan->first_quarter + i) ++rung;
    plan->quarter_levels[i] = uint8_t(args.rung_levels[rung]);
  }
  return true;
}

#if defined(__AVX512VBMI__)
constexpr int kShuffleEntries = 128;

// Turns the table into one indexed by the low seven bits of the quarter, for quarters from first to last; false if
// these bits do not tell them apart. Quarters are packed to signed bytes on the way.
inline bool PrepareQuarterBytes(int32_t first, int32_t last, LevelPlan* plan) {
  if (first < -128 || last > 127 || last - first >= kShuffleEntries) return false;
  uint8_t by_low_bits[kShuffleEntries];
  for (int32_t quarter = first; quarter < first + kShuffleEntries; ++quarter) {
    const int32_t from_lowest = quarter < plan->first_quarter ? 0 : quarter - plan->first_quarter;
    by_low_bits[quarter & (kShuffleEntries - 1)] = plan->quarter_levels[from_lowest];
  }
  __builtin_memcpy(plan->quarter_levels, by_low_bits, kShuffleEntries);
  return true;
}

// Absmax scales of two-sided formats that are not rounded to 8 bits leave |y| <= top up to rounding, so that clamping is
// needless; and doubling can be left to the inverse, unless y against 0 decides: y may underflow where 2 y does not.
inline bool PrepareBoundedQuarterBytes(const RotateQuantizeArgs& args, LevelPlan* plan) {
  if (args.rule != ScaleRule::kAbsmax || args.round_scales || plan->lowest >= 0) return false;
  for (int64_t i = 0; i < args.rungs - 1; ++i) {
    if (args.thresholds[i] >= 0 && args.thresholds[i] < 0.5f) return false;
  }
  constexpr float kMostTop = kShuffleEntries / 4;
  if (!(args.top < kMostTop)) return false;
  const int32_t farthest = 4 * int32_t(args.top) + 2;
  return float(int32_t(args.top)) == args.top && PrepareQuarterBytes(-farthest, farthest, plan);
}
#endif

inline Rounding ChooseRounding(const RotateQuantizeArgs& args, LevelPlan* plan) {
  if (IsRoundToNearestEven(args)) {
    plan->lowest = float(LevelOfRung(args, 0));
    plan->highest = float(LevelOfRung(args, args.rungs - 1));
    return Rounding::kNearest;
  }
  const bool has_quarters = PrepareQuarters(args, plan);
#if defined(__AVX512VBMI__)
  if (has_quarters && PrepareBoundedQuarterBytes(args, plan)) {
    plan->inverse_factor = 2.0f;
    return Rounding::kBoundedQuarterBytes;
  }
  const int32_t last_quarter = 4 * int32_t(plan->highest);
  if (has_quarters && PrepareQuarterBytes(plan->first_quarter, last_quarter, plan)) return Rounding::kQuarterBytes;
#endif
#if defined(__AVX2__)
  if (args.rungs <= kLanes) return Rounding::kSearch16;
#endif
  return has_quarters ? Rounding::kQuarterTable : Rounding::kSearch;
}

inline void PrepareLevels(const RotateQuantizeArgs& args, LevelPlan* plan) {
  plan->is_unsigned = args.levels_unsigned;
  plan->lowest = plan->highest = 0.0f;
  plan->inverse_factor = 1.0f;
  for (int64_t rung = 0; rung < kMostRungs; ++rung) {
    plan->thresholds[rung] = rung < args.rungs - 1 ? args.thresholds[rung] : __builtin_inff();
    plan->rung_levels[rung] = uint8_t(args.rung_levels[rung < args.rungs ? rung : args.rungs - 1]);
  }
  plan->rounding = ChooseRounding(args, plan);
}

// ---- 64 levels ------------------------------------------------------------------------------------------------------

struct Chunk {
  Float16Lanes v[kChunkVectors];
};

struct IntChunk {
  Int16Lanes v[kChunkVectors];
};

#if defined(__AVX512F__)
// 64 int32 to bytes in order, saturating to int16 first and then to int8, or to uint8.
template <bool kUnsigned>
HQDIT_INLINE __m512i PackBytes(const IntChunk& chunk) {
  const __m512i low = _mm512_packs_epi32(__m512i(chunk.v[0].part[0]), __m512i(chunk.v[1].part[0]));
  const __m512i high = _mm512_packs_epi32(__m512i(chunk.v[2].part[0]), __m512i(chunk.v[3].part[0]));
  const __m512i bytes = kUnsigned ? _mm512_packus_epi16(low, high) : _mm512_packs_epi16(low, high);
  // The packs work within quarters of 128 bits, which leaves the fours of bytes transposed.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, bytes);
}

template <bool kUnsigned>
HQDIT_INLINE void StoreBytes(uint8_t* to, const IntChunk& chunk) {
  _mm512_storeu_si512(to, PackBytes<kUnsigned>(chunk));
}
#elif defined(__AVX2__)
// The same for two vectors, 32 bytes.
template <bool kUnsigned>
HQDIT_INLINE __m256i PackBytes(const Int16Lanes& first, const Int16Lanes& second) {
  const __m256i low = _mm256_packs_epi32(__m256i(first.part[0]), __m256i(first.part[1]));
  const __m256i high = _mm256_packs_epi32(__m256i(second.part[0]), __m256i(second.part[1]));
  const __m256i bytes = kUnsigned ? _mm256_packus_epi16(low, high) : _mm256_packs_epi16(low, high);
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

template <bool kUnsigned>
HQDIT_INLINE void StoreBytes(uint8_t* to, const IntChunk& chunk) {
  for (int i = 0; i < kChunkVectors; i += 2) {
    const __m256i bytes = PackBytes<kUnsigned>(chunk.v[i], chunk.v[i + 1]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * kLanes), bytes);
  }
}
#else
template <bool kUnsigned>
HQDIT_INLINE void StoreBytes(uint8_t* to, const IntChunk& chunk) {
  int32_t lanes[kChunk];
  for (int i = 0; i < kChunkVectors; ++i) Store(lanes + i * kLanes, chunk.v[i]);
  for (int i = 0; i < kChunk; ++i) to[i] = uint8_t(lanes[i]);
}
#endif

struct NearestLevels {
  const LevelPlan& plan;

  HQDIT_INLINE void operator()(uint8_t* to, const Chunk& y) const {
    IntChunk levels;
    for (int i = 0; i < kChunkVectors; ++i) {
      levels.v[i] = RoundToInt(Max(Float16Lanes(plan.lowest), Min(Float16Lanes(plan.highest), y.v[i])));
    }
    if (plan.is_unsigned) return StoreBytes<true>(to, levels);
    StoreBytes<false>(to, levels);
  }
};

// floor(2 y) + ceil(2 y) of clamped y.
HQDIT_INLINE IntChunk Quarters(const LevelPlan& plan, const Chunk& y) {
  IntChunk quarters;
  for (int i = 0; i < kChunkVectors; ++i) {
    const Float16Lanes clamped = Max(Float16Lanes(plan.lowest), Min(Float16Lanes(plan.highest), y.v[i]));
    const Float16Lanes doubled = clamped + clamped;
    quarters.v[i] = FloorToInt(doubled) + CeilToInt(doubled);
  }
  return quarters;
}

struct QuarterTableLevels {
  const LevelPlan& plan;

  HQDIT_INLINE void operator()(uint8_t* to, const Chunk& y) const {
    const IntChunk quarters = Quarters(plan, y);
    int32_t index[kChunk];
    for (int i = 0; i < kChunkVectors; ++i) Store(index + i * kLanes, quarters.v[i] - Int16Lanes(plan.first_quarter));
    // Only a NaN leaves the table; a token that holds one has no levels that mean anything.
    for (int i = 0; i < kChunk; ++i) to[i] = plan.quarter_levels[index[i] & (kMostQuarters - 1)];
  }
};

#if defined(__AVX512VBMI__)
HQDIT_INLINE void StoreQuarterBytes(const LevelPlan& plan, uint8_t* to, const IntChunk& quarters) {
  const __m512i low = _mm512_loadu_si512(plan.quarter_levels);
  const __m512i high = _mm512_loadu_si512(plan.quarter_levels + kShuffleEntries / 2);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi8(low, PackBytes<false>(quarters), high));
}

struct QuarterBytesLevels {
  const LevelPlan& plan;

  HQDIT_INLINE void operator()(uint8_t* to, const Chunk& y) const { StoreQuarterBytes(plan, to, Quarters(plan, y)); }
};

struct BoundedQuarterBytesLevels {
  const LevelPlan& plan;

  HQDIT_INLINE void operator()(uint8_t* to, const Chunk& doubled) const {
    IntChunk quarters;
    for (int i = 0; i < kChunkVectors; ++i) quarters.v[i] = FloorToInt(doubled.v[i]) + CeilToInt(doubled.v[i]);
    StoreQuarterBytes(plan, to, quarters);
  }
};
#endif

#if defined(__AVX512F__)
struct Search16Levels {
  const LevelPlan& plan;

  HQDIT_INLINE void operator()(uint8_t* to, const Chunk& y) const {
    IntChunk rungs;
    for (int i = 0; i < kChunkVectors; ++i) rungs.v[i].part[0] = IntPart(Rung(__m512(y.v[i].part[0])));
    const __m512i levels = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(plan.rung_levels)));
    _mm512_storeu_si512(to, _mm512_shuffle_epi8(levels, PackBytes<false>(rungs)));
  }

  // The rung, bit by bit from the highest; thresholds[rung + bit - 1] decides whether the bit belongs to it.
  HQDIT_INLINE __m512i Rung(__m512 y) const {
    __m512i rung = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(y, _mm512_set1_ps(plan.thresholds[7]), _CMP_GE_OQ), 8);
    rung = AddBit(y, rung, 4);
    rung = AddBit(y, rung, 2);
    return AddBit(y, rung, 1);
  }

  HQDIT_INLINE __m512i AddBit(__m512 y, __m512i rung, int bit) const {
    // For rungs that the bits so far cannot give, the load reads on, into the infinities.
    const __m512 threshold = _mm512_permutexvar_ps(rung, _mm512_loadu_ps(plan.thresholds + bit - 1));
    return _mm512_mask_add_epi32(rung, _mm512_cmp_ps_mask(y, threshold, _CMP_GE_OQ), rung, _mm512_set1_epi32(bit));
  }
};
#elif defined(__AVX2__)
struct Search16Levels {
  const LevelPlan& plan;

  HQDIT_INLINE void operator()(uint8_t* to, const Chunk& y) const {
    const __m256i levels =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(plan.rung_levels)));
    for (int i = 0; i < kChunkVectors; i += 2) {
      const __m256i rungs = PackBytes<false>(Rungs(y.v[i]), Rungs(y.v[i + 1]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * kLanes), _mm256_shuffle_epi8(levels, rungs));
    }
  }

  HQDIT_INLINE Int16Lanes Rungs(Float16Lanes y) const {
    Int16Lanes rungs;
    for (int i = 0; i < kParts; ++i) rungs.part[i] = IntPart(Rung(__m256(y.part[i])));
    return rungs;
  }

  // The rung, bit by bit from the highest: `rung` is the bits so far, and a table of eight holds what to compare with.
  HQDIT_INLINE __m256i Rung(__m256 y) const {
    const float* t = plan.thresholds;
    __m256i rung = _mm256_setzero_si256();
    rung = AddBit(y, rung, _mm256_set1_ps(t[7]));
    rung = AddBit(y, rung, _mm256_setr_ps(t[3], t[11], 0, 0, 0, 0, 0, 0));
    rung = AddBit(y, rung, _mm256_setr_ps(t[1], t[5], t[9], t[13], 0, 0, 0, 0));
    return AddBit(y, rung, _mm256_setr_ps(t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14]));
  }

  HQDIT_INLINE __m256i AddBit(__m256 y, __m256i rung, __m256 table) const {
    const __m256 is_above = _mm256_cmp_ps(y, _mm256_permutevar8x32_ps(table, rung), _CMP_GE_OQ);
    return _mm256_sub_epi32(_mm256_add_epi32(rung, rung), _mm256_castps_si256(is_above));
  }
};
#endif

struct SearchLevels {
  const LevelPlan& plan;

  HQDIT_INLINE void operator()(uint8_t* to, const Chunk& y) const {
    float numbers[kChunk];
    for (int i = 0; i < kChunkVectors; ++i) Store(numbers + i * kLanes, y.v[i]);
    for (int i = 0; i < kChunk; ++i) {
      int rung = 0;
      for (int bit = kMostRungs / 2; bit > 0; bit /= 2) rung += numbers[i] >= plan.thresholds[rung + bit - 1] ? bit : 0;
      to[i] = plan.rung_levels[rung];
    }
  }
};

// ---- a row ----------------------------------------------------------------------------------------------------------

// What y is multiplied with, 1 / scale times plan.inverse_factor: one number, or one for each element where groups have
// their own.
struct OneInverse {
  float inverse;
  HQDIT_INLINE Float16Lanes operator()(int64_t) const { return inverse; }
};
struct RowOfInverses {
  const float* inverses;
  HQDIT_INLINE Float16Lanes operator()(int64_t at) const { return Load(inverses + at); }
};

// `row` and the inverses can be read up to the next multiple of kChunk.
template <typename Levels, typename Inverse>
inline void RoundRowWith(Levels levels, const float* row, int64_t width, Inverse inverse, uint8_t* to) {
  for (int64_t at = 0; at < width; at += kChunk) {
    Chunk y;
    for (int i = 0; i < kChunkVectors; ++i) y.v[i] = Load(row + at + i * kLanes) * inverse(at + i * kLanes);
    if (width - at >= kChunk) {
      levels(to + at, y);
    } else {
      uint8_t last[kChunk];
      levels(last, y);
      __builtin_memcpy(to + at, last, size_t(width - at));
    }
  }
}

template <typename Inverse>
inline void RoundRow(const LevelPlan& plan, const float* row, int64_t width, Inverse inverse, uint8_t* to) {
  switch (plan.rounding) {
    case Rounding::kNearest: return RoundRowWith(NearestLevels{plan}, row, width, inverse, to);
#if defined(__AVX512VBMI__)
    case Rounding::kQuarterBytes: return RoundRowWith(QuarterBytesLevels{plan}, row, width, inverse, to);
    case Rounding::kBoundedQuarterBytes: return RoundRowWith(BoundedQuarterBytesLevels{plan}, row, width, inverse, to);
#endif
#if defined(__AVX2__)
    case Rounding::kSearch16: return RoundRowWith(Search16Levels{plan}, row, width, inverse, to);
#endif
    case Rounding::kQuarterTable: return RoundRowWith(QuarterTableLevels{plan}, row, width, inverse, to);
    default: return RoundRowWith(SearchLevels{plan}, row, width, inverse, to);
  }
}

}  // namespace
}  // namespace hqdit
