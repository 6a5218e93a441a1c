// The public functions: pick the instruction set, split the work, give each worker its scratch memory.
#include "hqdit/kernels.h"

#include <atomic>
#include <cstdlib>

#include "isa.h"
#include "kernel_table.h"
#include "parallel.h"

namespace hqdit {
namespace {

#define HQDIT_KERNELS(isa)                                                                              \
  {isa::Product,   isa::ProductScratch,  isa::RotateQuantize, isa::RotateQuantizeScratch, isa::Attention, \
   isa::AttentionScratch}

constexpr KernelTable kTables[] = {
    HQDIT_KERNELS(portable),
#if defined(HQDIT_X86)
    HQDIT_KERNELS(avx2),
    HQDIT_KERNELS(avx512),
    HQDIT_KERNELS(amx),
#endif
};

const KernelTable& Table() { return kTables[static_cast<int>(CurrentIsa())]; }

// Scratch memory stays with its thread, because giving megabytes back and faulting them in again costs more than many
// a kernel call.
class ThreadScratch {
 public:
  ~ThreadScratch() { std::free(memory_); }

  // Memory of at least `bytes`, 64-byte aligned, undefined contents; null if there is none.
  void* Reserve(int64_t bytes) {
    constexpr int64_t kAlignment = 64;
    if (bytes <= bytes_) return memory_;
    std::free(memory_);
    bytes_ = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    memory_ = std::aligned_alloc(kAlignment, static_cast<size_t>(bytes_));
    if (memory_ == nullptr) bytes_ = 0;
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

template <typename Args>
struct KernelCall {
  const Args* args;
  void (*kernel)(const Args&, const Share&);
  int64_t scratch_bytes;
  int64_t next_item = 0;
  std::atomic<bool> is_out_of_memory{false};

  static void Work(void* context, int worker, int workers) {
    thread_local ThreadScratch scratch;
    KernelCall& call = *static_cast<KernelCall*>(context);
    void* memory = scratch.Reserve(call.scratch_bytes);
    if (memory == nullptr && call.scratch_bytes > 0) {
      call.is_out_of_memory = true;
      return;
    }
    call.kernel(*call.args, Share{worker, workers, &call.next_item, memory});
  }
};

template <typename Args>
bool Run(const Args& args, void (*kernel)(const Args&, const Share&), int64_t (*scratch)(const Args&), int threads) {
  KernelCall<Args> call{&args, kernel, scratch(args)};
  RunWorkers(threads, KernelCall<Args>::Work, &call);
  return !call.is_out_of_memory;
}

}  // namespace

bool Product(const ProductArgs& args, int threads) {
  return Run(args, Table().product, Table().product_scratch, threads);
}

bool RotateQuantize(const RotateQuantizeArgs& args, int threads) {
  return Run(args, Table().rotate_quantize, Table().rotate_quantize_scratch, threads);
}

bool Attention(const AttentionArgs& args, int threads) {
  return Run(args, Table().attention, Table().attention_scratch, threads);
}

}  // namespace hqdit
