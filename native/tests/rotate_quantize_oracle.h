// What must come out of rotate and quantize, by plain loops in double.
//
// Groups of one number with `top` = 1 make the scale of each number its magnitude and the level its sign, so a call
// shows the rotated numbers themselves, bit for bit. From these every other call's scales and levels follow exactly;
// the rotated numbers are checked against the product with the explicit matrix, within a bound from norms and epsilons.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "hqdit/kernels.h"
#include "rotate_quantize_problem.h"

namespace hqdit_test {

// ---- what must come out ---------------------------------------------------------------------------------------------

// The numbers before rounding, as the kernel computes them. Numbers below the smallest scale show as 0.
inline std::vector<float> RotatedByKernel(Problem problem, const Kernel& kernel) {
  problem.rule = ScaleRule::kAbsmax;
  problem.scale_factor = 1;
  problem.round_scales = false;
  problem.group_size = 1;
  problem.format = IntegerFormat("sign", -1, 1);
  const Result result = Run(problem, kernel);
  std::vector<float> y(result.scale);
  for (size_t i = 0; i < y.size(); ++i) {
    y[i] = result.levels[i] == 0 ? 0.0f : std::copysign(y[i], static_cast<float>(int8_t(result.levels[i])));
  }
  return y;
}

struct Bounded {
  double value, error;
};

inline double NormalDistribution(double x) { return std::erfc(-x / std::sqrt(2.0)) / 2; }

// An activation, with the errors that vector_math.h states.
inline Bounded Activate(Front front, double x) {
  constexpr double kTail = 1e-36;
  if (front == Front::kSilu) {
    const double y = x / (1 + std::exp(-x));
    return {y, 0x1p-22 * std::fabs(y) + kTail};
  }
  if (front == Front::kGeluErf) {
    const double y = x * NormalDistribution(x);
    return {y, 0x1p-21 * std::fabs(y) + kTail};
  }
  if (front == Front::kGeluTanh) {
    const double u = std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x);
    const double y = x / (1 + std::exp(-2 * u));
    return {y, 0x1p-22 * std::fabs(y) * (2 + std::fmax(0, -u)) + kTail};
  }
  return {x, 0};
}

// LayerNorm's error: sums of n numbers in 64 running sums err by at most (n / 64 + 10) roundoffs of the sum of
// magnitudes; the deviation passes on half of the variance's relative error.
inline std::vector<Bounded> LayerNormModulated(const Problem& problem, int64_t token) {
  const double n = static_cast<double>(problem.width);
  double mean = 0, magnitude = 0, variance = 0;
  for (int64_t c = 0; c < problem.width; ++c) mean += problem.At(token, c) / n;
  for (int64_t c = 0; c < problem.width; ++c) magnitude += std::fabs(problem.At(token, c)) / n;
  for (int64_t c = 0; c < problem.width; ++c) variance += std::pow(problem.At(token, c) - mean, 2) / n;
  const double deviation = std::sqrt(variance + 1e-6f);
  const double sum_error = (n / 64 + 10) * kRoundoff;
  std::vector<Bounded> y;
  for (int64_t c = 0; c < problem.width; ++c) {
    const double centered = problem.At(token, c) - mean;
    const size_t mod_at = static_cast<size_t>(token / problem.tokens_per_mod * problem.width + c);
    const double gain = problem.mod_scale.empty() ? 1 : 1.0 + problem.mod_scale[mod_at];
    const double shift = problem.mod_shift.empty() ? 0 : problem.mod_shift[mod_at];
    const double value = centered / deviation * gain;
    const double mean_error = sum_error * magnitude + kRoundoff * std::fabs(centered);
    // The variance moves by the square of the mean's error at most, and by its own summation error.
    const double deviation_error = sum_error + 4 * kRoundoff + std::pow(sum_error * magnitude / deviation, 2);
    y.push_back({value + shift,
                 mean_error / deviation * std::fabs(gain) + std::fabs(value) * (deviation_error + 6 * kRoundoff) +
                     2 * kRoundoff * (std::fabs(value + shift) + std::fabs(shift) + std::fabs(centered / deviation))});
  }
  return y;
}

inline std::vector<Bounded> BeforeRotation(const Problem& problem, int64_t token) {
  std::vector<Bounded> y;
  if (problem.front == Front::kLayerNormModulate) {
    y = LayerNormModulated(problem, token);
  } else {
    for (int64_t c = 0; c < problem.width; ++c) y.push_back(Activate(problem.front, problem.At(token, c)));
  }
  for (int64_t c = 0; c < problem.width; ++c) {
    const size_t i = static_cast<size_t>(c);
    Bounded& v = y[i];
    if (!problem.input_shift.empty()) {
      v.value -= problem.input_shift[i];
      v.error += kRoundoff * (std::fabs(v.value) + v.error);
    }
    if (!problem.input_scale.empty()) {
      v.value *= problem.input_scale[i];
      v.error = v.error * std::fabs(problem.input_scale[i]) + kRoundoff * std::fabs(v.value);
    }
    if (!problem.sign_bits.empty() && (problem.sign_bits[i / 8] >> (i % 8) & 1) != 0) v.value = -v.value;
  }
  return y;
}

// The product with the explicit matrix. An output passes at most log2(sylvester) + 5 + paley / 3 roundings in a row, so
// its error is at most that many roundoffs of the magnitudes that are summed: each input's once, and twice more those
// that the kernel subtracts from paired sums, which at most triples the sum.
inline std::vector<Bounded> Rotated(const Problem& problem, int64_t token) {
  const std::vector<Bounded> x = BeforeRotation(problem, token);
  const int64_t run = problem.inner, block = problem.sylvester * problem.paley * run;
  const double depth = std::log2(static_cast<double>(problem.sylvester)) + 5 + static_cast<double>(problem.paley) / 3;
  const double magnitudes = problem.paley > 1 ? 3 : 1;
  std::vector<Bounded> y;
  for (int64_t c = 0; c < problem.width; ++c) {
    const int64_t begin = c / block * block, row = (c - begin) / run, i = (c - begin) % run;
    const int64_t s = row / problem.paley, p = row % problem.paley;
    double sum = 0, error = 0;
    for (int64_t from = 0; from < problem.sylvester * problem.paley; ++from) {
      const Bounded& v = x[static_cast<size_t>(begin + from * run + i)];
      int entry = SylvesterEntry(from / problem.paley, s);
      if (problem.paley > 1)
        entry *= problem.paley_matrix[static_cast<size_t>(from % problem.paley * problem.paley + p)];
      sum += entry * v.value;
      error += v.error + magnitudes * depth * kRoundoff * (std::fabs(v.value) + v.error);
    }
    double factor = problem.normalization();
    if (!problem.channel_scale.empty()) factor /= problem.channel_scale[static_cast<size_t>(c)];
    y.push_back({sum * factor, error * std::fabs(factor) + 4 * kRoundoff * std::fabs(sum * factor) + 0x1p-125});
  }
  return y;
}

inline void CheckRotation(const Problem& problem, const std::vector<float>& y) {
  for (int64_t token = 0; token < problem.tokens; ++token) {
    const std::vector<Bounded> expected = Rotated(problem, token);
    for (int64_t c = 0; c < problem.width; ++c) {
      const double found = y[static_cast<size_t>(token * problem.width + c)];
      const Bounded& want = expected[static_cast<size_t>(c)];
      CHECK(std::fabs(found - want.value) <= want.error * 1.001);
    }
  }
}

inline bool IsFinite(const Problem& problem, const std::vector<float>& y, int64_t token) {
  return std::all_of(y.begin() + token * problem.width, y.begin() + (token + 1) * problem.width,
                     [](float v) { return std::isfinite(v); });
}

inline float ExpectedAbsmaxScale(const Problem& problem, const float* y) {
  float largest = 0;
  for (int64_t i = 0; i < problem.group_size; ++i) {
    largest = std::max(largest, problem.format.levels[0] >= 0 ? y[i] : std::fabs(y[i]));
  }
  return std::max(largest / problem.top(), kSmallestScale);
}

inline void CheckScale(const Problem& problem, const float* y, float scale) {
  if (problem.rule == ScaleRule::kAbsmax) CHECK(scale == ExpectedAbsmaxScale(problem, y));
  if (problem.rule == ScaleRule::kStatic) CHECK(scale == problem.static_scale);
  if (problem.rule != ScaleRule::kRms) return;
  double squares = 0;
  for (int64_t i = 0; i < problem.group_size; ++i) squares += double(y[i]) * y[i];
  const double n = static_cast<double>(problem.group_size);
  const double want = std::max(std::sqrt(squares / n) * problem.rms_factor, double(kSmallestScale));
  CHECK(std::fabs(scale - want) <= (n / 16 + 10) * kRoundoff * want);
}

// The numbers of E4M3 that are not negative, by their codes: exponent bits, then three of mantissa.
constexpr int kLargestE4M3Code = 126;
inline double NumberOfE4M3(int code) {
  const int exponent = code / 8, mantissa = code % 8;
  return exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
}

// The positive one that is nearest to x, by distances to all of them; ties go to the even code.
inline double NearestE4M3(double x) {
  int nearest = 0;
  for (int code = 1; code <= kLargestE4M3Code; ++code) {
    const double distance = std::fabs(NumberOfE4M3(code) - x), smallest = std::fabs(NumberOfE4M3(nearest) - x);
    if (distance < smallest || (distance == smallest && code % 2 == 0)) nearest = code;
  }
  return NumberOfE4M3(std::max(nearest, 1));
}

// The scales of a token in 8 bits; NaN for all of them where one is beyond float32.
inline std::vector<float> RoundedScales(const std::vector<float>& scales) {
  int exponent = 0;
  std::frexp(*std::max_element(scales.begin(), scales.end()), &exponent);  // the largest is below 2^exponent
  const double unit = std::ldexp(1.0, exponent - 1 - 7);
  std::vector<float> rounded;
  for (float scale : scales) rounded.push_back(static_cast<float>(unit * NearestE4M3(scale / unit)));
  const bool is_finite = std::all_of(rounded.begin(), rounded.end(), [](float scale) { return std::isfinite(scale); });
  return is_finite ? rounded : std::vector<float>(scales.size(), kNaN);
}

// Checks rounded scales, given those before they are rounded.
inline void CheckRoundedScales(const Problem& problem, const Result& exact, const Result& rounded) {
  for (int64_t token = 0; token < problem.tokens; ++token) {
    const auto begin = exact.scale.begin() + token * problem.groups();
    const std::vector<float> scales(begin, begin + problem.groups());
    if (std::isnan(scales[0])) continue;
    const std::vector<float> expected = RoundedScales(scales);
    CHECK(std::memcmp(expected.data(), &rounded.scale[static_cast<size_t>(token * problem.groups())],
                      expected.size() * sizeof(float)) == 0);
  }
}

// Scales from `y`, and levels by counting thresholds.
inline void CheckLevels(const Problem& problem, const std::vector<float>& y, const Result& result) {
  for (int64_t token = 0; token < problem.tokens; ++token) {
    const bool is_finite = IsFinite(problem, y, token);
    for (int64_t group = 0; group < problem.groups(); ++group) {
      const float scale = result.Scale(problem, token, group);
      CHECK(std::isnan(scale) == !is_finite);
      if (!is_finite) continue;
      const int64_t begin = group * problem.group_size;
      const float* numbers = y.data() + token * problem.width + begin;
      if (!problem.round_scales) CheckScale(problem, numbers, scale);
      const float inverse = 1 / scale;
      for (int64_t i = 0; i < problem.group_size; ++i) {
        const int64_t rung = problem.format.Count(numbers[i] * inverse);
        const int level = problem.format.levels[static_cast<size_t>(rung)];
        CHECK(result.Level(problem, token, begin + i) == static_cast<uint8_t>(level));
      }
    }
  }
}

// Everything about one problem, on every instruction set.
inline void CheckProblem(const Problem& problem) {
  const std::vector<Kernel> kernels = Kernels();
  const std::vector<float> y = RotatedByKernel(problem, kernels[0]);
  CheckRotation(problem, y);
  const Result first = Run(problem, kernels[0]);
  const std::vector<float>& numbers = problem.IsPlain() ? problem.x : y;
  CheckLevels(problem, numbers, first);
  if (problem.round_scales) {
    Problem unrounded = problem;
    unrounded.round_scales = false;
    const Result exact = Run(unrounded, kernels[0]);
    CheckLevels(unrounded, numbers, exact);
    CheckRoundedScales(problem, exact, first);
  }
  for (const Kernel& kernel : kernels) {
    const int workers = static_cast<int>(Uniform(1, 3));
    CHECK(Run(problem, kernel, workers) == first);
    const std::vector<float> same = RotatedByKernel(problem, kernel);
    CHECK(std::memcmp(same.data(), y.data(), y.size() * sizeof(float)) == 0);
  }
}

}  // namespace hqdit_test
