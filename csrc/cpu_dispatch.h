// Run-time choice among the instruction sets a CPU kernel was compiled for.
#pragma once
#include "abi.h"

namespace jk {

// The best instruction set of this processor (and operating system: GCC's test includes the saved register state).
inline jk_isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16")) return JK_ISA_AVX512_BF16;
  if (avx512) return JK_ISA_AVX512;
  if (avx2) return JK_ISA_AVX2;
#endif
  return JK_ISA_PORTABLE;
}

// What to run when `requested` was asked for: that one where the processor has it, the best one for JK_ISA_AUTO.
// Returns JK_ISA_AUTO when the processor lacks the requested set.
inline jk_isa choose_isa(int requested) {
  const jk_isa best = best_isa();
  if (requested == JK_ISA_AUTO) return best;
  return requested >= JK_ISA_PORTABLE && requested <= best ? static_cast<jk_isa>(requested) : JK_ISA_AUTO;
}

}  // namespace jk
