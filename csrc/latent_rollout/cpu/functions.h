// gelu and its derivatives, sigmoid, tanh and signs on vectors.
#pragma once
#include "../../cpu/simd/exp2.h"

namespace jk::rollout {
namespace {

template <class V>
JK_INLINE typename V::Vec negate(typename V::Vec x) {
  return V::sub(V::zero(), x);
}
template <class V>
JK_INLINE typename V::Vec smaller(typename V::Vec a, typename V::Vec b) {
  return negate<V>(V::max(negate<V>(a), negate<V>(b)));
}
template <class V>
JK_INLINE typename V::Vec magnitude(typename V::Vec x) {
  return V::max(negate<V>(x), x);
}
// -1, 0 or 1 for every normal number; NaN stays NaN.
template <class V>
JK_INLINE typename V::Vec sign(typename V::Vec x) {
  const typename V::Vec grown = V::mul(x, V::set1(1e38f));
  return smaller<V>(V::set1(1.f), V::max(V::set1(-1.f), grown));
}
template <class V>
JK_INLINE typename V::Vec exp(typename V::Vec x) {
  const typename V::Vec scaled = V::mul(x, V::set1(1.442695041f));
  return simd::exp2<V, 6>(smaller<V>(V::set1(126.f), V::max(V::set1(-126.f), scaled)));
}

// The normal distribution at x: upper tail Phi(-|x|) and exp(-x^2 / 2). The tail over the density
// is a polynomial in t = 1 / (1 + 0.34 |x|), fitted in relative error over |x| <= 14 (3e-8).
template <class V>
struct Normal {
  typename V::Vec tail, bell, size;
};
template <class V>
JK_INLINE Normal<V> normal(typename V::Vec x) {
  constexpr float kFit[] = {-0.02612047586f, 0.1394994988f,   -0.2731327622f,
                            0.2021826941f,   -0.04471846504f, 0.1153591668f,
                            0.1151976584f,   0.1361121966f,   0.1356205035f};
  const typename V::Vec size = magnitude<V>(x);
  const typename V::Vec t = V::div(V::set1(1.f), V::fma(size, V::set1(0.34f), V::set1(1.f)));
  const typename V::Vec bell = exp<V>(V::mul(V::mul(size, size), V::set1(-0.5f)));
  typename V::Vec p = V::set1(kFit[0]);
  JK_UNROLL for (int i = 1; i < 9; ++i) p = V::fma(p, t, V::set1(kFit[i]));
  return {V::mul(V::mul(p, t), bell), bell, size};
}

template <class V>
JK_INLINE typename V::Vec gelu_of(const Normal<V>& n, typename V::Vec x) {
  return V::sub(V::max(x, V::zero()), V::mul(n.size, n.tail));
}
template <class V>
JK_INLINE typename V::Vec gelu(typename V::Vec x) {
  return gelu_of<V>(normal<V>(x), x);
}
// gelu'(x) = Phi(x) + x phi(x).
template <class V>
JK_INLINE typename V::Vec slope_of(const Normal<V>& n, typename V::Vec x) {
  const typename V::Vec phi = V::mul(n.bell, V::set1(0.3989422804f));
  const typename V::Vec half = V::set1(0.5f);
  return V::fma(x, phi, V::fma(sign<V>(x), V::sub(half, n.tail), half));
}
// gelu''(x) = (2 - x^2) phi(x).
template <class V>
JK_INLINE typename V::Vec curvature_of(const Normal<V>& n, typename V::Vec x) {
  return V::mul(V::sub(V::set1(2.f), V::mul(x, x)), V::mul(n.bell, V::set1(0.3989422804f)));
}

template <class V>
JK_INLINE typename V::Vec sigmoid(typename V::Vec x) {
  return V::div(V::set1(1.f), V::add(V::set1(1.f), exp<V>(negate<V>(x))));
}
template <class V>
JK_INLINE typename V::Vec tanh(typename V::Vec x) {
  return V::sub(V::set1(1.f), V::div(V::set1(2.f), V::add(V::set1(1.f), exp<V>(V::add(x, x)))));
}

}  // namespace
}  // namespace jk::rollout
