#include "../simd/portable.h"

#include "cpu_table.h"

namespace jk::rollout {
const Kernels kPortable = kernels<FloatProducts<simd::Portable>>();
}  // namespace jk::rollout
