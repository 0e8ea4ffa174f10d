// From hidden sums to predictions, errors or the gradient of errors: the product with the output
// weight, fused with what follows it.
#pragma once
#include <math.h>

#include "functions.h"
#include "kernels.h"
#include "multiply.h"

namespace jk::rollout {
namespace {

// Where a row of a table begins, in its numbers.
inline int64_t row_of(const jk_rollout_rows& table, int64_t position) {
  return (table.index == nullptr ? position : table.index[position]) * table.stride;
}
inline void prefetch(const jk_rollout_rows& table, int64_t at) {
  __builtin_prefetch((const char*)table.data +
                     at * (table.dtype == JK_FLOAT32 ? sizeof(float) : sizeof(bf16)));
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

// A block of kColumns numbers of a row that may end inside it: zeros beyond the end, which are
// never written.
template <class V>
struct Columns {
  int64_t left;  // numbers from here to the end of the row
  template <class Number>
  JK_INLINE void load(const Number* p, typename V::Vec (&v)[2]) const {
    if (left >= 2 * V::kLanes) {
      v[0] = V::load(p);
      v[1] = V::load(p + V::kLanes);
      return;
    }
    Number part[2 * V::kLanes] = {};
    memcpy(part, p, sizeof(Number) * left);
    v[0] = V::load(part);
    v[1] = V::load(part + V::kLanes);
  }
  JK_INLINE void load(const jk_rollout_rows& table, int64_t at, typename V::Vec (&v)[2]) const {
    if (table.dtype == JK_FLOAT32) {
      load((const float*)table.data + at, v);
    } else {
      load((const bf16*)table.data + at, v);
    }
  }
  template <class Number>
  JK_INLINE void store(Number* p, const typename V::Vec (&v)[2]) const {
    if (left >= 2 * V::kLanes) {
      V::store_two(p, v[0], v[1]);
      return;
    }
    Number part[2 * V::kLanes];
    V::store_two(part, v[0], v[1]);
    memcpy(p, part, sizeof(Number) * left);
  }
};

inline int64_t sign_bytes(const jk_rollout_readout_params& p) { return (p.channels + 7) / 8; }

template <class V>
JK_INLINE void store_signs(const jk_rollout_readout_params& p, int64_t row, int64_t column,
                           const typename V::Vec (&residual)[2]) {
  constexpr int kBytes = 2 * V::kLanes / 8;
  const int64_t plane = sign_bytes(p), left = plane - column / 8;
  uint8_t* to = p.signs + row * 2 * plane + column / 8;
  const uint32_t up = V::positive_lanes(residual[0]) | V::positive_lanes(residual[1]) << V::kLanes;
  const uint32_t down = V::positive_lanes(negate<V>(residual[0])) |
                        V::positive_lanes(negate<V>(residual[1])) << V::kLanes;
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
  return p.steps * (left_size<V>(p.hidden) + kTileRows * V::kLanes);
}

// Where the row of targets of step k begins.
inline int64_t target_of(const jk_rollout_readout_params& p, int64_t k, int64_t row) {
  return p.targets.index != nullptr ? row_of(p.targets, k * p.rows + row)
                                    : row_of(p.targets, row) + k * p.target_step_stride;
}

// One tile of rows, every step. Panels of the weight are the outer loop, so that each is read from
// memory once per tile and the rows of a table (base, targets) are visited column block by column
// block for all steps.
template <class V>
void readout(const jk_rollout_readout_params& p, const Packed& packed, int64_t first, int64_t rows,
             float* scratch) {
  using Number = typename V::Number;
  constexpr int kColumns = Block<V>::kColumns;
  const int64_t tile = kTileRows, h = p.hidden, size = left_size<V>(h);
  float *left = scratch, *totals = left + p.steps * size;
  const auto sums_of = [&](int64_t k) { return p.sums + (k * p.rows + first) * h; };
  for (int64_t k = 0; k < p.steps; ++k) fill_left<V>(sums_of(k), h, rows, h, left + k * size);
  if (p.errors != nullptr) memset(totals, 0, sizeof(float) * p.steps * tile * V::kLanes);
  for (int64_t column = 0; column < p.channels; column += kColumns) {
    const Columns<V> edge{p.channels - column};
    typename V::Vec bias[2] = {V::zero(), V::zero()};
    if (p.bias != nullptr) edge.load(p.bias + column, bias);
    for (int64_t k = 0; k < p.steps; ++k) {
      const typename V::Vec times = V::set1((float)(p.first_step + k));
      const auto finish = [&](int64_t r, int64_t c, typename V::Vec left,
                              typename V::Vec right) __attribute__((always_inline)) {
        const int64_t row = first + r, at = k * p.rows + row;
        typename V::Vec value[2];
        edge.load(p.base, row_of(p.base, row) + c, value);
        value[0] = V::add(V::fma(times, bias[0], value[0]), left);
        value[1] = V::add(V::fma(times, bias[1], value[1]), right);
        if (p.out != nullptr) {
          edge.store((Number*)p.out + k * p.out_step_stride + row * p.out_row_stride + c, value);
          return;
        }
        typename V::Vec wanted[2];
        edge.load(p.targets, target_of(p, k, row) + c, wanted);
        value[0] = V::sub(value[0], wanted[0]);
        value[1] = V::sub(value[1], wanted[1]);
        if (p.errors != nullptr) {
          float* total = totals + (k * tile + r) * V::kLanes;
          V::store(total, V::add(V::load(total), V::add(power<V>(value[0], p.exponent),
                                                        power<V>(value[1], p.exponent))));
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
        edge.store((Number*)p.grad + at * p.channels + c, value);
      };
      // Rows of tables are far apart: ask for their numbers while the product runs.
      const auto ahead = [&](int64_t r, int64_t c) {
        prefetch(p.base, row_of(p.base, first + r) + c);
        if (p.out != nullptr) {
          __builtin_prefetch(
              (Number*)p.out + k * p.out_step_stride + (first + r) * p.out_row_stride + c, 1);
        } else {
          prefetch(p.targets, target_of(p, k, first + r) + c);
        }
      };
      multiply_panel<V>(left_at<V>(sums_of(k), h, rows, h, left + k * size),
                        packed.matrix[0] + column * units<V>(h), column, finish, ahead);
    }
  }
  if (p.errors == nullptr) return;
  for (int64_t k = 0; k < p.steps; ++k)
    for (int64_t r = 0; r < rows; ++r)
      p.errors[k * p.rows + first + r] =
          V::sum(V::load(totals + (k * tile + r) * V::kLanes)) / (float)p.channels;
}

// Eight 0 or 1 for every byte.
struct BitTable {
  float value[256][8] = {};
  constexpr BitTable() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0; bit < 8; ++bit) value[byte][bit] = (float)(byte >> bit & 1);
  }
};

// Two vectors from the bits at `up` and `down`: `times` where the first is set, minus `times` where
// the second.
template <class V>
JK_INLINE void load_signs(const uint8_t* up, const uint8_t* down, typename V::Vec times,
                          typename V::Vec (&v)[2]) {
  if constexpr (V::kMaskRegisters) {
    uint16_t plus[2], minus[2];
    memcpy(plus, up, sizeof(plus));
    memcpy(minus, down, sizeof(minus));
    JK_UNROLL for (int i = 0; i < 2; ++i) v[i] = V::signed_by(plus[i], minus[i], times);
    return;
  }
  static constexpr BitTable table;
  float lanes[2 * V::kLanes];
  for (int i = 0; i < V::kLanes / 4; ++i)
    for (int bit = 0; bit < 8; ++bit)
      lanes[8 * i + bit] = table.value[up[i]][bit] - table.value[down[i]][bit];
  v[0] = V::mul(times, V::load(lanes));
  v[1] = V::mul(times, V::load(lanes + V::kLanes));
}

// The gradient of an L1 error from the signs of its residuals.
template <class V>
void gradient_from_signs(const jk_rollout_readout_params& p, int64_t first, int64_t rows) {
  using Number = typename V::Number;
  constexpr int kColumns = Block<V>::kColumns;
  const int64_t plane = sign_bytes(p);
  for (int64_t k = 0; k < p.steps; ++k)
    for (int64_t row = first; row < first + rows; ++row) {
      const int64_t at = k * p.rows + row;
      const typename V::Vec times = V::set1(p.grad_errors[at] / (float)p.channels);
      const uint8_t *up = p.signs + at * 2 * plane, *down = up + plane;
      for (int64_t c = 0; c < p.channels; c += kColumns) {
        const Columns<V> edge{p.channels - c};
        const uint8_t *plus = up + c / 8, *minus = down + c / 8;
        uint8_t bits[2][kColumns / 8] = {};
        if (edge.left < kColumns) {
          memcpy(bits[0], plus, plane - c / 8);
          memcpy(bits[1], minus, plane - c / 8);
          plus = bits[0];
          minus = bits[1];
        }
        typename V::Vec value[2], base[2];
        load_signs<V>(plus, minus, times, value);
        float* grad_base = p.grad_base + row * p.grad_base_stride + c;
        edge.load(grad_base, base);
        for (int half = 0; half < 2; ++half) base[half] = V::add(base[half], value[half]);
        edge.store(grad_base, base);
        edge.store((Number*)p.grad + at * p.channels + c, value);
      }
    }
}

}  // namespace
}  // namespace jk::rollout
