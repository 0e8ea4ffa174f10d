// Residual MLP over one tile of rows, all steps without leaving the cache.
#pragma once
#include "tile.h"

namespace jk::rollout {
namespace {

template <class V>
int64_t mlp_scratch(const jk_rollout_mlp_params& p) {
  const int64_t wide = Block<V>::padded(p.hidden);
  return (4 * kTileRows + 1) * wide + left_size<V>(p.hidden);
}

template <class V>
void mlp_forward(const jk_rollout_mlp_params& p, const Packed& packed, int64_t first, int64_t rows,
                 float* scratch) {
  const int64_t h = p.hidden, wide = Block<V>::padded(h), step = p.rows * h, count = rows * wide;
  float *a = scratch, *active = a + kTileRows * wide, *sum = active + kTileRows * wide,
        *drift = sum + kTileRows * wide, *spare = drift + wide;
  load_tile(a, wide, p.start + first * h, h, rows);
  memset(sum, 0, sizeof(float) * count);
  if (p.horizon > 1) load_vector(drift, wide, p.drift, h);
  for (int64_t k = 0; k < p.horizon; ++k) {
    if (p.inputs != nullptr) store_tile(p.inputs + k * step + first * h, h, a, wide, rows);
    for (int64_t i = 0; i < count; i += V::kLanes) {
      const typename V::Vec g = gelu<V>(V::load(a + i));
      V::store(active + i, g);
      add_to<V>(sum + i, g);
    }
    if (p.kept > 1 || k + 1 == p.horizon)
      store_tile(p.sums + (p.kept > 1 ? k : 0) * step + first * h, h, sum, wide, rows);
    if (k + 1 == p.horizon) break;
    multiply<V>(active, wide, rows, h, packed.matrix[0], h, spare,
                [&](int64_t r, int64_t c, typename V::Vec left, typename V::Vec right) {
                  add_to<V>(a + r * wide + c, V::add(left, V::load(drift + c)));
                  add_to<V>(a + r * wide + c + V::kLanes,
                            V::add(right, V::load(drift + c + V::kLanes)));
                });
  }
}

template <class V>
void mlp_backward(const jk_rollout_mlp_params& p, const Packed& packed, int64_t first, int64_t rows,
                  float* scratch) {
  const int64_t h = p.hidden, wide = Block<V>::padded(h), step = p.rows * h, count = rows * wide;
  float *a = scratch, *following = a + kTileRows * wide, *grad = following + kTileRows * wide,
        *moved = grad + kTileRows * wide;
  float* spare = moved + kTileRows * wide;
  memset(grad, 0, sizeof(float) * count);
  memset(following, 0, sizeof(float) * count);
  for (int64_t k = p.horizon - 1; k >= 0; --k) {
    const bool last = k + 1 == p.horizon;
    if (last || p.kept > 1) {
      load_tile(moved, wide, p.grad_sums + (p.kept > 1 ? k : 0) * step + first * h, h, rows);
      add_tile<V>(following, moved, count);
    }
    if (!last) {
      multiply<V>(grad, wide, rows, h, packed.matrix[0], h, spare,
                  [&](int64_t r, int64_t c, typename V::Vec left, typename V::Vec right) {
                    V::store(moved + r * wide + c, left);
                    V::store(moved + r * wide + c + V::kLanes, right);
                  });
    }
    load_tile(a, wide, p.inputs + k * step + first * h, h, rows);
    for (int64_t i = 0; i < count; i += V::kLanes) {
      const typename V::Vec x = V::load(a + i);
      const Normal<V> n = normal<V>(x);
      typename V::Vec into = V::load(following + i);
      if (!last) into = V::add(into, V::load(moved + i));
      V::store(grad + i, V::fma(slope_of<V>(n, x), into, V::load(grad + i)));
      V::store(a + i, gelu_of<V>(n, x));
    }
    store_numbers<V>(p.grad_inputs, k * p.rows + first, h, grad, wide, rows);
    if (!last) store_numbers<V>(p.activations, k * p.rows + first, h, a, wide, rows);
  }
}

}  // namespace
}  // namespace jk::rollout
