// 2^x by rounding to an integer with a magic addition and a polynomial for the rest; minimax in relative error over [-1/2, 1/2].
#pragma once
#include "bf16.h"

namespace jk::simd {

// Degree 3 is good to 8e-5 (less than half a bf16 step), degree 6 to 2e-9 before rounding. Needs -126 <= x < 127; a NaN stays a NaN.
template <class V, int kDegree>
JK_INLINE typename V::Vec exp2(typename V::Vec x) {
  static_assert(kDegree == 3 || kDegree == 6, "coefficients are given for degrees 3 and 6");
  constexpr float kThree[] = {0.0551716685f, 0.2426111251f, 0.6932609677f, 0.9999280572f};
  constexpr float kSix[] = {1.534581243e-4f, 1.339993091e-3f, 9.618489072e-3f, 5.550328642e-2f, 0.2402264625f, 0.6931471825f, 1.0f};
  const typename V::Vec magic = V::set1(12582912.f);  // 1.5 * 2^23
  const typename V::Vec shifted = V::add(x, magic);
  const typename V::Vec fraction = V::sub(x, V::sub(shifted, magic));
  typename V::Vec p = V::set1(kDegree == 3 ? kThree[0] : kSix[0]);
  JK_UNROLL for (int i = 1; i <= kDegree; ++i) p = V::fma(p, fraction, V::set1(kDegree == 3 ? kThree[i] : kSix[i]));
  return V::scale_by_power(p, shifted);
}

}  // namespace jk::simd
