// exp and the activations built on it, on sixteen lanes, with the same bits on every instruction set.
//
// Everything is made of operations that IEEE 754 rounds exactly: +, -, *, /, Fma and a last product with a power of
// two. Relative errors (native/tests/vector_math_test.cc holds them to it): Exp 2^-23, Silu 2^-22, GeluErf 2^-21, as
// long as the result is a normal number; GeluTanh 2^-22 for x >= -1, growing below to 2^-17 at x = -8, where the result
// is 1e-21. Nothing overflows into a NaN, minus infinity gives the limit 0 up to 1e-36, and a NaN stays a NaN.
#pragma once

#include "vector.h"

#if defined(__FMA__)
#define HQDIT_INLINE_MATH HQDIT_INLINE
#else
// Fma is a library call for each lane here: too much code to repeat wherever a function is used.
#define HQDIT_INLINE_MATH __attribute__((noinline, unused))
#endif

namespace hqdit {
namespace {

// p * 2^n for n from -252 to 254, p within 2^-2 .. 2^2, rounded once.
HQDIT_INLINE Float16Lanes ScaleByPowerOfTwo(Float16Lanes p, Float16Lanes n, Int16Lanes n_as_int) {
#if defined(__AVX512F__)
  (void)n_as_int;
  Float16Lanes out;
  out.part[0] = FloatPart(_mm512_scalef_ps(__m512(p.part[0]), __m512(n.part[0])));
  return out;
#else
  (void)n;
  // Two factors, because 2^n itself may be no float. The first product is exact, so only the second one rounds.
  constexpr int kExponentBias = 127, kMantissaBits = 23;
  const Int16Lanes half = n_as_int >> 1;
  const Float16Lanes first = FloatFromBits((half + Int16Lanes(kExponentBias)) << kMantissaBits);
  const Float16Lanes second = FloatFromBits((n_as_int - half + Int16Lanes(kExponentBias)) << kMantissaBits);
  return p * first * second;
#endif
}

// e^x: 2^n e^r with n the integer nearest to x / ln 2 and |r| <= ln 2 / 2, where a polynomial of degree 6 errs by 3e-9.
HQDIT_INLINE_MATH Float16Lanes Exp(Float16Lanes x) {
  // Beyond these the result is 0 and infinity in float32 anyway. NaN passes: Min and Max keep their second operand.
  constexpr float kLowest = -104.0f, kHighest = 89.0f;
  constexpr float kInverseLn2 = 0x1.715476p+0f;
  constexpr float kLn2High = 0x1.62e430p-1f, kLn2Low = -0x1.05c610p-29f;
  // Adding it to |y| < 2^22 leaves y's nearest integer in the low bits of the mantissa.
  constexpr float kRoundingShift = 0x1.8p23f;

  x = Max(Float16Lanes(kLowest), Min(Float16Lanes(kHighest), x));
  const Float16Lanes shifted = Fma(x, kInverseLn2, kRoundingShift);
  const Float16Lanes n = shifted - kRoundingShift;
  Float16Lanes r = Fma(n, -kLn2High, x);
  r = Fma(n, -kLn2Low, r);

  Float16Lanes p = 0x1.6a2432p-10f;
  p = Fma(p, r, 0x1.1239e2p-7f);
  p = Fma(p, r, 0x1.5558f2p-5f);
  p = Fma(p, r, 0x1.555492p-3f);
  p = Fma(p, r, 0x1.fffffcp-2f);
  p = Fma(p, r, 1.0f);
  p = Fma(p, r, 1.0f);
  return ScaleByPowerOfTwo(p, n, BitsOf(shifted) - BitsOf(Float16Lanes(kRoundingShift)));
}

// x / (1 + e^-x).
HQDIT_INLINE_MATH Float16Lanes Silu(Float16Lanes x) {
  // Below it e^-x would overflow, and minus infinity would give a NaN; the result there is -5e-37, as good as its 0.
  constexpr float kLowest = -88.0f;
  const Float16Lanes clamped = Max(Float16Lanes(kLowest), x);
  return clamped / (Exp(-clamped) + 1.0f);
}

// x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), written as x / (1 + e^(-2 u)): without the cancellation
// of 1 + tanh u, and with one division.
HQDIT_INLINE_MATH Float16Lanes GeluTanh(Float16Lanes x) {
  constexpr float kLinear = -1.5957691216057308f;   // -2 sqrt(2 / pi)
  constexpr float kCubic = -0.071354816272600246f;  // -2 sqrt(2 / pi) 0.044715
  constexpr float kLowest = -10.0f;                 // as in Silu; the result there is -6e-37
  const Float16Lanes clamped = Max(Float16Lanes(kLowest), x);
  const Float16Lanes exponent = clamped * Fma(clamped * clamped, kCubic, kLinear);
  return clamped / (Exp(exponent) + 1.0f);
}

// x P(x), P the normal distribution function. P(-a) = e^(-a^2 / 2) R(a) for a >= 0, where R, the ratio of the tail to
// the density, is a polynomial of degree 9 in t = 1 / (1 + 0.35 a) up to 3.2e-8.
HQDIT_INLINE_MATH Float16Lanes GeluErf(Float16Lanes x) {
  constexpr float kFarthest = 13.0f;  // P(-13) is 6e-39, below the normal numbers
  const Float16Lanes clamped = Max(Float16Lanes(-kFarthest), x);
  const Float16Lanes a = Min(Float16Lanes(kFarthest), Abs(x));
  const Float16Lanes t = Float16Lanes(1.0f) / Fma(a, 0.35f, 1.0f);

  Float16Lanes ratio = -0.029108899870254043f;
  ratio = Fma(ratio, t, 0.1437880744581658f);
  ratio = Fma(ratio, t, -0.2553269760645384f);
  ratio = Fma(ratio, t, 0.158721686874601f);
  ratio = Fma(ratio, t, -0.022790533715220745f);
  ratio = Fma(ratio, t, 0.10536910961280532f);
  ratio = Fma(ratio, t, 0.11986910952391763f);
  ratio = Fma(ratio, t, 0.13985670175803974f);
  ratio = Fma(ratio, t, 0.13962171159566708f);

  const Float16Lanes square = a * a;
  const Float16Lanes square_error = Fma(a, a, -square);  // what rounding the square left out
  const Float16Lanes density = Exp(square * -0.5f);
  const Float16Lanes tail = Fma(density, square_error * -0.5f, density) * (ratio * t);
  const Float16Lanes probability = Select(Less(x, Float16Lanes(0.0f)), tail, Float16Lanes(1.0f) - tail);
  return clamped * probability;
}

}  // namespace
}  // namespace hqdit
