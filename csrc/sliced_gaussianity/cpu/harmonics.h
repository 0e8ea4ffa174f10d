// Sums of the powers of z = exp(i spacing u) over rows, and the polynomial in z that is their
// gradient. Knots are equally spaced, so a power costs one complex product. Lanes are directions.
#pragma once
#include <string.h>

#include "../../cpu/simd/native.h"
#include "../params.h"
#include "turn.h"

namespace jk::gaussianity {
namespace {

// A vector of columns of a row of floats, of which `width` are there; the others read as 0.
template <class V>
JK_INLINE typename V::Vec load_columns(const float* from, int64_t width) {
  if (width >= V::kLanes) return V::load(from);
  alignas(64) float lanes[V::kLanes] = {};
  memcpy(lanes, from, sizeof(float) * width);
  return V::load(lanes);
}
template <class V>
JK_INLINE void store_columns(float* to, typename V::Vec v, int64_t width) {
  if (width >= V::kLanes) {
    V::store(to, v);
    return;
  }
  alignas(64) float lanes[V::kLanes];
  V::store(lanes, v);
  memcpy(to, lanes, sizeof(float) * width);
}

// Two planes of `knots` vectors of columns.
template <class V>
struct Planes {
  alignas(64) float numbers[2][JK_MOST_KNOTS][V::kLanes];
};

// Adds the powers of kRows rows, `stride` apart.
template <class V, int kRows>
JK_INLINE void add_powers(const float* from, int64_t stride, int64_t width, float spacing,
                          int64_t knots, Planes<V>& sums) {
  using Vec = typename V::Vec;
  Turn<V> first[kRows], power[kRows];
  JK_UNROLL for (int r = 0; r < kRows; ++r) {
    const Vec u = load_columns<V>(from + r * stride, width);
    power[r] = first[r] = turn<V>(V::mul(u, V::set1(spacing)));
  }
  for (int64_t k = 0; k < knots; ++k) {
    float *cosines = sums.numbers[0][k], *sines = sums.numbers[1][k];
    Vec c = power[0].cosine, s = power[0].sine;
    JK_UNROLL for (int r = 1; r < kRows; ++r) {
      c = V::add(c, power[r].cosine);
      s = V::add(s, power[r].sine);
    }
    V::store(cosines, V::add(V::load(cosines), c));
    V::store(sines, V::add(V::load(sines), s));
    JK_UNROLL for (int r = 0; r < kRows; ++r) {
      const Turn<V> z = first[r], w = power[r];
      power[r].cosine = V::fms(w.cosine, z.cosine, V::mul(w.sine, z.sine));
      power[r].sine = V::fma(w.cosine, z.sine, V::mul(w.sine, z.cosine));
    }
  }
}

// Sums over rows [first, last) of the columns from `column` on.
template <class V>
void sum_columns(const jk_sliced_gaussianity_params& p, int64_t first, int64_t last, int64_t column,
                 float* to) {
  constexpr int kRows = kTiles.turned_rows;
  const int64_t width = p.columns - column;
  Planes<V> sums;
  for (int64_t k = 0; k < p.knots; ++k)
    for (int plane = 0; plane < 2; ++plane) V::store(sums.numbers[plane][k], V::zero());
  const float* from = p.projections + first * p.columns + column;
  int64_t row = first;
  for (; row + kRows <= last; row += kRows, from += kRows * p.columns)
    add_powers<V, kRows>(from, p.columns, width, p.spacing, p.knots, sums);
  for (; row < last; ++row, from += p.columns)
    add_powers<V, 1>(from, p.columns, width, p.spacing, p.knots, sums);
  for (int plane = 0; plane < 2; ++plane)
    for (int64_t k = 0; k < p.knots; ++k)
      store_columns<V>(to + (plane * p.knots + k) * p.columns + column,
                       V::load(sums.numbers[plane][k]), width);
}

// The real part of sum_k (c[1, k] + i c[0, k]) z^k of kRows rows, by Horner's rule.
template <class V, int kRows>
JK_INLINE void write_slope(const float* from, float* to, int64_t stride, int64_t width,
                           float spacing, int64_t knots, const Planes<V>& coefficients) {
  using Vec = typename V::Vec;
  Turn<V> z[kRows], h[kRows];
  Vec minus_sine[kRows];
  JK_UNROLL for (int r = 0; r < kRows; ++r) {
    const Vec u = load_columns<V>(from + r * stride, width);
    z[r] = turn<V>(V::mul(u, V::set1(spacing)));
    minus_sine[r] = V::sub(V::zero(), z[r].sine);
    h[r] = {V::zero(), V::zero()};
  }
  for (int64_t k = knots - 1; k >= 0; --k) {
    const Vec real = V::load(coefficients.numbers[1][k]),
              imaginary = V::load(coefficients.numbers[0][k]);
    JK_UNROLL for (int r = 0; r < kRows; ++r) {
      const Turn<V> was = h[r];
      h[r].cosine = V::fma(was.cosine, z[r].cosine, V::fma(was.sine, minus_sine[r], real));
      h[r].sine = V::fma(was.cosine, z[r].sine, V::fma(was.sine, z[r].cosine, imaginary));
    }
  }
  JK_UNROLL for (int r = 0; r < kRows; ++r) store_columns<V>(
      to + r * stride, V::fma(h[r].cosine, z[r].cosine, V::mul(h[r].sine, minus_sine[r])), width);
}

template <class V>
void slope_columns(const jk_sliced_gaussianity_params& p, int64_t first, int64_t last,
                   int64_t column) {
  constexpr int kRows = kTiles.turned_rows;
  const int64_t width = p.columns - column;
  Planes<V> coefficients;
  for (int plane = 0; plane < 2; ++plane)
    for (int64_t k = 0; k < p.knots; ++k)
      V::store(coefficients.numbers[plane][k],
               load_columns<V>(p.coefficients + (plane * p.knots + k) * p.columns + column, width));
  const float* from = p.projections + first * p.columns + column;
  float* to = p.slope + first * p.columns + column;
  int64_t row = first;
  for (; row + kRows <= last; row += kRows, from += kRows * p.columns, to += kRows * p.columns)
    write_slope<V, kRows>(from, to, p.columns, width, p.spacing, p.knots, coefficients);
  for (; row < last; ++row, from += p.columns, to += p.columns)
    write_slope<V, 1>(from, to, p.columns, width, p.spacing, p.knots, coefficients);
}

}  // namespace
}  // namespace jk::gaussianity
