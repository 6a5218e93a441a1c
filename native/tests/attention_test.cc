// Attention of every instruction set against plain loops in double precision.
//
// The bound. Let u = 2^-24, d the head's dimension, n the number of keys, s_j the exact score of key j, m the largest,
// p_j = exp(s_j - m), l = sum p_j, w_j = p_j / l and o = sum w_j v_j.
//  1. A score is a float32 sum of d products, off by at most (d + 4) u sum_i |q_i k_i|, or a sum of products of 24-bit
//     integers (attention_amx_digits.h), off by at most 2^-21.6 max|q| max|k| for each of the d terms and once for
//     cutting off what is below 2^-8. Scaling it and subtracting m add a few u of |s_j| + |m|. The sum of these is
//     delta_j.
//  2. An exponential is off by p_j (delta_j + delta_m + 4 u), to first order, and by 2 u where it is rounded to an
//     integer in units of 2^-24.
//  3. o, a ratio, moves by w_j |v_j - o| for each relative change of p_j: by sum_j w_j (delta_j + delta_m + 4 u) |v_j -
//  o|
//     + 2 u / l sum_j |v_j - o|.
//  4. Summing n products in float32 costs (n + 8) u sum_j w_j |v_j|, or in integers 2^-21.6 max_j |v_j| (1 + n / l
//  2^-1)
//     at most for rounding values and for the products of digits that are left out.
// The worst case holds for every element. Errors of random signs are far smaller: what quantization after attention
// needs, 3e-6 of a row's norm, is checked on normal inputs.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../src/isa.h"
#include "check.h"
#include "hqdit/kernels.h"

namespace {

using hqdit::AttentionArgs;
using hqdit::AttentionTensor;
using hqdit::Element;
using hqdit::Isa;

constexpr double kU = 0x1p-24;
constexpr double kDigitError = 3.05e-7;  // 2^-21.6

float BFloat16Value(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint16_t ToBFloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (std::isnan(value)) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

struct Shape {
  int64_t batch, heads, queries, keys, dim;
};

// How a tensor lies in memory: heads inside tokens or outside, with `gap` unused elements after every row.
struct Memory {
  bool heads_inside;
  int64_t gap;
};

// A tensor in a block of exactly its size, so that a sanitizer sees every access outside.
class Tensor {
 public:
  Tensor(int64_t batch, int64_t heads, int64_t tokens, int64_t dim, Element type, Memory memory)
      : batch_(batch), heads_(heads), tokens_(tokens), dim_(dim), type_(type) {
    const int64_t row = dim + memory.gap;
    view.token_stride = memory.heads_inside ? row * heads : row;
    view.head_stride = memory.heads_inside ? row : row * tokens;
    view.batch_stride = row * heads * tokens;
    const bool is_empty = batch * heads * tokens == 0;
    elements_ = is_empty ? 0 : batch * heads * tokens * row - memory.gap;
    view.data = std::malloc(static_cast<size_t>(elements_ * bytes()));
    std::memset(view.data, kGuard, static_cast<size_t>(elements_ * bytes()));
  }
  ~Tensor() { std::free(view.data); }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  int64_t Offset(int64_t b, int64_t h, int64_t t, int64_t d) const {
    return b * view.batch_stride + t * view.token_stride + h * view.head_stride + d;
  }
  float Get(int64_t b, int64_t h, int64_t t, int64_t d) const {
    const int64_t i = Offset(b, h, t, d);
    return type_ == Element::kFloat32 ? static_cast<const float*>(view.data)[i]
                                      : BFloat16Value(static_cast<const uint16_t*>(view.data)[i]);
  }
  void Set(int64_t b, int64_t h, int64_t t, int64_t d, float value) {
    const int64_t i = Offset(b, h, t, d);
    if (type_ == Element::kFloat32) {
      static_cast<float*>(view.data)[i] = value;
    } else {
      static_cast<uint16_t*>(view.data)[i] = ToBFloat16(value);
    }
  }
  template <typename F>
  void ForEach(F f) const {
    for (int64_t b = 0; b < batch_; ++b) {
      for (int64_t h = 0; h < heads_; ++h) {
        for (int64_t t = 0; t < tokens_; ++t) {
          for (int64_t d = 0; d < dim_; ++d) f(b, h, t, d);
        }
      }
    }
  }
  void FillNormal(std::mt19937& random, float deviation) {
    std::normal_distribution<float> normal(0.0f, deviation);
    ForEach([&](int64_t b, int64_t h, int64_t t, int64_t d) { Set(b, h, t, d, normal(random)); });
  }
  // Whether the bytes between the rows are as they were.
  bool GapsAreUntouched() const {
    std::vector<bool> is_element(static_cast<size_t>(elements_), false);
    ForEach([&](int64_t b, int64_t h, int64_t t, int64_t d) {
      is_element[static_cast<size_t>(Offset(b, h, t, d))] = true;
    });
    const unsigned char* memory = static_cast<const unsigned char*>(view.data);
    for (int64_t i = 0; i < elements_ * bytes(); ++i) {
      if (!is_element[static_cast<size_t>(i / bytes())] && memory[i] != kGuard) return false;
    }
    return true;
  }
  bool HasSameBytes(const Tensor& other) const {
    return std::memcmp(view.data, other.view.data, static_cast<size_t>(elements_ * bytes())) == 0;
  }

  AttentionTensor view;

 private:
  static constexpr unsigned char kGuard = 0xff;  // a NaN in both types

  int64_t bytes() const { return type_ == Element::kFloat32 ? 4 : 2; }

  int64_t batch_, heads_, tokens_, dim_, elements_;
  Element type_;
};

struct Problem {
  Problem(const Shape& s, Element type, Memory memory, float scale)
      : shape(s),
        q(s.batch, s.heads, s.queries, s.dim, type, memory),
        k(s.batch, s.heads, s.keys, s.dim, type, memory),
        v(s.batch, s.heads, s.keys, s.dim, type, memory),
        out(s.batch, s.heads, s.queries, s.dim, type, memory),
        args{q.view, k.view, v.view, out.view, type, s.batch, s.heads, s.queries, s.keys, s.dim, scale},
        memory_(memory) {}

  // Scores of standard deviation `deviation`.
  void FillNormal(unsigned seed, double deviation) {
    std::mt19937 random(seed);
    const double each = std::sqrt(deviation / std::fabs(args.softmax_scale) / std::sqrt(double(shape.dim)));
    q.FillNormal(random, static_cast<float>(each));
    k.FillNormal(random, static_cast<float>(each));
    v.FillNormal(random, 1.0f);
  }
  bool Run(int threads) { return hqdit::Attention(args, threads); }
  bool HasSameBitsWith(int threads) {
    Tensor again(shape.batch, shape.heads, shape.queries, shape.dim, args.type, memory_);
    AttentionArgs other = args;
    other.out = again.view;
    return hqdit::Attention(other, threads) && again.HasSameBytes(out);
  }

  Shape shape;
  Tensor q, k, v, out;
  AttentionArgs args;

 private:
  Memory memory_;
};

// One row of the oracle, and what each element may be off by.
struct Row {
  std::vector<double> exact, bound;
};

double MaxMagnitude(const Tensor& tensor, int64_t b, int64_t h, int64_t t, int64_t dim) {
  double largest = 0;
  for (int64_t d = 0; d < dim; ++d) largest = std::fmax(largest, std::fabs(tensor.Get(b, h, t, d)));
  return largest;
}

struct Scores {
  std::vector<double> weight, error;  // of each key
  double inverse_sum = 0;             // 1 / l
};

Scores ExactScores(const Problem& p, int64_t b, int64_t h, int64_t t) {
  const int64_t n = p.shape.keys, dim = p.shape.dim;
  const double scale = p.args.softmax_scale, q_max = MaxMagnitude(p.q, b, h, t, dim);
  Scores scores{std::vector<double>(size_t(n)), std::vector<double>(size_t(n))};
  double largest = -std::numeric_limits<double>::infinity(), largest_error = 0, sum = 0;
  for (int64_t j = 0; j < n; ++j) {
    double product = 0, magnitude = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const double term = double(p.q.Get(b, h, t, d)) * p.k.Get(b, h, j, d);
      product += term;
      magnitude += std::fabs(term);
    }
    const double digits = double(dim + 1) * kDigitError * q_max * MaxMagnitude(p.k, b, h, j, dim);
    const double error = std::fabs(scale) * ((double(dim) + 8) * kU * magnitude + digits + 4 * kU * std::fabs(product));
    scores.weight[size_t(j)] = product * scale;
    scores.error[size_t(j)] = error;
    if (product * scale > largest) largest = product * scale;
    largest_error = std::fmax(largest_error, error);
  }
  for (double& weight : scores.weight) sum += weight = std::exp(weight - largest);
  for (double& weight : scores.weight) weight /= sum;
  for (double& error : scores.error) error = std::expm1(error + largest_error + 4 * kU * (1 + std::fabs(largest)));
  scores.inverse_sum = 1 / sum;
  return scores;
}

Row ExactRow(const Problem& p, int64_t b, int64_t h, int64_t t) {
  const Scores scores = ExactScores(p, b, h, t);
  const double n = double(p.shape.keys);
  Row row{std::vector<double>(size_t(p.shape.dim)), std::vector<double>(size_t(p.shape.dim))};
  for (int64_t d = 0; d < p.shape.dim; ++d) {
    double exact = 0, magnitude = 0, largest = 0;
    for (int64_t j = 0; j < p.shape.keys; ++j) {
      const double value = p.v.Get(b, h, j, d), weight = scores.weight[size_t(j)];
      exact += weight * value;
      magnitude += weight * std::fabs(value);
      largest = std::fmax(largest, std::fabs(value));
    }
    double bound = (n + 8) * kU * magnitude + kDigitError * largest * (1 + n * scores.inverse_sum / 2);
    for (int64_t j = 0; j < p.shape.keys; ++j) {
      const double change = scores.weight[size_t(j)] * scores.error[size_t(j)] + 2 * kU * scores.inverse_sum;
      bound += change * std::fabs(p.v.Get(b, h, j, d) - exact);
    }
    if (p.args.type == Element::kBFloat16) bound += (std::fabs(exact) + bound) * 0x1p-8;
    row.exact[size_t(d)] = exact;
    row.bound[size_t(d)] = bound;
  }
  return row;
}

struct Errors {
  double worst_row = 0;    // norm of a row's error over the row's norm, the largest
  double mean_square = 0;  // of all errors over that of all outputs, square root
  bool are_within_bounds = true;
};

Errors Compare(const Problem& p, int64_t row_step) {
  Errors errors;
  double all_errors = 0, all_values = 0;
  for (int64_t b = 0; b < p.shape.batch; ++b) {
    for (int64_t h = 0; h < p.shape.heads; ++h) {
      for (int64_t t = 0; t < p.shape.queries; t += row_step) {
        const Row row = ExactRow(p, b, h, t);
        double error = 0, norm = 0;
        for (int64_t d = 0; d < p.shape.dim; ++d) {
          const double exact = row.exact[size_t(d)], off = p.out.Get(b, h, t, d) - exact;
          if (!(std::fabs(off) <= row.bound[size_t(d)])) errors.are_within_bounds = false;
          error += off * off;
          norm += exact * exact;
        }
        all_errors += error;
        all_values += norm;
        errors.worst_row = std::fmax(errors.worst_row, std::sqrt(error / norm));
      }
    }
  }
  errors.mean_square = std::sqrt(all_errors / all_values);
  return errors;
}

template <typename F>
void ForEachIsa(F f) {
  const Isa before = hqdit::CurrentIsa();
  for (int isa = 0; isa <= static_cast<int>(hqdit::BestIsa()); ++isa) {
    CHECK(hqdit::SelectIsa(static_cast<Isa>(isa)));
    f(hqdit::IsaName(static_cast<Isa>(isa)));
  }
  CHECK(hqdit::SelectIsa(before));
}

float Scale(int64_t dim) { return 1.0f / std::sqrt(static_cast<float>(dim)); }

void CheckShape(const char* isa, const Shape& shape, Element type, Memory memory, double deviation) {
  Problem p(shape, type, memory, Scale(shape.dim));
  p.FillNormal(static_cast<unsigned>(shape.keys * 1000 + shape.dim), deviation);
  CHECK(p.Run(1));
  const Errors errors = Compare(p, 1);
  CHECK(errors.are_within_bounds);
  CHECK(p.out.GapsAreUntouched());
  CHECK(p.HasSameBitsWith(2));
  CHECK(p.HasSameBitsWith(3));
  if (!errors.are_within_bounds) {
    std::fprintf(stderr, "  %s, %d x %d x %d x %d x %d\n", isa, int(shape.batch), int(shape.heads), int(shape.queries),
                 int(shape.keys), int(shape.dim));
  }
}

TEST(EveryHeadDimension) {
  ForEachIsa([](const char* isa) {
    for (int64_t dim = 1; dim <= 256; dim += dim < 40 ? 1 : 13) {
      CheckShape(isa, {1, 1, 5, 21, dim}, Element::kFloat32, {true, 0}, 1.0);
    }
    for (int64_t dim : {63, 64, 65, 72, 80, 81, 96, 127, 128, 129, 144, 192, 208, 255, 256}) {
      CheckShape(isa, {1, 2, 17, 70, dim}, Element::kFloat32, {true, 3}, 1.0);
      CheckShape(isa, {1, 2, 17, 70, dim}, Element::kBFloat16, {false, 1}, 1.0);
    }
  });
}

TEST(EveryNumberOfTokens) {
  ForEachIsa([](const char* isa) {
    for (int64_t tokens = 1; tokens <= 70; tokens += tokens < 36 ? 1 : 7) {
      CheckShape(isa, {1, 1, tokens, 5, 8}, Element::kFloat32, {true, 0}, 1.0);
      CheckShape(isa, {1, 1, 3, tokens, 8}, Element::kFloat32, {true, 0}, 1.0);
    }
    for (int64_t tokens : {127, 128, 129, 191, 255, 256, 257, 258, 300, 511, 512, 513, 770, 1024}) {
      CheckShape(isa, {1, 1, 6, tokens, 9}, Element::kFloat32, {false, 0}, 2.0);
      CheckShape(isa, {1, 1, tokens, 6, 9}, Element::kFloat32, {true, 2}, 2.0);
    }
  });
}

TEST(BatchesHeadsAndStrides) {
  ForEachIsa([](const char* isa) {
    for (Element type : {Element::kFloat32, Element::kBFloat16}) {
      for (const Memory& memory : {Memory{true, 0}, Memory{true, 5}, Memory{false, 0}, Memory{false, 7}}) {
        CheckShape(isa, {2, 3, 33, 40, 20}, type, memory, 1.0);
        CheckShape(isa, {3, 1, 7, 130, 72}, type, memory, 3.0);
      }
    }
  });
}

TEST(NothingToDo) {
  ForEachIsa([](const char*) {
    for (const Shape& shape : {Shape{0, 2, 3, 4, 5}, Shape{1, 0, 3, 4, 5}, Shape{1, 2, 0, 4, 5}}) {
      Problem p(shape, Element::kFloat32, {true, 0}, 1.0f);
      CHECK(p.Run(1));
      CHECK(p.Run(2));
    }
  });
}

// Float32 accuracy on normal inputs: at most 3e-6 of a row's norm, while rounding scores of 30 and more to float32 does
// not by itself cost that much.
TEST(AccuracyOnNormalInputs) {
  const Shape shapes[] = {{1, 2, 256, 256, 72}, {1, 1, 64, 1024, 64}, {1, 1, 64, 4096, 128}, {1, 1, 64, 256, 256}};
  ForEachIsa([&](const char* isa) {
    for (const Shape& shape : shapes) {
      for (double deviation : {0.1, 1.0, 3.0, 10.0}) {
        Problem p(shape, Element::kFloat32, {true, 0}, Scale(shape.dim));
        p.FillNormal(7, deviation);
        CHECK(p.Run(1));
        const Errors errors = Compare(p, 7);
        CHECK(errors.are_within_bounds);
        CHECK(errors.worst_row <= (deviation > 5 ? 9e-6 : 3e-6));
        std::printf("  %-11s %4d keys, dimension %3d, scores of deviation %4.1f: worst row %.2e, all %.2e\n", isa,
                    int(shape.keys), int(shape.dim), deviation, errors.worst_row, errors.mean_square);
      }
    }
  });
}

// One large channel, one large token, and scales of either sign.
TEST(UnevenInputs) {
  ForEachIsa([](const char*) {
    for (float scale : {0.3f, -0.3f, 0.0f}) {
      Problem p({1, 2, 40, 300, 24}, Element::kFloat32, {true, 0}, scale);
      p.FillNormal(11, scale == 0.0f ? 1.0 : 0.5);
      if (scale == 0.0f) {
        std::mt19937 random(3);
        p.q.FillNormal(random, 1.0f);
        p.k.FillNormal(random, 1.0f);
      }
      for (int64_t t = 0; t < 300; ++t) {
        p.k.Set(0, 0, t, 5, 20.0f + p.k.Get(0, 0, t, 5));
        p.v.Set(0, 0, t, 7, 50.0f * p.v.Get(0, 0, t, 7));
      }
      for (int64_t d = 0; d < 24; ++d) p.k.Set(0, 1, 17, d, 30.0f * p.k.Get(0, 1, 17, d));
      CHECK(p.Run(1));
      CHECK(Compare(p, 1).are_within_bounds);
    }
  });
}

// Zeros, the smallest and fairly large numbers: nothing may be lost in units and their reciprocals.
TEST(SmallAndLargeNumbers) {
  ForEachIsa([](const char*) {
    for (float size : {0.0f, 1e-40f, 1e-30f, 1e-10f, 1e10f, 1e15f}) {
      Problem p({1, 1, 9, 40, 16}, Element::kFloat32, {true, 0}, size > 1.0f ? 1.0f / size / size : 1.0f);
      std::mt19937 random(5);
      p.q.FillNormal(random, size);
      p.k.FillNormal(random, size);
      p.v.FillNormal(random, size > 0.0f ? size : 1.0f);
      CHECK(p.Run(1));
      bool is_right = true;
      for (int64_t t = 0; t < 9; ++t) {
        const Row row = ExactRow(p, 0, 0, t);
        for (int64_t d = 0; d < 16; ++d) {
          const double off = std::fabs(p.out.Get(0, 0, t, d) - row.exact[size_t(d)]);
          is_right &= off <= row.bound[size_t(d)] + 1e-37;
        }
      }
      CHECK(is_right);
    }
  });
}

// Very unlike scores: all weight on one key, whatever the size of the others.
TEST(FarApartScores) {
  ForEachIsa([](const char*) {
    for (float size : {10.0f, 1e3f, 1e6f, 1e12f}) {
      Problem p({1, 1, 4, 600, 8}, Element::kFloat32, {true, 0}, 1.0f);
      std::mt19937 random(5);
      p.v.FillNormal(random, 1.0f);
      p.q.ForEach([&](int64_t b, int64_t h, int64_t t, int64_t d) { p.q.Set(b, h, t, d, d == 0 ? size : 0.0f); });
      p.k.ForEach([&](int64_t b, int64_t h, int64_t t, int64_t d) {
        p.k.Set(b, h, t, d, d == 0 ? (t == 301 ? size : -size * float(t % 7)) : 0.0f);
      });
      CHECK(p.Run(1));
      bool is_right = true;
      for (int64_t d = 0; d < 8; ++d) is_right &= std::fabs(p.out.Get(0, 0, 3, d) - p.v.Get(0, 0, 301, d)) < 1e-5f;
      CHECK(is_right);
    }
  });
}

bool RowIsNaN(const Problem& p, int64_t b, int64_t h, int64_t t) {
  for (int64_t d = 0; d < p.shape.dim; ++d) {
    if (!std::isnan(p.out.Get(b, h, t, d))) return false;
  }
  return true;
}

TEST(NoKeys) {
  ForEachIsa([](const char*) {
    Problem p({1, 2, 20, 0, 5}, Element::kFloat32, {true, 0}, 1.0f);
    CHECK(p.Run(1));
    for (int64_t t = 0; t < 20; ++t) CHECK(RowIsNaN(p, 0, 1, t));
  });
}

// A NaN or an infinity makes NaN of exactly the rows whose query, keys or values hold it.
TEST(NotFinite) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  ForEachIsa([](const char*) {
    for (Element type : {Element::kFloat32, Element::kBFloat16}) {
      for (float bad : {kNaN, kInfinity, -kInfinity}) {
        for (int which = 0; which < 3; ++which) {
          Problem p({2, 2, 70, 300, 20}, type, {true, 0}, 0.2f);
          p.FillNormal(1, 1.0);
          Tensor& tensor = which == 0 ? p.q : which == 1 ? p.k : p.v;
          tensor.Set(1, 0, which == 0 ? 66 : 280, 19, bad);
          CHECK(p.Run(2));
          bool is_right = true;
          for (int64_t b = 0; b < 2; ++b) {
            for (int64_t h = 0; h < 2; ++h) {
              for (int64_t t = 0; t < 70; ++t) {
                const bool is_bad = b == 1 && h == 0 && (which > 0 || t == 66);
                is_right &= RowIsNaN(p, b, h, t) == is_bad;
                is_right &= is_bad || std::isfinite(p.out.Get(b, h, t, 0));
              }
            }
          }
          CHECK(is_right);
        }
      }
    }
  });
}

}  // namespace

int main(int argc, char** argv) { return RunTests(argc, argv); }
