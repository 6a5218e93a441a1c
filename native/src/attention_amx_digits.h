// Float32 numbers as three signed bytes, for attention with the 8-bit integer matrix unit.
//
// A row of numbers x with largest magnitude M becomes integers X = x / unit, |X| <= 8355701 where unit = M / 8355700,
// and each X three digits to the base 256: X = top * 65536 + mid * 256 + low, every digit a signed byte. Of a product
// of two such numbers the six products of digits that weigh 2^16 or more are kept:
//   X Y = (tt 2^8 + (tm + mt) + (tl + mm + lt) 2^-8) * 2^24  + dropped,  |dropped| <= 2 * 2^14 * 2^8 + 2^14.
// The sums of products of digits are exact in int32. Relative to the product of the two rows' largest magnitudes, a
// term is off by at most 2^-21.6: rounding X and Y costs 1.8e-7, dropping products 1.2e-7. Digits have random signs, so
// the root mean square is about 2^-25, and a score is as accurate as one summed in float32.
#pragma once

#include <stdint.h>

#include "vector.h"

namespace hqdit {
namespace {

constexpr int32_t kInfinityBits = 0x7f800000;
constexpr float kLargestInteger = 8355700.0f;  // three signed digits reach 0x7f7f7f = 8355711
constexpr float kLeastMagnitude = 0x1p-100f;   // rows of smaller numbers are treated as if they held this one

// Added to an integer, it makes the lower digits unsigned, 128 too high; ByteDigits takes the 128 off again.
constexpr int32_t kDigitBias = 0x8080;

// 1 / unit as the sum of two floats: with one float alone, all integers of a row would be off by the same 2^-24 or so.
struct Reciprocal {
  __m512 high, low;
};

inline __m512 UnitOf(__m512i magnitude_bits) {
  const __m512 magnitude = _mm512_max_ps(_mm512_castsi512_ps(magnitude_bits), _mm512_set1_ps(kLeastMagnitude));
  return _mm512_div_ps(magnitude, _mm512_set1_ps(kLargestInteger));
}

inline Reciprocal ReciprocalOf(__m512 unit) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 high = _mm512_div_ps(one, unit);
  return {high, _mm512_mul_ps(high, _mm512_fnmadd_ps(high, unit, one))};
}

inline __m512i BiasedInteger(__m512 x, __m512 reciprocal_high, __m512 reciprocal_low) {
  const __m512 scaled = _mm512_fmadd_ps(x, reciprocal_high, _mm512_mul_ps(x, reciprocal_low));
  return _mm512_add_epi32(_mm512_cvtps_epi32(scaled), _mm512_set1_epi32(kDigitBias));
}

inline __m512i MagnitudeBits(__m512 x) {
  return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(INT32_MAX));
}

// Four numbers a lane, one byte each, for each digit.
struct ByteDigits {
  __m512i top, mid, low;
};

// Byte shuffles count within 128 bits: the control that does the same within each lane of 32 bits.
inline __m512i ShuffleControl(int32_t control) {
  constexpr int32_t kNextLane = 0x04040404;
  return _mm512_set4_epi32(control + 3 * kNextLane, control + 2 * kNextLane, control + kNextLane, control);
}

// From biased integers. Bytes 0 to 3 of a lane come from c, d, a, b: the order that takes the fewest shuffles (seven).
inline ByteDigits DigitsOf(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i sign = _mm512_set1_epi8(-128);
  // Which byte of the second operand goes to bytes 0, 1, 2, 3.
  const __m512i low_word_up = ShuffleControl(0x01000000);  // -, -, 0, 1
  const __m512i odd = ShuffleControl(0x02000002);          // 2, 0, -, 2
  const __m512i even = ShuffleControl(0x00030201);         // 1, 2, 3, -
  const __m512i ca = _mm512_mask_shuffle_epi8(c, 0xccccccccccccccccu, a, low_word_up);
  const __m512i db = _mm512_mask_shuffle_epi8(d, 0xccccccccccccccccu, b, low_word_up);
  const __m512i low = _mm512_mask_shuffle_epi8(ca, 0xaaaaaaaaaaaaaaaau, db, odd);
  const __m512i mid = _mm512_mask_shuffle_epi8(db, 0x5555555555555555u, ca, even);
  __m512i top = _mm512_mask_shuffle_epi8(a, 0x8888888888888888u, b, odd);
  top = _mm512_mask_shuffle_epi8(top, 0x1111111111111111u, c, odd);
  top = _mm512_mask_shuffle_epi8(top, 0x2222222222222222u, d, even);
  return {top, _mm512_xor_si512(mid, sign), _mm512_xor_si512(low, sign)};
}

}  // namespace
}  // namespace hqdit
