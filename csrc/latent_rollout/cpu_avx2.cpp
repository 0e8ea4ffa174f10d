#ifdef __x86_64__
#include "../simd/avx2.h"

#include "cpu_table.h"

namespace jk::rollout {
const Kernels kAvx2 = kernels<FloatProducts<simd::Avx2>>();
}  // namespace jk::rollout
#endif
