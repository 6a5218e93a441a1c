// Attention with AMX: both matrix products on 8-bit integers, six tile products for one of float32 accuracy.
//
// Scores: queries (times softmax_scale log2 e) and keys as three signed digits of 8 bits with a unit for each row
// (attention_amx_digits.h). Exponentials: integers relative to the largest score of their query, P = 2^t * 16744000
// rounded, again as three digits, the top one unsigned. Values: three digits with a unit for each dimension and block
// of keys.
//
// bfloat16 tiles, the alternative, need the same number of tile products for 16 bits of accuracy (three products of
// two-way splits) and twice as many for 24 bits. Tiles of 8-bit integers cover twice the width in the same time.
//
// Scores are kept transposed, one vector for each key with a query in each lane: maximum, sum and scaling are then
// operations between vectors, and four vectors of exponentials give a row of each of three right-hand tiles.
//
// The matrix unit works beside the vector units, so the scores of one query tile are computed in between the
// exponentials of the one before it: a tenth faster than one after the other. The two do not overlap further on Sapphire
// Rapids, which issues about one vector instruction a cycle instead of two while tiles are being multiplied.
#include <stdint.h>

#include "attention_amx_digits.h"
#include "attention_amx_pack.h"
#include "attention_driver.h"
#include "kernel_table.h"

namespace hqdit {
namespace amx {
namespace {

constexpr int kQueries = 16;
constexpr int kTileFloats = 256;
constexpr int kBlockKeys = 256;  // so many sums of integers below 2^24 stay below 2^32

// ---- tiles ----------------------------------------------------------------------------------------------------------

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// The tile intrinsics of GCC 12 do not say what memory they read: whatever was written is in memory after this.
void FinishWrites() { __asm__ volatile("" : : : "memory"); }

// All eight tiles of full size.
void ConfigureTiles() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = kRowBytes;
    config.rows[i] = 16;
  }
  __asm__ volatile("" : : "r"(&config) : "memory");  // as FinishWrites, for memory that nobody else sees
  _tile_loadconfig(&config);
}

void StoreSums(int32_t* sums) {
  _tile_stored(0, sums, kRowBytes);
  _tile_stored(1, sums + kTileFloats, kRowBytes);
  _tile_stored(2, sums + 2 * kTileFloats, kRowBytes);
}

// The sums of weight 2^8, 1 and 2^-8 of 16 keys x 16 queries.
void MultiplyScores(const HeadLayout& layout, const int8_t* keys, const int8_t* queries) {
  FinishWrites();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  for (int chunk = 0; chunk < layout.chunks; ++chunk) {
    _tile_loadd(3, keys, layout.key_bytes);
    _tile_loadd(4, queries, kRowBytes);
    _tile_dpbssd(0, 3, 4);
    _tile_loadd(5, queries + kTileBytes, kRowBytes);
    _tile_dpbssd(1, 3, 5);
    _tile_loadd(6, queries + 2 * kTileBytes, kRowBytes);
    _tile_dpbssd(2, 3, 6);
    _tile_loadd(7, keys + kRowBytes, layout.key_bytes);
    _tile_dpbssd(1, 7, 4);
    _tile_dpbssd(2, 7, 5);
    _tile_loadd(3, keys + 2 * kRowBytes, layout.key_bytes);
    _tile_dpbssd(2, 3, 4);
    keys += kDigits * kRowBytes;
    queries += kDigits * kTileBytes;
  }
  if (layout.has_tail) {
    _tile_loadd(7, keys, layout.key_bytes);
    _tile_loadd(4, queries + 8 * kRowBytes, kRowBytes);
    _tile_dpbssd(0, 7, 4);
    _tile_loadd(5, queries + 4 * kRowBytes, kRowBytes);
    _tile_dpbssd(1, 7, 5);
    _tile_loadd(6, queries, kRowBytes);
    _tile_dpbssd(2, 7, 6);
  }
}

// Likewise of 16 dimensions x 16 queries, over all chunks of keys.
void MultiplyValues(int64_t chunks, const int8_t* values, int64_t value_chunk_bytes, const uint8_t* exponentials) {
  FinishWrites();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    _tile_loadd(3, values, kRowBytes);
    _tile_loadd(4, exponentials, kRowBytes);
    _tile_dpbsud(0, 3, 4);
    _tile_loadd(5, exponentials + kTileBytes, kRowBytes);
    _tile_dpbssd(1, 3, 5);
    _tile_loadd(6, exponentials + 2 * kTileBytes, kRowBytes);
    _tile_dpbssd(2, 3, 6);
    _tile_loadd(7, values + kTileBytes, kRowBytes);
    _tile_dpbsud(1, 7, 4);
    _tile_dpbssd(2, 7, 5);
    _tile_loadd(3, values + 2 * kTileBytes, kRowBytes);
    _tile_dpbsud(2, 3, 4);
    values += value_chunk_bytes;
    exponentials += kDigits * kTileBytes;
  }
}

__m512i SumsOfRow(const int32_t* sums, int weight, int row) {
  return _mm512_load_si512(sums + weight * kTileFloats + row * 16);
}

// ---- exponentials ---------------------------------------------------------------------------------------------------

// 2^x times `factor`, |x| <= 1/2: relative error below 1.5e-7, and exactly `factor` at 0, or sums over many blocks of
// keys would drift.
__m512 PolynomialExp2(__m512 x, float factor) {
  const auto constant = [factor](double coefficient) {
    return _mm512_set1_ps(static_cast<float>(coefficient * factor));
  };
  __m512 y = constant(0x1.5bba14p-10);
  y = _mm512_fmadd_ps(y, x, constant(0x1.3cea88p-7));
  y = _mm512_fmadd_ps(y, x, constant(0x1.c6b752p-5));
  y = _mm512_fmadd_ps(y, x, constant(0x1.ebf9bcp-3));
  y = _mm512_fmadd_ps(y, x, constant(0x1.62e42ap-1));
  return _mm512_fmadd_ps(y, x, constant(1.0));
}

// 2^x for x <= 0; a NaN stays one.
__m512 Exp2(__m512 x) {
  const __m512 clamped = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // the second operand where one is a NaN
  const __m512 whole = _mm512_roundscale_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(PolynomialExp2(_mm512_sub_ps(clamped, whole), 1.0f), whole);
}

// 2^(difference * unit) * 16744000 for difference <= 0, rounded, with kDigitBias added. Adding kShift rounds to an
// integer, whose low bits it leaves in the lowest bits of the float; how far it lies below 0 is the count of a shift,
// which gives 0 for every count above 31, and so for every product below -32, -infinity and a NaN.
__m512i BiasedExponential(__m512 difference, __m512 unit) {
  constexpr float kShift = 0x1.8p23f;
  constexpr float kOne = 16744000.0f;  // with an unsigned top digit, three digits reach 0xff7f7f = 16744319
  const __m512 shift = _mm512_set1_ps(kShift);
  const __m512 shifted = _mm512_fmadd_ps(difference, unit, shift);
  const __m512 fraction = _mm512_fmsub_ps(difference, unit, _mm512_sub_ps(shifted, shift));
  const __m512i doubled = _mm512_cvtps_epi32(PolynomialExp2(fraction, 2 * kOne));
  const __m512i below = _mm512_sub_epi32(_mm512_castps_si512(shift), _mm512_castps_si512(shifted));
  const __m512i half = _mm512_set1_epi32(2 * kDigitBias + 1);
  return _mm512_srli_epi32(_mm512_add_epi32(_mm512_srlv_epi32(doubled, below), half), 1);
}

// ---- a group of queries ---------------------------------------------------------------------------------------------

// One tile of 16 queries, a query in each lane.
struct QueryTile {
  int8_t* digits;
  float* output;  // 16 lanes for each dimension, 2^-24 times sums of exponentials and values
  __m512 unit;
  __m512 largest;        // score up to the block of keys before
  __m512 block_largest;  // up to the current one
  __m512 sum;            // of the exponentials, relative to `largest`
  __m512 rescale;        // exponential that takes sums from `largest` to `block_largest`
  __mmask16 is_not_finite;
};

template <Element kType>
class Engine {
 public:
  static constexpr int kTileQueries = kQueries;
  static constexpr int kMostTiles = 32;
  static constexpr int kMostKeys = kBlockKeys;
  static constexpr int kKeyStep = kChunk;

  Engine(const AttentionArgs& args, void* scratch);
  int64_t scratch_bytes() const { return scratch_bytes_; }

  void Start(const TokenRows& q, int64_t queries);
  void AddKeys(const TokenRows& k, const TokenRows& v, int64_t keys);
  void Finish(const TokenRows& out);

 private:
  int64_t tiles() const { return CeilDiv(queries_, kQueries); }
  float* Scores(int64_t tile) const { return scores_ + tile % 2 * kBlockKeys * kQueries; }

  uint8_t* ExponentialRow(int64_t quad, int digit) const {
    return exponentials_ + (quad / 16 * kDigits + digit) * kTileBytes + quad % 16 * kRowBytes;
  }

  void PackBlock(const TokenRows& k, const TokenRows& v, int64_t keys);
  void ReadScores(int64_t tile, int64_t step, int64_t keys);
  __m512i AddExponentials(int64_t tile, int64_t quad, int64_t end_quad, __m512i sum);
  void AddValues(QueryTile* tile, int64_t keys);
  void ReadValues(QueryTile* tile, int vector);
  void StoreTile(const QueryTile& tile, const TokenRows& out, int64_t first, int queries) const;

  HeadLayout layout_;
  float query_factor_;
  int64_t queries_ = 0;
  bool keys_are_finite_ = true;
  bool is_first_block_ = true;
  int8_t* key_digits_;
  float* key_units_;
  int8_t* value_tiles_;
  float* value_units_;
  float* scores_;
  int32_t* sums_;
  uint8_t* exponentials_;  // tiles of (chunk of keys, digit)
  QueryTile* query_tiles_;
  int64_t scratch_bytes_;
};

template <Element kType>
Engine<kType>::Engine(const AttentionArgs& args, void* scratch)
    : layout_(args.head_dim), query_factor_(args.softmax_scale * 0x1.715476p+0f) {
  ScratchParts parts(scratch);
  key_digits_ = parts.Take<int8_t>(kBlockKeys * layout_.key_bytes);
  key_units_ = parts.Take<float>(kBlockKeys);
  value_tiles_ = parts.Take<int8_t>(kBlockKeys / kChunk * layout_.vectors * kDigits * kTileBytes);
  value_units_ = parts.Take<float>(layout_.vectors * kLanes);
  scores_ = parts.Take<float>(2 * kBlockKeys * kQueries);
  sums_ = parts.Take<int32_t>(kDigits * kTileFloats);
  exponentials_ = parts.Take<uint8_t>(kBlockKeys / kChunk * kDigits * kTileBytes);
  query_tiles_ = parts.Take<QueryTile>(kMostTiles);
  int8_t* digits = parts.Take<int8_t>(kMostTiles * layout_.query_bytes);
  float* output = parts.Take<float>(kMostTiles * layout_.vectors * kTileFloats);
  scratch_bytes_ = parts.used();
  if (scratch == nullptr) return;
  for (int tile = 0; tile < kMostTiles; ++tile) {
    query_tiles_[tile].digits = digits + tile * layout_.query_bytes;
    query_tiles_[tile].output = output + tile * layout_.vectors * kTileFloats;
  }
}

template <Element kType>
void Engine<kType>::Start(const TokenRows& q, int64_t queries) {
  queries_ = queries;
  keys_are_finite_ = true;
  is_first_block_ = true;
  for (int64_t i = 0; i < tiles(); ++i) {
    QueryTile& tile = query_tiles_[i];
    const int count = static_cast<int>(Least(kQueries, queries - i * kQueries));
    alignas(64) float units[kQueries];
    tile.is_not_finite = PackQueries<kType>(layout_, q, i * kQueries, count, query_factor_, tile.digits, units);
    // Of the 2^24 that a score's sums are to be multiplied by, half goes to each unit: neither overflows early.
    tile.unit = _mm512_mul_ps(_mm512_load_ps(units), _mm512_set1_ps(0x1p12f));
    tile.largest = _mm512_set1_ps(-__builtin_inff());
    tile.sum = _mm512_setzero_ps();
  }
}

template <Element kType>
void Engine<kType>::PackBlock(const TokenRows& k, const TokenRows& v, int64_t keys) {
  keys_are_finite_ &= PackKeys<kType>(layout_, k, keys, key_digits_, key_units_);
  keys_are_finite_ &= PackValues<kType>(layout_, v, keys, value_tiles_, value_units_);
  for (int64_t key = 0; key < keys; key += kLanes) {
    _mm512_store_ps(key_units_ + key, _mm512_mul_ps(_mm512_load_ps(key_units_ + key), _mm512_set1_ps(0x1p12f)));
  }
  // Rows of four keys that no exponential is written to.
  for (int64_t quad = CeilDiv(keys, 4); quad < CeilDiv(keys, kChunk) * 16; ++quad) {
    for (int digit = 0; digit < kDigits; ++digit)
      _mm512_store_si512(ExponentialRow(quad, digit), _mm512_setzero_si512());
  }
}

// Puts the sums of 16 keys together to scores (in units of the queries), and takes the maximum over keys.
template <Element kType>
void Engine<kType>::ReadScores(int64_t tile, int64_t step, int64_t keys) {
  const int32_t* sums = sums_;
  const float* units = key_units_ + step * 16;
  float* scores = Scores(tile) + step * kTileFloats;
  const int rows = static_cast<int>(Least(16, keys - step * 16));
  __m512 largest = query_tiles_[tile].block_largest;
  for (int row = 0; row < rows; ++row) {
    const __m512i high = _mm512_add_epi32(_mm512_slli_epi32(SumsOfRow(sums, 0, row), 8), SumsOfRow(sums, 1, row));
    const __m512i sum = _mm512_add_epi32(high, _mm512_srai_epi32(SumsOfRow(sums, 2, row), 8));
    const __m512 score = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(units[row]));
    _mm512_store_ps(scores + row * kQueries, score);
    largest = _mm512_max_ps(largest, score);
  }
  query_tiles_[tile].block_largest = largest;
  for (int row = rows; row % 4 != 0; ++row) {
    _mm512_store_ps(scores + row * kQueries, _mm512_set1_ps(-__builtin_inff()));
  }
}

// The digits of the exponentials of keys 4 * quad to 4 * end_quad; returns `sum` plus the biased exponentials, modulo
// 2^32.
template <Element kType>
__m512i Engine<kType>::AddExponentials(int64_t tile, int64_t quad, int64_t end_quad, __m512i sum) {
  const __m512 unit = query_tiles_[tile].unit, largest = query_tiles_[tile].block_largest;
  for (; quad < end_quad; ++quad) {
    const float* scores = Scores(tile) + quad * 4 * kQueries;
    __m512i x[4];
    for (int i = 0; i < 4; ++i) {
      x[i] = BiasedExponential(_mm512_sub_ps(_mm512_load_ps(scores + i * kQueries), largest), unit);
      sum = _mm512_add_epi32(sum, x[i]);
    }
    const ByteDigits digits = DigitsOf(x[0], x[1], x[2], x[3]);
    _mm512_store_si512(ExponentialRow(quad, 0), digits.top);
    _mm512_store_si512(ExponentialRow(quad, 1), digits.mid);
    _mm512_store_si512(ExponentialRow(quad, 2), digits.low);
  }
  return sum;
}

template <Element kType>
void Engine<kType>::ReadValues(QueryTile* tile, int vector) {
  const int32_t* sums = sums_;
  const int dims = static_cast<int>(Least(kLanes, layout_.dims - vector * kLanes));
  for (int row = 0; row < dims; ++row) {
    float* output = tile->output + (vector * kLanes + row) * kQueries;
    const __m512i low = _mm512_add_epi32(SumsOfRow(sums, 1, row), _mm512_srai_epi32(SumsOfRow(sums, 2, row), 8));
    const __m512 high = _mm512_cvtepi32_ps(SumsOfRow(sums, 0, row));
    const __m512 sum = _mm512_fmadd_ps(high, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(low));
    const __m512 value = _mm512_mul_ps(sum, _mm512_set1_ps(value_units_[vector * kLanes + row]));
    _mm512_store_ps(output, is_first_block_ ? value : _mm512_fmadd_ps(_mm512_load_ps(output), tile->rescale, value));
  }
}

template <Element kType>
void Engine<kType>::AddValues(QueryTile* tile, int64_t keys) {
  for (int vector = 0; vector < layout_.vectors; ++vector) {
    MultiplyValues(CeilDiv(keys, kChunk), value_tiles_ + vector * kDigits * kTileBytes,
                   layout_.vectors * kDigits * kTileBytes, exponentials_);
    if (vector > 0) ReadValues(tile, vector - 1);
    StoreSums(sums_);
  }
  ReadValues(tile, layout_.vectors - 1);
}

template <Element kType>
void Engine<kType>::AddKeys(const TokenRows& k, const TokenRows& v, int64_t keys) {
  PackBlock(k, v, keys);
  const int64_t steps = CeilDiv(keys, 16), quads = CeilDiv(keys, 4);
  const __m512i all_biases = _mm512_set1_epi32(static_cast<int32_t>(4 * quads) * kDigitBias);
  for (int64_t i = 0; i <= tiles(); ++i) {
    const bool has_scores = i < tiles(), has_exponentials = i > 0;
    __m512i sum = _mm512_setzero_si512();
    if (has_scores) query_tiles_[i].block_largest = query_tiles_[i].largest;
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t quad = 4 * step, middle = Least(quad + 2, quads), end = Least(quad + 4, quads);
      if (has_scores) {
        MultiplyScores(layout_, key_digits_ + step * 16 * layout_.key_bytes, query_tiles_[i].digits);
      }
      if (has_exponentials) sum = AddExponentials(i - 1, quad, middle, sum);
      if (has_scores) StoreSums(sums_);
      if (has_exponentials) sum = AddExponentials(i - 1, middle, end, sum);
      if (has_scores) ReadScores(i, step, keys);
    }
    if (has_exponentials) {
      QueryTile& tile = query_tiles_[i - 1];
      tile.rescale = Exp2(_mm512_mul_ps(_mm512_sub_ps(tile.largest, tile.block_largest), tile.unit));
      tile.largest = tile.block_largest;
      const __m512 block_sum = _mm512_cvtepu32_ps(_mm512_sub_epi32(sum, all_biases));
      tile.sum = _mm512_fmadd_ps(tile.sum, tile.rescale, block_sum);
      AddValues(&tile, keys);
    }
  }
  is_first_block_ = false;
}

template <Element kType>
void Engine<kType>::StoreTile(const QueryTile& tile, const TokenRows& out, int64_t first, int queries) const {
  const __m512 nan = _mm512_set1_ps(__builtin_nanf(""));
  const bool is_defined = keys_are_finite_ && !is_first_block_;  // without keys it is 0 / 0
  __m512 factor = _mm512_div_ps(_mm512_set1_ps(0x1p24f), tile.sum);
  factor = _mm512_mask_mov_ps(factor, is_defined ? tile.is_not_finite : __mmask16{0xffff}, nan);
  for (int vector = 0; vector < layout_.vectors; ++vector) {
    __m512i rows[16];
    for (int row = 0; row < 16; ++row) {
      const int dim = vector * kLanes + row;
      const __m512 value = dim < layout_.dims ? _mm512_load_ps(tile.output + dim * kQueries) : _mm512_setzero_ps();
      rows[row] = _mm512_castps_si512(_mm512_mul_ps(value, factor));
    }
    Transpose(rows);
    for (int query = 0; query < queries; ++query) {
      StoreRow(out, first + query, vector, layout_.masks[vector], _mm512_castsi512_ps(rows[query]));
    }
  }
}

template <Element kType>
void Engine<kType>::Finish(const TokenRows& out) {
  for (int64_t i = 0; i < tiles(); ++i) {
    StoreTile(query_tiles_[i], out, i * kQueries, static_cast<int>(Least(kQueries, queries_ - i * kQueries)));
  }
}

}  // namespace

void Attention(const AttentionArgs& args, const Share& share) {
  ConfigureTiles();
  if (args.type == Element::kFloat32) {
    RunAttention<Engine<Element::kFloat32>>(args, share);
  } else {
    RunAttention<Engine<Element::kBFloat16>>(args, share);
  }
  _tile_release();
}

int64_t AttentionScratch(const AttentionArgs& args) { return Engine<Element::kFloat32>(args, nullptr).scratch_bytes(); }

}  // namespace amx
}  // namespace hqdit
