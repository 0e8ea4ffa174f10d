// z = exp(i x) of a vector of angles.
#pragma once
#include <math.h>

#include "../../cpu/simd/bf16.h"

namespace jk::gaussianity {
namespace {

template <class V>
struct Turn {
  typename V::Vec cosine, sine;
};

// Beyond this angle the integer of the reduction would leave no room for exact products.
constexpr float kFar = 20000.f;

template <class V>
__attribute__((noinline)) void turn_far(const float* angle, float* cosine, float* sine) {
  for (int i = 0; i < V::kLanes; ++i) {
    cosine[i] = cosf(angle[i]);
    sine[i] = sinf(angle[i]);
  }
}

// x = q pi + r with |r| <= pi / 2; then polynomials, minimax in absolute error (4.6e-9
// and 3.9e-10), and the sign of (-1)^q. pi is split so that q times its first two parts is exact.
template <class V>
JK_INLINE Turn<V> turn(typename V::Vec x) {
  using Vec = typename V::Vec;
  const Vec size = V::max(V::sub(V::zero(), x), x);
  if (__builtin_expect(V::any_greater(size, V::set1(kFar)), 0)) {
    alignas(64) float angle[V::kLanes], cosine[V::kLanes], sine[V::kLanes];
    V::store(angle, x);
    turn_far<V>(angle, cosine, sine);
    return {V::load(cosine), V::load(sine)};
  }
  const Vec magic = V::set1(12582912.f);  // 1.5 * 2^23
  const Vec shifted = V::fma(x, V::set1(0.3183098862f), magic), q = V::sub(shifted, magic);
  Vec r = V::fma(q, V::set1(-3.140625f), x);
  r = V::fma(q, V::set1(-9.67502593994140625e-4f), r);
  r = V::fma(q, V::set1(-1.509957990978376432e-7f), r);
  const Vec y = V::mul(r, r);
  Vec s = V::fma(V::set1(2.6000543348952618e-6f), y, V::set1(-1.98066150025399e-4f));
  s = V::fma(s, y, V::set1(8.333017288745106e-3f));
  s = V::fma(s, y, V::set1(-0.16666657096385215f));
  s = V::fma(V::mul(s, y), r, r);
  Vec c = V::fma(V::set1(-2.6193811448181094e-7f), y, V::set1(2.4769304057607332e-5f));
  c = V::fma(c, y, V::set1(-1.388856915903826e-3f));
  c = V::fma(c, y, V::set1(0.04166665577302991f));
  c = V::fma(c, y, V::set1(-0.5f));
  c = V::fma(c, y, V::set1(1.f));
  return {V::negate_odd(c, shifted), V::negate_odd(s, shifted)};
}

}  // namespace
}  // namespace jk::gaussianity
