// Rotation, scaling and packing: from strided rows of the caller's dtype to what the micro-kernels
// read, and back. Included by one translation unit per instruction set, hence the anonymous
// namespace.
#pragma once
#include <math.h>
#include <string.h>

#include "kernels.h"
#include "micro.h"

namespace jk::attention {
namespace {

constexpr JK_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
constexpr JK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The larger of two squared norms, a NaN being the largest: the order of their bits.
JK_INLINE float largest_of(float a, float b) {
  uint32_t x, y;
  memcpy(&x, &a, sizeof x);
  memcpy(&y, &b, sizeof y);
  x = x > y ? x : y;
  memcpy(&a, &x, sizeof a);
  return a;
}

// Channels of a packed row: whole vectors of units.
template <class F>
JK_INLINE int64_t padded_channels(int64_t head_dim) {
  return round_up(head_dim, F::Simd::kLanes * F::kPerUnit);
}

// The table rows of t, y and x whose sum is a token's rotation; `rope` is NULL where nothing
// rotates.
struct Angle {
  const RopeRows* rope;
  const float* axes[3];
};

JK_INLINE int64_t id_at(const Ids& ids, int64_t i) {
  return ids.bytes == 4 ? ((const int32_t*)ids.data)[i * ids.stride]
                        : ((const int64_t*)ids.data)[i * ids.stride];
}

JK_INLINE Angle angle(const RopeRows* rope, const Ids& ids, int64_t i) {
  if (rope == nullptr || ids.data == nullptr) return {nullptr, {}};
  const int64_t row = 2 * rope->padded, h = rope->grid_t, w = h + rope->grid_h,
                rest = w + rope->grid_w;
  const int64_t id = id_at(ids, i);
  int64_t at[3] = {rest, rest + 1, rest + 2};
  if (id >= 0) {
    const uint64_t line = (uint64_t)id / (uint64_t)rope->grid_w, t = line / (uint64_t)rope->grid_h;
    at[0] = (int64_t)t;
    at[1] = h + (int64_t)(line - t * (uint64_t)rope->grid_h);
    at[2] = w + id - (int64_t)line * rope->grid_w;
  }
  return {rope, {rope->data + at[0] * row, rope->data + at[1] * row, rope->data + at[2] * row}};
}

template <class V>
JK_INLINE void cos_sin(const Angle& a, int64_t d, typename V::Vec& c, typename V::Vec& s) {
  const int64_t sines = a.rope->padded;
  int axis = a.rope->first_axis[d / 8];
  const int last = a.rope->last_axis[(d + V::kLanes - 1) / 8];
  c = V::load(a.axes[axis] + d);
  s = V::load(a.axes[axis] + sines + d);
  while (++axis <= last) {
    c = V::add(c, V::load(a.axes[axis] + d));
    s = V::add(s, V::load(a.axes[axis] + sines + d));
  }
}

// Head vectors to pack: rows of the caller with the ids that rotate them.
struct Source {
  Rows rows;
  Ids ids;
  const RopeRows* rope;
  float scale;
};

// How scale * log2(e) is shared out: scores take it inside a fused multiply-add, because rounding
// every scaled query once more would show in large scores; packed queries take its sign, or all of
// it where it is too small to divide by.
struct Scales {
  float query, score;
  float grad_k;  // turns sums over packed queries into the gradient of K
};

inline Scales scales_of(float scale) {
  const float c = scale * (float)M_LOG2E;
  if (!(fabsf(c) > 1e-20f)) return {c, 1.f, (float)M_LN2};
  return {c < 0 ? -1.f : 1.f, fabsf(c), fabsf(scale)};
}

template <class V>
JK_INLINE typename V::Vec rotated(typename V::Vec x, const Angle& at, int64_t d) {
  typename V::Vec c, s;
  cos_sin<V>(at, d, c, s);
  return V::fma(x, c, V::mul(V::swap_pairs(x), s));
}

// Rows first .. first + count as floats, rotated and scaled, then zero rows up to `padded`. Returns
// the largest squared norm where it is asked for.
template <class V, class T, bool kNorm>
float read_rows(const Source& from, int64_t head_dim, int64_t first, int64_t count, int64_t padded,
                float* rows, int64_t stride) {
  const typename V::Vec scale = V::set1(from.scale);
  float largest = 0;
  const T* src = (const T*)from.rows.data + first * from.rows.stride;
  const T* ahead = src + kPrefetchRows * from.rows.stride;
  for (int64_t i = 0; i < count; ++i, src += from.rows.stride, ahead += from.rows.stride) {
    const Angle at = angle(from.rope, from.ids, first + i);
    float* row = rows + i * stride;
    typename V::Vec squares = V::zero();
    const auto put = [&](int64_t d, typename V::Vec x) __attribute__((always_inline)) {
      x = V::mul(x, scale);
      if constexpr (kNorm) squares = V::fma(x, x, squares);
      V::store(row + d, x);
      __builtin_prefetch(ahead + d);
    };
    if (at.rope == nullptr) {
      for (int64_t d = 0; d < head_dim; d += V::kLanes) put(d, V::load_head(src + d, head_dim - d));
    } else {
      for (int64_t d = 0; d < head_dim; d += V::kLanes)
        put(d, rotated<V>(V::load_head(src + d, head_dim - d), at, d));
    }
    if constexpr (kNorm) largest = largest_of(largest, V::sum(squares));
  }
  if (padded > count)
    memset(rows + count * stride, 0, (size_t)((padded - count) * stride) * sizeof(float));
  return largest;
}

// A gradient of a rotated, scaled row back to the caller: times scale, through the transpose of the
// rotation.
template <class V, class T>
JK_INLINE void write_row(const Rows& to, int64_t i, const Angle& at, int64_t head_dim, float scale,
                         const float* row) {
  T* dst = (T*)to.data + i * to.stride;
  for (int64_t d = 0; d < head_dim; d += V::kLanes) {
    typename V::Vec g = V::mul(V::load(row + d), V::set1(scale));
    if (at.rope != nullptr) {
      typename V::Vec c, s;
      cos_sin<V>(at, d, c, s);
      g = V::fma(g, c, V::swap_pairs(V::mul(g, s)));
    }
    V::store_head(dst + d, g, head_dim - d);
  }
}

// Rows summed along the row: dst[n][channels / kPerUnit].
template <class F>
void put_rows(const float* rows, int64_t channels, int64_t count, float* dst) {
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t d = 0; d < channels; d += F::Simd::kLanes) {
      F::put_row(dst + (n * channels + d) / F::kPerUnit, F::Simd::load(rows + n * channels + d));
    }
  }
}

// Rows summed over tokens: dst[n / kPerUnit][channels].
template <class F>
void put_pairs(const float* rows, int64_t channels, int64_t count, float* dst) {
  using V = typename F::Simd;
  for (int64_t n = 0; n < count; n += 2) {
    for (int64_t d = 0; d < channels; d += V::kLanes) {
      F::put_pair(dst + n / F::kPerUnit * channels + d, channels, V::load(rows + n * channels + d),
                  V::load(rows + (n + 1) * channels + d));
    }
  }
}

// The same cut into panels of kRows channels, so that a row block reads on and on: dst[d / kRows][n
// / kPerUnit][kRows], `first` being the unit of the first token and `units` the length of a panel.
template <class F>
void put_panels(const float* rows, int64_t channels, int64_t head_dim, int64_t count, float* dst,
                int64_t first, int64_t units) {
  constexpr int64_t kRows = Shape<F>::kRows;
  alignas(64) float line[2 * kMaxHeadDim];
  for (int64_t n = 0; n < count; n += 2) {
    put_pairs<F>(rows + n * channels, channels, 2, line);
    for (int64_t i = 0; i < 2 / F::kPerUnit; ++i) {
      const int64_t unit = first + n / F::kPerUnit + i;
      for (int64_t d = 0; d < head_dim; d += kRows) {
        memcpy(dst + (d / kRows * units + unit) * kRows, line + i * channels + d,
               kRows * sizeof(float));
      }
    }
  }
}

// kLanes rows as lanes of a tile: dst[unit of channels][lane], tiles being kTile lanes wide.
template <class F>
void put_lanes(const float* rows, int64_t channels, float* dst) {
  using V = typename F::Simd;
  const int64_t units = channels / F::kPerUnit;
  alignas(64) float packed[F::kPerUnit == 1 ? 1 : V::kLanes * kMaxHeadDim / 2];
  const float* src = rows;
  if constexpr (F::kPerUnit > 1) {
    put_rows<F>(rows, channels, V::kLanes, packed);
    src = packed;
  }
  for (int64_t u = 0; u < units; u += V::kLanes) {
    typename V::Vec r[V::kLanes];
    JK_UNROLL for (int i = 0; i < V::kLanes; ++i) r[i] = V::load(src + i * units + u);
    V::transpose(r);
    JK_UNROLL for (int i = 0; i < V::kLanes; ++i) V::store(dst + (u + i) * Shape<F>::kTile, r[i]);
  }
}

// Query tiles of a sequence: whole ones of kVecs vectors, and the last two even where the last
// would have a single vector.
template <class F>
JK_INLINE int64_t tile_count(int64_t len) {
  return (len + Shape<F>::kTile - 1) / Shape<F>::kTile;
}

template <class F>
JK_INLINE int64_t tile_begin(int64_t len, int64_t tile) {
  constexpr int64_t kVecs = Shape<F>::kVecs, kLanes = F::Simd::kLanes;
  const int64_t count = tile_count<F>(len), vecs = (len + kLanes - 1) / kLanes;
  if (tile >= count) return round_up(len, kLanes);
  const bool lean = kVecs > 2 && count > 1 && tile == count - 1 && vecs % kVecs == 1;
  return (tile * kVecs - (lean ? 1 : 0)) * kLanes;
}

}  // namespace
}  // namespace jk::attention
