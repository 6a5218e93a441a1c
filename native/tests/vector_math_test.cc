// vector.h and vector_math.h as the portable kernels see them; that the other instruction sets compute the same bits is
// the business of rotate_quantize_test.cc, which runs the activations on all of them.
#include "vector_math.h"

#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"

namespace {

using namespace hqdit;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

using Function = Float16Lanes (*)(Float16Lanes);

std::mt19937& Random() {
  static std::mt19937 generator(7);
  return generator;
}

std::vector<float> Uniform(size_t count, float low, float high) {
  std::uniform_real_distribution<float> distribution(low, high);
  std::vector<float> numbers(count);
  for (float& number : numbers) number = distribution(Random());
  return numbers;
}

// Random bits: all magnitudes, infinities and NaN among them.
std::vector<float> AnyFloats(size_t count) {
  std::vector<float> numbers(count);
  for (float& number : numbers) {
    const uint32_t bits = static_cast<uint32_t>(Random()());
    std::memcpy(&number, &bits, sizeof(bits));
  }
  const float special[] = {0.0f,      -0.0f,        kInfinity,     -kInfinity,   kNaN,        FLT_MAX,
                           -FLT_MAX,  FLT_MIN,      -FLT_MIN,      1e-45f,       -1e-45f,     0.5f,
                           -0.5f,     1.5f,         -1.5f,         2.5f,         8388607.5f,  -8388607.5f,
                           8388609.f, 2147483648.f, -2147483648.f, 2147483520.f, 0.99999994f, -0.99999994f};
  size_t i = 0;
  for (float number : special) numbers[i++] = number;
  return numbers;
}

template <typename F>
void ForEachLane(const std::vector<float>& x, Function function, F check) {
  for (size_t at = 0; at + kLanes <= x.size(); at += kLanes) {
    const Float16Lanes y = function(Load(x.data() + at));
    for (int lane = 0; lane < kLanes; ++lane) check(x[at + static_cast<size_t>(lane)], y[lane]);
  }
}

bool SameBits(float a, float b) { return (std::isnan(a) && std::isnan(b)) || std::memcmp(&a, &b, sizeof(a)) == 0; }

// ---- functions ------------------------------------------------------------------------------------------------------

double SiluInDouble(double x) { return x / (1 + std::exp(-x)); }
double GeluErfInDouble(double x) { return x * std::erfc(-x / std::sqrt(2.0)) / 2; }
double GeluTanhInDouble(double x) {
  const double u = std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x);
  return x / (1 + std::exp(-2 * u));
}
double ExpInDouble(double x) { return std::exp(x); }

// Within `bound` of the truth, relatively where it is a normal number.
void CheckRelative(Function function, double (*truth)(double), float low, float high, double bound) {
  constexpr size_t kPoints = 1 << 20;
  ForEachLane(Uniform(kPoints, low, high), function, [&](float x, float y) {
    const double want = truth(x);
    if (std::fabs(want) > FLT_MAX) return CHECK(std::fabs(y) >= FLT_MAX * (1 - bound));
    CHECK(std::fabs(y - want) <= bound * std::fabs(want) + (std::fabs(want) < 1e-35 ? 1e-36 : 0));
  });
}

TEST(ExpIsAccurate) {
  CheckRelative(Exp, ExpInDouble, -87.0f, 89.0f, 0x1p-23);
  CheckRelative(Exp, ExpInDouble, -1.0f, 1.0f, 0x1p-23);
}

TEST(ExpOfSubnormalResultsRoundsOnce) {
  ForEachLane(Uniform(1 << 16, -104.5f, -87.0f), Exp, [](float x, float y) {
    const double want = std::exp(static_cast<double>(x));
    CHECK(std::fabs(y - want) <= want * 0x1p-23 + 0x1p-150);
  });
}

TEST(SiluIsAccurate) {
  CheckRelative(Silu, SiluInDouble, -80.0f, 100.0f, 0x1p-22);
  CheckRelative(Silu, SiluInDouble, -1.0f, 1.0f, 0x1p-22);
}

TEST(GeluErfIsAccurate) {
  CheckRelative(GeluErf, GeluErfInDouble, -12.0f, 15.0f, 0x1p-21);
  CheckRelative(GeluErf, GeluErfInDouble, -1.0f, 1.0f, 0x1p-21);
}

TEST(GeluTanhIsAccurate) {
  CheckRelative(GeluTanh, GeluTanhInDouble, -1.0f, 12.0f, 0x1p-22);
  CheckRelative(GeluTanh, GeluTanhInDouble, -8.0f, -1.0f, 0x1p-17);
}

// Activations never leave the range between their minimum and max(x, 0), and tend to the right limits.
TEST(ActivationsHoldEverywhere) {
  for (Function function : {Function(Silu), Function(GeluTanh), Function(GeluErf)}) {
    ForEachLane(AnyFloats(1 << 20), function, [](float x, float y) {
      CHECK(std::isnan(y) == std::isnan(x));
      if (std::isnan(x)) return;
      CHECK(y >= -0.2785f && y <= std::fmax(x, 0.0f));
      if (x > 20.0f) CHECK(y >= x * (1 - 0x1p-23f));
      if (x < -90.0f) CHECK(y >= -1e-36f);
    });
  }
}

TEST(ExpHoldsEverywhere) {
  ForEachLane(AnyFloats(1 << 20), Exp, [](float x, float y) {
    CHECK(std::isnan(y) == std::isnan(x));
    if (x > 88.8f) CHECK(y == kInfinity);
    if (x < -104.0f) CHECK(y == 0.0f);
    if (std::fabs(x) < 1e-8f) CHECK(y == 1.0f);
  });
}

// ---- vectors --------------------------------------------------------------------------------------------------------

TEST(RoundingToIntegers) {
  const std::vector<float> x = AnyFloats(1 << 16);
  ForEachLane(
      x, [](Float16Lanes v) { return Floor(v); }, [](float v, float y) { CHECK(SameBits(y, std::floor(v))); });
  ForEachLane(
      x, [](Float16Lanes v) { return Ceil(v); }, [](float v, float y) { CHECK(SameBits(y, std::ceil(v))); });
  for (size_t at = 0; at < x.size(); at += kLanes) {
    const Float16Lanes v = Load(x.data() + at);
    const Int16Lanes nearest = RoundToInt(v), below = FloorToInt(v), above = CeilToInt(v);
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto to_int = [](float r) { return r >= -0x1p31f && r < 0x1p31f ? static_cast<int32_t>(r) : INT32_MIN; };
      CHECK(nearest[lane] == to_int(std::nearbyint(v[lane])));
      CHECK(below[lane] == to_int(std::floor(v[lane])));
      CHECK(above[lane] == to_int(std::ceil(v[lane])));
    }
  }
}

TEST(FmaRoundsOnce) {
  const std::vector<float> a = AnyFloats(1 << 12), b = Uniform(1 << 12, -2, 2), c = AnyFloats(1 << 12);
  for (size_t at = 0; at < a.size(); at += kLanes) {
    const Float16Lanes y = Fma(Load(a.data() + at), Load(b.data() + at), Load(c.data() + at));
    for (int lane = 0; lane < kLanes; ++lane) {
      const size_t i = at + static_cast<size_t>(lane);
      CHECK(SameBits(y[lane], std::fma(a[i], b[i], c[i])));
    }
  }
}

// Of the two bfloat16 neighbours the nearer one, ties to the even one.
TEST(BFloat16RoundsToNearest) {
  const std::vector<float> x = AnyFloats(1 << 16);
  for (size_t at = 0; at < x.size(); at += kLanes) {
    uint16_t halves[kLanes];
    StoreBFloat16(halves, Load(x.data() + at));
    const Float16Lanes back = LoadBFloat16(halves);
    for (int lane = 0; lane < kLanes; ++lane) {
      const float v = x[at + static_cast<size_t>(lane)], y = back[lane];
      CHECK(std::isnan(y) == std::isnan(v));
      if (std::isnan(v)) {
        CHECK((halves[lane] & 0x40) != 0);  // quiet
        continue;
      }
      uint32_t bits;
      std::memcpy(&bits, &v, sizeof(bits));
      const uint32_t low = bits & 0xffff, high = bits >> 16;
      const bool goes_up = low > 0x8000 || (low == 0x8000 && high % 2 == 1);
      CHECK(halves[lane] == high + (goes_up ? 1 : 0));
    }
  }
}

TEST(LanesMoveAndReduce) {
  const std::vector<float> x = Uniform(kLanes, -1, 1);
  const Float16Lanes v = Load(x.data());
  float tree[kLanes];
  std::memcpy(tree, x.data(), sizeof(tree));
  for (int distance = 8; distance > 0; distance /= 2) {
    for (int lane = 0; lane < distance; ++lane) tree[lane] = tree[lane] + tree[lane + distance];
  }
  CHECK(HorizontalSum(v) == tree[0]);
  float largest = x[0];
  for (float number : x) largest = std::fmax(largest, number);
  CHECK(HorizontalMax(v) == largest);
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto at = [&](int from) { return x[static_cast<size_t>(from)]; };
    CHECK(SwapLanes<1>(v)[lane] == at(lane ^ 1));
    CHECK(SwapLanes<2>(v)[lane] == at(lane ^ 2));
    CHECK(SwapLanes<4>(v)[lane] == at(lane ^ 4));
    CHECK(SwapLanes<8>(v)[lane] == at(lane ^ 8));
  }
}

TEST(MaxAndMinKeepTheirSecondOperand) {
  CHECK(std::isnan(Max(Float16Lanes(1.0f), Float16Lanes(kNaN))[0]));
  CHECK(std::isnan(Min(Float16Lanes(1.0f), Float16Lanes(kNaN))[0]));
  CHECK(Max(Float16Lanes(kNaN), Float16Lanes(1.0f))[0] == 1.0f);
  CHECK(std::signbit(Max(Float16Lanes(0.0f), Float16Lanes(-0.0f))[0]));
  CHECK(Max(Float16Lanes(2.0f), Float16Lanes(1.0f))[0] == 2.0f &&
        Min(Float16Lanes(2.0f), Float16Lanes(1.0f))[0] == 1.0f);
}

// Allocations of the exact size show a sanitizer what is touched beyond them.
TEST(PartialLoadsAndStores) {
  for (int count = 0; count <= kLanes; ++count) {
    const size_t size = static_cast<size_t>(count);
    const std::vector<float> x = Uniform(size, 1, 2);
    const Float16Lanes v = LoadPartial(x.data(), count);
    for (int lane = 0; lane < kLanes; ++lane) CHECK(v[lane] == (lane < count ? x[static_cast<size_t>(lane)] : 0.0f));
    std::vector<float> copy(size);
    StorePartial(copy.data(), v, count);
    CHECK(copy == x);
    std::vector<uint16_t> halves(size);
    StoreBFloat16Partial(halves.data(), Float16Lanes(1.5f), count);
    const Float16Lanes back = LoadBFloat16Partial(halves.data(), count);
    const Float16Lanes kept = KeepFirst(Float16Lanes(3.0f), count);
    for (int lane = 0; lane < kLanes; ++lane) {
      CHECK(back[lane] == (lane < count ? 1.5f : 0.0f));
      CHECK(kept[lane] == (lane < count ? 3.0f : 0.0f));
    }
  }
}

}  // namespace

int main(int argc, char** argv) { return RunTests(argc, argv); }
