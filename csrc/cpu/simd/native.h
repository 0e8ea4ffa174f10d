// The vectors and tile sizes of the instruction set that a translation unit is built for: the build
// defines JK_KERNEL_ISA, a number of jk_isa, for every kernels.cpp.
#pragma once
#include "../tiles.h"

#if JK_KERNEL_ISA == 0
#include "portable.h"
namespace jk::simd {
using Native = Portable;
}
#elif JK_KERNEL_ISA == 1
#include "avx2.h"
namespace jk::simd {
using Native = Avx2;
}
#elif JK_KERNEL_ISA == 2
#include "avx512.h"
namespace jk::simd {
using Native = Avx512;
}
#elif JK_KERNEL_ISA == 3
#include "avx512_bf16.h"
// Bfloat16 numbers multiply as such, in pairs. A float32 call takes the kernels of AVX-512.
#define JK_BF16_PRODUCTS
namespace jk::simd {
using Native = Avx512Bf16;
}
#else
#error "JK_KERNEL_ISA must be a number of jk_isa that this file knows."
#endif
// The preprocessor does not know enumerators.
static_assert(JK_ISA_PORTABLE == 0 && JK_ISA_AVX2 == 1 && JK_ISA_AVX512 == 2 &&
              JK_ISA_AVX512_BF16 == 3);

namespace jk {
constexpr Tiles kTiles = kTilesOf[JK_KERNEL_ISA];
}  // namespace jk
