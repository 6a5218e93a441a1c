// What the kernels on vpdpbusd share. It multiplies unsigned by signed bytes: unsigned activations are the unsigned
// operand as they are; beside signed ones the weights are decoded 128 too high and so unsigned, and the sums start at
// -128 times the sum of the token's levels. Sums modulo 2^32 are exact because the true ones fit.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "product_plan.h"

namespace hqdit {
namespace {

// What is xored into the weights' levels.
inline uint8_t WeightFlip(const ProductArgs& args) { return args.levels_unsigned ? 0 : 0x80; }

// sum + unsigned bytes * signed bytes. As assembly, because around the intrinsic GCC 12 copies sums between registers
// and to memory.
inline void AddDots(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

template <bool kUnsignedLevels>
inline void AddDots(__m512i& sum, __m512i levels, __m512i weights) {
  kUnsignedLevels ? AddDots(sum, levels, weights) : AddDots(sum, weights, levels);
}

inline __mmask64 FirstBytes(int64_t count) { return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1; }

inline int32_t SumOfLevels(const int8_t* levels, int64_t count) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < count; k += 64) {
    AddDots(sum, ones, _mm512_maskz_loadu_epi8(FirstBytes(count - k), levels + k));
  }
  return _mm512_reduce_add_epi32(sum);
}

// Where the sums of (token of the item, group) start, at token * groups + group.
inline void FillStarts(const ProductArgs& args, const Item& item, int32_t* starts) {
  const int64_t groups = GroupCount(args);
  if (args.levels_unsigned) {
    memset(starts, 0, static_cast<size_t>(groups * item.rows) * sizeof(int32_t));
    return;
  }
  for (int64_t i = 0; i < item.rows; ++i) {
    const int8_t* levels = static_cast<const int8_t*>(args.levels) + (item.row + i) * args.levels_stride;
    for (int64_t g = 0; g < groups; ++g) {
      starts[i * groups + g] = -128 * SumOfLevels(levels + g * args.group_size, args.group_size);
    }
  }
}

}  // namespace
}  // namespace hqdit
