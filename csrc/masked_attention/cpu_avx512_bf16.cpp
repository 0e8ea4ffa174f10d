// bfloat16 calls on the dot-product instruction: two bfloat16 products per lane and step, summed in float.
#ifdef __x86_64__
#include "../simd/avx512.h"

#include "cpu_table.h"

namespace jk::attention {
namespace {

struct DotFormat {
  using Simd = simd::Avx512;
  using Vec = __m512;
  static constexpr int kPerUnit = 2;
  static constexpr int kExpDegree = 3;
  static constexpr int kChunk = 2;

  static JK_INLINE Vec step(Vec acc, Vec a, Vec b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
  // Sixteen numbers of x0, then sixteen of x1.
  static JK_INLINE __m512i round(Vec x0, Vec x1) { return (__m512i)_mm512_cvtne2ps_pbh(x1, x0); }
  static JK_INLINE void put_pair(float* units, int64_t, Vec x0, Vec x1) {
    alignas(64) static constexpr uint16_t kInterleave[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_loadu_si512(kInterleave);
    _mm512_storeu_ps(units, _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, round(x0, x1))));
  }
  static JK_INLINE void put_two_rows(float* units, int64_t row, int64_t n, int64_t at, Vec x0, Vec x1) {
    const __m512i both = round(x0, x1);
    _mm256_storeu_si256((__m256i*)(units + (n * row + at) / 2), _mm512_castsi512_si256(both));
    _mm256_storeu_si256((__m256i*)(units + ((n + 1) * row + at) / 2), _mm512_extracti64x4_epi64(both, 1));
  }
  static JK_INLINE void put_row(float* units, Vec x) { _mm256_storeu_si256((__m256i*)units, (__m256i)_mm512_cvtneps_pbh(x)); }
};

}  // namespace

const Kernels kAvx512DotBf16 = kernels<DotFormat, bf16>();
}  // namespace jk::attention
#endif
