#include "attention_float.h"

namespace hqdit {
namespace avx2 {
namespace {

// Sixteen registers of 256 bits: 6 x 1 vectors of sums take twelve, a vector of queries two and a broadcast one.
using Engine = FloatEngine<6, 1>;

}  // namespace

void Attention(const AttentionArgs& args, const Share& share) { RunAttention<Engine>(args, share); }

int64_t AttentionScratch(const AttentionArgs& args) { return Engine(args, nullptr).scratch_bytes(); }

}  // namespace avx2
}  // namespace hqdit
