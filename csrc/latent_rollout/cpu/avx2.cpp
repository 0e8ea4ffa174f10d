#ifdef __x86_64__
#include "../../cpu/simd/avx2.h"

#include "table.h"

namespace jk::rollout {
const Kernels kAvx2 = kernels<FloatProducts<simd::Avx2>>();
}  // namespace jk::rollout
#endif
