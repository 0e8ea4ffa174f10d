// Run-time choice of the instruction set a CPU kernel uses. Include it from baseline translation
// units only: a header function compiled with AVX flags could be the copy that the linker keeps for
// every caller.
#pragma once
#include "../abi.h"
#include "refuse.h"

namespace jk {

constexpr const char* kIsaNames[JK_ISA_COUNT] = {"portable", "avx2", "avx512", "avx512_bf16"};

// Whether this machine can run kernels of the given instruction set. JK_EMULATED_ISA is defined by
// test builds whose AVX-512 kernels are compiled against an emulation of the intrinsics.
inline bool cpu_supports(int isa) {
  if (isa == JK_ISA_PORTABLE) return true;
#ifdef JK_EMULATED_ISA
  if (isa <= JK_EMULATED_ISA) return isa > JK_ISA_PORTABLE;
#endif
#ifdef __x86_64__
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case JK_ISA_AVX2:
      return avx2;
    case JK_ISA_AVX512:
      return avx512;
    case JK_ISA_AVX512_BF16:
      return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  }
#endif
  return false;
}

inline int best_isa() {
  static const int best = [] {
    int isa = JK_ISA_COUNT - 1;
    while (!cpu_supports(isa)) --isa;
    return isa;
  }();
  return best;
}

// Makes JK_ISA_AUTO the best instruction set; refuses one that this processor lacks.
inline const char* choose_isa(const char* op, int& isa) {
  if (isa == JK_ISA_AUTO) isa = best_isa();
  if (cpu_supports(isa)) return nullptr;
  return refuse("%s: isa must be one that this processor has (up to %d, %s), got %d.", op,
                best_isa(), kIsaNames[best_isa()], isa);
}

// Instruction sets beyond the portable one, in a list that ends here on other machines.
#ifdef __x86_64__
#define JK_X86(...) __VA_ARGS__
#else
#define JK_X86(...)
#endif

// The entry of a table in the order of jk_isa for the best instruction set up to `isa` that has
// one.
template <class Entry, int kCount>
inline Entry best_of(const Entry (&by_isa)[kCount], int isa) {
  return by_isa[isa < kCount ? isa : kCount - 1];
}

// The kernels of one instruction set for a dtype, or NULL.
template <class Kernels>
using KernelsOf = const Kernels* (*)(int64_t dtype);

// The same for kernels that only some instruction sets have for a dtype; NULL where none has.
template <class Kernels, int kCount>
inline const Kernels* best_kernels(const KernelsOf<Kernels> (&by_isa)[kCount], int isa,
                                   int64_t dtype) {
  const Kernels* found = nullptr;
  for (; found == nullptr && isa >= JK_ISA_PORTABLE; --isa)
    if (isa < kCount) found = by_isa[isa](dtype);
  return found;
}

}  // namespace jk
