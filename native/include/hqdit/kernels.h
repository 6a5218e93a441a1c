// The kernels as plain C++ on raw pointers and sizes: no Python, no torch.
//
// Vocabulary (docs/kernels.md): a *code* is what a format stores (4 bits), a *level* is the small integer a code stands
// for, number = level * scale. Activations travel as levels (one byte each), weights as packed codes.
//
// Every kernel gives the same bits for every number of threads. In the product and in rotate + quantize the float
// operations and their order are part of the definition, so that they also give the same bits on every instruction set;
// attention is of float32 accuracy everywhere, in an order of its own on each. Nothing is contracted into a fused
// multiply-add unless it is written as one (compiled with -ffp-contract=off).
//
// The functions check nothing but what follows from memory: callers (Python: hqdit.kernels.native_ops) see to shapes and
// ranges. They return false if working memory could not be had; outputs are then undefined.
#pragma once

#include <cstdint>

namespace hqdit {

enum class Element : int32_t { kFloat32 = 0, kBFloat16 = 1 };

// ---- the product ----------------------------------------------------------------------------------------------------

// One packed weight. Row n holds K codes, two a byte, the low nibble first, `row_bytes` apart.
struct Weight {
  const uint8_t* packed;        // rows * row_bytes
  int64_t row_bytes;            // at least K / 2
  int64_t rows;                 // N, output channels
  const int8_t* level_tables;   // formats * 16: level of each code, any int8 value
  const uint8_t* format_index;  // rows: which table each row uses; null: table 0 for all
  const float* scale;           // scale of (row n, group g) at n * scale_row_stride + g * scale_group_stride
  int64_t scale_row_stride;     // 0 where all rows share a scale
  int64_t scale_group_stride;   // 0 where all groups share a scale
  const float* bias;            // rows, or null
  // Output of this weight: element (m, n) at out + m * out_stride + n (elements of `ProductArgs::out_type`).
  void* out;
  int64_t out_stride;
  // y = residual + gate * f(...), see below; both null or given, addressed like `out`. `residual` may equal `out`.
  const float* gate;            // gate of (m, n) at (m / tokens_per_gate) * gate_stride + n
  int64_t gate_stride;
  int64_t tokens_per_gate;      // at least 1
  const void* residual;
  int64_t residual_stride;
};

enum class Activation : int32_t { kNone = 0, kGeluTanh = 1, kGeluErf = 2 };

// y = f(sum over groups g, ascending, of float(sum_k a_k w_k) * token_scale * weight_scale, + bias) [* gate + residual]
//
// The inner sum is an exact int32. In float32, in this order, each operation rounded by itself:
//   part_g = (float(sum_g) * token_scale_g) * weight_scale_g;  y = part_0; y = y + part_1; ...; y = y + bias;
//   y = f(y); y = y * gate; y = y + residual; then rounded to out_type (to nearest, ties to even).
// Several weights can read one activation in one call (q, k, v).
struct ProductArgs {
  const void* levels;           // rows of K levels, `levels_stride` bytes apart
  int64_t levels_stride;
  bool levels_unsigned;         // uint8 instead of int8; int8 levels may be -128
  const float* token_scale;     // scale of (m, g) at m * token_scale_stride + g * token_scale_group_stride
  int64_t token_scale_stride;
  int64_t token_scale_group_stride;  // 0 where all groups share a scale
  int64_t tokens;               // M, may be 0
  int64_t width;                // K, even, at least 2; the sums fit in int32
  int64_t group_size;           // K if there is one group, else a multiple of 4 that divides K
  const Weight* weights;
  int64_t weight_count;
  Activation activation;        // the same for all weights
  Element out_type;             // also the type of `residual`
};

[[nodiscard]] bool Product(const ProductArgs& args, int threads);

// ---- rotate and quantize --------------------------------------------------------------------------------------------

enum class Front : int32_t { kNone = 0, kLayerNormModulate = 1, kGeluTanh = 2, kGeluErf = 3, kSilu = 4 };
enum class ScaleRule : int32_t { kAbsmax = 0, kRms = 1, kStatic = 2 };

// Levels and scales of each token of x:
//   1. front: nothing, LayerNorm without weights then * (1 + mod_scale) + mod_shift, GELU or SiLU;
//   2. static, per channel: y = (y - input_shift) * input_scale;
//   3. rotation: y = y diag(signs) H * normalization, with H as below;
//   4. y = y / channel_scale (per channel, after the rotation), as a product with its reciprocal;
//   5. per token and group: scale = max(absmax / top, 2^-126), or max(rms * rms_factor, 2^-126), or the static scale;
//      then, where asked for, rounded to 8 bits: with e = floor(log2(largest scale of the token)) and unit = 2^(e - 7),
//      scale = unit * E4M3(scale / unit), to nearest, ties to even, at least 2^-9 * unit. E4M3's numbers have 3 bits of
//      mantissa down to 2^-6 and are multiples of 2^-9 below. All of this is exact: no rounding but that one;
//      a token that holds a NaN or an infinity after step 4, or has an infinite scale, gets NaN scales, all of them, and
//      any levels;
//   6. level nearest to y * (1 / scale): a count of `thresholds` not above it gives the rung, `rung_levels` its level.
// One-sided formats (rung_levels[0] >= 0) take absmax over positive values only.
struct RotateQuantizeArgs {
  const void* x;                // tokens rows of `width`, `x_stride` elements apart
  int64_t x_stride;
  Element x_type;
  int64_t tokens;               // may be 0
  int64_t width;

  Front front;
  float layer_norm_eps;
  const float* mod_scale;       // of (m, c) at (m / tokens_per_mod) * mod_stride + c; null unless kLayerNormModulate
  const float* mod_shift;       // likewise
  int64_t mod_stride;
  int64_t tokens_per_mod;       // at least 1

  const float* input_shift;     // width, or null
  const float* input_scale;     // width, or null

  // Rotation. x is seen as (width / (sylvester * paley * inner), sylvester, paley, inner); H = S (x) P acts on the two
  // middle axes, S the Sylvester matrix of order `sylvester` (a power of two, natural order: S[i][j] =
  // (-1)^popcount(i & j)), P the +-1 matrix `paley_matrix` (y_p = sum_j x_j P[j][p]). sylvester = paley = 1: none.
  const uint8_t* sign_bits;     // bit c % 8 of byte c / 8 set: channel c is negated; null: none
  int64_t sylvester;
  int64_t paley;
  const int8_t* paley_matrix;   // paley * paley, row-major; null where paley = 1
  int64_t inner;
  float normalization;          // 1 / sqrt(sylvester * paley)

  const float* channel_scale;   // width, or null

  ScaleRule rule;
  bool round_scales;            // to 8 bits; not for kStatic
  float rms_factor;
  const float* static_scale;    // 1, finite, for kStatic
  int64_t group_size;           // divides width; = width for one scale a token
  // The format: `rungs` levels ascending, `rungs - 1` thresholds ascending: a number lies on the highest rung whose
  // threshold (thresholds[rung - 1]) is not above it. Ties are already in the thresholds.
  int64_t rungs;                // 2 to 256
  const float* thresholds;
  const int8_t* rung_levels;    // as bytes: int8, or uint8 where levels_unsigned
  bool levels_unsigned;
  float top;                    // what absmax is divided by: the largest level, or more where the largest saturate

  void* levels;                 // tokens rows of `width` bytes, `levels_stride` apart
  int64_t levels_stride;
  float* scale;                 // tokens * (width / group_size)
};

[[nodiscard]] bool RotateQuantize(const RotateQuantizeArgs& args, int threads);

// ---- attention ------------------------------------------------------------------------------------------------------

// softmax(q k^T * softmax_scale) v for every batch and head, without a mask.
// Element (b, t, h, d) of q at b * batch_stride + t * token_stride + h * head_stride + d; the same for k, v and out,
// each with its own strides (elements).
struct AttentionTensor {
  void* data;
  int64_t batch_stride, token_stride, head_stride;
};

struct AttentionArgs {
  AttentionTensor q, k, v, out;
  Element type;                 // of all four
  int64_t batch, heads, query_tokens, key_tokens, head_dim;
  float softmax_scale;
};

[[nodiscard]] bool Attention(const AttentionArgs& args, int threads);

}  // namespace hqdit
