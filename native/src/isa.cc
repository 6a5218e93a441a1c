#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(HQDIT_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace hqdit {
namespace {

constexpr const char* kNames[kIsaCount] = {"portable", "avx2", "avx512_vnni", "amx"};

#if defined(HQDIT_X86)
bool Bit(unsigned word, int bit) { return (word >> bit) & 1u; }

// What the operating system saves on a context switch: bits of XCR0.
unsigned SavedState() {
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// Linux gives tile data only to processes that ask (arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
bool RequestTileData() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa Detect() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::kPortable;
  const bool has_xsave = Bit(c, 27), has_fma = Bit(c, 12), has_avx = Bit(c, 28);
  if (!has_xsave || !has_avx) return Isa::kPortable;
  const unsigned saved = SavedState();
  constexpr unsigned kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;
  unsigned b7 = 0, c7 = 0, d7 = 0, a71 = 0;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return Isa::kPortable;
  __get_cpuid_count(7, 1, &a71, &b, &c, &d);

  if ((saved & kYmm) != kYmm || !Bit(b7, 5) || !has_fma) return Isa::kPortable;
  const bool has_f_dq_bw_vl = Bit(b7, 16) && Bit(b7, 17) && Bit(b7, 30) && Bit(b7, 31);
  if ((saved & kZmm) != kZmm || !has_f_dq_bw_vl || !Bit(c7, 11)) return Isa::kAvx2;
  const bool has_vbmi = Bit(c7, 1), has_bf16 = Bit(a71, 5);
  const bool has_amx = Bit(d7, 22) && Bit(d7, 24) && Bit(d7, 25);
  if ((saved & kTiles) != kTiles || !has_vbmi || !has_bf16 || !has_amx || !RequestTileData()) return Isa::kAvx512;
  return Isa::kAmx;
}
#else
Isa Detect() { return Isa::kPortable; }
#endif

// What HQDIT_CPU_ISA asks for: the best set if it is unset or empty, -1 if it cannot be had.
int Requested() {
  const char* name = std::getenv("HQDIT_CPU_ISA");
  if (name == nullptr || *name == '\0') return static_cast<int>(BestIsa());
  for (int isa = 0; isa <= static_cast<int>(BestIsa()); ++isa) {
    if (std::strcmp(name, kNames[isa]) == 0) return isa;
  }
  return -1;
}

std::atomic<int>& Selected() {
  static std::atomic<int> selected{Requested()};
  return selected;
}

}  // namespace

const char* IsaName(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa BestIsa() {
  static const Isa best = Detect();
  return best;
}

Isa CurrentIsa() { return static_cast<Isa>(Selected().load(std::memory_order_relaxed)); }

bool SelectIsa(Isa isa) {
  if (isa > BestIsa()) return false;
  Selected().store(static_cast<int>(isa), std::memory_order_relaxed);
  return true;
}

bool EnvironmentIsaIsUsable() { return Requested() >= 0; }

}  // namespace hqdit
