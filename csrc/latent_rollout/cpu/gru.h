// GRU with LayerNorm over one tile of rows, all steps without leaving the cache.
#pragma once
#include <math.h>

#include <initializer_list>

#include "tile.h"

namespace jk::rollout {
namespace {

// Packed matrices: W_i^T [A, 3 D] and W_s^T [D, 3 D] by gate, each gate padded to whole blocks;
// backward: W_s [3 wide, D] with its gates in the order r, u, n, and W_i [3 wide, A] in the order
// n, r, u.
enum { kFromAction, kFromState, kToState, kToAction };

// Backward keeps a row of gradients as n, r, u, W_s z + b_s of n, so that either matrix finds its
// three side by side. The block between rows spreads the columns of a tile over all sets of the L1
// cache.
template <class V>
int64_t gru_gradient_stride(int64_t wide) {
  return 4 * wide + Block<V>::kColumns;
}
// Rows of [1 | action]^T: whole groups of a product.
template <class V>
int64_t gru_small_rows(const jk_rollout_gru_params& p) {
  return (p.actions + Block<V>::kRows) / Block<V>::kRows * Block<V>::kRows;
}

template <class V>
int64_t gru_scratch(const jk_rollout_gru_params& p) {
  const int64_t wide = Block<V>::padded(p.channels), small = gru_small_rows<V>(p);
  const int64_t depth = 3 * wide > p.actions ? 3 * wide : p.actions;
  const int64_t forward = (5 * kTileRows + 8) * wide;
  const int64_t backward =
      kTileRows * (wide + gru_gradient_stride<V>(wide) + small) + 9 * wide + small * 4 * wide;
  return (forward > backward ? forward : backward) + left_size<V>(depth);
}

constexpr int64_t kStreamedBytes = int64_t{1} << 24;

template <class V>
JK_INLINE float row_sum(const float* row, int64_t wide) {
  typename V::Vec total = V::zero();
  for (int64_t i = 0; i < wide; i += V::kLanes) total = V::add(total, V::load(row + i));
  return V::sum(total);
}

// Mean of the first `width` numbers of a row of `wide` (zeros beyond), and 1 / sqrt(variance +
// epsilon).
template <class V>
JK_INLINE void moments(const float* row, int64_t width, int64_t wide, float epsilon, float& mean,
                       float& inverse) {
  mean = row_sum<V>(row, wide) / (float)width;
  typename V::Vec total = V::zero();
  const typename V::Vec m = V::set1(mean);
  int64_t i = 0;
  for (; i + V::kLanes <= width; i += V::kLanes) {
    const typename V::Vec d = V::sub(V::load(row + i), m);
    total = V::fma(d, d, total);
  }
  float rest = 0.f;  // one by one: what the zeros would add may be far more than the variance of a
                     // narrow row, and leaves a rounding error
  for (; i < width; ++i) rest += (row[i] - mean) * (row[i] - mean);
  inverse = 1.f / sqrtf((V::sum(total) + rest) / (float)width + epsilon);
}

template <class V>
void gru_forward(const jk_rollout_gru_params& p, const Packed& packed, int64_t first, int64_t rows,
                 float* scratch) {
  const int64_t d = p.channels, wide = Block<V>::padded(d), tile = kTileRows * wide,
                gates = 3 * wide;
  float *state = scratch, *gate = state + tile,
        *hidden = gate + 3 * tile;  // gate: rows of [r, u, n]; hidden: W_s z + b_s of n
  float *bias = hidden + tile, *bias_state = bias + gates, *weight = bias_state + gates,
        *shift = weight + wide, *spare = shift + wide;
  for (int g = 0; g < 3; ++g) {
    load_vector(bias + g * wide, wide, p.bias_input + g * d, d);
    load_vector(bias_state + g * wide, wide, p.bias_state + g * d, d);
  }
  load_vector(weight, wide, p.norm_weight, d);
  load_vector(shift, wide, p.norm_bias, d);
  for (int64_t r = 0; r < rows; ++r)
    load_vector(state + r * wide, wide, p.start + (first + r) * p.start_stride, d);
  // More gates than a cache holds until backward reads them go past it, where whole vectors lie on
  // cache lines.
  const int64_t gate_bytes = p.horizon * p.rows * 4 * d * (int64_t)sizeof(float);
  const bool streams = p.gates != nullptr && d == wide && (uintptr_t)p.gates % 64 == 0 &&
                       gate_bytes >= kStreamedBytes;
  for (int64_t k = 0; k < p.horizon; ++k) {
    const int64_t at = k * p.rows + first;
    multiply<V>(
        p.action + at * p.actions, p.actions, rows, p.actions, packed.matrix[kFromAction], gates,
        spare, [&](int64_t r, int64_t c, typename V::Vec left, typename V::Vec right) {
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
      float *z = state + r * wide, *reset = gate + r * gates, *update = reset + wide,
            *candidate = update + wide, *from_state = hidden + r * wide;
      float* saved = p.gates == nullptr ? nullptr : p.gates + (at + r) * 4 * d;
      for (int64_t i = 0; i < wide; i += V::kLanes) {
        const typename V::Vec q = V::load(reset + i), u = V::load(update + i),
                              m = V::load(from_state + i);
        const typename V::Vec n = tanh<V>(V::fma(q, m, V::load(candidate + i)));
        V::store(z + i, V::fma(u, V::sub(V::load(z + i), n), n));
        if (streams) {
          V::stream(saved + i, q);
          V::stream(saved + d + i, u);
          V::stream(saved + 2 * d + i, n);
          V::stream(saved + 3 * d + i, m);
        } else {
          V::store(candidate + i, n);
        }
      }
      if (saved != nullptr && !streams) {
        for (int g = 0; g < 3; ++g) memcpy(saved + g * d, reset + g * wide, sizeof(float) * d);
        memcpy(saved + 3 * d, from_state, sizeof(float) * d);
      }
      memset(z + d, 0, sizeof(float) * (wide - d));
      float mean, inverse;
      moments<V>(z, d, wide, p.epsilon, mean, inverse);
      const typename V::Vec m = V::set1(mean), s = V::set1(inverse);
      for (int64_t i = 0; i < wide; i += V::kLanes)
        V::store(z + i, V::fma(V::mul(V::sub(V::load(z + i), m), s), V::load(weight + i),
                               V::load(shift + i)));
    }
    if (p.kept > 1 || k + 1 == p.horizon)
      store_tile(p.states + ((p.kept > 1 ? k : 0) * p.rows + first) * d, d, state, wide, rows);
  }
  if (streams) V::fence();
}

// The gradients of one row of gates, before the products: of the new state (`into`) and what the
// LayerNorm's parameters get.
template <class V>
void gru_row_backward(const jk_rollout_gru_params& p, const float* before,
                      const float* const (&gate)[4], const float* weight, int64_t wide, float* into,
                      float* mixed, float* to, float* grad_weight, float* grad_shift) {
  const float *reset = gate[0], *update = gate[1], *candidate = gate[2], *from_state = gate[3];
  const int64_t d = p.channels;
  for (int64_t i = 0; i < wide; i += V::kLanes)
    V::store(mixed + i,
             V::fma(V::load(update + i), V::sub(V::load(before + i), V::load(candidate + i)),
                    V::load(candidate + i)));
  float mean, inverse;
  moments<V>(mixed, d, wide, p.epsilon, mean, inverse);
  const typename V::Vec m = V::set1(mean), s = V::set1(inverse);
  typename V::Vec plain = V::zero(), along = V::zero();
  for (int64_t i = 0; i < wide; i += V::kLanes) {
    const typename V::Vec normal = V::mul(V::sub(V::load(mixed + i), m), s), g = V::load(into + i),
                          scaled = V::mul(g, V::load(weight + i));
    add_to<V>(grad_weight + i, V::mul(g, normal));
    add_to<V>(grad_shift + i, g);
    V::store(mixed + i, normal);
    plain = V::add(plain, scaled);
    along = V::fma(scaled, normal, along);
  }
  const typename V::Vec plain_mean = V::set1(V::sum(plain) / (float)d),
                        along_mean = V::set1(V::sum(along) / (float)d), one = V::set1(1.f);
  float *to_candidate = to, *to_reset = to_candidate + wide, *to_update = to_reset + wide,
        *to_state = to_update + wide;
  for (int64_t i = 0; i < wide; i += V::kLanes) {
    const typename V::Vec scaled = V::mul(V::load(into + i), V::load(weight + i));
    const typename V::Vec mix =
        V::mul(s, V::sub(V::sub(scaled, plain_mean), V::mul(V::load(mixed + i), along_mean)));
    const typename V::Vec u = V::load(update + i), n = V::load(candidate + i),
                          q = V::load(reset + i);
    const typename V::Vec of_candidate =
        V::mul(V::mul(mix, V::sub(one, u)), V::sub(one, V::mul(n, n)));
    V::store(to_candidate + i, of_candidate);
    V::store(to_reset + i,
             V::mul(V::mul(of_candidate, V::load(from_state + i)), V::mul(q, V::sub(one, q))));
    V::store(to_update + i,
             V::mul(V::mul(mix, V::sub(V::load(before + i), n)), V::mul(u, V::sub(one, u))));
    V::store(to_state + i, V::mul(of_candidate, q));
    V::store(into + i, V::mul(mix, u));
  }
  // Beyond the edge only `normal` is not zero; nothing of it may reach a product or the next step.
  for (float* row : {to_candidate, to_reset, to_update, to_state, into})
    memset(row + d, 0, sizeof(float) * (wide - d));
}

template <class V>
void gru_backward(const jk_rollout_gru_params& p, const Packed& packed, int64_t first, int64_t rows,
                  int64_t piece, float* scratch) {
  const int64_t d = p.channels, wide = Block<V>::padded(d), stride = gru_gradient_stride<V>(wide),
                small_rows = gru_small_rows<V>(p);
  float *carried = scratch, *grad = carried + kTileRows * wide, *given = grad + kTileRows * stride,
        *small = given + small_rows * kTileRows;
  float *mixed = small + small_rows * 4 * wide, *before = mixed + wide, *part = before + wide,
        *weight = part + 4 * wide, *grad_weight = weight + wide, *grad_shift = grad_weight + wide,
        *spare = grad_shift + wide;
  load_vector(weight, wide, p.norm_weight, d);
  memset(grad_weight, 0, sizeof(float) * 2 * wide);
  memset(carried, 0, sizeof(float) * rows * wide);
  memset(before, 0, sizeof(float) * 5 * wide);
  memset(small, 0, sizeof(float) * small_rows * 4 * wide);
  memset(given, 0, sizeof(float) * small_rows * kTileRows);
  for (int64_t r = 0; r < rows; ++r) given[r] = 1.f;
  for (int64_t k = p.horizon - 1; k >= 0; --k) {
    const int64_t at = k * p.rows + first;
    for (int64_t r = 0; r < rows; ++r) {
      float *into = carried + r * wide, *to = grad + r * stride;
      if (p.every_step || k + 1 == p.horizon) {
        const float* from = p.grad_states + ((p.every_step ? at : first) + r) * d;
        for (int64_t i = 0; i < d; ++i) into[i] += from[i];
      }
      const float* z =
          k > 0 ? p.states + (at - p.rows + r) * d : p.start + (first + r) * p.start_stride;
      const float* gate[4];
      for (int g = 0; g < 4; ++g) gate[g] = p.gates + ((at + r) * 4 + g) * d;
      if (d <
          wide) {  // with zeros beyond the edge; where there is no edge, tensors are read in place
        memcpy(before, z, sizeof(float) * d);
        z = before;
        for (int g = 0; g < 4; ++g) {
          memcpy(part + g * wide, gate[g], sizeof(float) * d);
          gate[g] = part + g * wide;
        }
      }
      gru_row_backward<V>(p, z, gate, weight, wide, into, mixed, to, grad_weight, grad_shift);
      for (int g = 0; g < 3; ++g)
        V::put_numbers((typename V::Number*)p.grad_gates + ((at + r) * 3 + g) * d,
                       to + (1 + g) * wide, d);
      for (int64_t i = 0; i < p.actions; ++i)
        given[(1 + i) * kTileRows + r] = p.action[(at + r) * p.actions + i];
    }
    add_outer<V>(given, kTileRows, small_rows, rows, grad, stride, 4 * wide, small);
    multiply<V>(grad, stride, rows, 3 * wide, packed.matrix[kToAction], p.actions, spare,
                [&](int64_t r, int64_t c, typename V::Vec left, typename V::Vec right) {
                  alignas(64) float row[Block<V>::kColumns];
                  V::store(row, left);
                  V::store(row + V::kLanes, right);
                  const int64_t count =
                      p.actions - c < Block<V>::kColumns ? p.actions - c : Block<V>::kColumns;
                  memcpy(p.grad_actions + (at + r) * p.actions + c, row, sizeof(float) * count);
                });
    multiply<V>(grad + wide, stride, rows, 3 * wide, packed.matrix[kToState], d, spare,
                [&](int64_t r, int64_t c, typename V::Vec left, typename V::Vec right) {
                  add_to<V>(carried + r * wide + c, left);
                  add_to<V>(carried + r * wide + c + V::kLanes, right);
                });
  }
  store_tile(p.grad_start + first * d, d, carried, wide, rows);
  memcpy(p.grad_norm + piece * 2 * d, grad_weight, sizeof(float) * d);
  memcpy(p.grad_norm + piece * 2 * d + d, grad_shift, sizeof(float) * d);
  constexpr int kOrder[] = {1, 2, 0, 3};  // r, u, n, W_s z + b_s of n
  for (int64_t i = 0; i <= p.actions; ++i)
    for (int g = 0; g < 4; ++g)
      memcpy(p.grad_small + ((piece * (1 + p.actions) + i) * 4 + g) * d,
             small + (i * 4 + kOrder[g]) * wide, sizeof(float) * d);
}

}  // namespace
}  // namespace jk::rollout
