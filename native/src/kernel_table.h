// What each instruction set implements. One table per set, filled in its own translation units; kernels.cc picks.
//
// Rules for the files named *_avx2.cc, *_avx512.cc and *_amx.cc (compiled with wide instructions): everything that is
// not one of the functions below has internal linkage, and no standard library template is used, because the linker
// would otherwise be free to take a wide copy of a shared inline function for everybody.
#pragma once

#include "hqdit/kernels.h"

namespace hqdit {

// Each function does the share of `worker` out of `workers`; all of them together do the whole. They must not throw.
// The shares may be fixed, or be taken from `next_item`, which starts at 0 and is shared by all workers of the call.
struct Share {
  int worker;
  int workers;
  int64_t* next_item;  // use __atomic_fetch_add(next_item, 1, __ATOMIC_RELAXED)
  void* scratch;       // of this worker, 64-byte aligned, of the size that the *Scratch function asked for
};

struct KernelTable {
  void (*product)(const ProductArgs&, const Share&);
  int64_t (*product_scratch)(const ProductArgs&);
  void (*rotate_quantize)(const RotateQuantizeArgs&, const Share&);
  int64_t (*rotate_quantize_scratch)(const RotateQuantizeArgs&);
  void (*attention)(const AttentionArgs&, const Share&);
  int64_t (*attention_scratch)(const AttentionArgs&);
};

#define HQDIT_DECLARE_KERNELS(isa)                                        \
  namespace isa {                                                         \
  void Product(const ProductArgs&, const Share&);                         \
  int64_t ProductScratch(const ProductArgs&);                             \
  void RotateQuantize(const RotateQuantizeArgs&, const Share&);           \
  int64_t RotateQuantizeScratch(const RotateQuantizeArgs&);               \
  void Attention(const AttentionArgs&, const Share&);                     \
  int64_t AttentionScratch(const AttentionArgs&);                         \
  }

HQDIT_DECLARE_KERNELS(portable)
HQDIT_DECLARE_KERNELS(avx2)
HQDIT_DECLARE_KERNELS(avx512)
HQDIT_DECLARE_KERNELS(amx)

}  // namespace hqdit
