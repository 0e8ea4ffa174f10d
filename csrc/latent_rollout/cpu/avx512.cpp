#ifdef __x86_64__
#include "../../cpu/simd/avx512.h"

#include "table.h"

namespace jk::rollout {
const Kernels kAvx512 = kernels<FloatProducts<simd::Avx512>>();
}  // namespace jk::rollout
#endif
