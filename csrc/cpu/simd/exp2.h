// 2^x by rounding to an integer with a magic addition and a polynomial for the rest; minimax in
// relative error over [-1/2, 1/2].
#pragma once
#include "bf16.h"

namespace jk::simd {

// 1.5 * 2^23, then the polynomial from its highest power down. Degree 3 is good to 8e-5 (less than
// half a bf16 step), degree 6 to 2e-9 before rounding.
template <int kDegree>
struct Exp2Constants;
template <>
struct Exp2Constants<3> {
  static constexpr float kValues[] = {12582912.f, 0.0551716685f, 0.2426111251f, 0.6932609677f,
                                      0.9999280572f};
};
template <>
struct Exp2Constants<6> {
  static constexpr float kValues[] = {
      12582912.f,      1.534581243e-4f, 1.339993091e-3f, 9.618489072e-3f,
      5.550328642e-2f, 0.2402264625f,   0.6931471825f,   1.0f};
};

template <class V, int kDegree>
JK_INLINE typename V::Vec polynomial(const float* constants, typename V::Vec x) {
  typename V::Vec p = V::broadcast(constants + 1);
  JK_UNROLL for (int i = 2; i <= kDegree + 1; ++i) p = V::fma(p, x, V::broadcast(constants + i));
  return p;
}

// 2^(x * factor), the product entering unrounded. Needs -126 <= x * factor < 127; a NaN stays a
// NaN.
template <class V, int kDegree>
JK_INLINE typename V::Vec exp2(typename V::Vec x, typename V::Vec factor) {
  const float* constants = Exp2Constants<kDegree>::kValues;
  if constexpr (V::kConstantsInMemory) JK_KEEP_IN_MEMORY(constants);
  const typename V::Vec shifted = V::fma(x, factor, V::broadcast(constants));
  const typename V::Vec fraction = V::fms(x, factor, V::sub(shifted, V::broadcast(constants)));
  return V::scale_by_power(polynomial<V, kDegree>(constants, fraction), shifted);
}

// 2^(x * factor - shift), `offset` being kExp2Offset - shift with an even integer shift below 2^23.
// The product and its fraction are those of the function above, so the result is exactly its
// 2^-shift-fold, but not below 2^-126. Needs x * factor - shift < 127; a NaN need not stay one.
constexpr float kExp2Offset = 12582912.f;  // 1.5 * 2^23
template <class V, int kDegree>
JK_INLINE typename V::Vec exp2(typename V::Vec x, typename V::Vec factor, typename V::Vec offset) {
  const float* constants = Exp2Constants<kDegree>::kValues;
  const typename V::Vec shifted = V::fma(x, factor, offset);
  const typename V::Vec fraction = V::fms(x, factor, V::sub(shifted, offset));
  return V::scale_by_power(polynomial<V, kDegree>(constants, fraction),
                           V::max(V::set1(kExp2Offset - 125.f), shifted));
}

// 2^x under the same conditions.
template <class V, int kDegree>
JK_INLINE typename V::Vec exp2(typename V::Vec x) {
  const float* constants = Exp2Constants<kDegree>::kValues;
  if constexpr (V::kConstantsInMemory) JK_KEEP_IN_MEMORY(constants);
  const typename V::Vec shifted = V::add(x, V::broadcast(constants));
  const typename V::Vec fraction = V::sub(x, V::sub(shifted, V::broadcast(constants)));
  return V::scale_by_power(polynomial<V, kDegree>(constants, fraction), shifted);
}

}  // namespace jk::simd
