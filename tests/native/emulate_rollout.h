// emulate_avx512.h for latent_rollout, whose sources ask by macro whether AVX-512 is there. Without
// optimisation GCC's own header has the intrinsics below as macros, which would meet those of the
// emulation.
#pragma once
#include <immintrin.h>

#undef _mm512_extractf32x8_ps
#undef _mm512_permute_ps
#undef _mm512_shuffle_f32x4

#include "emulate_avx512.h"

#define __AVX512F__ 1
