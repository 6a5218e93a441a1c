// Rotate and quantize on every instruction set, against rotate_quantize_oracle.h.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "hqdit/kernels.h"
#include "rotate_quantize_oracle.h"
#include "rotate_quantize_problem.h"

namespace {

using namespace hqdit_test;

TEST(EveryFormatWithoutRotation) {
  for (const Format& format : Formats()) {
    for (int64_t width : {1, 2, 3, 17, 64, 72, 100, 200}) {
      Problem problem = MakeProblem({1, 1, 1, width}, format);
      CheckProblem(problem);
      problem.rule = ScaleRule::kStatic;
      for (float& x : problem.x) x *= 20;  // saturates
      CheckProblem(problem);
    }
  }
}

TEST(EveryTie) {
  for (const Format& format : Formats()) {
    // The top level first, so that the scale is 1 (a static 1 where the lowest level has the larger magnitude).
    std::vector<float> x = {static_cast<float>(format.levels.back()), 0.0f, -0.0f, FLT_MIN, -FLT_MIN, 1e-45f, -1e-45f};
    for (float threshold : format.thresholds) {
      for (float v : {threshold, std::nextafter(threshold, kInfinity), std::nextafter(threshold, -kInfinity)})
        x.push_back(v);
    }
    for (int halves = 2 * format.levels[0]; halves <= 2 * format.levels.back(); ++halves) {
      const float v = static_cast<float>(halves) / 2;
      for (float near : {v, std::nextafter(v, kInfinity), std::nextafter(v, -kInfinity)}) x.push_back(near);
    }
    Problem problem = MakeProblem({1, 1, 1, static_cast<int64_t>(x.size())}, format);
    problem.tokens = 1;
    problem.x = x;
    problem.rule = ScaleRule::kStatic;
    problem.static_scale = 1;
    CheckProblem(problem);
    for (float huge : {300.0f, 3e9f, FLT_MAX}) {
      problem.x[1] = huge;
      problem.x[2] = -huge;
      CheckProblem(problem);
    }
  }
}

// Next to a threshold of 0 the sign of a number decides, until its product with 1 / scale rounds to 0.
TEST(UnderflowNextToAThreshold) {
  for (bool goes_up : {true, false}) {
    const Format format = MakeFormat("without zero", {-3, -1, 1, 3}, [goes_up](size_t) { return goes_up; });
    Problem problem = MakeProblem({1, 1, 1, 40}, format);
    problem.x[0] = 3 * 0x1p20f;
    for (size_t i = 1; i < problem.x.size(); ++i) {
      problem.x[i] = std::ldexp(i % 2 == 0 ? 1.0f : -1.0f, -120 - static_cast<int>(i % 40) / 2);
    }
    CheckProblem(problem);
  }
}

TEST(Rotations) {
  const Format format = Formats()[0];
  const std::vector<Factors> all = {{2, 1, 1, 1},  {4, 1, 1, 25},  {8, 1, 1, 3},   {16, 1, 1, 5},   {32, 1, 1, 3},
                                    {64, 1, 1, 2}, {128, 1, 1, 9}, {256, 1, 1, 1}, {1024, 1, 1, 1}, {2048, 1, 1, 1},
                                    {1, 12, 1, 1}, {1, 20, 1, 1},  {2, 12, 1, 1},  {1, 24, 1, 3},   {1, 28, 1, 1},
                                    {1, 36, 1, 2}, {4, 36, 1, 2},  {32, 36, 1, 1}, {128, 36, 1, 1}, {1, 44, 1, 1},
                                    {2, 44, 1, 1}, {16, 1, 72, 1}, {16, 1, 64, 1}, {1, 12, 64, 1},  {2, 12, 8, 1},
                                    {8, 1, 3, 2},  {4, 3, 5, 2},   {1, 7, 1, 3},   {1, 2, 1, 1},    {32, 1, 17, 1},
                                    {2, 1, 1, 1},  {1, 6, 17, 1},  {1, 1, 9, 2},   {128, 3, 1, 1},  {64, 1, 16, 1}};
  for (const Factors& factors : all) {
    Problem problem = MakeProblem(factors, format);
    CheckProblem(problem);
    problem.sign_bits = RandomBits(problem.width);
    if (factors.paley > 1) problem.paley_matrix = RandomSigns(factors.paley);
    problem.group_size = problem.sylvester * problem.paley * problem.inner;
    problem.tokens = 1;
    CheckProblem(problem);
  }
}

// The matrices are Hadamard's: P P^T = n I.
TEST(PaleyMatricesAreOrthogonal) {
  for (int64_t order : {4, 12, 20, 24, 28, 36, 44}) {
    const std::vector<int8_t> matrix = MatrixOfOrder(order);
    for (int64_t i = 0; i < order; ++i) {
      for (int64_t j = 0; j < order; ++j) {
        int64_t product = 0;
        for (int64_t k = 0; k < order; ++k) {
          product += matrix[static_cast<size_t>(i * order + k)] * matrix[static_cast<size_t>(j * order + k)];
        }
        CHECK(product == (i == j ? order : 0));
      }
    }
  }
}

TEST(RandomProblems) {
  const std::vector<Format> formats = Formats();
  for (int repeat = 0; repeat < 250; ++repeat) {
    const Factors factors = {int64_t{1} << Uniform(0, 6), Pick<int64_t>({1, 1, 1, 4, 12, 20, 36, 5}),
                             Pick<int64_t>({1, 1, 1, 2, 9, 16, 40}), Uniform(1, 3)};
    Problem problem = MakeProblem(factors, Pick(formats));
    if (problem.width > 6000) continue;
    Vary(&problem);
    CheckProblem(problem);
  }
}

TEST(GroupsOfEverySize) {
  for (int64_t group_size : {4, 8, 12, 16, 32, 36, 48, 64, 72, 96, 128, 144, 384, 1152}) {
    Problem problem = MakeProblem({128, 1, 1, 9}, Formats()[0]);
    problem.group_size = group_size;
    problem.sign_bits = RandomBits(problem.width);
    CheckProblem(problem);
    problem.rule = ScaleRule::kRms;
    CheckProblem(problem);
  }
}

TEST(ScaleFactors) {
  for (const Format& format : Formats()) {
    for (double factor : {0.75, 0.9, 0.5, 6.0 / 7, 12.0 / 31, 1e-3, 1e-12, 3.0}) {
      Problem problem = MakeProblem({1, 1, 1, 96}, format);
      problem.scale_factor = factor;
      CheckProblem(problem);
      problem.group_size = 24;
      CheckProblem(problem);
    }
  }
}

TEST(RoundedScales) {
  for (const Format& format : Formats()) {
    for (int64_t group_size : {1, 4, 12, 36, 64, 128, 1152}) {
      Problem problem = MakeProblem({1, 1, 1, 1152}, format);
      problem.group_size = group_size;
      problem.round_scales = true;
      // Groups of all magnitudes, and one of zeros.
      for (size_t i = 0; i < problem.x.size(); ++i) {
        problem.x[i] = std::ldexp(problem.x[i], -static_cast<int>(static_cast<int64_t>(i) / group_size % 24));
        if (static_cast<int64_t>(i) / group_size == 3) problem.x[i] = 0;
      }
      CheckProblem(problem);
      problem.rule = ScaleRule::kRms;
      CheckProblem(problem);
    }
  }
}

// Scales that are the numbers themselves: every number and tie of E4M3 and their neighbours, next to a largest scale of
// every kind of exponent.
TEST(EveryNumberAndTieOfRoundedScales) {
  for (int exponent : {-126, -125, -119, -113, -112, -111, -110, -109, -100, 0, 99, 120, 126}) {
    for (float lead : {1.0f, 1.0625f, 1.9375f, std::nextafter(2.0f, 0.0f)}) {
      std::vector<float> x = {std::ldexp(lead, exponent)};
      for (int code = 0; code < kLargestE4M3Code; ++code) {
        const double lower = NumberOfE4M3(code), tie = (lower + NumberOfE4M3(code + 1)) / 2;
        for (double point : {lower, tie}) {
          const float number = static_cast<float>(std::ldexp(point, exponent - 7));
          for (float near : {number, std::nextafter(number, 0.0f), std::nextafter(number, kInfinity)}) {
            if (near >= kSmallestScale && near <= x[0]) x.push_back(near);
          }
        }
      }
      Problem problem = MakeProblem({1, 1, 1, static_cast<int64_t>(x.size())}, IntegerFormat("sign", -1, 1));
      problem.tokens = 1;
      problem.group_size = 1;
      problem.x = x;
      problem.round_scales = true;
      CheckProblem(problem);
    }
  }
}

TEST(ScalesThatOverflow) {
  for (bool round_scales : {false, true}) {
    Problem problem = MakeProblem({1, 1, 1, 64}, IntegerFormat("sign", -1, 1));
    problem.group_size = 16;
    problem.round_scales = round_scales;
    problem.x[64 + 20] = FLT_MAX;  // rounds up to 2^128
    for (const Kernel& kernel : Kernels()) {
      const Result result = Run(problem, kernel);
      for (int64_t group = 0; group < problem.groups(); ++group) {
        CHECK(std::isnan(result.Scale(problem, 1, group)) == round_scales);
        for (int64_t token : {0, 2}) CHECK(std::isfinite(result.Scale(problem, token, group)));
      }
      Problem wide = problem;
      wide.scale_factor = 2;
      CHECK(std::isnan(Run(wide, kernel).Scale(problem, 1, 0)));
      wide.rule = ScaleRule::kRms;  // the square is beyond float32
      CHECK(std::isnan(Run(wide, kernel).Scale(problem, 1, 0)));
    }
  }
}

TEST(ActivationsOfAllMagnitudes) {
  for (Front front : {Front::kSilu, Front::kGeluErf, Front::kGeluTanh}) {
    Problem problem = MakeProblem({1, 1, 1, 5000}, Formats()[0]);
    problem.front = front;
    for (float& x : problem.x) x = Coin() ? 5 * Normal() : std::ldexp(Normal(), static_cast<int>(Uniform(-140, 120)));
    CheckProblem(problem);
  }
}

TEST(ManyTokensAndWorkers) {
  Problem problem = MakeProblem({16, 1, 1, 4}, Formats()[0]);
  problem.tokens = 203;
  problem.x = Normals(problem.tokens * problem.width);
  const std::vector<Kernel> kernels = Kernels();
  const Result first = Run(problem, kernels[0]);
  CheckLevels(problem, RotatedByKernel(problem, kernels[0]), first);
  for (const Kernel& kernel : kernels) {
    for (int workers : {1, 2, 3, 7}) CHECK(Run(problem, kernel, workers) == first);
  }
}

TEST(NoTokens) {
  for (const Kernel& kernel : Kernels()) {
    RotateQuantizeArgs args = {};
    const float threshold = 0;
    const int8_t levels[] = {-1, 1};
    args.width = args.group_size = args.sylvester = args.paley = args.inner = 1;
    args.rungs = 2;
    args.thresholds = &threshold;
    args.rung_levels = levels;
    args.top = 1;
    RunShares(kernel, args, 2);
  }
}

// ---- numbers that are none ------------------------------------------------------------------------------------------

// The bad token's scales are NaN, all of them; its neighbours do not notice.
void CheckBadToken(Problem problem, float bad) {
  for (const Kernel& kernel : Kernels()) {
    const Result good = Run(problem, kernel);
    Problem spoilt = problem;
    spoilt.x[static_cast<size_t>(problem.width + Uniform(0, problem.width - 1))] = bad;
    const Result result = Run(spoilt, kernel);
    for (int64_t group = 0; group < problem.groups(); ++group) {
      CHECK(std::isnan(result.Scale(problem, 1, group)));
      for (int64_t token : {0, 2}) CHECK(result.Scale(problem, token, group) == good.Scale(problem, token, group));
    }
    for (int64_t token : {0, 2}) {
      for (int64_t c = 0; c < problem.width; ++c)
        CHECK(result.Level(problem, token, c) == good.Level(problem, token, c));
    }
  }
}

TEST(BadNumbers) {
  for (const Format& format : Formats()) {
    for (const Factors& factors :
         std::vector<Factors>{{1, 1, 1, 100}, {128, 1, 1, 2}, {2, 12, 1, 2}, {4, 1, 9, 2}, {1, 12, 5, 1}}) {
      Problem problem = MakeProblem(factors, format);
      problem.rule = Pick<ScaleRule>({ScaleRule::kAbsmax, ScaleRule::kRms, ScaleRule::kStatic});
      problem.group_size = Pick(Divisors(problem.width));
      problem.round_scales = problem.rule != ScaleRule::kStatic && Coin();
      for (float bad : {kNaN, -kNaN, kInfinity, -kInfinity}) CheckBadToken(problem, bad);
      problem.front = Pick<Front>({Front::kLayerNormModulate, Front::kGeluTanh, Front::kGeluErf, Front::kSilu});
      for (float bad : {kNaN, kInfinity}) CheckBadToken(problem, bad);
    }
  }
}

TEST(SumsThatOverflow) {
  for (const Factors& factors : std::vector<Factors>{{128, 1, 1, 1}, {2, 12, 1, 1}, {16, 1, 9, 1}}) {
    Problem problem = MakeProblem(factors, Formats()[0]);
    for (int repeat = 0; repeat < 20; ++repeat) {
      for (float& x : problem.x) x = Coin() ? FLT_MAX : -FLT_MAX;
      const std::vector<Kernel> kernels = Kernels();
      const Result first = Run(problem, kernels[0]);
      for (float scale : first.scale) CHECK(std::isnan(scale));
      for (const Kernel& kernel : kernels) {
        const Result result = Run(problem, kernel);
        CHECK(result.levels == first.levels);
        for (float scale : result.scale) CHECK(std::isnan(scale));
      }
    }
  }
}

TEST(Zeros) {
  for (const Format& format : Formats()) {
    Problem problem = MakeProblem({128, 1, 1, 1}, format);
    const int level_of_zero = format.levels[static_cast<size_t>(format.Count(0))];
    for (float zero : {0.0f, -0.0f}) {
      std::fill(problem.x.begin(), problem.x.end(), zero);
      problem.round_scales = Coin();
      for (const Kernel& kernel : Kernels()) {
        const Result result = Run(problem, kernel);
        for (float scale : result.scale) CHECK(scale == kSmallestScale);
        for (uint8_t level : result.levels) CHECK(level == static_cast<uint8_t>(level_of_zero));
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) { return RunTests(argc, argv); }
