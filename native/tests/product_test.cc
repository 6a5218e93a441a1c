// The product of every instruction set against plain loops, bit for bit.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "hqdit/kernels.h"
#include "isa.h"
#include "kernel_table.h"
#include "vector.h"
#include "vector_math.h"

namespace {

using hqdit::Activation;
using hqdit::Element;
using hqdit::Isa;
using hqdit::ProductArgs;
using hqdit::Share;
using hqdit::Weight;

struct Kernel {
  Isa isa;
  void (*product)(const ProductArgs&, const Share&);
  int64_t (*scratch)(const ProductArgs&);
};

std::vector<Kernel> Kernels() {
  std::vector<Kernel> kernels = {{Isa::kPortable, hqdit::portable::Product, hqdit::portable::ProductScratch}};
#if defined(HQDIT_X86)
  kernels.push_back({Isa::kAvx2, hqdit::avx2::Product, hqdit::avx2::ProductScratch});
  kernels.push_back({Isa::kAvx512, hqdit::avx512::Product, hqdit::avx512::ProductScratch});
  kernels.push_back({Isa::kAmx, hqdit::amx::Product, hqdit::amx::ProductScratch});
#endif
  while (kernels.back().isa > hqdit::BestIsa()) kernels.pop_back();
  return kernels;
}

std::mt19937 random_bits(1);

int64_t Uniform(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }
float Normal() { return std::normal_distribution<float>()(random_bits); }

// Memory of exactly the size asked for: one that sanitizers watch, or one that ends where the page after it may not be
// touched, because no sanitizer sees what tile loads and assembly read. `offset` bytes come first, for odd addresses.
class Bytes {
 public:
  explicit Bytes(int64_t size = 0, int64_t offset = 0) : size_(size) {
    const size_t bytes = static_cast<size_t>(size + offset);
    if (Uniform(0, 1) == 0) {
      memory_ = std::malloc(bytes + (bytes == 0));
      data_ = static_cast<uint8_t*>(memory_) + offset;
      return;
    }
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t usable = (bytes + page - 1) / page * page;
    mapped_ = usable + page;
    memory_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(static_cast<uint8_t*>(memory_) + usable, page, PROT_NONE);
    data_ = static_cast<uint8_t*>(memory_) + usable - size;
  }
  Bytes(Bytes&& other) noexcept { *this = std::move(other); }
  Bytes& operator=(Bytes&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(mapped_, other.mapped_);
    return *this;
  }
  ~Bytes() {
    if (mapped_ > 0) {
      munmap(memory_, mapped_);
    } else {
      std::free(memory_);
    }
  }

  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  uint8_t& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return size_; }

 private:
  void* memory_ = nullptr;
  uint8_t* data_ = nullptr;
  int64_t size_ = 0;
  size_t mapped_ = 0;  // bytes; 0 where `memory_` comes from malloc
};

float FromBFloat16(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint16_t ToBFloat16(float value) {
  if (std::isnan(value)) return 0x7fc0;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rest = bits & 0xffff;
  bits >>= 16;
  if (rest > 0x8000 || (rest == 0x8000 && bits % 2 == 1)) ++bits;
  return static_cast<uint16_t>(bits);
}

int64_t ElementBytes(Element type) { return type == Element::kBFloat16 ? 2 : 4; }

float ReadElement(const void* from, int64_t index, Element type) {
  if (type == Element::kBFloat16) return FromBFloat16(static_cast<const uint16_t*>(from)[index]);
  return static_cast<const float*>(from)[index];
}

void WriteElement(void* to, int64_t index, Element type, float value) {
  if (type == Element::kBFloat16) {
    static_cast<uint16_t*>(to)[index] = ToBFloat16(value);
  } else {
    static_cast<float*>(to)[index] = value;
  }
}

struct Shape {
  int64_t tokens, width, group_size;
  std::vector<int64_t> rows;  // of each weight
  bool levels_unsigned = false;
  Activation activation = Activation::kNone;
  Element out_type = Element::kFloat32;
  bool has_bias = false, has_gate = false, in_place = false, has_formats = false, shares_scales = false;
  bool is_extreme = false;   // all levels and weights of the largest magnitude
  bool has_padding = false;  // strides larger than needed, odd addresses
  bool has_nan_scale = false;
};

struct WeightData {
  Bytes packed, tables, formats, scale, bias, gate, residual;
  int64_t out_bytes = 0;
  Weight weight = {};
};

// One random problem: its inputs live here; outputs are made for each run.
struct Problem {
  Shape shape;
  Bytes levels, token_scale;
  std::vector<WeightData> weights;
  ProductArgs args = {};

  int64_t Pad() const { return shape.has_padding ? Uniform(0, 9) : 0; }
  int64_t groups() const { return shape.width / shape.group_size; }
};

void FillFloats(const Bytes& bytes) {
  for (int64_t i = 0; i < bytes.size() / 4; ++i) bytes.as<float>()[i] = Normal();
}

// Bytes that rows `stride` apart take, without anything after the last one.
int64_t Span(int64_t rows, int64_t stride, int64_t width) { return rows == 0 ? 0 : (rows - 1) * stride + width; }

void MakeLevels(Problem& p) {
  const Shape& s = p.shape;
  p.args.levels_stride = s.width + p.Pad();
  p.levels = Bytes(Span(s.tokens, p.args.levels_stride, s.width), p.Pad());
  for (int64_t i = 0; i < p.levels.size(); ++i) {
    const int most = s.levels_unsigned ? 255 : 128;  // int8: -128
    p.levels[i] = static_cast<uint8_t>(s.is_extreme ? most : Uniform(0, 255));
  }
  p.args.levels = p.levels.as<void>();
  p.args.levels_unsigned = s.levels_unsigned;
  const int64_t scales_of_row = s.shares_scales ? 1 : p.groups();
  p.args.token_scale_group_stride = s.shares_scales ? 0 : 1;
  p.args.token_scale_stride = scales_of_row + p.Pad();
  p.token_scale = Bytes(4 * Span(s.tokens, p.args.token_scale_stride, scales_of_row));
  FillFloats(p.token_scale);
  if (s.tokens > 1) p.token_scale.as<float>()[p.args.token_scale_stride] = -0.0f;
  if (s.has_nan_scale) p.token_scale.as<float>()[0] = std::numeric_limits<float>::quiet_NaN();
  p.args.token_scale = p.token_scale.as<float>();
}

void MakeScales(Problem& p, WeightData& data, int64_t rows) {
  Weight& w = data.weight;
  const bool is_row_major = Uniform(0, 1) == 1;
  w.scale_row_stride = p.shape.shares_scales ? 0 : is_row_major ? p.groups() : 1;
  w.scale_group_stride = p.shape.shares_scales ? 0 : is_row_major ? 1 : rows;
  data.scale = Bytes(4 * (p.shape.shares_scales ? 1 : rows * p.groups()));
  FillFloats(data.scale);
  w.scale = data.scale.as<float>();
}

void MakeGate(Problem& p, WeightData& data, int64_t rows) {
  const Shape& s = p.shape;
  Weight& w = data.weight;
  w.tokens_per_gate = Uniform(1, 1 + s.tokens);
  w.gate_stride = rows + p.Pad();
  const int64_t gates = s.tokens == 0 ? 0 : (s.tokens - 1) / w.tokens_per_gate + 1;
  data.gate = Bytes(4 * Span(gates, w.gate_stride, rows));
  FillFloats(data.gate);
  w.gate = data.gate.as<float>();
  w.residual_stride = s.in_place ? w.out_stride : rows + p.Pad();
  const int64_t count = Span(s.tokens, w.residual_stride, rows);
  data.residual = Bytes(count * ElementBytes(s.out_type));
  w.residual = data.residual.as<void>();
  for (int64_t i = 0; i < count; ++i) WriteElement(data.residual.as<void>(), i, s.out_type, Normal());
}

void MakeWeight(Problem& p, WeightData& data, int64_t rows) {
  const Shape& s = p.shape;
  Weight& w = data.weight;
  w.rows = rows;
  w.row_bytes = s.width / 2 + p.Pad();
  data.packed = Bytes(Span(rows, w.row_bytes, s.width / 2), p.Pad());
  for (int64_t i = 0; i < data.packed.size(); ++i) data.packed[i] = static_cast<uint8_t>(random_bits());
  w.packed = data.packed.as<uint8_t>();
  const int64_t formats = s.has_formats ? Uniform(1, 20) : 1;
  data.tables = Bytes(formats * 16, p.Pad());
  for (int64_t i = 0; i < data.tables.size(); ++i) {
    data.tables[i] = static_cast<uint8_t>(s.is_extreme ? (Uniform(0, 7) == 0 ? -127 : 127) : Uniform(-127, 127));
  }
  w.level_tables = data.tables.as<int8_t>();
  if (s.has_formats) {
    data.formats = Bytes(rows);
    for (int64_t i = 0; i < rows; ++i) data.formats[i] = static_cast<uint8_t>(Uniform(0, formats - 1));
    w.format_index = data.formats.as<uint8_t>();
  }
  MakeScales(p, data, rows);
  if (s.has_bias) {
    data.bias = Bytes(4 * rows);
    FillFloats(data.bias);
    w.bias = data.bias.as<float>();
  }
  w.out_stride = rows + p.Pad();
  data.out_bytes = Span(s.tokens, w.out_stride, rows) * ElementBytes(s.out_type);
  if (s.has_gate) MakeGate(p, data, rows);
}

void MakeProblem(Problem& p) {
  const Shape& s = p.shape;
  MakeLevels(p);
  p.weights.resize(s.rows.size());
  for (size_t i = 0; i < s.rows.size(); ++i) MakeWeight(p, p.weights[i], s.rows[i]);
  p.args.tokens = s.tokens;
  p.args.width = s.width;
  p.args.group_size = s.group_size;
  p.args.activation = s.activation;
  p.args.out_type = s.out_type;
  p.args.weight_count = static_cast<int64_t>(s.rows.size());
}

// ---- the definition, in plain loops ---------------------------------------------------------------------------------

float Activate(Activation activation, float x) {
  const hqdit::Float16Lanes lanes = hqdit::LoadPartial(&x, 1);
  if (activation == Activation::kGeluTanh) return hqdit::GeluTanh(lanes)[0];
  if (activation == Activation::kGeluErf) return hqdit::GeluErf(lanes)[0];
  return x;
}

double LevelOf(const ProductArgs& args, int64_t m, int64_t k) {
  const int64_t at = m * args.levels_stride + k;
  if (args.levels_unsigned) return static_cast<const uint8_t*>(args.levels)[at];
  return static_cast<const int8_t*>(args.levels)[at];
}

std::vector<double> WeightLevels(const Weight& w, int64_t n, int64_t width) {
  std::vector<double> levels(static_cast<size_t>(width));
  const int8_t* table = w.level_tables + (w.format_index == nullptr ? 0 : w.format_index[n] * 16);
  for (int64_t k = 0; k < width; ++k) {
    const int code = w.packed[n * w.row_bytes + k / 2] >> (k % 2 == 0 ? 0 : 4) & 15;
    levels[static_cast<size_t>(k)] = table[code];
  }
  return levels;
}

float Expected(const ProductArgs& args, const Weight& w, int64_t m, int64_t n, const std::vector<double>& levels) {
  volatile float y = 0;
  for (int64_t g = 0; g < args.width / args.group_size; ++g) {
    double sum = 0;  // exact: whole numbers below 2^31
    for (int64_t k = g * args.group_size; k < (g + 1) * args.group_size; ++k) {
      sum += LevelOf(args, m, k) * levels[static_cast<size_t>(k)];
    }
    volatile float part = static_cast<float>(static_cast<int32_t>(sum));
    part = part * args.token_scale[m * args.token_scale_stride + g * args.token_scale_group_stride];
    part = part * w.scale[n * w.scale_row_stride + g * w.scale_group_stride];
    y = g == 0 ? part : y + part;
  }
  if (w.bias != nullptr) y = y + w.bias[n];
  y = Activate(args.activation, y);
  if (w.gate != nullptr) {
    y = y * w.gate[m / w.tokens_per_gate * w.gate_stride + n];
    y = y + ReadElement(w.residual, m * w.residual_stride + n, args.out_type);
  }
  return y;
}

constexpr uint8_t kGuard = 0xa5;

Bytes ExpectedOutput(const Problem& p, const WeightData& data) {
  Bytes out(data.out_bytes);
  std::memset(out.as<void>(), kGuard, static_cast<size_t>(data.out_bytes));
  for (int64_t n = 0; n < data.weight.rows; ++n) {
    const std::vector<double> levels = WeightLevels(data.weight, n, p.args.width);
    for (int64_t m = 0; m < p.args.tokens; ++m) {
      WriteElement(out.as<void>(), m * data.weight.out_stride + n, p.args.out_type,
                   Expected(p.args, data.weight, m, n, levels));
    }
  }
  return out;
}

// ---- running the kernels --------------------------------------------------------------------------------------------

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

void RunShare(const Kernel& kernel, const ProductArgs& args, int worker, int workers, int64_t* next_item) {
  const int64_t bytes = (kernel.scratch(args) + 63) / 64 * 64;
  std::unique_ptr<void, Free> scratch(std::aligned_alloc(64, static_cast<size_t>(bytes)));
  std::memset(scratch.get(), 0xff, static_cast<size_t>(bytes));
  kernel.product(args, Share{worker, workers, next_item, scratch.get()});
}

void RunKernel(const Kernel& kernel, const ProductArgs& args, int workers, bool in_threads) {
  int64_t next_item = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < workers; ++i) {
    if (in_threads) {
      threads.emplace_back([&, i] { RunShare(kernel, args, i, workers, &next_item); });
    } else {
      RunShare(kernel, args, i, workers, &next_item);
    }
  }
  for (std::thread& thread : threads) thread.join();
}

bool SameElements(const Bytes& a, const Bytes& b, Element type) {
  if (std::memcmp(a.as<void>(), b.as<void>(), static_cast<size_t>(a.size())) == 0) return true;
  for (int64_t i = 0; i < a.size() / ElementBytes(type); ++i) {
    const float x = ReadElement(a.as<void>(), i, type), y = ReadElement(b.as<void>(), i, type);
    if (std::memcmp(&x, &y, sizeof(x)) != 0 && !(std::isnan(x) && std::isnan(y))) return false;
  }
  return true;
}

void PrintShape(const Kernel& kernel, const Shape& s) {
  std::fprintf(
      stderr, "  %s M=%d K=%d group=%d N=%d.. weights=%d unsigned=%d act=%d bf16=%d gate=%d pad=%d formats=%d\n",
      hqdit::IsaName(kernel.isa), int(s.tokens), int(s.width), int(s.group_size), int(s.rows[0]), int(s.rows.size()),
      s.levels_unsigned, int(s.activation), s.out_type == Element::kBFloat16, s.has_gate, s.has_padding, s.has_formats);
}

void CheckShape(const Shape& shape) {
  Problem p;
  p.shape = shape;
  MakeProblem(p);
  std::vector<Bytes> expected;
  for (const WeightData& data : p.weights) expected.push_back(ExpectedOutput(p, data));
  for (const Kernel& kernel : Kernels()) {
    const int workers = static_cast<int>(Uniform(1, 3));
    std::vector<Bytes> outputs;
    std::vector<Weight> weights;
    for (const WeightData& data : p.weights) {
      outputs.emplace_back(data.out_bytes);
      Weight w = data.weight;
      w.out = outputs.back().as<void>();
      std::memset(w.out, kGuard, static_cast<size_t>(data.out_bytes));
      if (shape.has_gate && shape.in_place) {
        for (int64_t m = 0; m < shape.tokens; ++m) {
          const int64_t row = m * w.out_stride * ElementBytes(shape.out_type);
          std::memcpy(&outputs.back()[row], &data.residual[row],
                      static_cast<size_t>(w.rows * ElementBytes(shape.out_type)));
        }
        w.residual = w.out;
      }
      weights.push_back(w);
    }
    p.args.weights = weights.data();
    RunKernel(kernel, p.args, workers, Uniform(0, 3) == 0);
    for (size_t i = 0; i < outputs.size(); ++i) {
      const bool is_same = SameElements(outputs[i], expected[i], shape.out_type);
      CHECK(is_same);
      if (!is_same) PrintShape(kernel, shape);
    }
  }
}

Shape RandomShape(int64_t most_tokens, int64_t most_rows, int64_t most_width) {
  Shape s;
  s.tokens = Uniform(0, most_tokens);
  s.width = 2 * Uniform(1, most_width / 2);
  s.group_size = s.width;
  for (int64_t i = Uniform(0, 3) == 0 ? 3 : 1; i > 0; --i) s.rows.push_back(Uniform(1, most_rows));
  s.levels_unsigned = Uniform(0, 1);
  s.activation = static_cast<Activation>(Uniform(0, 2));
  s.out_type = static_cast<Element>(Uniform(0, 1));
  s.has_bias = Uniform(0, 1);
  s.has_gate = Uniform(0, 1);
  s.in_place = Uniform(0, 1);
  s.has_formats = Uniform(0, 1);
  s.shares_scales = Uniform(0, 2) == 0;
  s.has_padding = Uniform(0, 1);
  return s;
}

TEST(ProductOfSmallSizes) {
  for (int i = 0; i < 1500; ++i) CheckShape(RandomShape(10, 70, 150));
}

TEST(ProductOfMediumSizes) {
  for (int i = 0; i < 150; ++i) CheckShape(RandomShape(90, 200, 600));
}

TEST(ProductOfManyTokens) {
  for (int i = 0; i < 12; ++i) CheckShape(RandomShape(1200, 40, 100));
}

TEST(ProductOfManyChannels) {
  for (int i = 0; i < 12; ++i) CheckShape(RandomShape(40, 600, 600));
}

TEST(ProductOfWideRows) {
  for (int64_t width : {1152, 4608, 4096, 5000, 9216}) {
    Shape s = RandomShape(40, 60, 2);
    s.tokens = 37;
    s.width = s.group_size = width;
    CheckShape(s);
  }
}

TEST(ProductWithGroups) {
  for (int64_t group_size : {4, 8, 12, 16, 20, 32, 36, 48, 60, 64, 68, 72, 96, 100, 128, 132, 144, 200, 256}) {
    for (int i = 0; i < 8; ++i) {
      Shape s = RandomShape(i < 4 ? 8 : 80, 130, 2);
      s.width = group_size * Uniform(1, 600 / group_size);
      s.group_size = group_size;
      CheckShape(s);
    }
  }
}

TEST(ProductOfExtremeLevels) {
  for (int i = 0; i < 40; ++i) {
    Shape s = RandomShape(40, 60, 600);
    s.is_extreme = true;
    s.levels_unsigned = i % 2 == 0;
    CheckShape(s);
  }
}

TEST(ProductAtTheWidestExactWidth) {
  Shape s = RandomShape(1, 20, 2);
  s.tokens = 3;
  s.width = s.group_size = 66310;  // 255 * 127 * 66312 is the last multiple below 2^31
  s.levels_unsigned = s.is_extreme = true;
  CheckShape(s);
  s.levels_unsigned = false;
  CheckShape(s);
}

TEST(NanTokenScaleMakesTheTokenNan) {
  for (int i = 0; i < 20; ++i) {
    Shape s = RandomShape(20, 60, 100);
    s.tokens += 1;
    s.has_nan_scale = true;
    CheckShape(s);
  }
}

TEST(SmallProductUnderValgrind) {
  for (int i = 0; i < 40; ++i) CheckShape(RandomShape(9, 40, 70));
  Shape s = RandomShape(5, 40, 2);
  s.width = 96;
  s.group_size = 12;
  CheckShape(s);
}

}  // namespace

int main(int argc, char** argv) { return RunTests(argc, argv); }
