// GRU with LayerNorm over one tile of rows, all steps without leaving the cache.
#pragma once
#include <math.h>

#include <initializer_list>

#include "cpu_recurrence.h"

namespace jk::rollout {
namespace {

// Packed matrices: W_i^T [A, 3 D] and W_s^T [D, 3 D] by gate, each gate padded to whole blocks; backward: W_s [3 wide, D].
enum { kFromAction, kFromState, kToState };

template <class V>
int64_t gru_scratch(const jk_rollout_gru_params& p) {
  const int64_t wide = Block<V>::padded(p.channels);
  const int64_t depth = 3 * wide > p.actions ? 3 * wide : p.actions;
  return (7 * kTileRows + 9) * wide + Block<V>::kRows * depth;
}

template <class V>
JK_INLINE float row_sum(const float* row, int64_t wide) {
  typename V::Vec total = V::zero();
  for (int64_t i = 0; i < wide; i += V::kLanes) total = V::add(total, V::load(row + i));
  return V::sum(total);
}

// Mean of the first `width` numbers of a row of `wide` (zeros beyond), and 1 / sqrt(variance + epsilon).
template <class V>
JK_INLINE void moments(const float* row, int64_t width, int64_t wide, float epsilon, float& mean, float& inverse) {
  mean = row_sum<V>(row, wide) / (float)width;
  typename V::Vec total = V::zero();
  const typename V::Vec m = V::set1(mean);
  for (int64_t i = 0; i < wide; i += V::kLanes) {
    const typename V::Vec d = V::sub(V::load(row + i), m);
    total = V::fma(d, d, total);
  }
  const float beyond = (float)(wide - width) * mean * mean;  // what the zeros added
  inverse = 1.f / sqrtf((V::sum(total) - beyond) / (float)width + epsilon);
}

template <class V>
void gru_forward(const jk_rollout_gru_params& p, const Packed& packed, int64_t first, int64_t rows, float* scratch) {
  const int64_t d = p.channels, wide = Block<V>::padded(d), tile = kTileRows * wide, gates = 3 * wide;
  float *state = scratch, *gate = state + tile, *hidden = gate + 3 * tile;  // gate: rows of [r, u, n]; hidden: W_s z + b_s of n
  float *bias = hidden + tile, *bias_state = bias + gates, *weight = bias_state + gates, *shift = weight + wide, *spare = shift + wide;
  for (int g = 0; g < 3; ++g) {
    load_vector(bias + g * wide, wide, p.bias_input + g * d, d);
    load_vector(bias_state + g * wide, wide, p.bias_state + g * d, d);
  }
  load_vector(weight, wide, p.norm_weight, d);
  load_vector(shift, wide, p.norm_bias, d);
  for (int64_t r = 0; r < rows; ++r) load_vector(state + r * wide, wide, p.start + (first + r) * p.start_stride, d);
  for (int64_t k = 0; k < p.horizon; ++k) {
    const int64_t at = k * p.rows + first;
    multiply<V>(p.action + at * p.actions, p.actions, rows, p.actions, packed.matrix[kFromAction], gates, spare,
                [&](int64_t r, int64_t c, typename V::Vec left, typename V::Vec right) {
                  V::store(gate + r * gates + c, V::add(left, V::load(bias + c)));
                  V::store(gate + r * gates + c + V::kLanes, V::add(right, V::load(bias + c + V::kLanes)));
                });
    multiply<V>(state, wide, rows, d, packed.matrix[kFromState], gates, spare,
                [&](int64_t r, int64_t c, typename V::Vec left, typename V::Vec right) {
                  left = V::add(left, V::load(bias_state + c));
                  right = V::add(right, V::load(bias_state + c + V::kLanes));
                  if (c >= 2 * wide) {
                    V::store(hidden + r * wide + c - 2 * wide, left);
                    V::store(hidden + r * wide + c - 2 * wide + V::kLanes, right);
                  } else {
                    float* to = gate + r * gates + c;
                    V::store(to, sigmoid<V>(V::add(V::load(to), left)));
                    V::store(to + V::kLanes, sigmoid<V>(V::add(V::load(to + V::kLanes), right)));
                  }
                });
    for (int64_t r = 0; r < rows; ++r) {
      float *z = state + r * wide, *reset = gate + r * gates, *update = reset + wide, *candidate = update + wide,
            *from_state = hidden + r * wide;
      for (int64_t i = 0; i < wide; i += V::kLanes) {
        const typename V::Vec n = tanh<V>(V::fma(V::load(reset + i), V::load(from_state + i), V::load(candidate + i)));
        V::store(candidate + i, n);
        V::store(z + i, V::fma(V::load(update + i), V::sub(V::load(z + i), n), n));
      }
      if (p.gates != nullptr) {
        float* to = p.gates + (at + r) * 4 * d;
        for (int g = 0; g < 3; ++g) memcpy(to + g * d, reset + g * wide, sizeof(float) * d);
        memcpy(to + 3 * d, from_state, sizeof(float) * d);
      }
      memset(z + d, 0, sizeof(float) * (wide - d));
      float mean, inverse;
      moments<V>(z, d, wide, p.epsilon, mean, inverse);
      const typename V::Vec m = V::set1(mean), s = V::set1(inverse);
      for (int64_t i = 0; i < wide; i += V::kLanes)
        V::store(z + i, V::fma(V::mul(V::sub(V::load(z + i), m), s), V::load(weight + i), V::load(shift + i)));
    }
    if (p.kept > 1 || k + 1 == p.horizon) store_tile(p.states + ((p.kept > 1 ? k : 0) * p.rows + first) * d, d, state, wide, rows);
  }
}

template <class V>
void gru_backward(const jk_rollout_gru_params& p, const Packed& packed, int64_t first, int64_t rows, float* grad_norm, float* scratch) {
  const int64_t d = p.channels, wide = Block<V>::padded(d), tile = kTileRows * wide;
  float *carried = scratch, *grad = carried + tile, *mixed = grad + 3 * tile, *before = mixed + tile;  // grad: rows of [r, u, W_s z of n]
  float *weight = before + wide, *part = weight + wide, *grad_weight = part + 4 * wide, *grad_shift = grad_weight + wide,
        *spare = grad_shift + wide;
  load_vector(weight, wide, p.norm_weight, d);
  memset(grad_weight, 0, sizeof(float) * 2 * wide);
  memset(carried, 0, sizeof(float) * rows * wide);
  memset(before, 0, sizeof(float) * wide);
  memset(part, 0, sizeof(float) * 4 * wide);
  for (int64_t k = p.horizon - 1; k >= 0; --k) {
    const int64_t at = k * p.rows + first;
    for (int64_t r = 0; r < rows; ++r) {
      float *into = carried + r * wide, *h = mixed + r * wide;
      if (p.every_step || k + 1 == p.horizon) {
        const float* from = p.grad_states + ((p.every_step ? at : first) + r) * d;
        for (int64_t i = 0; i < d; ++i) into[i] += from[i];
      }
      const float* z = k > 0 ? p.states + (at - p.rows + r) * d : p.start + (first + r) * p.start_stride;
      memcpy(before, z, sizeof(float) * d);
      for (int g = 0; g < 4; ++g) memcpy(part + g * wide, p.gates + ((at + r) * 4 + g) * d, sizeof(float) * d);
      const float *reset = part, *update = part + wide, *candidate = part + 2 * wide, *from_state = part + 3 * wide;
      for (int64_t i = 0; i < wide; i += V::kLanes)
        V::store(h + i, V::fma(V::load(update + i), V::sub(V::load(before + i), V::load(candidate + i)), V::load(candidate + i)));
      float mean, inverse;
      moments<V>(h, d, wide, p.epsilon, mean, inverse);
      const typename V::Vec m = V::set1(mean), s = V::set1(inverse);
      typename V::Vec plain = V::zero(), along = V::zero();
      for (int64_t i = 0; i < wide; i += V::kLanes) {
        const typename V::Vec normal = V::mul(V::sub(V::load(h + i), m), s), g = V::load(into + i), scaled = V::mul(g, V::load(weight + i));
        add_to<V>(grad_weight + i, V::mul(g, normal));
        add_to<V>(grad_shift + i, g);
        plain = V::add(plain, scaled);
        along = V::fma(scaled, normal, along);
      }
      const typename V::Vec plain_mean = V::set1(V::sum(plain) / (float)d), along_mean = V::set1(V::sum(along) / (float)d),
                            one = V::set1(1.f);
      float *to_reset = grad + r * 3 * wide, *to_update = to_reset + wide, *to_state = to_update + wide;
      for (int64_t i = 0; i < wide; i += V::kLanes) {
        const typename V::Vec normal = V::mul(V::sub(V::load(h + i), m), s), scaled = V::mul(V::load(into + i), V::load(weight + i));
        const typename V::Vec mix = V::mul(s, V::sub(V::sub(scaled, plain_mean), V::mul(normal, along_mean)));
        const typename V::Vec u = V::load(update + i), n = V::load(candidate + i), q = V::load(reset + i);
        const typename V::Vec of_candidate = V::mul(V::mul(mix, V::sub(one, u)), V::sub(one, V::mul(n, n)));
        V::store(to_update + i, V::mul(V::mul(mix, V::sub(V::load(before + i), n)), V::mul(u, V::sub(one, u))));
        V::store(to_reset + i, V::mul(V::mul(of_candidate, V::load(from_state + i)), V::mul(q, V::sub(one, q))));
        V::store(to_state + i, V::mul(of_candidate, q));
        V::store(h + i, of_candidate);
        V::store(into + i, V::mul(mix, u));
      }
      // Beyond the edge only `normal` is not zero; nothing of it may reach the product or the next step.
      for (float* row : {to_reset, to_update, to_state, into}) memset(row + d, 0, sizeof(float) * (wide - d));
      float* to = p.grad_gates + (at + r) * 4 * d;
      memcpy(to, to_reset, sizeof(float) * d);
      memcpy(to + d, to_update, sizeof(float) * d);
      memcpy(to + 2 * d, h, sizeof(float) * d);
      memcpy(to + 3 * d, to_state, sizeof(float) * d);
    }
    multiply<V>(grad, 3 * wide, rows, 3 * wide, packed.matrix[kToState], d, spare,
                [&](int64_t r, int64_t c, typename V::Vec left, typename V::Vec right) {
                  add_to<V>(carried + r * wide + c, left);
                  add_to<V>(carried + r * wide + c + V::kLanes, right);
                });
  }
  store_tile(p.grad_start + first * d, d, carried, wide, rows);
  memcpy(grad_norm, grad_weight, sizeof(float) * d);
  memcpy(grad_norm + d, grad_shift, sizeof(float) * d);
}

}  // namespace
}  // namespace jk::rollout
