// From hidden sums to predictions, errors or the gradient of errors: the product with the output weight, fused with what follows it.
#pragma once
#include <math.h>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "cpu_functions.h"
#include "cpu_kernels.h"
#include "cpu_multiply.h"

namespace jk::rollout {
namespace {

inline const float* table_row(const jk_rollout_rows& table, int64_t position) {
  return (const float*)table.data + (table.index == nullptr ? position : table.index[position]) * table.stride;
}

// Bit i: whether lane i is positive.
template <class V>
JK_INLINE uint32_t positive_lanes(typename V::Vec x) {
#if defined(__AVX512F__)
  if constexpr (V::kLanes == 16) return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
#endif
#if defined(__AVX2__)
  if constexpr (V::kLanes == 8) return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ));
#endif
  if constexpr (V::kLanes == 4) {
    float lanes[V::kLanes];
    V::store(lanes, x);
    uint32_t bits = 0;
    for (int i = 0; i < V::kLanes; ++i) bits |= (uint32_t)(lanes[i] > 0.f) << i;
    return bits;
  }
}

// |x|^exponent / exponent, and its derivative.
template <class V>
JK_INLINE typename V::Vec power(typename V::Vec x, float exponent) {
  if (exponent == 1.f) return magnitude<V>(x);
  if (exponent == 2.f) return V::mul(V::set1(0.5f), V::mul(x, x));
  float lanes[V::kLanes];
  V::store(lanes, x);
  for (float& lane : lanes) lane = powf(fabsf(lane), exponent) / exponent;
  return V::load(lanes);
}
template <class V>
JK_INLINE typename V::Vec power_slope(typename V::Vec x, float exponent) {
  if (exponent == 1.f) return sign<V>(x);
  if (exponent == 2.f) return x;
  float lanes[V::kLanes];
  V::store(lanes, x);
  for (float& lane : lanes) lane = copysignf(powf(fabsf(lane), exponent - 1.f), lane);
  return V::load(lanes);
}

// A block of kColumns numbers of a row that may end inside it: zeros beyond the end, which are never written.
template <class V>
struct Columns {
  int64_t left;  // numbers from here to the end of the row
  JK_INLINE void load(const float* p, typename V::Vec (&v)[2]) const {
    if (left >= 2 * V::kLanes) {
      v[0] = V::load(p);
      v[1] = V::load(p + V::kLanes);
      return;
    }
    float part[2 * V::kLanes] = {};
    memcpy(part, p, sizeof(float) * left);
    v[0] = V::load(part);
    v[1] = V::load(part + V::kLanes);
  }
  JK_INLINE void store(float* p, const typename V::Vec (&v)[2]) const {
    if (left >= 2 * V::kLanes) {
      V::store(p, v[0]);
      V::store(p + V::kLanes, v[1]);
      return;
    }
    float part[2 * V::kLanes];
    V::store(part, v[0]);
    V::store(part + V::kLanes, v[1]);
    memcpy(p, part, sizeof(float) * left);
  }
};

inline int64_t sign_bytes(const jk_rollout_readout_params& p) { return (p.channels + 7) / 8; }

template <class V>
JK_INLINE void store_signs(const jk_rollout_readout_params& p, int64_t row, int64_t column, const typename V::Vec (&residual)[2]) {
  constexpr int kBytes = 2 * V::kLanes / 8;
  const int64_t plane = sign_bytes(p), left = plane - column / 8;
  uint8_t* to = p.signs + row * 2 * plane + column / 8;
  const uint32_t up = positive_lanes<V>(residual[0]) | positive_lanes<V>(residual[1]) << V::kLanes;
  const uint32_t down = positive_lanes<V>(negate<V>(residual[0])) | positive_lanes<V>(negate<V>(residual[1])) << V::kLanes;
  if (left >= kBytes) {
    memcpy(to, &up, kBytes);
    memcpy(to + plane, &down, kBytes);
    return;
  }
  for (int i = 0; i < left; ++i) {
    to[i] = (uint8_t)(up >> (8 * i));
    to[plane + i] = (uint8_t)(down >> (8 * i));
  }
}

template <class V>
int64_t readout_scratch(const jk_rollout_readout_params& p) {
  return Block<V>::kRows * p.hidden + p.steps * kTileRows * V::kLanes;
}

inline const float* target_row(const jk_rollout_readout_params& p, int64_t k, int64_t row) {
  if (p.targets.index != nullptr) return table_row(p.targets, k * p.rows + row);
  return table_row(p.targets, row) + k * p.target_step_stride;
}

// One tile of rows, every step. Panels of the weight are the outer loop, so that each is read from memory once per tile and
// the rows of a table (base, targets) are visited column block by column block for all steps.
template <class V>
void readout(const jk_rollout_readout_params& p, const Packed& packed, int64_t first, int64_t rows, float* scratch) {
  constexpr int kColumns = Block<V>::kColumns;
  const int64_t tile = kTileRows;
  float *spare = scratch, *totals = spare + Block<V>::kRows * p.hidden;
  if (p.errors != nullptr) memset(totals, 0, sizeof(float) * p.steps * tile * V::kLanes);
  for (int64_t column = 0; column < p.channels; column += kColumns) {
    const Columns<V> edge{p.channels - column};
    typename V::Vec bias[2] = {V::zero(), V::zero()};
    if (p.bias != nullptr) edge.load(p.bias + column, bias);
    for (int64_t k = 0; k < p.steps; ++k) {
      const typename V::Vec times = V::set1((float)(p.first_step + k));
      const auto finish = [&](int64_t r, int64_t c, typename V::Vec left, typename V::Vec right) {
        const int64_t row = first + r, at = k * p.rows + row;
        typename V::Vec value[2];
        edge.load(table_row(p.base, row) + c, value);
        value[0] = V::add(V::fma(times, bias[0], value[0]), left);
        value[1] = V::add(V::fma(times, bias[1], value[1]), right);
        if (p.out != nullptr) {
          edge.store((float*)p.out + k * p.out_step_stride + row * p.out_row_stride + c, value);
          return;
        }
        typename V::Vec wanted[2];
        edge.load(target_row(p, k, row) + c, wanted);
        value[0] = V::sub(value[0], wanted[0]);
        value[1] = V::sub(value[1], wanted[1]);
        if (p.errors != nullptr) {
          float* total = totals + (k * tile + r) * V::kLanes;
          V::store(total, V::add(V::load(total), V::add(power<V>(value[0], p.exponent), power<V>(value[1], p.exponent))));
          if (p.signs != nullptr) store_signs<V>(p, at, c, value);
          return;
        }
        const typename V::Vec scale = V::set1(p.grad_errors[at] / (float)p.channels);
        typename V::Vec base[2];
        float* grad_base = p.grad_base + row * p.grad_base_stride + c;
        edge.load(grad_base, base);
        for (int half = 0; half < 2; ++half) {
          value[half] = V::mul(power_slope<V>(value[half], p.exponent), scale);
          base[half] = V::add(base[half], value[half]);
        }
        edge.store(grad_base, base);
        edge.store(p.grad + at * p.channels + c, value);
      };
      // Rows of tables are far apart: ask for their numbers while the product runs.
      const auto ahead = [&](int64_t r, int64_t c) {
        __builtin_prefetch(table_row(p.base, first + r) + c);
        if (p.out != nullptr) {
          __builtin_prefetch((float*)p.out + k * p.out_step_stride + (first + r) * p.out_row_stride + c, 1);
        } else {
          __builtin_prefetch(target_row(p, k, first + r) + c);
        }
      };
      const float* sums = p.sums + (k * p.rows + first) * p.hidden;
      multiply_panel<V>(sums, p.hidden, rows, p.hidden, packed.matrix[0] + column * p.hidden, column, spare, finish, ahead);
    }
  }
  if (p.errors == nullptr) return;
  for (int64_t k = 0; k < p.steps; ++k)
    for (int64_t r = 0; r < rows; ++r)
      p.errors[k * p.rows + first + r] = V::sum(V::load(totals + (k * tile + r) * V::kLanes)) / (float)p.channels;
}

// Eight 0 or 1 for every byte.
struct BitTable {
  float value[256][8];
  BitTable() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0; bit < 8; ++bit) value[byte][bit] = (float)(byte >> bit & 1);
  }
};

// The gradient of an L1 error from the signs of its residuals.
template <class V>
void gradient_from_signs(const jk_rollout_readout_params& p, int64_t first, int64_t rows) {
  static const BitTable table;
  const int64_t plane = sign_bytes(p), whole = p.channels / 8;
  for (int64_t k = 0; k < p.steps; ++k)
    for (int64_t row = first; row < first + rows; ++row) {
      const int64_t at = k * p.rows + row;
      const float scale = p.grad_errors[at] / (float)p.channels;
      const uint8_t *up = p.signs + at * 2 * plane, *down = up + plane;
      float *grad = p.grad + at * p.channels, *base = p.grad_base + row * p.grad_base_stride;
      const typename V::Vec times = V::set1(scale);
      for (int64_t byte = 0; byte < whole; ++byte) {
        const float *plus = table.value[up[byte]], *minus = table.value[down[byte]];
        if constexpr (V::kLanes <= 8) {
          for (int i = 0; i < 8; i += V::kLanes) {
            const typename V::Vec v = V::mul(times, V::sub(V::load(plus + i), V::load(minus + i)));
            V::store(grad + byte * 8 + i, v);
            V::store(base + byte * 8 + i, V::add(V::load(base + byte * 8 + i), v));
          }
        } else {
          for (int i = 0; i < 8; ++i) {
            const float v = scale * (plus[i] - minus[i]);
            grad[byte * 8 + i] = v;
            base[byte * 8 + i] += v;
          }
        }
      }
      for (int64_t c = whole * 8; c < p.channels; ++c) {
        const float v = scale * (table.value[up[whole]][c - whole * 8] - table.value[down[whole]][c - whole * 8]);
        grad[c] = v;
        base[c] += v;
      }
    }
}

}  // namespace
}  // namespace jk::rollout
