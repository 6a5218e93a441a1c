#include "rotate_quantize.h"

namespace hqdit::avx2 {

void RotateQuantize(const RotateQuantizeArgs& args, const Share& share) { RotateQuantizeShare(args, share); }

int64_t RotateQuantizeScratch(const RotateQuantizeArgs& args) { return RotateQuantizeScratchBytes(args); }

}  // namespace hqdit::avx2
