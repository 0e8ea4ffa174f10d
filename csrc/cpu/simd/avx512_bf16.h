// Sixteen float lanes and products of bfloat16 pairs on AVX512_BF16.
#pragma once
#include "avx512.h"

namespace jk::simd {

struct Avx512Bf16 : Avx512 {
  // acc plus both products of the bfloat16 pairs in each lane.
  static JK_INLINE Vec dot(Vec acc, Vec a, Vec b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(a),
                            (__m512bh)_mm512_castps_si512(b));
  }
  // Sixteen numbers of x0, then sixteen of x1. Unlike `narrow`, denormals become zero.
  static JK_INLINE __m512i round(Vec x0, Vec x1) { return (__m512i)_mm512_cvtne2ps_pbh(x1, x0); }
  static JK_INLINE __m256i round(Vec x) { return (__m256i)_mm512_cvtneps_pbh(x); }
};

}  // namespace jk::simd
