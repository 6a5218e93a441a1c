// Instruction sets: which ones this CPU and operating system have, and which one the kernels use.
#pragma once

namespace hqdit {

// In ascending order; each includes what the ones before it can do.
enum class Isa : int {
  kPortable = 0,  // what the compiler's baseline has
  kAvx2 = 1,      // AVX2, FMA
  kAvx512 = 2,    // AVX-512 F, BW, DQ, VL and VNNI
  kAmx = 3,       // kAvx512 plus VBMI, BF16, AMX-TILE, AMX-INT8 and AMX-BF16
};
inline constexpr int kIsaCount = 4;

// "portable", "avx2", "avx512_vnni", "amx": the values of HQDIT_CPU_ISA.
const char* IsaName(Isa isa);

// The highest set that this CPU has, the operating system saves (xgetbv; permission for tile data) and the library was
// compiled for. Constant over the life of the process.
Isa BestIsa();

// The set in use: HQDIT_CPU_ISA if it is set when the first kernel runs, else BestIsa().
Isa CurrentIsa();

// Use `isa` from now on; false, changing nothing, if this machine cannot.
bool SelectIsa(Isa isa);

// False if HQDIT_CPU_ISA holds a name that is unknown or not available here: kernels must then not be called.
bool EnvironmentIsaIsUsable();

}  // namespace hqdit
