// Hamiltonian half-steps over one tile of rows: forward all of them without leaving the cache,
// backward one.
#pragma once
#include "tile.h"

namespace jk::rollout {
namespace {

template <class V>
int64_t hamiltonian_scratch(int64_t hidden, int64_t middle) {
  const int64_t wide = Block<V>::padded(hidden), deep = Block<V>::padded(middle);
  return 7 * kTileRows * wide + (4 * kTileRows + 2) * deep +
         left_size<V>(hidden > middle ? hidden : middle);
}

// Packed matrices of both Hamiltonian functions: W2^T [h, middle], W2 [middle, h], C^T and C.
enum { kToMiddle, kFromMiddle, kCouplingTransposed, kCoupling };

// W2 gelu(a) + b2 and what follows it for a tile: pulled = w3 gelu'(.) and, for backward, gelu'(.)
// and w3 gelu''(.).
template <class V, bool kBackward>
JK_INLINE void pull(const float* activation, int64_t wide, int64_t rows, int64_t hidden,
                    int64_t middle, const Packed& packed, const float* bias, const float* energy,
                    int64_t deep, float* pulled, float* slopes, float* curvatures, float* spare) {
  multiply<V>(activation, wide, rows, hidden, packed.matrix[kToMiddle], middle, spare,
              [&](int64_t r, int64_t c, typename V::Vec left, typename V::Vec right) {
                const typename V::Vec value[2] = {left, right};
                for (int half = 0; half < 2; ++half) {
                  const int64_t column = c + half * V::kLanes, at = r * deep + column;
                  const typename V::Vec x = V::add(value[half], V::load(bias + column)),
                                        w = V::load(energy + column);
                  const Normal<V> n = normal<V>(x);
                  const typename V::Vec slope = slope_of<V>(n, x);
                  V::store(pulled + at, V::mul(w, slope));
                  if (kBackward) {
                    V::store(slopes + at, slope);
                    V::store(curvatures + at, V::mul(w, curvature_of<V>(n, x)));
                  }
                }
              });
}

template <class V>
void hamiltonian_forward(const jk_rollout_hamiltonian_params& p, const Packed& packed,
                         int64_t first, int64_t rows, float* scratch) {
  const int64_t h = p.hidden, m = p.middle, wide = Block<V>::padded(h), deep = Block<V>::padded(m),
                step = p.rows * h, count = rows * wide;
  const int64_t tile = kTileRows * wide;
  float *a = scratch, *activation = a + tile, *slope = activation + tile, *force = slope + tile,
        *sums[2] = {force + tile, force + 2 * tile};
  float *pulled = force + 3 * tile, *bias = pulled + kTileRows * deep, *energy = bias + deep,
        *spare = energy + deep;
  load_tile(a, wide, p.start + first * h, h, rows);
  memset(sums[0], 0, sizeof(float) * 2 * tile);
  load_vector(bias, deep, p.bias, m);
  load_vector(energy, deep, p.energy, m);
  for (int64_t j = 0; j < 2 * p.horizon; ++j) {
    const int64_t which = j % 2, k = j / 2;
    if (p.inputs != nullptr) store_tile(p.inputs + j * step + first * h, h, a, wide, rows);
    for (int64_t i = 0; i < count; i += V::kLanes) {
      const typename V::Vec x = V::load(a + i);
      const Normal<V> n = normal<V>(x);
      V::store(activation + i, gelu_of<V>(n, x));
      V::store(slope + i, slope_of<V>(n, x));
    }
    pull<V, false>(activation, wide, rows, h, m, packed, bias, energy, deep, pulled, nullptr,
                   nullptr, spare);
    multiply<V>(pulled, deep, rows, m, packed.matrix[kFromMiddle], h, spare,
                [&](int64_t r, int64_t c, typename V::Vec left, typename V::Vec right) {
                  const int64_t at = r * wide + c;
                  const typename V::Vec u = V::mul(left, V::load(slope + at)),
                                        v = V::mul(right, V::load(slope + at + V::kLanes));
                  V::store(force + at, u);
                  V::store(force + at + V::kLanes, v);
                  add_to<V>(sums[which] + at, u);
                  add_to<V>(sums[which] + at + V::kLanes, v);
                });
    if (p.kept > 1 || k + 1 == p.horizon) {
      float* to = p.sums + (which * p.kept + (p.kept > 1 ? k : 0)) * step + first * h;
      store_tile(to, h, sums[which], wide, rows);
    }
    if (j + 1 == 2 * p.horizon) break;
    const typename V::Vec dt = V::set1(which ? -p.time_step : p.time_step);
    multiply<V>(force, wide, rows, h, packed.matrix[which ? kCoupling : kCouplingTransposed], h,
                spare, [&](int64_t r, int64_t c, typename V::Vec left, typename V::Vec right) {
                  float* to = a + r * wide + c;
                  V::store(to, V::fma(dt, left, V::load(to)));
                  V::store(to + V::kLanes, V::fma(dt, right, V::load(to + V::kLanes)));
                });
  }
}

template <class V>
void hamiltonian_backward(const jk_rollout_hamiltonian_step_params& p, const Packed& packed,
                          int64_t first, int64_t rows, float* scratch) {
  const int64_t h = p.hidden, m = p.middle, wide = Block<V>::padded(h), deep = Block<V>::padded(m),
                count = rows * wide;
  const int64_t tile = kTileRows * wide, deep_tile = kTileRows * deep, here = first * h;
  float *carried = scratch, *into = carried + tile, *activation = into + tile,
        *slope = activation + tile, *curvature = slope + tile;
  float *force = curvature + tile, *returned = force + tile;
  float *pulled = returned + tile, *slopes = pulled + deep_tile, *curvatures = slopes + deep_tile,
        *grad_middle = curvatures + deep_tile;
  float *bias = grad_middle + deep_tile, *energy = bias + deep, *spare = energy + deep;
  load_vector(bias, deep, p.bias, m);
  load_vector(energy, deep, p.energy, m);
  load_tile(carried, wide, p.carried + here, h, rows);
  load_tile(into, wide, p.following + here, h, rows);
  load_tile(activation, wide, p.input + here, h, rows);
  for (int64_t i = 0; i < count; i += V::kLanes) {
    const typename V::Vec x = V::load(activation + i);
    const Normal<V> n = normal<V>(x);
    V::store(activation + i, gelu_of<V>(n, x));
    V::store(slope + i, slope_of<V>(n, x));
    V::store(curvature + i, curvature_of<V>(n, x));
  }
  store_tile(p.activation + here, h, activation, wide, rows);
  pull<V, true>(activation, wide, rows, h, m, packed, bias, energy, deep, pulled, slopes,
                curvatures, spare);
  store_tile(p.pulled + first * m, m, pulled, deep, rows);
  multiply<V>(pulled, deep, rows, m, packed.matrix[kFromMiddle], h, spare,
              [&](int64_t r, int64_t c, typename V::Vec left, typename V::Vec right) {
                V::store(returned + r * wide + c, left);
                V::store(returned + r * wide + c + V::kLanes, right);
              });
  if (p.time_step != 0.f) {
    const typename V::Vec dt = V::set1(p.time_step);
    multiply<V>(carried, wide, rows, h,
                packed.matrix[p.transposed ? kCouplingTransposed : kCoupling], h, spare,
                [&](int64_t r, int64_t c, typename V::Vec left, typename V::Vec right) {
                  float* to = into + r * wide + c;
                  V::store(to, V::fma(dt, left, V::load(to)));
                  V::store(to + V::kLanes, V::fma(dt, right, V::load(to + V::kLanes)));
                });
  }
  for (int64_t i = 0; i < count; i += V::kLanes) {
    const typename V::Vec back = V::load(returned + i), grad = V::load(into + i),
                          s = V::load(slope + i);
    V::store(force + i, V::mul(s, back));
    V::store(carried + i, V::fma(V::mul(V::load(curvature + i), back), grad, V::load(carried + i)));
    V::store(into + i, V::mul(s, grad));  // the gradient of `returned` from here on
  }
  store_tile(p.force + here, h, force, wide, rows);
  store_tile(p.grad_returned + here, h, into, wide, rows);
  multiply<V>(into, wide, rows, h, packed.matrix[kToMiddle], m, spare,
              [&](int64_t r, int64_t c, typename V::Vec left, typename V::Vec right) {
                const typename V::Vec value[2] = {left, right};
                for (int half = 0; half < 2; ++half) {
                  const int64_t at = r * deep + c + half * V::kLanes;
                  V::store(grad_middle + at, V::mul(value[half], V::load(curvatures + at)));
                  V::store(slopes + at, V::mul(value[half], V::load(slopes + at)));
                }
              });
  store_tile(p.grad_middle + first * m, m, grad_middle, deep, rows);
  store_tile(p.grad_energy + first * m, m, slopes, deep, rows);
  multiply<V>(grad_middle, deep, rows, m, packed.matrix[kFromMiddle], h, spare,
              [&](int64_t r, int64_t c, typename V::Vec left, typename V::Vec right) {
                const int64_t at = r * wide + c;
                V::store(carried + at, V::fma(left, V::load(slope + at), V::load(carried + at)));
                V::store(carried + at + V::kLanes, V::fma(right, V::load(slope + at + V::kLanes),
                                                          V::load(carried + at + V::kLanes)));
              });
  store_tile(p.carried + here, h, carried, wide, rows);
}

}  // namespace
}  // namespace jk::rollout
