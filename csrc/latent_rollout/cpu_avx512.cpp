#ifdef __x86_64__
#include "../simd/avx512.h"

#include "cpu_table.h"

namespace jk::rollout {
const Kernels kAvx512 = kernels<FloatProducts<simd::Avx512>>();
}  // namespace jk::rollout
#endif
