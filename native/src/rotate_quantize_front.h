// The steps before the rotation: a token of x, LayerNorm and modulation or an activation, static shifts and scales, and
// the rotation's signs.
#pragma once

#include "hqdit/kernels.h"
#include "vector.h"
#include "vector_math.h"

namespace hqdit {
namespace {

// The numbers of a token; `count` = 16 reads a whole vector.
struct Float32Source {
  const float* x;
  HQDIT_INLINE Float16Lanes operator()(int64_t at, int count) const {
    return count == kLanes ? Load(x + at) : LoadPartial(x + at, count);
  }
};
struct BFloat16Source {
  const uint16_t* x;
  HQDIT_INLINE Float16Lanes operator()(int64_t at, int count) const {
    return count == kLanes ? LoadBFloat16(x + at) : LoadBFloat16Partial(x + at, count);
  }
};

// Calls f(at, count) for each vector of `width` numbers; only the last one's count may be less than 16.
template <typename F>
HQDIT_INLINE void ForEachVector(int64_t width, F f) {
  int64_t at = 0;
  for (; at + kLanes <= width; at += kLanes) f(at, kLanes);
  if (at < width) f(at, int(width - at));
}

// The sum of term(at, count) over all vectors: four running sums take turns, so that additions need not wait for each
// other; then (0 + 1) + (2 + 3), then the lanes.
template <typename Term>
HQDIT_INLINE float SumOfRow(int64_t width, Term term) {
  constexpr int kSums = 4;
  Float16Lanes sums[kSums] = {0.0f, 0.0f, 0.0f, 0.0f};
  int64_t at = 0;
  for (; at + kSums * kLanes <= width; at += kSums * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) sums[i] = sums[i] + term(at + i * kLanes, kLanes);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kSums; ++i, at += kLanes) {
    if (at < width) sums[i] = sums[i] + term(at, width - at < kLanes ? int(width - at) : kLanes);
  }
  return HorizontalSum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// ---- fronts: y of x at channels at .. at + count - 1 ----------------------------------------------------------------

// kIsCheap: few enough instructions to be repeated for each vector of a block.
struct NoFront {
  static constexpr bool kIsCheap = true;
  HQDIT_INLINE Float16Lanes operator()(Float16Lanes x, int64_t, int) const { return x; }
};
struct GeluTanhFront {
  static constexpr bool kIsCheap = false;
  HQDIT_INLINE Float16Lanes operator()(Float16Lanes x, int64_t, int) const { return GeluTanh(x); }
};
struct GeluErfFront {
  static constexpr bool kIsCheap = false;
  HQDIT_INLINE Float16Lanes operator()(Float16Lanes x, int64_t, int) const { return GeluErf(x); }
};
struct SiluFront {
  static constexpr bool kIsCheap = false;
  HQDIT_INLINE Float16Lanes operator()(Float16Lanes x, int64_t, int) const { return Silu(x); }
};

// y = (x - mean) * (1 / sqrt(variance + eps)), then y = y * (1 + scale) + shift.
struct LayerNormFront {
  static constexpr bool kIsCheap = true;
  float mean, inverse_deviation;
  const float* scale;  // null: no modulation
  const float* shift;

  HQDIT_INLINE Float16Lanes operator()(Float16Lanes x, int64_t at, int count) const {
    const Float16Lanes y = (x - mean) * inverse_deviation;
    if (scale == nullptr) return y;
    return y * (Float32Source{scale}(at, count) + 1.0f) + Float32Source{shift}(at, count);
  }
};

template <typename Source>
inline LayerNormFront MakeLayerNorm(Source x, const RotateQuantizeArgs& args, int64_t token) {
  const float width = float(args.width);
  const float sum = SumOfRow(args.width, [&](int64_t at, int count) HQDIT_INLINE_LAMBDA { return x(at, count); });
  const float mean = sum / width;
  const float squares = SumOfRow(args.width, [&](int64_t at, int count) HQDIT_INLINE_LAMBDA {
    const Float16Lanes centered = x(at, count) - mean;
    const Float16Lanes square = centered * centered;
    return count == kLanes ? square : KeepFirst(square, count);
  });
  const float inverse_deviation = 1.0f / __builtin_sqrtf(squares / width + args.layer_norm_eps);
  if (args.mod_scale == nullptr) return {mean, inverse_deviation, nullptr, nullptr};
  const int64_t mod_at = token / args.tokens_per_mod * args.mod_stride;
  return {mean, inverse_deviation, args.mod_scale + mod_at, args.mod_shift + mod_at};
}

// ---- the numbers that go into the rotation --------------------------------------------------------------------------

// Per channel, in this order: y = (y - shift) * scale, y = y * sign. Null: left out.
struct ChannelSteps {
  const float* shift;  // `width` numbers, as `scale`
  const float* scale;
  const float* signs;  // +-1, readable up to the next whole vector

  HQDIT_INLINE Float16Lanes operator()(Float16Lanes y, int64_t at, int count) const {
    if (shift != nullptr) y = y - Float32Source{shift}(at, count);
    if (scale != nullptr) y = y * Float32Source{scale}(at, count);
    if (signs != nullptr) y = y * Load(signs + at);
    return y;
  }
};

template <typename Source, typename FrontSteps>
struct Numbers {
  static constexpr bool kIsCheap = FrontSteps::kIsCheap;
  Source x;
  FrontSteps front;
  ChannelSteps steps;

  HQDIT_INLINE Float16Lanes operator()(int64_t at, int count) const {
    return steps(front(x(at, count), at, count), at, count);
  }
};

// What use(numbers) gives for the Numbers of this front.
template <typename Source, typename Use>
inline bool WithFront(Source x, const RotateQuantizeArgs& args, int64_t token, const ChannelSteps& steps, Use use) {
  switch (args.front) {
    case Front::kLayerNormModulate:
      return use(Numbers<Source, LayerNormFront>{x, MakeLayerNorm(x, args, token), steps});
    case Front::kGeluTanh: return use(Numbers<Source, GeluTanhFront>{x, {}, steps});
    case Front::kGeluErf: return use(Numbers<Source, GeluErfFront>{x, {}, steps});
    case Front::kSilu: return use(Numbers<Source, SiluFront>{x, {}, steps});
    default: return use(Numbers<Source, NoFront>{x, {}, steps});
  }
}

template <typename Use>
inline bool WithToken(const RotateQuantizeArgs& args, int64_t token, const ChannelSteps& steps, Use use) {
  if (args.x_type == Element::kBFloat16) {
    const BFloat16Source x = {static_cast<const uint16_t*>(args.x) + token * args.x_stride};
    return WithFront(x, args, token, steps, use);
  }
  const Float32Source x = {static_cast<const float*>(args.x) + token * args.x_stride};
  return WithFront(x, args, token, steps, use);
}

// All of them into `row`; the rest of its last vector becomes 0.
struct StoreInRow {
  int64_t width;
  float* row;

  template <typename AnyNumbers>
  HQDIT_INLINE void operator()(const AnyNumbers& numbers) const {
    ForEachVector(width, [&](int64_t at, int count) HQDIT_INLINE_LAMBDA {
      const Float16Lanes y = numbers(at, count);
      Store(row + at, count == kLanes ? y : KeepFirst(y, count));
    });
  }
};

}  // namespace
}  // namespace hqdit
