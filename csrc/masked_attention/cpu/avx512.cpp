#ifdef __x86_64__
#include "../../cpu/simd/avx512.h"

#include "table.h"

namespace jk::attention {
const Kernels kAvx512Float = kernels<FloatFormat<simd::Avx512>, float>();
const Kernels kAvx512Bf16 = kernels<FloatFormat<simd::Avx512>, bf16>();
}  // namespace jk::attention
#endif
