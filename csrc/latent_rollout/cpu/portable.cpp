#include "../../cpu/simd/portable.h"

#include "table.h"

namespace jk::rollout {
const Kernels kPortable = kernels<FloatProducts<simd::Portable>>();
}  // namespace jk::rollout
