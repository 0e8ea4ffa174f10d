#include "../simd/portable.h"

#include "cpu_table.h"

namespace jk::rollout {
const Kernels kPortable = kernels<simd::Portable>();
}  // namespace jk::rollout
