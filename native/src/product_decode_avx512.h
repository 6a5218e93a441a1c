// Packed codes to levels in the layout that vpdpbusd and the AMX tiles read: for each unit (4 consecutive k) 16 output
// channels of 4 bytes each. Included by files compiled with AVX-512.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "product_plan.h"
#include "vector.h"

namespace hqdit {
namespace {

constexpr int kUnit = 4;                    // levels that one lane of vpdpbusd multiplies
constexpr int kRunUnits = 8;                // units that 16 packed bytes hold
constexpr int kUnitBytes = kLanes * kUnit;  // one unit of 16 output channels

// The level tables of 16 output channels: each distinct table with the bytes of a unit that use it.
struct TableSet {
  __m512i tables[kLanes];
  __mmask64 bytes[kLanes];
  int count;
};

// 16 output channels that are decoded together, the last one repeated where fewer are left.
struct Channels {
  const uint8_t* packed[kLanes];
  TableSet set;
};

// `flip` is xored into the levels: 0x80 makes them unsigned, 128 higher.
inline Channels MakeChannels(const Weight& weight, int64_t first, uint8_t flip) {
  Channels channels;
  int formats[kLanes];
  TableSet& set = channels.set;
  set.count = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t row = Min(first + lane, weight.rows - 1);
    channels.packed[lane] = weight.packed + row * weight.row_bytes;
    const int format = weight.format_index == nullptr ? 0 : weight.format_index[row];
    int slot = 0;
    while (slot < set.count && formats[slot] != format) ++slot;
    if (slot == set.count) {
      formats[slot] = format;
      const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight.level_tables + format * 16));
      set.tables[slot] = _mm512_broadcast_i32x4(_mm_xor_si128(table, _mm_set1_epi8(static_cast<char>(flip))));
      set.bytes[slot] = 0;
      ++set.count;
    }
    set.bytes[slot] |= __mmask64{15} << (lane * kUnit);
  }
  return channels;
}

template <bool kOneTable>
inline __m512i LevelsOf(const TableSet& set, __m512i codes) {
  __m512i levels = _mm512_shuffle_epi8(set.tables[0], codes);
  if (kOneTable) return levels;
  for (int i = 1; i < set.count; ++i) {
    levels = _mm512_mask_shuffle_epi8(levels, set.bytes[i], set.tables[i], codes);
  }
  return levels;
}

// Two packed bytes of each 32-bit lane, given as two 16-bit units, to four codes.
inline __m512i SpreadNibbles(__m512i words) {
  // (words | words << 4) & 0x0f0f
  constexpr int kOrAnd = 0xa8;
  return _mm512_ternarylogic_epi32(words, _mm512_slli_epi16(words, 4), _mm512_set1_epi8(15), kOrAnd);
}

// 16 channels x 16 packed bytes, four channels in each vector (channel 4 * lane + i in 128-bit lane `lane` of vector
// i), to `units` units at `out`, `unit_stride` bytes apart.
template <bool kOneTable>
inline void StoreRun(const TableSet& set, const __m512i rows[4], int units, uint8_t* out, int64_t unit_stride) {
  const __m512i pair01_low = _mm512_unpacklo_epi32(rows[0], rows[1]);
  const __m512i pair01_high = _mm512_unpackhi_epi32(rows[0], rows[1]);
  const __m512i pair23_low = _mm512_unpacklo_epi32(rows[2], rows[3]);
  const __m512i pair23_high = _mm512_unpackhi_epi32(rows[2], rows[3]);
  const __m512i columns[4] = {
      _mm512_unpacklo_epi64(pair01_low, pair23_low), _mm512_unpackhi_epi64(pair01_low, pair23_low),
      _mm512_unpacklo_epi64(pair01_high, pair23_high), _mm512_unpackhi_epi64(pair01_high, pair23_high)};
  const __m512i first_words =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1));
  const __m512i second_words =
      _mm512_broadcast_i32x4(_mm_setr_epi8(2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1));
  for (int i = 0; i < 4; ++i) {
    const __m512i first = SpreadNibbles(_mm512_shuffle_epi8(columns[i], first_words));
    const __m512i second = SpreadNibbles(_mm512_shuffle_epi8(columns[i], second_words));
    if (2 * i < units) _mm512_store_si512(out + 2 * i * unit_stride, LevelsOf<kOneTable>(set, first));
    if (2 * i + 1 < units) _mm512_store_si512(out + (2 * i + 1) * unit_stride, LevelsOf<kOneTable>(set, second));
  }
}

// 16 packed bytes of one channel; unless kWhole only those of `bytes` are read, and the others are 0.
template <bool kWhole>
inline __m128i LoadPacked(const uint8_t* packed, __mmask16 bytes) {
  if (kWhole) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  return _mm_maskz_loadu_epi8(bytes, packed);
}

// One run: the levels of `units` units (at most 8) from packed byte `byte` of each channel on, of which `bytes` exist.
template <bool kOneTable, bool kWhole>
inline void DecodeRun(const Channels& channels, int64_t byte, int bytes, int units, uint8_t* out, int64_t unit_stride) {
  const __mmask16 mask = static_cast<__mmask16>((1u << bytes) - 1);
  __m512i rows[4];
  for (int i = 0; i < 4; ++i) {
    // Masked broadcasts from memory, into one 128-bit lane each, leave port 5 to the shuffles.
    rows[i] = _mm512_castsi128_si512(LoadPacked<kWhole>(channels.packed[i] + byte, mask));
    rows[i] = _mm512_mask_broadcast_i32x4(rows[i], 0x00f0, LoadPacked<kWhole>(channels.packed[i + 4] + byte, mask));
    rows[i] = _mm512_mask_broadcast_i32x4(rows[i], 0x0f00, LoadPacked<kWhole>(channels.packed[i + 8] + byte, mask));
    rows[i] = _mm512_mask_broadcast_i32x4(rows[i], 0xf000, LoadPacked<kWhole>(channels.packed[i + 12] + byte, mask));
  }
  StoreRun<kOneTable>(channels.set, rows, units, out, unit_stride);
}

template <bool kOneTable>
inline void DecodeUnits(const Channels& channels, int64_t byte, int64_t bytes, uint8_t* out, int64_t unit_stride) {
  constexpr int kRunBytes = 2 * kRunUnits;
  int64_t done = 0;
  for (; done + kRunBytes <= bytes; done += kRunBytes) {
    DecodeRun<kOneTable, true>(channels, byte + done, kRunBytes, kRunUnits, out, unit_stride);
    out += kRunUnits * unit_stride;
  }
  if (done == bytes) return;
  const int rest = static_cast<int>(bytes - done);
  DecodeRun<kOneTable, false>(channels, byte + done, rest, (rest + 1) / 2, out, unit_stride);
}

// The units of packed bytes [byte, byte + bytes) of each channel. A last unit that is half there is filled with the
// level of code 0; the activations are 0 there.
inline void Decode(const Channels& channels, int64_t byte, int64_t bytes, uint8_t* out, int64_t unit_stride) {
  if (channels.set.count == 1) {
    DecodeUnits<true>(channels, byte, bytes, out, unit_stride);
  } else {
    DecodeUnits<false>(channels, byte, bytes, out, unit_stride);
  }
}

}  // namespace
}  // namespace hqdit
