// Products of bfloat16 matrices on AVX512_BF16: two bfloat16 in a unit, multiplied and added by one
// dot-product instruction, summed in float.
#pragma once
#include "multiply.h"

namespace jk::rollout {
namespace {

using Floats = FloatProducts<simd::Avx512Bf16>;

struct PairProducts : Floats {
  using Number = bf16;
  static constexpr int kPerUnit = 2;

  static JK_INLINE Vec step(Vec acc, Vec a, Vec b) { return dot(acc, a, b); }
  static JK_INLINE Vec load_units(const bf16* p, int64_t row_stride) {
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    const __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(p + row_stride)));
    return _mm512_castsi512_ps(_mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
  }
  using Floats::store_two;
  static JK_INLINE void store_two(bf16* p, Vec x0, Vec x1) {
    _mm512_storeu_si512(p, round(x0, x1));
  }
  static JK_INLINE void put_numbers(bf16* to, const float* row, int64_t count) {
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes)
      store_two(to + i, load(row + i), load(row + i + kLanes));
    if (i == count) return;
    float part[2 * kLanes] = {};
    bf16 rounded[2 * kLanes];
    memcpy(part, row + i, sizeof(float) * (count - i));
    store_two(rounded, load(part), load(part + kLanes));
    memcpy(to + i, rounded, sizeof(bf16) * (count - i));
  }
  static JK_INLINE void put_units(float* to, const float* row, int64_t count) {
    bf16* numbers = (bf16*)to;
    put_numbers(numbers, row, count);
    if (count % 2) numbers[count] = {};
  }
};

}  // namespace
}  // namespace jk::rollout
