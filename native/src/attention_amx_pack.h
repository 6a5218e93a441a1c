// Queries, keys and values as digits (attention_amx_digits.h), laid out as the tiles that the matrix unit reads.
//
// Scores: left tiles hold 16 keys x 64 bytes of one digit each, right tiles 16 queries x 64 dimensions with four
// dimensions in each 32-bit lane. Dimensions go 64 at a time ("chunks", whose order inside a tile is DigitsOf's); 16 or
// fewer that remain are a "tail", whose three digits share one tile, so that a head of 72 takes 9 tile products instead
// of 12:
//   left: a key's (top, mid, low, 0), 16 bytes each; right, for the three weights, top to bottom, 4 rows each:
//   (top, 0, 0, 0), (mid, top, 0, 0) and (low, mid, top, 0), all cut from the rows low, mid, top, 0, 0, 0.
//
// Output: left tiles hold 16 dimensions x 64 keys of the values, transposed, right tiles 16 queries x 64 keys.
#pragma once

#include <stdint.h>

#include "attention_amx_digits.h"
#include "attention_driver.h"
#include "attention_transpose.h"

namespace hqdit {
namespace {

constexpr int kTileBytes = 1024;
constexpr int kRowBytes = 64;
constexpr int kChunk = 64;
constexpr int kDigits = 3;
constexpr int kTailRows = 24;
constexpr int kMostDims = 256;
constexpr int kMostVectors = kMostDims / kLanes;

struct HeadLayout {
  explicit HeadLayout(int64_t head_dim)
      : dims(static_cast<int>(head_dim)),
        vectors(static_cast<int>(CeilDiv(head_dim, kLanes))),
        has_tail(head_dim % kChunk > 0 && head_dim % kChunk <= kLanes),
        chunks(static_cast<int>(CeilDiv(head_dim - (has_tail ? head_dim % kChunk : 0), kChunk))),
        key_bytes(chunks * kDigits * kRowBytes + (has_tail ? kRowBytes : 0)),
        query_bytes(chunks * kDigits * kTileBytes + (has_tail ? kTailRows * kRowBytes : 0)) {
    for (int vector = 0; vector < kMostVectors; ++vector) {
      const int left = dims - vector * kLanes;
      masks[vector] = left >= kLanes ? __mmask16{0xffff} : FirstLanes(left > 0 ? left : 0);
    }
  }

  int dims;
  int vectors;  // of 16 dimensions
  bool has_tail;
  int chunks;
  int key_bytes;    // of one key; a multiple of 64, because tile rows that cross cache lines load five times slower
  int query_bytes;  // of 16 queries

  __mmask16 masks[kMostVectors];  // the dimensions that a vector really has; none beyond the last vector
};

// Elements 16 * vector and following of a row; 0 where `mask` is not set, and nothing is read there.
template <Element kType>
inline __m512 LoadVector(const char* row, int vector, __mmask16 mask) {
  if (kType == Element::kFloat32) return _mm512_maskz_loadu_ps(mask, row + vector * kLanes * 4);
  const __m256i halves = _mm256_maskz_loadu_epi16(mask, row + vector * kLanes * 2);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline void StoreRow(const TokenRows& rows, int64_t row, int vector, __mmask16 mask, __m512 x) {
  char* to = rows.Row(row);
  if (rows.type == Element::kFloat32) {
    _mm512_mask_storeu_ps(to + vector * kLanes * 4, mask, x);
    return;
  }
  // To nearest, ties to even. (The instruction for it takes denormal numbers for 0.)
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i half =
      _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1)));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i halves = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0));
  _mm256_mask_storeu_epi16(to + vector * kLanes * 2, mask, _mm512_cvtepi32_epi16(halves));
}

inline bool HasNonFinite(__m512i magnitude_bits) {
  return _mm512_cmpge_epi32_mask(magnitude_bits, _mm512_set1_epi32(kInfinityBits)) != 0;
}

// ---- keys -----------------------------------------------------------------------------------------------------------

template <Element kType>
inline void StoreKey(const HeadLayout& layout, const char* row, __m512 high, __m512 low, int8_t* to) {
  const auto integers = [&](int vector) {
    return BiasedInteger(LoadVector<kType>(row, vector, layout.masks[vector]), high, low);
  };
  for (int chunk = 0; chunk < layout.chunks; ++chunk, to += kDigits * kRowBytes) {
    const int v = 4 * chunk;
    const ByteDigits digits = DigitsOf(integers(v), integers(v + 1), integers(v + 2), integers(v + 3));
    _mm512_store_si512(to, digits.top);
    _mm512_store_si512(to + kRowBytes, digits.mid);
    _mm512_store_si512(to + 2 * kRowBytes, digits.low);
  }
  if (!layout.has_tail) return;
  const __m512i x = integers(4 * layout.chunks);
  const __m128i sign = _mm_set1_epi8(-128);
  __m128i* parts = reinterpret_cast<__m128i*>(to);
  _mm_store_si128(parts, _mm512_cvtepi32_epi8(_mm512_srli_epi32(x, 16)));
  _mm_store_si128(parts + 1, _mm_xor_si128(_mm512_cvtepi32_epi8(_mm512_srli_epi32(x, 8)), sign));
  _mm_store_si128(parts + 2, _mm_xor_si128(_mm512_cvtepi32_epi8(x), sign));
  _mm_store_si128(parts + 3, _mm_setzero_si128());
}

// Digits and units of `keys` keys, at most 16; false if one is not finite.
template <Element kType>
inline bool PackSomeKeys(const HeadLayout& layout, const TokenRows& k, int64_t first, int keys, int8_t* digits,
                         float* units) {
  alignas(64) int32_t magnitudes[kLanes] = {};
  alignas(64) float high[kLanes], low[kLanes];
  for (int key = 0; key < keys; ++key) {
    __m512i magnitude = _mm512_setzero_si512();
    for (int vector = 0; vector < layout.vectors; ++vector) {
      const __m512 x = LoadVector<kType>(k.Row(first + key), vector, layout.masks[vector]);
      magnitude = _mm512_max_epi32(magnitude, MagnitudeBits(x));
    }
    magnitudes[key] = _mm512_reduce_max_epi32(magnitude);
  }
  const __m512i magnitude = _mm512_load_si512(magnitudes);
  const __m512 unit = UnitOf(magnitude);
  const Reciprocal reciprocal = ReciprocalOf(unit);
  _mm512_store_ps(units, unit);
  _mm512_store_ps(high, reciprocal.high);
  _mm512_store_ps(low, reciprocal.low);
  for (int key = 0; key < keys; ++key) {
    StoreKey<kType>(layout, k.Row(first + key), _mm512_set1_ps(high[key]), _mm512_set1_ps(low[key]),
                    digits + key * layout.key_bytes);
  }
  return !HasNonFinite(magnitude);
}

template <Element kType>
inline bool PackKeys(const HeadLayout& layout, const TokenRows& k, int64_t keys, int8_t* digits, float* units) {
  bool is_finite = true;
  for (int64_t key = 0; key < keys; key += kLanes) {
    is_finite &= PackSomeKeys<kType>(layout, k, key, static_cast<int>(Least(kLanes, keys - key)),
                                     digits + key * layout.key_bytes, units + key);
  }
  return is_finite;
}

// ---- values ---------------------------------------------------------------------------------------------------------

// Three tiles of 16 dimensions x 64 keys, from key `first` on.
template <Element kType>
inline void StoreValueTiles(const TokenRows& v, int64_t first, int64_t keys, int vector, __mmask16 mask,
                            const Reciprocal& reciprocal, int8_t* tiles) {
  const auto integers = [&](int64_t key) {
    const __m512 x = LoadVector<kType>(v.Row(key), vector, key < keys ? mask : __mmask16{0});
    return BiasedInteger(x, reciprocal.high, reciprocal.low);
  };
  __m512i top[16], mid[16], low[16];
  for (int quad = 0; quad < 16; ++quad) {
    const int64_t key = first + 4 * quad;
    const ByteDigits digits = DigitsOf(integers(key), integers(key + 1), integers(key + 2), integers(key + 3));
    top[quad] = digits.top;
    mid[quad] = digits.mid;
    low[quad] = digits.low;
  }
  __m512i* const planes[kDigits] = {top, mid, low};
  for (int digit = 0; digit < kDigits; ++digit) {
    Transpose(planes[digit]);
    for (int row = 0; row < 16; ++row) {
      _mm512_store_si512(tiles + digit * kTileBytes + row * kRowBytes, planes[digit][row]);
    }
  }
}

template <Element kType>
inline void MaxMagnitudes(const HeadLayout& layout, const TokenRows& v, int64_t keys,
                          __m512i magnitudes[kMostVectors]) {
  constexpr int kRows = 4;  // at a time, because updating a maximum in memory takes longer than reading a vector
  for (int vector = 0; vector < layout.vectors; ++vector) magnitudes[vector] = _mm512_setzero_si512();
  for (int64_t key = 0; key < keys; key += kRows) {
    const char* rows[kRows];
    for (int i = 0; i < kRows; ++i) rows[i] = v.Row(Least(key + i, keys - 1));
    for (int vector = 0; vector < layout.vectors; ++vector) {
      const __mmask16 mask = layout.masks[vector];
      __m512i bits[kRows];
      for (int i = 0; i < kRows; ++i) bits[i] = MagnitudeBits(LoadVector<kType>(rows[i], vector, mask));
      const __m512i largest = _mm512_max_epi32(_mm512_max_epi32(bits[0], bits[1]), _mm512_max_epi32(bits[2], bits[3]));
      magnitudes[vector] = _mm512_max_epi32(magnitudes[vector], largest);
    }
  }
}

// Tiles of (chunk of keys, 16 dimensions, digit) in this order, and the unit of each dimension; false if a value is
// not finite.
template <Element kType>
inline bool PackValues(const HeadLayout& layout, const TokenRows& v, int64_t keys, int8_t* tiles, float* units) {
  __m512i magnitudes[kMostVectors];
  MaxMagnitudes<kType>(layout, v, keys, magnitudes);
  bool is_finite = true;
  for (int vector = 0; vector < layout.vectors; ++vector) {
    is_finite &= !HasNonFinite(magnitudes[vector]);
    const __m512 unit = UnitOf(magnitudes[vector]);
    const Reciprocal reciprocal = ReciprocalOf(unit);
    _mm512_store_ps(units + vector * kLanes, unit);
    for (int64_t key = 0; key < keys; key += kChunk) {
      const int64_t tile = (key / kChunk * layout.vectors + vector) * kDigits;
      StoreValueTiles<kType>(v, key, keys, vector, layout.masks[vector], reciprocal, tiles + tile * kTileBytes);
    }
  }
  return is_finite;
}

// ---- queries --------------------------------------------------------------------------------------------------------

// `queries` queries, at most 16, times `factor`, as columns: dimension d of all of them at columns[d].
template <Element kType>
inline void LoadColumns(const HeadLayout& layout, const TokenRows& q, int64_t first, int queries, float factor,
                        __m512i columns[kMostDims]) {
  for (int vector = 0; vector < layout.vectors; ++vector) {
    __m512i* block = columns + vector * kLanes;
    for (int query = 0; query < kLanes; ++query) {
      const __mmask16 mask = query < queries ? layout.masks[vector] : __mmask16{0};
      const __m512 x = LoadVector<kType>(q.Row(first + query), vector, mask);
      block[query] = _mm512_castps_si512(_mm512_mul_ps(x, _mm512_set1_ps(factor)));
    }
    Transpose(block);
  }
}

inline void StoreTail(const ByteDigits& digits, int row, int8_t* to) {
  _mm512_store_si512(to + row * kRowBytes, digits.low);
  _mm512_store_si512(to + (4 + row) * kRowBytes, digits.mid);
  _mm512_store_si512(to + (8 + row) * kRowBytes, digits.top);
  for (int zeros = 12; zeros < kTailRows; zeros += 4) {
    _mm512_store_si512(to + (zeros + row) * kRowBytes, _mm512_setzero_si512());
  }
}

// Digits and units of 16 queries; returns the lanes of those that are not finite.
template <Element kType>
inline __mmask16 PackQueries(const HeadLayout& layout, const TokenRows& q, int64_t first, int queries, float factor,
                             int8_t* digits, float* units) {
  __m512i columns[kMostDims];
  LoadColumns<kType>(layout, q, first, queries, factor, columns);
  const int dims = layout.vectors * kLanes;
  __m512i magnitude = _mm512_setzero_si512();
  for (int dim = 0; dim < dims; ++dim) {
    magnitude = _mm512_max_epi32(magnitude, MagnitudeBits(_mm512_castsi512_ps(columns[dim])));
  }
  const __m512 unit = UnitOf(magnitude);
  const Reciprocal reciprocal = ReciprocalOf(unit);
  _mm512_store_ps(units, unit);
  const auto integers = [&](int dim) {
    const __m512 x = dim < dims ? _mm512_castsi512_ps(columns[dim]) : _mm512_setzero_ps();
    return BiasedInteger(x, reciprocal.high, reciprocal.low);
  };
  for (int chunk = 0; chunk < layout.chunks; ++chunk, digits += kDigits * kTileBytes) {
    for (int row = 0; row < 16; ++row) {
      const int dim = chunk * kChunk + row;
      const ByteDigits four = DigitsOf(integers(dim), integers(dim + 16), integers(dim + 32), integers(dim + 48));
      _mm512_store_si512(digits + row * kRowBytes, four.top);
      _mm512_store_si512(digits + kTileBytes + row * kRowBytes, four.mid);
      _mm512_store_si512(digits + 2 * kTileBytes + row * kRowBytes, four.low);
    }
  }
  for (int row = 0; layout.has_tail && row < 4; ++row) {
    const int dim = layout.chunks * kChunk + 4 * row;
    StoreTail(DigitsOf(integers(dim + 2), integers(dim + 3), integers(dim), integers(dim + 1)), row, digits);
  }
  return _mm512_cmpge_epi32_mask(magnitude, _mm512_set1_epi32(kInfinityBits));
}

}  // namespace
}  // namespace hqdit
