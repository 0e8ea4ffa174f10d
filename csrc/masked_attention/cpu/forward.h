// Forward attention of one (sequence, head). Queries sit in the lanes of vectors, so a softmax row
// is a lane and needs no horizontal step: scores^T [keys, queries] = K Q^T, P = 2^(scores - shift),
// out^T += V^T P. Scores are in units of log2. Included by one translation unit per instruction
// set, hence the anonymous namespace.
#pragma once
#include <float.h>
#include <math.h>

#include "pack.h"
#include "sight.h"

namespace jk::attention {
namespace {

// Below this bound on |score| the sum of 2^score can neither overflow nor lose terms: no running
// maximum is needed.
constexpr float kScoreBound = 48.f;
// Elsewhere a lane's shift may lag its maximum by this much; a narrow margin would rescale all the
// time.
constexpr float kShiftMargin = 64.f;
constexpr float kLowestExponent = -126.f;

struct PackedKeys {
  float* rows;    // [tokens][channels]: K rotated, summed along the row
  float* panels;  // [head_dim / kRows][tokens][kRows]: V, summed over tokens
  int64_t count;  // keys, without padding
  int64_t channels, head_dim, panel_units;
};

struct ForwardScratch {
  float* key_norm;
  PackedKeys keys;
  float *lanes, *out, *probs;
  // Where there are times: the range of each row block of keys, and the largest squared norm of
  // each vector of them.
  TimeRange* key_times;
  float* key_norms;
  int64_t floats;
};

template <class F>
ForwardScratch forward_layout(float* base, int64_t head_dim, int64_t len_k) {
  constexpr int64_t kTile = Shape<F>::kTile, kUnit = F::kPerUnit;
  const int64_t channels = padded_channels<F>(head_dim), tokens = round_up(len_k, kTokenPad);
  ForwardScratch s;
  int64_t used = 0;
  // 32 floats between buffers keep their rows from sharing cache sets.
  const auto take = [&](int64_t floats) {
    float* p = base + used;
    used += round_up(floats, 16) + 32;
    return p;
  };
  s.key_norm = take(1);
  s.keys = {take(tokens * channels / kUnit),
            take(tokens / kUnit * head_dim),
            len_k,
            channels,
            head_dim,
            tokens / kUnit};
  s.lanes = take(channels / kUnit * kTile);
  s.out = take(channels * kTile);
  s.probs = take(kForwardBlock / kUnit * kTile);
  s.key_times = (TimeRange*)take(tokens / Shape<F>::kRows * 2);
  s.key_norms = take(tokens / F::Simd::kLanes);
  s.floats = used;
  return s;
}

template <class F, class T>
void forward_keys(const Head& head, float* scratch) {
  constexpr int64_t kLanes = F::Simd::kLanes;
  const ForwardScratch s = forward_layout<F>(scratch, head.head_dim, head.len_k);
  const int64_t channels = s.keys.channels, tokens = round_up(head.len_k, kTokenPad);
  alignas(64) float buffer[kLanes * kMaxHeadDim];
  const Source key = {head.k, head.ids_k, head.rope, 1.f},
               value = {head.v, head.ids_k, nullptr, 1.f};
  float largest = 0;
  for (int64_t n = 0; n < tokens; n += kLanes) {
    const int64_t count = n < head.len_k ? least(head.len_k - n, kLanes) : 0;
    float* packed = s.keys.rows + n * channels / F::kPerUnit;
    float* rows = F::kPerUnit == 1 ? packed : buffer;
    const float norm =
        read_rows<typename F::Simd, T, true>(key, head.head_dim, n, count, kLanes, rows, channels);
    s.key_norms[n / kLanes] = norm;
    largest = largest_of(largest, norm);
    if constexpr (F::kPerUnit > 1) put_rows<F>(rows, channels, kLanes, packed);
    read_rows<typename F::Simd, T, false>(value, head.head_dim, n, count, kLanes, buffer, channels);
    put_panels<F>(buffer, channels, head.head_dim, kLanes, s.keys.panels, n / F::kPerUnit,
                  s.keys.panel_units);
  }
  *s.key_norm = sqrtf(largest);
  if (head.key_time == nullptr) return;
  constexpr int64_t kRows = Shape<F>::kRows;
  for (int64_t n = 0; n < head.len_k; n += kRows)
    s.key_times[n / kRows] = range_of(head.key_time + n, least(head.len_k - n, kRows));
}

// The running state of one query tile; `part` is the sum over the keys that out has not seen yet.
template <class F>
struct Softmax {
  alignas(64) float sum[Shape<F>::kTile];
  alignas(64) float part[Shape<F>::kTile];
  alignas(64) float shift[Shape<F>::kTile];
};

// out^T[d][q] += sum over keys first .. last of V[key][d] P[key][q], and the same for the sum of P;
// `out` is still to be written unless have_out.
template <class F, int NQ>
JK_INLINE void add_values(const PackedKeys& keys, const float* probs, Softmax<F>& state, float* out,
                          int64_t first, int64_t last, bool have_out) {
  using V = typename F::Simd;
  constexpr int MR = Shape<F>::kRows;
  constexpr int64_t kTile = Shape<F>::kTile;
  for (int64_t i = 0; i < NQ * V::kLanes; i += V::kLanes) {
    V::store(state.sum + i, V::add(V::load(state.sum + i), V::load(state.part + i)));
    V::store(state.part + i, V::zero());
  }
  for (int64_t d = 0; d < keys.head_dim; d += MR) {
    Block<F, MR, NQ> acc;
    clear<F, MR, NQ>(acc);
    const float* panel = keys.panels + (d / MR * keys.panel_units + first / F::kPerUnit) * MR;
    dot<F, MR, NQ>(acc, panel, 1, MR, probs, kTile, (last - first) / F::kPerUnit);
    if (!have_out) {
      store<F, MR, NQ>(acc, out + d * kTile, kTile);
    } else {
      add<F, MR, NQ>(acc, out + d * kTile, kTile);
    }
  }
}

template <class F, int NQ>
JK_INLINE bool outgrown(const Block<F, Shape<F>::kRows, NQ>& acc, float scale, const float* shift) {
  using V = typename F::Simd;
  bool any = false;
  JK_UNROLL for (int j = 0; j < NQ; ++j) {
    typename V::Vec top = acc[0][j];
    JK_UNROLL for (int r = 1; r < Shape<F>::kRows; ++r) top = V::max(top, acc[r][j]);
    any |= V::any_greater(V::mul(top, V::set1(scale)),
                          V::add(V::load(shift + j * V::kLanes), V::set1(kShiftMargin)));
  }
  return any;
}

// Raises the shifts to the scores of this tile and brings the sums and outputs so far to the new
// scale, in place.
template <class F, int NQ>
__attribute__((noinline)) void raise_shift(const float* jobs, float scale, int64_t head_dim,
                                           bool have_out, Softmax<F>& state, float* out) {
  using V = typename F::Simd;
  constexpr int64_t kLanes = V::kLanes, kTile = Shape<F>::kTile;
  for (int64_t j = 0; j < NQ; ++j) {
    typename V::Vec top = V::load(state.shift + j * kLanes);
    const typename V::Vec old = top;
    for (int64_t r = 0; r < Shape<F>::kRows; ++r)
      top = V::max(V::mul(V::set1(scale), V::load(jobs + ((r / 2 * NQ + j) * 2 + r % 2) * kLanes)),
                   top);
    const typename V::Vec factor =
        simd::exp2<V, 6>(V::max(V::set1(kLowestExponent), V::sub(old, top)));
    V::store(state.shift + j * kLanes, top);
    V::store(state.sum + j * kLanes, V::mul(factor, V::load(state.sum + j * kLanes)));
    if (!have_out) continue;
    for (int64_t d = 0; d < head_dim; ++d)
      V::store(out + d * kTile + j * kLanes, V::mul(factor, V::load(out + d * kTile + j * kLanes)));
  }
}

// One query tile against all keys. P of a key tile is computed beside the dot products of the next
// one.
template <class F, int NQ, bool kBounded>
__attribute__((noinline)) void attend(const PackedKeys& keys, const float* lanes, float scale,
                                      float* probs, Softmax<F>& state, float* out) {
  using V = typename F::Simd;
  constexpr int MR = Shape<F>::kRows, kJobs = MR / 2 * NQ;
  constexpr int64_t kLanes = V::kLanes, kTile = Shape<F>::kTile;
  const int64_t row = keys.channels / F::kPerUnit, steps = keys.head_dim / F::kPerUnit;
  alignas(64) float jobs[MR * NQ * kLanes];
  for (int64_t i = 0; i < kTile; ++i)
    state.sum[i] = state.part[i] = 0, state.shift[i] = kBounded ? 0 : -INFINITY;
  const float masked = kBounded ? (kLowestExponent + 1) / scale : -INFINITY;
  const float scales[] = {scale, 1.f, kLowestExponent};
  float* pending = probs;
  const auto exponentiate = [&](int n) __attribute__((always_inline)) {
    const int j = n % NQ;
    typename V::Vec x0 = V::load(jobs + n * 2 * kLanes), x1 = V::load(jobs + (n * 2 + 1) * kLanes);
    const float* factors = scales;
    if constexpr (V::kConstantsInMemory) JK_KEEP_IN_MEMORY(factors);
    if constexpr (!kBounded) {
      const typename V::Vec shift = V::load(state.shift + j * kLanes),
                            lowest = V::broadcast(factors + 2);
      x0 = V::max(lowest, V::fms(x0, V::broadcast(factors), shift));
      x1 = V::max(lowest, V::fms(x1, V::broadcast(factors), shift));
    }
    float* sum = state.part + j * kLanes;
    float* units = pending + n / NQ * (2 / F::kPerUnit) * kTile + j * kLanes;
    V::store(sum, F::put_exp2(units, kTile, x0, x1, V::broadcast(factors + (kBounded ? 0 : 1)),
                              V::load(sum)));
  };
  int64_t done = 0;  // keys that out has seen
  for (int64_t n = 0; n < keys.count; n += MR) {
    Block<F, MR, NQ> acc;
    clear<F, MR, NQ>(acc);
    dot_beside<F, MR, NQ>(acc, keys.rows + n * row, row, lanes, kTile, steps, n > 0, exponentiate);
    if (__builtin_expect(n + MR > keys.count, 0)) {
      JK_UNROLL for (int r = 1; r < MR; ++r) {
        if (n + r < keys.count) continue;
        JK_UNROLL for (int j = 0; j < NQ; ++j) acc[r][j] = V::set1(masked);
      }
    }
    store_jobs<F, MR, NQ>(acc, jobs);
    bool raise = false;
    if constexpr (!kBounded) raise = outgrown<F, NQ>(acc, scale, state.shift);
    if (n - done == kForwardBlock || (raise && n > done)) {
      add_values<F, NQ>(keys, probs, state, out, done, n, done > 0);
      done = n;
    }
    if constexpr (!kBounded) {
      if (__builtin_expect(raise, 0))
        raise_shift<F, NQ>(jobs, scale, keys.head_dim, n > 0, state, out);
    }
    pending = probs + (n - done) / F::kPerUnit * kTile;
  }
  for (int n = 0; n < kJobs; ++n) exponentiate(n);
  add_values<F, NQ>(keys, probs, state, out, done, round_up(keys.count, MR), done > 0);
}

// ln(2^shift * sum). With times the same whatever part of its power of two the shift holds.
inline double log_sum(float shift, float sum, bool in_time) {
  if (!in_time || !(sum > 0)) return shift * M_LN2 + logf(sum);
  int exponent;
  const float mantissa = frexpf(sum, &exponent);
  return (shift + (float)exponent) * M_LN2 + logf(mantissa);
}

template <class F, class T, int NQ>
void write_out(const Head& head, const Softmax<F>& state, float* out, float key_poison,
               int64_t first) {
  using V = typename F::Simd;
  constexpr int64_t kLanes = V::kLanes, kTile = Shape<F>::kTile;
  for (int64_t j = 0; j < NQ; ++j) {
    const int64_t begin = first + j * kLanes, count = least(head.len_q - begin, kLanes);
    // A lane whose shift is not finite met a NaN or an infinity, which P need not show.
    const typename V::Vec poison =
        V::fma(V::load(state.shift + j * kLanes), V::zero(), V::set1(key_poison));
    // A query that sees no key has a sum and an output of 0.
    const typename V::Vec sum = V::max(V::set1(FLT_MIN), V::load(state.sum + j * kLanes));
    const typename V::Vec inverse = V::add(V::div(V::set1(1.f), sum), poison);
    alignas(64) float poisons[kLanes];
    V::store(poisons, poison);
    for (int64_t d = 0; d < head.head_dim; d += kLanes) {
      typename V::Vec r[kLanes];
      JK_UNROLL for (int i = 0; i < kLanes; ++i) r[i] =
          V::mul(inverse, V::load(out + (d + i) * kTile + j * kLanes));
      V::transpose(r);
      alignas(64) float rows[kLanes * kLanes];
      JK_UNROLL for (int i = 0; i < kLanes; ++i) V::store(rows + i * kLanes, r[i]);
      for (int64_t i = 0; i < count; ++i) {
        T* dst = (T*)head.out.data + (begin + i) * head.out.stride + d;
        V::store_head(dst, V::load(rows + i * kLanes), head.head_dim - d);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      head.lse[begin + i] = (float)log_sum(state.shift[j * kLanes + i], state.sum[j * kLanes + i],
                                           head.key_time != nullptr) +
                            poisons[i];
    }
  }
}

// Whether no score can reach kScoreBound; two per cent for the rounding of the packed numbers.
JK_INLINE bool within_bound(float query_square, float key_norm, float scale) {
  return sqrtf(query_square) * key_norm * scale * 1.02f < kScoreBound;
}

template <class F, int NQ>
float attend_in_time(const Head& head, const ForwardScratch& s, int64_t first, float largest,
                     float scale, Softmax<F>& state);

template <class F, class T, int NQ>
void forward_tile(const Head& head, const ForwardScratch& s, int64_t first) {
  using V = typename F::Simd;
  constexpr int64_t kLanes = V::kLanes;
  const int64_t channels = s.keys.channels;
  const Scales scales = scales_of(head.scale);
  const Source query = {head.q, head.ids_q, head.rope, scales.query};
  alignas(64) float rows[kLanes * kMaxHeadDim];
  float largest = 0;
  for (int64_t j = 0; j < NQ; ++j) {
    const int64_t begin = first + j * kLanes, count = least(head.len_q - begin, kLanes);
    largest = largest_of(
        largest, read_rows<V, T, true>(query, head.head_dim, begin, count, kLanes, rows, channels));
    put_lanes<F>(rows, channels, s.lanes + j * kLanes);
  }
  Softmax<F> state;
  if (head.key_time != nullptr) {
    const float poison = attend_in_time<F, NQ>(head, s, first, largest, scales.score, state);
    write_out<F, T, NQ>(head, state, s.out, poison, first);
    return;
  }
  if (within_bound(largest, *s.key_norm, scales.score)) {
    attend<F, NQ, true>(s.keys, s.lanes, scales.score, s.probs, state, s.out);
  } else {
    attend<F, NQ, false>(s.keys, s.lanes, scales.score, s.probs, state, s.out);
  }
  // A key that is not a number makes every score of its head one.
  write_out<F, T, NQ>(head, state, s.out, *s.key_norm == *s.key_norm ? 0.f : NAN, first);
}

template <class F, class T>
void forward_queries(const Head& head, float* scratch, Range tiles) {
  constexpr int kVecs = Shape<F>::kVecs;
  const ForwardScratch s = forward_layout<F>(scratch, head.head_dim, head.len_k);
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const int64_t first = tile_begin<F>(head.len_q, tile);
    const int64_t vecs = (tile_begin<F>(head.len_q, tile + 1) - first) / F::Simd::kLanes;
    if (vecs == kVecs) {
      forward_tile<F, T, kVecs>(head, s, first);
    } else if (vecs == 2) {
      forward_tile<F, T, 2>(head, s, first);
    } else {
      forward_tile<F, T, 1>(head, s, first);
    }
  }
}

template <class F>
int64_t forward_scratch(int64_t head_dim, int64_t len_k) {
  return forward_layout<F>(nullptr, head_dim, len_k).floats;
}

}  // namespace
}  // namespace jk::attention
