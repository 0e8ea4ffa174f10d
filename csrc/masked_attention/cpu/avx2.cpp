#ifdef __x86_64__
#include "../../cpu/simd/avx2.h"

#include "table.h"

namespace jk::attention {
const Kernels kAvx2Float = kernels<FloatFormat<simd::Avx2>, float>();
const Kernels kAvx2Bf16 = kernels<FloatFormat<simd::Avx2>, bf16>();
}  // namespace jk::attention
#endif
