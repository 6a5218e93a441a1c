// Sixteen float32 or int32 lanes, the same on every instruction set: the same functions, the same bits.
//
// A vector is one 512-bit register, two of 256 bits or four of 128 bits: GCC keeps a struct of such parts in registers,
// but keeps a 64-byte vector extension in memory where the machine has no 64-byte register. Where a NaN meets another
// operand, only that the result is a NaN is the same everywhere, not its payload.
//
// Everything is in an anonymous namespace, because this file is compiled with different flags (kernel_table.h).
#pragma once

#include <stdint.h>
#if defined(__x86_64__)
// GCC 12 takes the "undefined" operand of its own AVX-512 intrinsics for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

// Vectors wider than the baseline's are only passed to functions that are inlined, so no calling convention matters.
#pragma GCC diagnostic ignored "-Wpsabi"

#define HQDIT_INLINE inline __attribute__((always_inline))
#define HQDIT_INLINE_LAMBDA __attribute__((always_inline))  // behind a lambda's parameters

namespace hqdit {
namespace {

constexpr int kLanes = 16;

#if defined(__AVX512F__)
constexpr int kPartBytes = 64;
#elif defined(__AVX2__)
constexpr int kPartBytes = 32;
#else
constexpr int kPartBytes = 16;
#endif
constexpr int kParts = 64 / kPartBytes;
constexpr int kPartLanes = kLanes / kParts;

typedef float FloatPart __attribute__((vector_size(kPartBytes)));
typedef int32_t IntPart __attribute__((vector_size(kPartBytes)));
typedef uint32_t UnsignedPart __attribute__((vector_size(kPartBytes)));

// What a comparison gives, for Select and Any.
#if defined(__AVX512F__)
typedef __mmask16 MaskPart;
#else
typedef IntPart MaskPart;
#endif

struct Mask16Lanes {
  MaskPart part[kParts];
};

// Both vectors convert from a scalar, which fills all lanes, so that formulas read as on scalars.
struct Float16Lanes {
  FloatPart part[kParts];

  Float16Lanes() = default;
  HQDIT_INLINE Float16Lanes(float value) {
    for (FloatPart& p : part) p = value - FloatPart{};  // not a sum, which would lose the sign of -0
  }
  HQDIT_INLINE float operator[](int lane) const { return part[lane / kPartLanes][lane % kPartLanes]; }
};

struct Int16Lanes {
  IntPart part[kParts];

  Int16Lanes() = default;
  HQDIT_INLINE Int16Lanes(int32_t value) {
    for (IntPart& p : part) p = IntPart{} + value;
  }
  HQDIT_INLINE int32_t operator[](int lane) const { return part[lane / kPartLanes][lane % kPartLanes]; }
};

// Applies `f` to the parts, of one vector or of two.
template <typename Out, typename A, typename F>
HQDIT_INLINE Out MapParts(const A& a, F f) {
  Out out;
  for (int i = 0; i < kParts; ++i) out.part[i] = f(a.part[i]);
  return out;
}
template <typename Out, typename A, typename B, typename F>
HQDIT_INLINE Out MapParts(const A& a, const B& b, F f) {
  Out out;
  for (int i = 0; i < kParts; ++i) out.part[i] = f(a.part[i], b.part[i]);
  return out;
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------

HQDIT_INLINE Float16Lanes operator+(Float16Lanes a, Float16Lanes b) {
  return MapParts<Float16Lanes>(a, b, [](FloatPart x, FloatPart y) { return x + y; });
}
HQDIT_INLINE Float16Lanes operator-(Float16Lanes a, Float16Lanes b) {
  return MapParts<Float16Lanes>(a, b, [](FloatPart x, FloatPart y) { return x - y; });
}
HQDIT_INLINE Float16Lanes operator*(Float16Lanes a, Float16Lanes b) {
  return MapParts<Float16Lanes>(a, b, [](FloatPart x, FloatPart y) { return x * y; });
}
HQDIT_INLINE Float16Lanes operator/(Float16Lanes a, Float16Lanes b) {
  return MapParts<Float16Lanes>(a, b, [](FloatPart x, FloatPart y) { return x / y; });
}
HQDIT_INLINE Float16Lanes operator-(Float16Lanes a) {
  return MapParts<Float16Lanes>(a, [](FloatPart x) { return -x; });
}

// Sums and differences wrap around.
HQDIT_INLINE Int16Lanes operator+(Int16Lanes a, Int16Lanes b) {
  return MapParts<Int16Lanes>(a, b, [](IntPart x, IntPart y) { return IntPart(UnsignedPart(x) + UnsignedPart(y)); });
}
HQDIT_INLINE Int16Lanes operator-(Int16Lanes a, Int16Lanes b) {
  return MapParts<Int16Lanes>(a, b, [](IntPart x, IntPart y) { return IntPart(UnsignedPart(x) - UnsignedPart(y)); });
}
HQDIT_INLINE Int16Lanes operator&(Int16Lanes a, Int16Lanes b) {
  return MapParts<Int16Lanes>(a, b, [](IntPart x, IntPart y) { return x & y; });
}
HQDIT_INLINE Int16Lanes operator|(Int16Lanes a, Int16Lanes b) {
  return MapParts<Int16Lanes>(a, b, [](IntPart x, IntPart y) { return x | y; });
}
HQDIT_INLINE Int16Lanes operator^(Int16Lanes a, Int16Lanes b) {
  return MapParts<Int16Lanes>(a, b, [](IntPart x, IntPart y) { return x ^ y; });
}
// Shifts of all lanes by the same count; to the right with the sign.
HQDIT_INLINE Int16Lanes operator<<(Int16Lanes a, int count) {
  return MapParts<Int16Lanes>(a, [count](IntPart x) { return IntPart(UnsignedPart(x) << count); });
}
HQDIT_INLINE Int16Lanes operator>>(Int16Lanes a, int count) {
  return MapParts<Int16Lanes>(a, [count](IntPart x) { return x >> count; });
}

// a * b + c, rounded once. Without FMA instructions this is a library call for each lane: right, but slow.
HQDIT_INLINE Float16Lanes Fma(Float16Lanes a, Float16Lanes b, Float16Lanes c) {
  Float16Lanes out;
  for (int i = 0; i < kParts; ++i) {
#if defined(__AVX512F__)
    out.part[i] = FloatPart(_mm512_fmadd_ps(__m512(a.part[i]), __m512(b.part[i]), __m512(c.part[i])));
#elif defined(__FMA__)
    out.part[i] = FloatPart(_mm256_fmadd_ps(__m256(a.part[i]), __m256(b.part[i]), __m256(c.part[i])));
#else
    for (int lane = 0; lane < kPartLanes; ++lane) {
      out.part[i][lane] = __builtin_fmaf(a.part[i][lane], b.part[i][lane], c.part[i][lane]);
    }
#endif
  }
  return out;
}

// ---- bits, comparisons, selection -----------------------------------------------------------------------------------

HQDIT_INLINE Int16Lanes BitsOf(Float16Lanes a) {
  return MapParts<Int16Lanes>(a, [](FloatPart x) { return IntPart(x); });
}
HQDIT_INLINE Float16Lanes FloatFromBits(Int16Lanes a) {
  return MapParts<Float16Lanes>(a, [](IntPart x) { return FloatPart(x); });
}

HQDIT_INLINE Float16Lanes Abs(Float16Lanes a) { return FloatFromBits(BitsOf(a) & Int16Lanes(0x7fffffff)); }

// a < b; false where either is a NaN.
HQDIT_INLINE Mask16Lanes Less(Float16Lanes a, Float16Lanes b) {
#if defined(__AVX512F__)
  return {{_mm512_cmp_ps_mask(__m512(a.part[0]), __m512(b.part[0]), _CMP_LT_OQ)}};
#else
  return MapParts<Mask16Lanes>(a, b, [](FloatPart x, FloatPart y) { return x < y; });
#endif
}
// a <= b; false where either is a NaN.
HQDIT_INLINE Mask16Lanes LessEqual(Float16Lanes a, Float16Lanes b) {
#if defined(__AVX512F__)
  return {{_mm512_cmp_ps_mask(__m512(a.part[0]), __m512(b.part[0]), _CMP_LE_OQ)}};
#else
  return MapParts<Mask16Lanes>(a, b, [](FloatPart x, FloatPart y) { return x <= y; });
#endif
}
HQDIT_INLINE Mask16Lanes Less(Int16Lanes a, Int16Lanes b) {
#if defined(__AVX512F__)
  return {{_mm512_cmplt_epi32_mask(__m512i(a.part[0]), __m512i(b.part[0]))}};
#else
  return MapParts<Mask16Lanes>(a, b, [](IntPart x, IntPart y) { return x < y; });
#endif
}

// yes where `mask` holds, else no.
HQDIT_INLINE Int16Lanes Select(Mask16Lanes mask, Int16Lanes yes, Int16Lanes no) {
  Int16Lanes out;
  for (int i = 0; i < kParts; ++i) {
#if defined(__AVX512F__)
    out.part[i] = IntPart(_mm512_mask_blend_epi32(mask.part[i], __m512i(no.part[i]), __m512i(yes.part[i])));
#elif defined(__AVX2__)
    out.part[i] = IntPart(_mm256_blendv_epi8(__m256i(no.part[i]), __m256i(yes.part[i]), __m256i(mask.part[i])));
#else
    out.part[i] = (mask.part[i] & yes.part[i]) | (~mask.part[i] & no.part[i]);
#endif
  }
  return out;
}
HQDIT_INLINE Float16Lanes Select(Mask16Lanes mask, Float16Lanes yes, Float16Lanes no) {
  return FloatFromBits(Select(mask, BitsOf(yes), BitsOf(no)));
}

// a > b ? a : b and a < b ? a : b, so b where either is a NaN or both are zeros: put what must survive second.
HQDIT_INLINE Float16Lanes Max(Float16Lanes a, Float16Lanes b) {
#if defined(__AVX512F__)
  return MapParts<Float16Lanes>(a, b, [](FloatPart x, FloatPart y) { return FloatPart(_mm512_max_ps(x, y)); });
#elif defined(__AVX2__)
  return MapParts<Float16Lanes>(a, b, [](FloatPart x, FloatPart y) { return FloatPart(_mm256_max_ps(x, y)); });
#elif defined(__SSE2__)
  return MapParts<Float16Lanes>(a, b, [](FloatPart x, FloatPart y) { return FloatPart(_mm_max_ps(x, y)); });
#else
  return MapParts<Float16Lanes>(a, b, [](FloatPart x, FloatPart y) { return x > y ? x : y; });
#endif
}
HQDIT_INLINE Float16Lanes Min(Float16Lanes a, Float16Lanes b) {
#if defined(__AVX512F__)
  return MapParts<Float16Lanes>(a, b, [](FloatPart x, FloatPart y) { return FloatPart(_mm512_min_ps(x, y)); });
#elif defined(__AVX2__)
  return MapParts<Float16Lanes>(a, b, [](FloatPart x, FloatPart y) { return FloatPart(_mm256_min_ps(x, y)); });
#elif defined(__SSE2__)
  return MapParts<Float16Lanes>(a, b, [](FloatPart x, FloatPart y) { return FloatPart(_mm_min_ps(x, y)); });
#else
  return MapParts<Float16Lanes>(a, b, [](FloatPart x, FloatPart y) { return x < y ? x : y; });
#endif
}
HQDIT_INLINE Int16Lanes Max(Int16Lanes a, Int16Lanes b) {
  return MapParts<Int16Lanes>(a, b, [](IntPart x, IntPart y) { return x > y ? x : y; });
}
HQDIT_INLINE Int16Lanes Min(Int16Lanes a, Int16Lanes b) {
  return MapParts<Int16Lanes>(a, b, [](IntPart x, IntPart y) { return x < y ? x : y; });
}

// The first `count` lanes, 0 in the others.
HQDIT_INLINE Float16Lanes KeepFirst(Float16Lanes a, int count) {
  Int16Lanes lane_numbers;
  for (int i = 0; i < kLanes; ++i) lane_numbers.part[i / kPartLanes][i % kPartLanes] = i;
  return Select(Less(lane_numbers, Int16Lanes(count)), a, Float16Lanes(0.0f));
}

// ---- lanes across a vector ------------------------------------------------------------------------------------------

// Lane i of the result is lane i ^ kDistance of `a`; kDistance is 1, 2, 4 or 8.
template <int kDistance, typename Lanes>
HQDIT_INLINE Lanes SwapLanes(Lanes a) {
  static_assert(kDistance == 1 || kDistance == 2 || kDistance == 4 || kDistance == 8, "a power of two below kLanes");
  Lanes out;
  for (int i = 0; i < kParts; ++i) {
    if (kDistance >= kPartLanes) {
      out.part[i] = a.part[i ^ (kDistance / kPartLanes)];
    } else {
      IntPart from;
      for (int lane = 0; lane < kPartLanes; ++lane) from[lane] = lane ^ (kDistance % kPartLanes);
      out.part[i] = __builtin_shuffle(a.part[i], from);
    }
  }
  return out;
}

// The largest lane; no NaN may be among them.
HQDIT_INLINE float HorizontalMax(Float16Lanes a) {
  a = Max(a, SwapLanes<8>(a));
  a = Max(a, SwapLanes<4>(a));
  a = Max(a, SwapLanes<2>(a));
  return Max(a, SwapLanes<1>(a))[0];
}
HQDIT_INLINE int32_t HorizontalMax(Int16Lanes a) {
  a = Max(a, SwapLanes<8>(a));
  a = Max(a, SwapLanes<4>(a));
  a = Max(a, SwapLanes<2>(a));
  return Max(a, SwapLanes<1>(a))[0];
}
// The sum of the lanes, as a tree over distances 8, 4, 2, 1.
HQDIT_INLINE float HorizontalSum(Float16Lanes a) {
  a = a + SwapLanes<8>(a);
  a = a + SwapLanes<4>(a);
  a = a + SwapLanes<2>(a);
  return (a + SwapLanes<1>(a))[0];
}

// ---- between float and int ------------------------------------------------------------------------------------------

HQDIT_INLINE Float16Lanes ToFloat(Int16Lanes a) {
  return MapParts<Float16Lanes>(a, [](IntPart x) { return __builtin_convertvector(x, FloatPart); });
}

// To the nearest integer, ties to even; INT32_MIN where that does not fit and for a NaN.
HQDIT_INLINE Int16Lanes RoundToInt(Float16Lanes a) {
  Int16Lanes out;
  for (int i = 0; i < kParts; ++i) {
#if defined(__AVX512F__)
    out.part[i] = IntPart(_mm512_cvtps_epi32(__m512(a.part[i])));
#elif defined(__AVX2__)
    out.part[i] = IntPart(_mm256_cvtps_epi32(__m256(a.part[i])));
#elif defined(__SSE2__)
    out.part[i] = IntPart(_mm_cvtps_epi32(__m128(a.part[i])));
#else
    for (int lane = 0; lane < kPartLanes; ++lane) {
      const float x = a.part[i][lane];
      out.part[i][lane] = x >= -0x1p31f && x < 0x1p31f ? int32_t(__builtin_rintf(x)) : INT32_MIN;
    }
#endif
  }
  return out;
}

#if !defined(__AVX2__)
// The nearest integer plus `step` where that is not on the wanted side of `a`, without a rounding instruction.
template <typename IsWrong>
HQDIT_INLINE Float16Lanes RoundAndCorrect(Float16Lanes a, float step, IsWrong is_wrong) {
  constexpr float kAllIntegers = 0x1p23f;  // from here on every float is an integer
  const Int16Lanes sign = BitsOf(a) & Int16Lanes(INT32_MIN);
  const Float16Lanes shift = FloatFromBits(BitsOf(Float16Lanes(kAllIntegers)) | sign);
  const Float16Lanes nearest = (a + shift) - shift;
  const Float16Lanes moved = nearest + Select(is_wrong(nearest, a), Float16Lanes(step), Float16Lanes(0.0f));
  const Float16Lanes signed_zero_kept = FloatFromBits(BitsOf(moved) | sign);
  return Select(Less(Abs(a), Float16Lanes(kAllIntegers)), signed_zero_kept, a);
}
#endif

// The largest integer not above `a`, and the smallest not below; NaN, infinities and the sign of zero are kept.
HQDIT_INLINE Float16Lanes Floor(Float16Lanes a) {
#if defined(__AVX512F__)
  return MapParts<Float16Lanes>(
      a, [](FloatPart x) { return FloatPart(_mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)); });
#elif defined(__AVX2__)
  return MapParts<Float16Lanes>(a, [](FloatPart x) { return FloatPart(_mm256_floor_ps(x)); });
#else
  return RoundAndCorrect(a, -1.0f, [](Float16Lanes nearest, Float16Lanes x) { return Less(x, nearest); });
#endif
}
HQDIT_INLINE Float16Lanes Ceil(Float16Lanes a) {
#if defined(__AVX512F__)
  return MapParts<Float16Lanes>(
      a, [](FloatPart x) { return FloatPart(_mm512_roundscale_ps(x, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC)); });
#elif defined(__AVX2__)
  return MapParts<Float16Lanes>(a, [](FloatPart x) { return FloatPart(_mm256_ceil_ps(x)); });
#else
  return RoundAndCorrect(a, 1.0f, [](Float16Lanes nearest, Float16Lanes x) { return Less(nearest, x); });
#endif
}

// RoundToInt(Floor(a)) and RoundToInt(Ceil(a)).
HQDIT_INLINE Int16Lanes FloorToInt(Float16Lanes a) {
#if defined(__AVX512F__)
  return MapParts<Int16Lanes>(
      a, [](FloatPart x) { return IntPart(_mm512_cvt_roundps_epi32(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)); });
#else
  return RoundToInt(Floor(a));
#endif
}
HQDIT_INLINE Int16Lanes CeilToInt(Float16Lanes a) {
#if defined(__AVX512F__)
  return MapParts<Int16Lanes>(
      a, [](FloatPart x) { return IntPart(_mm512_cvt_roundps_epi32(x, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC)); });
#else
  return RoundToInt(Ceil(a));
#endif
}

// ---- memory: any alignment; the partial ones touch the first `count` elements only, 0 to 16 -------------------------

// Part by part: a copy of the whole struct would go through memory.
template <typename Lanes, typename Element>
HQDIT_INLINE Lanes LoadParts(const Element* from) {
  Lanes out;
  for (int i = 0; i < kParts; ++i) __builtin_memcpy(&out.part[i], from + i * kPartLanes, kPartBytes);
  return out;
}
template <typename Lanes, typename Element>
HQDIT_INLINE void StoreParts(Element* to, const Lanes& a) {
  for (int i = 0; i < kParts; ++i) __builtin_memcpy(to + i * kPartLanes, &a.part[i], kPartBytes);
}
HQDIT_INLINE Float16Lanes Load(const float* from) { return LoadParts<Float16Lanes>(from); }
HQDIT_INLINE Int16Lanes Load(const int32_t* from) { return LoadParts<Int16Lanes>(from); }
HQDIT_INLINE void Store(float* to, Float16Lanes a) { StoreParts(to, a); }
HQDIT_INLINE void Store(int32_t* to, Int16Lanes a) { StoreParts(to, a); }

#if defined(__AVX512F__)
HQDIT_INLINE __mmask16 FirstLanes(int count) { return __mmask16((1u << count) - 1); }
#elif defined(__AVX2__)
// All ones in the lanes of part `part` that lie below `count`.
HQDIT_INLINE __m256i FirstLanes(int count, int part) {
  const __m256i lanes =
      _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(part * kPartLanes));
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes);
}
#endif

// The missing lanes are 0.
HQDIT_INLINE Float16Lanes LoadPartial(const float* from, int count) {
#if defined(__AVX512F__)
  Float16Lanes out;
  out.part[0] = FloatPart(_mm512_maskz_loadu_ps(FirstLanes(count), from));
  return out;
#elif defined(__AVX2__)
  Float16Lanes out;
  for (int i = 0; i < kParts; ++i) {
    out.part[i] = FloatPart(_mm256_maskload_ps(from + i * kPartLanes, FirstLanes(count, i)));
  }
  return out;
#else
  float lanes[kLanes] = {};
  for (int i = 0; i < count; ++i) lanes[i] = from[i];
  return Load(lanes);
#endif
}
HQDIT_INLINE void StorePartial(float* to, Float16Lanes a, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, FirstLanes(count), __m512(a.part[0]));
#elif defined(__AVX2__)
  for (int i = 0; i < kParts; ++i) {
    _mm256_maskstore_ps(to + i * kPartLanes, FirstLanes(count, i), __m256(a.part[i]));
  }
#else
  float lanes[kLanes];
  Store(lanes, a);
  for (int i = 0; i < count; ++i) to[i] = lanes[i];
#endif
}

// ---- bfloat16, as uint16_t: the high half of a float32 --------------------------------------------------------------

HQDIT_INLINE Float16Lanes LoadBFloat16(const uint16_t* from) {
#if defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  Int16Lanes out;
  out.part[0] = IntPart(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  return FloatFromBits(out);
#elif defined(__AVX2__)
  Int16Lanes out;
  for (int i = 0; i < kParts; ++i) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * kPartLanes));
    out.part[i] = IntPart(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  return FloatFromBits(out);
#else
  int32_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = int32_t(uint32_t(from[i]) << 16);
  return FloatFromBits(Load(lanes));
#endif
}
HQDIT_INLINE Float16Lanes LoadBFloat16Partial(const uint16_t* from, int count) {
  uint16_t lanes[kLanes] = {};
  for (int i = 0; i < count; ++i) lanes[i] = from[i];
  return LoadBFloat16(lanes);
}

// Rounded to nearest, ties to even, in the low half of each lane; a NaN stays a NaN and becomes quiet.
HQDIT_INLINE Int16Lanes RoundToBFloat16(Float16Lanes a) {
  const Int16Lanes bits = BitsOf(a);
  const Int16Lanes high = (bits >> 16) & Int16Lanes(0xffff);
  const Int16Lanes rounded = ((bits + Int16Lanes(0x7fff) + (high & Int16Lanes(1))) >> 16) & Int16Lanes(0xffff);
  const Mask16Lanes is_nan = Less(Int16Lanes(0x7f800000), bits & Int16Lanes(0x7fffffff));
  return Select(is_nan, high | Int16Lanes(0x40), rounded);
}
HQDIT_INLINE void StoreBFloat16(uint16_t* to, Float16Lanes a) {
  const Int16Lanes halves = RoundToBFloat16(a);
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(__m512i(halves.part[0])));
#elif defined(__AVX2__)
  // The pack works within halves of 128 bits; the permutation puts its quarters in order.
  const __m256i packed = _mm256_packus_epi32(__m256i(halves.part[0]), __m256i(halves.part[1]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
#else
  int32_t lanes[kLanes];
  Store(lanes, halves);
  for (int i = 0; i < kLanes; ++i) to[i] = uint16_t(lanes[i]);
#endif
}
HQDIT_INLINE void StoreBFloat16Partial(uint16_t* to, Float16Lanes a, int count) {
  uint16_t lanes[kLanes];
  StoreBFloat16(lanes, a);
  for (int i = 0; i < count; ++i) to[i] = lanes[i];
}

}  // namespace
}  // namespace hqdit
