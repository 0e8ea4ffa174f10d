#include "../../cpu/simd/portable.h"

#include "table.h"

namespace jk::attention {
const Kernels kPortableFloat = kernels<FloatFormat<simd::Portable>, float>();
const Kernels kPortableBf16 = kernels<FloatFormat<simd::Portable>, bf16>();
}  // namespace jk::attention
