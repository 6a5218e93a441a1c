// Rotate and quantize: one pass over each token in a row of floats that stays in the first level cache.
//
// Included by one file for each instruction set, which defines the functions of kernel_table.h.
#pragma once

#include "hqdit/kernels.h"
#include "kernel_table.h"
#include "rotate_quantize_front.h"
#include "rotate_quantize_levels.h"
#include "rotate_quantize_rotation.h"
#include "vector.h"

namespace hqdit {
namespace {

constexpr float kSmallestScale = 0x1p-126f;
constexpr int32_t kMagnitudeBits = 0x7fffffff;
constexpr int32_t kInfinityBits = 0x7f800000;

// ---- scratch memory of a worker -------------------------------------------------------------------------------------

// Hands out 64-byte aligned pieces; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* Take(int64_t count) {
    char* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

struct Scratch {
  float* row;
  int64_t row_floats;
  float* signs;                // null: no signs
  float* channel_reciprocals;  // null: no channel scales; tiled if the row is
  float* inverses;             // null: one group
  uint8_t* tiled_levels;       // null: no tiles
  PaleyPlan paley;
  LevelPlan* levels;
};

// Vectors are read and written whole, and rounded in chunks.
HQDIT_INLINE int64_t Padded(int64_t width) { return RoundUp(width, kChunk) + kLanes; }

inline Scratch Divide(const RotateQuantizeArgs& args, Arena* arena) {
  Scratch scratch = {};
  scratch.row_floats = Padded(args.width) + RotationPadding(args.paley);
  scratch.row = arena->Take<float>(scratch.row_floats);
  if (args.sign_bits != nullptr) scratch.signs = arena->Take<float>(Padded(args.width));
  if (args.channel_scale != nullptr) scratch.channel_reciprocals = arena->Take<float>(scratch.row_floats);
  if (args.group_size < args.width) scratch.inverses = arena->Take<float>(Padded(args.width));
  if (UsesTiles(args)) scratch.tiled_levels = arena->Take<uint8_t>(TiledWidth(args));
  if (args.paley > 1) scratch.paley = DividePaley(args.paley, arena);
  scratch.levels = arena->Take<LevelPlan>(1);
  return scratch;
}

// +-1 for each channel, and 1 for the padding.
inline void SpreadSigns(const RotateQuantizeArgs& args, float* signs) {
  Int16Lanes bit_of_lane;
  for (int lane = 0; lane < kLanes; ++lane) bit_of_lane.part[lane / kPartLanes][lane % kPartLanes] = 1 << lane;
  const int64_t bytes = (args.width + 7) / 8;
  for (int64_t at = 0; at < Padded(args.width); at += kLanes) {
    const int64_t byte = at / 8;
    const int low = byte < bytes ? args.sign_bits[byte] : 0, high = byte + 1 < bytes ? args.sign_bits[byte + 1] : 0;
    const Mask16Lanes is_negative = Less(Int16Lanes(0), Int16Lanes(low | high << 8) & bit_of_lane);
    Store(signs + at, Select(is_negative, Float16Lanes(-1.0f), Float16Lanes(1.0f)));
  }
}

// What does not depend on the token. Everything that is read beyond the width is set, to numbers without effect.
inline void Prepare(const RotateQuantizeArgs& args, Scratch* scratch) {
  __builtin_memset(scratch->row, 0, size_t(scratch->row_floats) * sizeof(float));
  if (scratch->inverses != nullptr) __builtin_memset(scratch->inverses, 0, size_t(Padded(args.width)) * sizeof(float));
  if (scratch->signs != nullptr) SpreadSigns(args, scratch->signs);
  if (scratch->channel_reciprocals != nullptr) {
    __builtin_memset(scratch->channel_reciprocals, 0, size_t(scratch->row_floats) * sizeof(float));
    for (int64_t c = 0; c < args.width; ++c) {
      const int64_t at = UsesTiles(args) ? TiledIndex(c, args.paley) : c;
      scratch->channel_reciprocals[at] = 1.0f / args.channel_scale[c];
    }
  }
  if (args.paley > 1) PreparePaley(args.paley_matrix, &scratch->paley);
  PrepareLevels(args, scratch->levels);
}

// ---- scales ---------------------------------------------------------------------------------------------------------

// What a group's scale follows from. The magnitude, as bits, is always wanted: it is the one that shows NaN and
// infinity, because as integers they lie above all others.
enum class Measure { kMagnitude, kPositive, kSquares };

struct GroupMeasure {
  Int16Lanes magnitude = 0;
  Float16Lanes positive = 0.0f;
  Float16Lanes squares = 0.0f;

  template <Measure kMeasure>
  HQDIT_INLINE void Add(Float16Lanes y) {
    magnitude = Max(magnitude, BitsOf(y) & Int16Lanes(kMagnitudeBits));
    if (kMeasure == Measure::kPositive) positive = Max(y, positive);
    if (kMeasure == Measure::kSquares) squares = squares + y * y;
  }
};

// Step 4 and the normalization, as one pass over the row.
struct RowScaling {
  float normalization;
  const float* channel_reciprocals;

  HQDIT_INLINE Float16Lanes operator()(Float16Lanes y, int64_t at) const {
    y = y * normalization;
    return channel_reciprocals == nullptr ? y : y * Load(channel_reciprocals + at);
  }
};

HQDIT_INLINE float LargerOf(float a, float b) { return a > b ? a : b; }

// The scale of a group whose numbers are finite.
template <Measure kMeasure>
inline float ScaleOf(const RotateQuantizeArgs& args, const GroupMeasure& measure) {
  if (args.rule == ScaleRule::kStatic) return args.static_scale[0];
  if (kMeasure == Measure::kSquares) {
    const float rms = __builtin_sqrtf(HorizontalSum(measure.squares) / float(args.group_size));
    return LargerOf(rms * args.rms_factor, kSmallestScale);
  }
  const Float16Lanes numbers = kMeasure == Measure::kPositive ? measure.positive : FloatFromBits(measure.magnitude);
  return LargerOf(HorizontalMax(numbers) / args.top, kSmallestScale);
}

// Where the numbers of a group come from: v[i] is the vector at at + 16 i.
struct RowNumbers {
  static constexpr int kVectors = 1;
  const float* row;
  HQDIT_INLINE void operator()(int64_t at, Float16Lanes (&v)[1]) const { v[0] = Load(row + at); }
};

// Blocks of 128 that are rotated in registers on the way.
template <typename AnyNumbers>
struct BlockNumbers {
  static constexpr int kVectors = kBlockVectors;
  const AnyNumbers& numbers;
  LaneStages stages;
  HQDIT_INLINE void operator()(int64_t at, Float16Lanes (&v)[kBlockVectors]) const {
#pragma GCC unroll 8
    for (int i = 0; i < kBlockVectors; ++i) v[i] = numbers(at + i * kLanes, kLanes);
    TransformBlock<kBlockVectors, kLanes>(v, stages);
  }
};

// Scales the numbers of a group, measures them and stores them in the row.
template <Measure kMeasure, typename GroupNumbers>
inline GroupMeasure ScaleAndMeasure(const GroupNumbers& numbers, const RowScaling& scaling, int64_t begin, int64_t size,
                                    float* row) {
  GroupMeasure measure;
  for (int64_t at = begin; at < begin + size; at += GroupNumbers::kVectors * kLanes) {
    Float16Lanes v[GroupNumbers::kVectors];
    numbers(at, v);
#pragma GCC unroll 8
    for (int i = 0; i < GroupNumbers::kVectors; ++i) {
      v[i] = scaling(v[i], at + i * kLanes);
      Store(row + at + i * kLanes, v[i]);
      const int64_t left = begin + size - at;
      measure.Add<kMeasure>(GroupNumbers::kVectors > 1 || left >= kLanes ? v[i] : KeepFirst(v[i], int(left)));
    }
  }
  return measure;
}

// The same for a group that begins or ends within a vector, of numbers that are scaled.
template <Measure kMeasure>
inline GroupMeasure MeasureScaled(const float* row, int64_t size) {
  GroupMeasure measure;
  ForEachVector(size, [&](int64_t at, int count) HQDIT_INLINE_LAMBDA {
    const Float16Lanes y = Load(row + at);
    measure.Add<kMeasure>(count == kLanes ? y : KeepFirst(y, count));
  });
  return measure;
}

// Stores a group's scale; false if it or a number of the group is not finite.
template <Measure kMeasure>
inline bool FinishGroup(const RotateQuantizeArgs& args, const GroupMeasure& measure, float* scale) {
  *scale = ScaleOf<kMeasure>(args, measure);
  return HorizontalMax(measure.magnitude) < kInfinityBits && *scale < __builtin_inff();
}

// From numbers before scaling to the scaled row and the scales of all groups, each of whole vectors or the only one.
template <Measure kMeasure, typename GroupNumbers>
inline bool FinishWholeGroups(const RotateQuantizeArgs& args, const Scratch& scratch, const GroupNumbers& numbers,
                              float* scales) {
  const RowScaling scaling = {args.normalization, scratch.channel_reciprocals};
  const int64_t width = UsesTiles(args) ? TiledWidth(args) : args.width;
  const int64_t size = args.group_size == args.width ? width : args.group_size;
  bool is_finite = true;
  for (int64_t begin = 0; begin < width; begin += size) {
    const GroupMeasure measure = ScaleAndMeasure<kMeasure>(numbers, scaling, begin, size, scratch.row);
    is_finite &= FinishGroup<kMeasure>(args, measure, scales++);
  }
  return is_finite;
}

template <Measure kMeasure>
inline bool FinishRow(const RotateQuantizeArgs& args, const Scratch& scratch, float* scales) {
  const bool are_whole = args.group_size == args.width || args.group_size % kLanes == 0;
  if (are_whole) return FinishWholeGroups<kMeasure>(args, scratch, RowNumbers{scratch.row}, scales);
  const RowScaling scaling = {args.normalization, scratch.channel_reciprocals};
  for (int64_t at = 0; at < args.width; at += kLanes) Store(scratch.row + at, scaling(Load(scratch.row + at), at));
  bool is_finite = true;
  for (int64_t begin = 0; begin < args.width; begin += args.group_size) {
    const GroupMeasure measure = MeasureScaled<kMeasure>(scratch.row + begin, args.group_size);
    is_finite &= FinishGroup<kMeasure>(args, measure, scales++);
  }
  return is_finite;
}

// Rounds the scales of a token, which are positive and normal, to 8 bits; false if one becomes infinite.
inline bool RoundScales(int64_t groups, float* scales) {
  // Exponent fields of float32 are moved so that that of the largest scale is kOne: it then lies in 1 .. 2, and the
  // numbers of E4M3 are multiples of 1/8 of a power of two from kSmallestNormal up, and of 1/8 of that one below.
  constexpr int32_t kField = 1 << 23, kOne = 127 * kField;
  constexpr int32_t kSmallestNormal = kOne - 13 * kField, kSmallest = kOne - 16 * kField;
  // Far below half of the smallest, where it does not matter how far.
  constexpr int32_t kFloor = kOne - 20 * kField;
  const auto bits_at = [&](int64_t at, int count) HQDIT_INLINE_LAMBDA {
    return BitsOf(Float32Source{scales}(at, count));
  };
  Int16Lanes largest = 0;
  ForEachVector(groups, [&](int64_t at, int count) HQDIT_INLINE_LAMBDA {
    largest = Max(largest, bits_at(at, count));
  });
  const Int16Lanes shift = (HorizontalMax(largest) & kInfinityBits) - kOne;
  Int16Lanes largest_rounded = 0;
  ForEachVector(groups, [&](int64_t at, int count) HQDIT_INLINE_LAMBDA {
    const Int16Lanes bits = Max(bits_at(at, count) - shift, Int16Lanes(kFloor));
    // Adding 2^20 of the last power of two leaves three bits of mantissa below it.
    const Int16Lanes power = Max(bits & Int16Lanes(kInfinityBits), Int16Lanes(kSmallestNormal));
    const Float16Lanes rounder = FloatFromBits(power + Int16Lanes(20 * kField));
    const Float16Lanes rounded = (FloatFromBits(bits) + rounder) - rounder;
    const Int16Lanes moved_back = Max(BitsOf(rounded), Int16Lanes(kSmallest)) + shift;
    largest_rounded = Max(largest_rounded, moved_back);
    StorePartial(scales + at, FloatFromBits(moved_back), count);
  });
  return HorizontalMax(largest_rounded) < kInfinityBits;
}

// The reciprocal of each number's scale, where groups have their own.
inline void SpreadInverses(const RotateQuantizeArgs& args, const Scratch& scratch, const float* scales) {
  for (int64_t begin = 0; begin < args.width; begin += args.group_size) {
    // What a group writes beyond its end, the next one overwrites.
    const Float16Lanes inverse = 1.0f / *scales++ * scratch.levels->inverse_factor;
    for (int64_t at = 0; at < args.group_size; at += kLanes) Store(scratch.inverses + begin + at, inverse);
  }
}

HQDIT_INLINE Measure MeasureOf(const RotateQuantizeArgs& args) {
  if (args.rule == ScaleRule::kRms) return Measure::kSquares;
  const bool is_one_sided = LevelOfRung(args, 0) >= 0;
  return args.rule == ScaleRule::kAbsmax && is_one_sided ? Measure::kPositive : Measure::kMagnitude;
}

// ---- tokens ---------------------------------------------------------------------------------------------------------

// Whether rotation, normalization and measuring can be one pass over blocks in registers.
HQDIT_INLINE bool IsBlockwise(const RotateQuantizeArgs& args) {
  constexpr int64_t kBlock = kBlockVectors * kLanes;
  return args.sylvester == kBlock && args.paley == 1 && args.inner == 1 && args.group_size % kBlock == 0 &&
         MeasureOf(args) == Measure::kMagnitude;
}

// Steps 1 to 5 of a token, but for the rounding of scales: the scaled row and the scales; false if a number of either
// is not finite.
struct ScaleToken {
  const RotateQuantizeArgs& args;
  const Scratch& scratch;
  float* scales;

  template <typename AnyNumbers>
  HQDIT_INLINE bool operator()(const AnyNumbers& numbers) const {
    if constexpr (AnyNumbers::kIsCheap) {
      if (IsBlockwise(args)) {
        const BlockNumbers<AnyNumbers> blocks = {numbers, {}};
        return FinishWholeGroups<Measure::kMagnitude>(args, scratch, blocks, scales);
      }
    }
    StoreInRow{args.width, scratch.row}(numbers);
    return RotateAndFinish();
  }

  __attribute__((noinline)) bool RotateAndFinish() const {
    Rotate(args, scratch.paley, scratch.row);
    switch (MeasureOf(args)) {
      case Measure::kSquares: return FinishRow<Measure::kSquares>(args, scratch, scales);
      case Measure::kPositive: return FinishRow<Measure::kPositive>(args, scratch, scales);
      default: return FinishRow<Measure::kMagnitude>(args, scratch, scales);
    }
  }
};

// Step 6.
inline void RoundToken(const RotateQuantizeArgs& args, const Scratch& scratch, const float* scales, uint8_t* levels) {
  if (scratch.inverses != nullptr) {
    SpreadInverses(args, scratch, scales);
    return RoundRow(*scratch.levels, scratch.row, args.width, RowOfInverses{scratch.inverses}, levels);
  }
  const OneInverse inverse = {1.0f / scales[0] * scratch.levels->inverse_factor};
  if (scratch.tiled_levels == nullptr) return RoundRow(*scratch.levels, scratch.row, args.width, inverse, levels);
  RoundRow(*scratch.levels, scratch.row, TiledWidth(args), inverse, scratch.tiled_levels);
  UntileBytes(scratch.tiled_levels, args.width / args.paley, args.paley, levels);
}

inline void QuantizeToken(const RotateQuantizeArgs& args, const Scratch& scratch, int64_t token) {
  const int64_t groups = args.width / args.group_size;
  float* scales = args.scale + token * groups;
  uint8_t* levels = static_cast<uint8_t*>(args.levels) + token * args.levels_stride;
  const ChannelSteps steps = {args.input_shift, args.input_scale, scratch.signs};
  if (WithToken(args, token, steps, ScaleToken{args, scratch, scales}) &&
      (!args.round_scales || RoundScales(groups, scales))) {
    return RoundToken(args, scratch, scales, levels);
  }
  // The token is bad as a whole: its other groups must not look sound.
  for (int64_t group = 0; group < groups; ++group) scales[group] = __builtin_nanf("");
  __builtin_memset(levels, 0, size_t(args.width));
}

// Tokens are taken some at a time, so that workers meet rarely and memory is read in long runs; but at least eight
// times for each worker, so that none waits long for the last one.
HQDIT_INLINE int64_t TokensAtATime(int64_t tokens, int workers) {
  constexpr int64_t kMost = 8;
  const int64_t share = tokens / (8 * workers);
  return share < 1 ? 1 : share < kMost ? share : kMost;
}

inline void RotateQuantizeShare(const RotateQuantizeArgs& args, const Share& share) {
  Arena arena(share.scratch);
  Scratch scratch = Divide(args, &arena);
  Prepare(args, &scratch);
  const int64_t step = TokensAtATime(args.tokens, share.workers);
  for (;;) {
    const int64_t begin = step * __atomic_fetch_add(share.next_item, 1, __ATOMIC_RELAXED);
    if (begin >= args.tokens) return;
    const int64_t end = begin + step < args.tokens ? begin + step : args.tokens;
    for (int64_t token = begin; token < end; ++token) QuantizeToken(args, scratch, token);
  }
}

inline int64_t RotateQuantizeScratchBytes(const RotateQuantizeArgs& args) {
  Arena arena(nullptr);
  Divide(args, &arena);
  return arena.used();
}

}  // namespace
}  // namespace hqdit
