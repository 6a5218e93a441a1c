#include "attention_float.h"

namespace hqdit {
namespace avx512 {
namespace {

// Thirty-two registers of 512 bits: 6 x 4 vectors of sums, four of queries and a broadcast.
using Engine = FloatEngine<6, 4>;

}  // namespace

void Attention(const AttentionArgs& args, const Share& share) { RunAttention<Engine>(args, share); }

int64_t AttentionScratch(const AttentionArgs& args) { return Engine(args, nullptr).scratch_bytes(); }

}  // namespace avx512
}  // namespace hqdit
