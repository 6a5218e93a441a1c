// The C functions that Python calls through ctypes; the argument structures are those of kernels.h.
#include <cstdint>

#include "hqdit/kernels.h"
#include "isa.h"
#include "parallel.h"

#define HQDIT_EXPORT extern "C" __attribute__((visibility("default")))

// Sizes of the structures as compiled here, so that the caller can see that its own mirror of them is right.
HQDIT_EXPORT void hqdit_struct_sizes(int64_t sizes[4]) {
  sizes[0] = sizeof(hqdit::Weight);
  sizes[1] = sizeof(hqdit::ProductArgs);
  sizes[2] = sizeof(hqdit::RotateQuantizeArgs);
  sizes[3] = sizeof(hqdit::AttentionArgs);
}

HQDIT_EXPORT const char* hqdit_isa_name(int isa) {
  return isa >= 0 && isa < hqdit::kIsaCount ? hqdit::IsaName(static_cast<hqdit::Isa>(isa)) : nullptr;
}

HQDIT_EXPORT int hqdit_best_isa() { return static_cast<int>(hqdit::BestIsa()); }

HQDIT_EXPORT int hqdit_current_isa() { return static_cast<int>(hqdit::CurrentIsa()); }

HQDIT_EXPORT bool hqdit_select_isa(int isa) {
  return isa >= 0 && isa < hqdit::kIsaCount && hqdit::SelectIsa(static_cast<hqdit::Isa>(isa));
}

HQDIT_EXPORT bool hqdit_environment_isa_is_usable() { return hqdit::EnvironmentIsaIsUsable(); }

HQDIT_EXPORT void hqdit_set_gomp_parallel(void* gomp_parallel) {
  hqdit::SetGompParallel(reinterpret_cast<hqdit::GompParallel>(gomp_parallel));
}

HQDIT_EXPORT bool hqdit_has_gomp_parallel() { return hqdit::HasGompParallel(); }

HQDIT_EXPORT bool hqdit_product(const hqdit::ProductArgs* args, int threads) {
  return hqdit::Product(*args, threads);
}

HQDIT_EXPORT bool hqdit_rotate_quantize(const hqdit::RotateQuantizeArgs* args, int threads) {
  return hqdit::RotateQuantize(*args, threads);
}

HQDIT_EXPORT bool hqdit_attention(const hqdit::AttentionArgs* args, int threads) {
  return hqdit::Attention(*args, threads);
}
