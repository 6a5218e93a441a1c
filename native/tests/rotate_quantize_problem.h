// What the tests of rotate and quantize are made of: formats, matrices, problems with random numbers, and runs of the
// kernels of every instruction set on them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "hqdit/kernels.h"
#include "isa.h"
#include "kernel_table.h"

namespace hqdit_test {

using namespace hqdit;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kSmallestScale = 0x1p-126f;
constexpr double kRoundoff = 0x1p-24;

struct Kernel {
  void (*run)(const RotateQuantizeArgs&, const Share&);
  int64_t (*scratch)(const RotateQuantizeArgs&);
};

inline std::vector<Kernel> Kernels() {
  const Kernel all[] = {
    {portable::RotateQuantize, portable::RotateQuantizeScratch},
#if defined(HQDIT_X86)
    {avx2::RotateQuantize, avx2::RotateQuantizeScratch},
    {avx512::RotateQuantize, avx512::RotateQuantizeScratch},
    {amx::RotateQuantize, amx::RotateQuantizeScratch},
#endif
  };
  return {all, all + static_cast<int>(BestIsa()) + 1};
}

inline std::mt19937& Random() {
  static std::mt19937 generator(20240531);
  return generator;
}
inline int64_t Uniform(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(Random());
}
inline bool Coin() { return Uniform(0, 1) == 1; }
inline float Normal() { return std::normal_distribution<float>()(Random()); }

template <typename T>
T Pick(const std::vector<T>& from) {
  return from[static_cast<size_t>(Uniform(0, static_cast<int64_t>(from.size()) - 1))];
}

// ---- formats --------------------------------------------------------------------------------------------------------

struct Format {
  std::string name;
  std::vector<int> levels;
  std::vector<float> thresholds;
  bool is_unsigned = false;

  int64_t Count(float y) const {
    int64_t rung = 0;
    for (float threshold : thresholds) rung += y >= threshold;
    return rung;
  }
  std::vector<int8_t> Bytes() const {
    std::vector<int8_t> bytes;
    for (int level : levels) bytes.push_back(static_cast<int8_t>(level));
    return bytes;
  }
};

// Midpoints; a tie goes up where `goes_up` says so of the upper rung.
template <typename GoesUp>
Format MakeFormat(const std::string& name, std::vector<int> levels, GoesUp goes_up, bool is_unsigned = false) {
  Format format{name, std::move(levels), {}, is_unsigned};
  for (size_t rung = 1; rung < format.levels.size(); ++rung) {
    const float midpoint = static_cast<float>(format.levels[rung] + format.levels[rung - 1]) / 2;
    format.thresholds.push_back(goes_up(rung) ? midpoint : std::nextafter(midpoint, kInfinity));
  }
  return format;
}

// Signed magnitudes, as of E2M1: a tie goes to the magnitude with the even index.
inline Format MagnitudeFormat(const std::string& name, const std::vector<int>& magnitudes) {
  std::vector<int> levels;
  for (size_t i = magnitudes.size() - 1; i > 0; --i) levels.push_back(-magnitudes[i]);
  levels.insert(levels.end(), magnitudes.begin(), magnitudes.end());
  const int zero = static_cast<int>(magnitudes.size()) - 1;
  return MakeFormat(name, levels, [zero](size_t rung) { return (static_cast<int>(rung) - zero) % 2 == 0; });
}

inline Format IntegerFormat(const std::string& name, int lowest, int highest) {
  std::vector<int> levels;
  for (int level = lowest; level <= highest; ++level) levels.push_back(level);
  return MakeFormat(
      name, levels, [lowest](size_t rung) { return (lowest + static_cast<int>(rung)) % 2 == 0; }, lowest >= 0);
}

inline Format TableFormat(const std::string& name, int lowest, int highest, int rungs = 16) {
  std::vector<int> levels;
  for (int level = lowest; level <= highest; ++level) levels.push_back(level);
  std::shuffle(levels.begin(), levels.end(), Random());
  levels.resize(static_cast<size_t>(rungs));
  std::sort(levels.begin(), levels.end());
  if (levels.back() <= 0) levels.back() = highest;
  return MakeFormat(
      name, levels, [](size_t rung) { return rung % 2 == 0; }, lowest >= 0);
}

// Thresholds that are no midpoints at all.
inline Format OddFormat(int rungs) {
  Format format = TableFormat("odd thresholds", -100, 100, rungs);
  for (float& threshold : format.thresholds) threshold = 40 * Normal();
  std::sort(format.thresholds.begin(), format.thresholds.end());
  return format;
}

// Thresholds between levels, but not at their midpoints.
inline Format ShiftedFormat(int rungs) {
  Format format = IntegerFormat("shifted thresholds", 1 - rungs / 2, rungs - rungs / 2);
  for (float& threshold : format.thresholds) threshold += 0.25f;
  return format;
}

inline std::vector<Format> Formats() {
  std::vector<int> e2m3;
  for (int i = 0; i < 16; ++i) e2m3.push_back(i);
  for (int i = 16; i < 32; i += 2) e2m3.push_back(i);
  for (int i = 32; i <= 60; i += 4) e2m3.push_back(i);
  return {MagnitudeFormat("e2m1", {0, 1, 2, 3, 4, 6, 8, 12}),
          MagnitudeFormat("e3m0", {0, 1, 2, 4, 8, 16, 32, 64}),
          MagnitudeFormat("e1m2", {0, 1, 2, 3, 4, 5, 6, 7}),
          MagnitudeFormat("e2m3", e2m3),
          IntegerFormat("int4", -8, 7),
          IntegerFormat("int6", -32, 31),
          IntegerFormat("int8", -128, 127),
          IntegerFormat("symmetric int8", -127, 127),
          IntegerFormat("uint4", 0, 15),
          IntegerFormat("uint8", 0, 255),
          TableFormat("table", -128, 127),
          TableFormat("small table", -12, 11),
          TableFormat("one-sided table", 0, 127),
          TableFormat("narrow table", -9, 9),
          MakeFormat("without zero", {-3, -1, 1, 3}, [](size_t rung) { return rung % 2 == 0; }),
          MakeFormat("two rungs", {-1, 1}, [](size_t) { return false; }),
          OddFormat(16),
          OddFormat(5),
          OddFormat(100),
          ShiftedFormat(14),
          ShiftedFormat(60)};
}

// ---- matrices -------------------------------------------------------------------------------------------------------

// Any +-1 matrix serves: the kernel makes no use of orthogonality.
inline std::vector<int8_t> RandomSigns(int64_t order) {
  std::vector<int8_t> matrix(static_cast<size_t>(order * order));
  for (int8_t& entry : matrix) entry = Coin() ? 1 : -1;
  return matrix;
}

// Paley's matrices over a prime field: the first construction for order = prime + 1, the second, whose structure the
// kernel makes use of, for order = 2 (prime + 1).
inline std::vector<int8_t> PaleyMatrix(int64_t prime, bool is_second) {
  const int64_t n = prime + 1, order = is_second ? 2 * n : n;
  std::vector<int> character(static_cast<size_t>(prime), -1);
  for (int64_t x = 1; x < prime; ++x) character[static_cast<size_t>(x * x % prime)] = 1;
  character[0] = 0;
  std::vector<int8_t> matrix(static_cast<size_t>(order * order));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      int c = i == 0 ? (j == 0 ? 0 : 1) : is_second ? 1 : -1;
      if (i > 0 && j > 0) c = character[static_cast<size_t>((i - j + prime) % prime)];
      const int same = i == j ? 1 : 0;
      if (!is_second) {
        matrix[static_cast<size_t>(i * n + j)] = static_cast<int8_t>(c + same);
        continue;
      }
      const int block[2][2] = {{c + same, c - same}, {c - same, -c - same}};
      for (int r = 0; r < 2; ++r) {
        for (int q = 0; q < 2; ++q) {
          matrix[static_cast<size_t>((2 * i + r) * order + 2 * j + q)] = static_cast<int8_t>(block[r][q]);
        }
      }
    }
  }
  return matrix;
}

// The matrix that is in use for an order, else a random one.
inline std::vector<int8_t> MatrixOfOrder(int64_t order) {
  const std::vector<int64_t> first = {4, 12, 20, 24, 44}, second = {28, 36};
  if (std::count(first.begin(), first.end(), order) > 0) return PaleyMatrix(order - 1, false);
  if (std::count(second.begin(), second.end(), order) > 0) return PaleyMatrix(order / 2 - 1, true);
  return RandomSigns(order);
}

inline int SylvesterEntry(int64_t i, int64_t j) {
  return __builtin_popcountll(static_cast<uint64_t>(i & j)) % 2 == 0 ? 1 : -1;
}

// ---- a problem ------------------------------------------------------------------------------------------------------

inline uint16_t ToBFloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}

inline void CutToBFloat16(std::vector<float>* numbers) {
  for (float& number : *numbers) {
    const uint32_t bits = static_cast<uint32_t>(ToBFloat16(number)) << 16;
    std::memcpy(&number, &bits, sizeof(number));
  }
}

// Every input in an allocation of its exact size, so that a sanitizer sees a read beyond it.
struct Problem {
  int64_t tokens = 3, width = 1, extra_stride = 0, tokens_per_mod = 2;
  Front front = Front::kNone;
  bool is_bfloat16 = false;
  int64_t sylvester = 1, paley = 1, inner = 1;
  std::vector<float> x;  // tokens * width; numbers that bfloat16 holds where it is the type
  std::vector<uint8_t> sign_bits;
  std::vector<int8_t> paley_matrix;
  std::vector<float> mod_scale, mod_shift, input_shift, input_scale, channel_scale;
  ScaleRule rule = ScaleRule::kAbsmax;
  float rms_factor = 0.4f, static_scale = 0.3f;
  double scale_factor = 1;  // of absmax scales
  bool round_scales = false;
  int64_t group_size = 1;
  Format format;

  int64_t groups() const { return width / group_size; }
  float top() const { return static_cast<float>(format.levels.back() / scale_factor); }
  float normalization() const { return 1 / std::sqrt(static_cast<float>(sylvester * paley)); }
  // Whether nothing happens to x before it is rounded.
  bool IsPlain() const {
    return front == Front::kNone && !is_bfloat16 && sylvester * paley == 1 && sign_bits.empty() &&
           input_shift.empty() && input_scale.empty() && channel_scale.empty();
  }
  float At(int64_t token, int64_t c) const { return x[static_cast<size_t>(token * width + c)]; }
};

inline std::vector<float> Normals(int64_t count, float offset = 0, float spread = 1) {
  std::vector<float> numbers(static_cast<size_t>(count));
  for (float& number : numbers) number = offset + spread * Normal();
  return numbers;
}

inline std::vector<float> Positives(int64_t count) {
  std::vector<float> numbers = Normals(count);
  for (float& number : numbers) number = std::exp(number);
  return numbers;
}

template <typename T>
const T* OrNull(const std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

struct Result {
  std::vector<uint8_t> levels;  // tokens * width
  std::vector<float> scale;     // tokens * groups

  bool operator==(const Result& other) const {
    return levels == other.levels && scale.size() == other.scale.size() &&
           std::memcmp(scale.data(), other.scale.data(), scale.size() * sizeof(float)) == 0;
  }
  float Scale(const Problem& problem, int64_t token, int64_t group) const {
    return scale[static_cast<size_t>(token * problem.groups() + group)];
  }
  uint8_t Level(const Problem& problem, int64_t token, int64_t c) const {
    return levels[static_cast<size_t>(token * problem.width + c)];
  }
};

inline void RunShares(const Kernel& kernel, const RotateQuantizeArgs& args, int workers) {
  const size_t bytes = static_cast<size_t>(kernel.scratch(args));
  int64_t next_item = 0;
  std::vector<std::thread> threads;
  for (int worker = 0; worker < workers; ++worker) {
    threads.emplace_back([&, worker] {
      void* scratch = std::aligned_alloc(64, bytes);
      std::memset(scratch, 0xff, bytes);  // NaN wherever something is read before it is written
      kernel.run(args, Share{worker, workers, &next_item, scratch});
      std::free(scratch);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

inline Result Run(const Problem& problem, const Kernel& kernel, int workers = 1) {
  constexpr uint8_t kGuard = 0xa5;
  const int64_t stride = problem.width + problem.extra_stride;
  const size_t x_size = static_cast<size_t>((problem.tokens - 1) * stride + problem.width);
  std::vector<float> x(x_size, kNaN);
  std::vector<uint16_t> x16(x_size, ToBFloat16(kNaN));
  for (int64_t token = 0; token < problem.tokens; ++token) {
    for (int64_t c = 0; c < problem.width; ++c) {
      x[static_cast<size_t>(token * stride + c)] = problem.At(token, c);
      x16[static_cast<size_t>(token * stride + c)] = ToBFloat16(problem.At(token, c));
    }
  }
  std::vector<uint8_t> levels(x_size, kGuard);
  std::vector<float> scale(static_cast<size_t>(problem.tokens * problem.groups()));
  const std::vector<int8_t> rung_levels = problem.format.Bytes();

  RotateQuantizeArgs args = {};
  args.x = problem.is_bfloat16 ? static_cast<const void*>(x16.data()) : x.data();
  args.x_stride = stride;
  args.x_type = problem.is_bfloat16 ? Element::kBFloat16 : Element::kFloat32;
  args.tokens = problem.tokens;
  args.width = problem.width;
  args.front = problem.front;
  args.layer_norm_eps = 1e-6f;
  args.mod_scale = OrNull(problem.mod_scale);
  args.mod_shift = OrNull(problem.mod_shift);
  args.mod_stride = problem.width;
  args.tokens_per_mod = problem.tokens_per_mod;
  args.input_shift = OrNull(problem.input_shift);
  args.input_scale = OrNull(problem.input_scale);
  args.sign_bits = OrNull(problem.sign_bits);
  args.sylvester = problem.sylvester;
  args.paley = problem.paley;
  args.paley_matrix = OrNull(problem.paley_matrix);
  args.inner = problem.inner;
  args.normalization = problem.normalization();
  args.channel_scale = OrNull(problem.channel_scale);
  args.rule = problem.rule;
  args.round_scales = problem.round_scales;
  args.rms_factor = problem.rms_factor;
  args.static_scale = &problem.static_scale;
  args.group_size = problem.group_size;
  args.rungs = static_cast<int64_t>(rung_levels.size());
  args.thresholds = problem.format.thresholds.data();
  args.rung_levels = rung_levels.data();
  args.levels_unsigned = problem.format.is_unsigned;
  args.top = problem.top();
  args.levels = levels.data();
  args.levels_stride = stride;
  args.scale = scale.data();
  RunShares(kernel, args, workers);

  Result result{{}, scale};
  for (int64_t token = 0; token < problem.tokens; ++token) {
    for (int64_t c = 0; c < stride && token * stride + c < static_cast<int64_t>(x_size); ++c) {
      const uint8_t level = levels[static_cast<size_t>(token * stride + c)];
      if (c < problem.width) {
        result.levels.push_back(level);
      } else {
        CHECK(level == kGuard);
      }
    }
  }
  return result;
}

// ---- random problems ------------------------------------------------------------------------------------------------

struct Factors {
  int64_t sylvester, paley, inner, blocks;
};

inline std::vector<uint8_t> RandomBits(int64_t width) {
  std::vector<uint8_t> bits(static_cast<size_t>((width + 7) / 8));
  for (uint8_t& byte : bits) byte = static_cast<uint8_t>(Uniform(0, 255));
  return bits;
}

inline Problem MakeProblem(const Factors& factors, const Format& format) {
  Problem problem;
  problem.sylvester = factors.sylvester;
  problem.paley = factors.paley;
  problem.inner = factors.inner;
  problem.width = factors.sylvester * factors.paley * factors.inner * factors.blocks;
  problem.group_size = problem.width;
  problem.format = format;
  if (factors.paley > 1) problem.paley_matrix = MatrixOfOrder(factors.paley);
  problem.x = Normals(problem.tokens * problem.width);
  return problem;
}

inline std::vector<int64_t> Divisors(int64_t width) {
  std::vector<int64_t> divisors;
  for (int64_t size = 1; size <= width; ++size) {
    if (width % size == 0) divisors.push_back(size);
  }
  return divisors;
}

// Adds steps and choices that the kernel must get right in any combination.
inline void Vary(Problem* problem) {
  const int64_t width = problem->width;
  if (Coin()) problem->sign_bits = RandomBits(width);
  if (Coin()) problem->input_shift = Normals(width);
  if (Coin()) problem->input_scale = Positives(width);
  if (Coin()) problem->channel_scale = Positives(width);
  problem->is_bfloat16 = Coin();
  if (problem->is_bfloat16) CutToBFloat16(&problem->x);
  problem->extra_stride = Coin() ? Uniform(1, 9) : 0;
  problem->front =
      Pick<Front>({Front::kNone, Front::kLayerNormModulate, Front::kGeluTanh, Front::kGeluErf, Front::kSilu});
  if (problem->front == Front::kLayerNormModulate) {
    const int64_t images = (problem->tokens + problem->tokens_per_mod - 1) / problem->tokens_per_mod;
    problem->mod_scale = Normals(images * width);
    problem->mod_shift = Normals(images * width);
  }
  problem->rule = Pick<ScaleRule>({ScaleRule::kAbsmax, ScaleRule::kAbsmax, ScaleRule::kRms, ScaleRule::kStatic});
  if (Coin()) problem->group_size = Pick(Divisors(width));
  problem->scale_factor = Pick<double>({1, 1, 0.75, 0.9, 6.0 / 7});
  problem->round_scales = problem->rule != ScaleRule::kStatic && Coin();
}

}  // namespace hqdit_test
