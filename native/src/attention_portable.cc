#include "attention_float.h"

namespace hqdit {
namespace portable {
namespace {

// Sixteen registers of 128 bits: 3 x 1 vectors of sums take twelve, a vector of queries four at a time.
using Engine = FloatEngine<3, 1>;

}  // namespace

void Attention(const AttentionArgs& args, const Share& share) { RunAttention<Engine>(args, share); }

int64_t AttentionScratch(const AttentionArgs& args) { return Engine(args, nullptr).scratch_bytes(); }

}  // namespace portable
}  // namespace hqdit
