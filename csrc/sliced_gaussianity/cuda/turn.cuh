// z = exp(i x) of an angle.
#pragma once
#include "../../cuda/device.cuh"

namespace jk::gaussianity {
namespace {

struct Turn {
  float cosine, sine;
};

// Beyond this angle two parts of pi no longer give an exact remainder.
constexpr float kFar = 100000.f;
constexpr float kQuarter = 1.5707964f;

// x = q pi + r in float64. Beyond 2^53 turns nothing is left of the angle: any number within the
// quarter turns, as long as x is one. (libm's sincosf would keep an array in memory for it.)
JK_DEVICE float far_remainder(float x, bool& odd) {
  const double wide = x, q = rint(wide * 0.3183098861837907);
  const float r = float(fma(q, -1.2246467991473532e-16, fma(q, -3.141592653589793, wide)));
  odd = q - 2.0 * floor(q * 0.5) != 0.0;
  return fabsf(r) <= kQuarter ? r : r * 0.f;
}

// x = q pi + r with |r| <= pi / 2; then polynomials, minimax in absolute error (4.6e-9
// and 3.9e-10), and the sign of (-1)^q.
JK_DEVICE Turn turn(float x) {
  float r;
  bool odd;
  if (fabsf(x) <= kFar) {
    const float q = rintf(x * 0.3183098862f);
    r = fmaf(q, 8.742277657347586e-8f, fmaf(q, -3.1415927410125732f, x));
    odd = (int(q) & 1) != 0;
  } else {
    r = far_remainder(x, odd);
  }
  const float y = r * r;
  float s = fmaf(2.6000543348952618e-6f, y, -1.98066150025399e-4f);
  s = fmaf(s, y, 8.333017288745106e-3f);
  s = fmaf(s, y, -0.16666657096385215f);
  s = fmaf(s * y, r, r);
  float c = fmaf(-2.6193811448181094e-7f, y, 2.4769304057607332e-5f);
  c = fmaf(c, y, -1.388856915903826e-3f);
  c = fmaf(c, y, 0.04166665577302991f);
  c = fmaf(c, y, -0.5f);
  c = fmaf(c, y, 1.f);
  return {odd ? -c : c, odd ? -s : s};
}

}  // namespace
}  // namespace jk::gaussianity
