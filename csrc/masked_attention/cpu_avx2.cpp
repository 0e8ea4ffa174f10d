#ifdef __x86_64__
#include "../simd/avx2.h"

#include "cpu_table.h"

namespace jk::attention {
const Kernels kAvx2Float = kernels<FloatFormat<simd::Avx2>, float>();
const Kernels kAvx2Bf16 = kernels<FloatFormat<simd::Avx2>, bf16>();
}  // namespace jk::attention
#endif
