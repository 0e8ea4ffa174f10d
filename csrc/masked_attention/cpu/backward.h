// Backward attention of one (sequence, head), or of a part of it. Keys in the outer loop, query
// tiles in the inner one, all five products through the micro-kernel, no atomics:
//   P = 2^(scores - lse)        dP = V dO^T         dS = P * (dP - delta),  delta = sum over
//   channels of dO * out dV += P dO                  dK += dS Q          dQ^T += K^T dS
// Every sum runs over tokens in their order, whichever part of the gradients is asked for, so one
// pass over everything and separate passes for dK, dV and for dQ give the same bits. Included by
// one translation unit per instruction set, hence the anonymous namespace.
#pragma once
#include <math.h>

#include "pack.h"

namespace jk::attention {
namespace {

// lse of lanes without a query: their P is tiny instead of an overflow, and meets zero rows only.
constexpr float kNoQueryLse = 60.f;
constexpr float kLowestPower = -126.f;

template <class F>
struct BackwardShape : Shape<F> {
  static constexpr int kGroup = kTiles.backward_tiles;
  static constexpr int64_t kSpan = kGroup * Shape<F>::kTile;  // queries of a group
  static constexpr int kMaxVecs = kTiles.backward_vectors;
};

struct BackwardScratch {
  int64_t channels, queries;  // queries, padded to whole vectors
  // Queries: lanes are [tile][unit of channels][lane], pairs are [unit of tokens][channels], grad_q
  // is [tile][channels][lane].
  float *q_lanes, *grad_lanes, *q_pairs, *grad_pairs, *lse, *lse_rest, *delta, *grad_q;
  // Keys of one block: rows [tokens][channels], panels [head_dim / kRows][tokens][kRows].
  float *k_rows, *v_rows, *k_panels, *grad_k, *grad_v;
  // P and dS of one block and group: [keys][queries], and dS once more for the sum over keys where
  // the format needs it.
  float *probs, *grads, *grads_pairs;
  int64_t floats;
};

template <class F>
BackwardScratch backward_layout(float* base, int64_t head_dim, int64_t len_q) {
  using S = BackwardShape<F>;
  constexpr int64_t kUnit = F::kPerUnit, kBlock = kBackwardBlock;
  BackwardScratch s;
  s.channels = padded_channels<F>(head_dim);
  s.queries = round_up(len_q, kTokenPad);
  const int64_t lanes = tile_count<F>(len_q) * S::kTile;
  int64_t used = 0;
  // 32 floats between buffers keep their rows from sharing cache sets.
  const auto take = [&](int64_t floats) {
    float* p = base + used;
    used += round_up(floats, 16) + 32;
    return p;
  };
  s.q_lanes = take(s.channels / kUnit * lanes);
  s.grad_lanes = take(s.channels / kUnit * lanes);
  s.q_pairs = take(s.queries / kUnit * s.channels);
  s.grad_pairs = take(s.queries / kUnit * s.channels);
  s.lse = take(lanes);
  s.lse_rest = take(lanes);
  s.delta = take(lanes);
  s.grad_q = take(s.channels * lanes);
  s.k_rows = take(kBlock * s.channels / kUnit);
  s.v_rows = take(kBlock * s.channels / kUnit);
  s.k_panels = take(kBlock / kUnit * head_dim);
  s.grad_k = take(kBlock * s.channels);
  s.grad_v = take(kBlock * s.channels);
  s.probs = take(kBlock * S::kSpan / kUnit);
  s.grads = take(kBlock * S::kSpan / kUnit);
  s.grads_pairs = take(kUnit == 1 ? 0 : kBlock / kUnit * S::kTile);
  s.floats = used;
  return s;
}

// The product of a packed row with row i of a tensor.
template <class V, class T>
JK_INLINE float row_product(const float* row, const Rows& other, int64_t i, int64_t head_dim) {
  const T* x = (const T*)other.data + i * other.stride;
  typename V::Vec sum = V::zero();
  for (int64_t d = 0; d < head_dim; d += V::kLanes)
    sum = V::fma(V::load(row + d), V::load_head(x + d, head_dim - d), sum);
  return V::sum(sum);
}

// Reads kLanes rows and packs them as lanes and as pairs of tokens; returns them as floats, which
// pairs of floats are already.
template <class F, class T>
JK_INLINE const float* pack_rows(const Source& from, int64_t head_dim, int64_t channels,
                                 int64_t first, int64_t count, float* buffer, float* lanes,
                                 float* pairs) {
  constexpr int64_t kLanes = F::Simd::kLanes;
  float* rows = F::kPerUnit == 1 ? pairs : buffer;
  read_rows<typename F::Simd, T, false>(from, head_dim, first, count, kLanes, rows, channels);
  put_lanes<F>(rows, channels, lanes);
  if constexpr (F::kPerUnit > 1) put_pairs<F>(rows, channels, kLanes, pairs);
  return rows;
}

template <class F, class T>
void pack_queries(const Head& head, const BackwardScratch& s, Range tiles) {
  using V = typename F::Simd;
  constexpr int64_t kLanes = V::kLanes, kTile = Shape<F>::kTile, kUnit = F::kPerUnit;
  const Source query = {head.q, head.ids_q, head.rope, scales_of(head.scale).query},
               grad = {head.grad_out, head.ids_q, nullptr, 1.f};
  alignas(64) float buffer[kLanes * kMaxHeadDim];
  const int64_t origin = tile_begin<F>(head.len_q, tiles.begin);
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const int64_t first = tile_begin<F>(head.len_q, tile),
                  last = tile_begin<F>(head.len_q, tile + 1);
    const int64_t slot = tile - tiles.begin;
    for (int64_t n = first; n < last; n += kLanes) {
      const int64_t count = least(head.len_q - n, kLanes), lane = slot * kTile + n - first;
      const int64_t lanes = slot * (s.channels / kUnit) * kTile + n - first,
                    pairs = (n - origin) / kUnit * s.channels;
      pack_rows<F, T>(query, head.head_dim, s.channels, n, count, buffer, s.q_lanes + lanes,
                      s.q_pairs + pairs);
      const float* rows = pack_rows<F, T>(grad, head.head_dim, s.channels, n, count, buffer,
                                          s.grad_lanes + lanes, s.grad_pairs + pairs);
      for (int64_t i = 0; i < kLanes; ++i) {
        // In units of log2 and in two floats: rounding a large lse once more would double the error
        // of P.
        const double lse = i < count ? head.lse[n + i] * M_LOG2E : kNoQueryLse;
        s.lse[lane + i] = (float)lse;
        s.lse_rest[lane + i] = (float)(lse - s.lse[lane + i]);
        s.delta[lane + i] =
            i < count ? row_product<V, T>(rows + i * s.channels, head.out, n + i, head.head_dim)
                      : 0.f;
      }
    }
  }
  memset(s.grad_q, 0, (size_t)((tiles.end - tiles.begin) * s.channels * kTile) * sizeof(float));
}

template <class F, class T>
void pack_keys(const Head& head, const BackwardScratch& s, int64_t first, int64_t count) {
  using V = typename F::Simd;
  constexpr int64_t kLanes = V::kLanes, kUnit = F::kPerUnit;
  const Source key = {head.k, head.ids_k, head.rope, 1.f},
               value = {head.v, head.ids_k, nullptr, 1.f};
  alignas(64) float buffer[kLanes * kMaxHeadDim];
  for (int64_t n = 0; n < count; n += kLanes) {
    const int64_t valid = least(count - n, kLanes), offset = n * s.channels / kUnit;
    float* rows = kUnit == 1 ? s.k_rows + offset : buffer;
    read_rows<V, T, false>(key, head.head_dim, first + n, valid, kLanes, rows, s.channels);
    if constexpr (kUnit > 1) put_rows<F>(rows, s.channels, kLanes, s.k_rows + offset);
    put_panels<F>(rows, s.channels, head.head_dim, kLanes, s.k_panels, n / kUnit,
                  kBackwardBlock / kUnit);
    rows = kUnit == 1 ? s.v_rows + offset : buffer;
    read_rows<V, T, false>(value, head.head_dim, first + n, valid, kLanes, rows, s.channels);
    if constexpr (kUnit > 1) put_rows<F>(rows, s.channels, kLanes, s.v_rows + offset);
  }
}

// One query tile of a group against one block of keys: P and dS at lane `at` of the group's
// buffers, and dQ^T if wanted.
struct BackwardTile {
  const float *q_lanes, *grad_lanes, *lse, *lse_rest, *delta;
  float* grad_q;
  int64_t at, keys, head_dim;
  float scale;
  bool want_q;
};

template <class F, int NQ>
__attribute__((noinline)) void differentiate(const BackwardScratch& s, const BackwardTile& t) {
  using V = typename F::Simd;
  constexpr int MR = Shape<F>::kRows, kJobs = MR / 2 * NQ;
  constexpr int64_t kLanes = V::kLanes, kTile = Shape<F>::kTile, kSpan = BackwardShape<F>::kSpan,
                    kUnit = F::kPerUnit;
  const int64_t row = s.channels / kUnit, steps = t.head_dim / kUnit;
  alignas(64) float scores[MR * NQ * kLanes], probs[MR * NQ * kLanes], products[MR * NQ * kLanes];
  const auto exponentiate = [&](int64_t key, int n) __attribute__((always_inline)) {
    const int64_t lane = n % NQ * kLanes, from = n * 2 * kLanes;
    const typename V::Vec lse = V::load(t.lse + lane), lowest = V::set1(kLowestPower);
    typename V::Vec x0 = V::load(scores + from), x1 = V::load(scores + from + kLanes);
    const float* factor = &t.scale;
    if constexpr (V::kConstantsInMemory) JK_KEEP_IN_MEMORY(factor);
    x0 = V::fms(x0, V::broadcast(factor), lse);
    x1 = V::fms(x1, V::broadcast(factor), lse);
    if constexpr (kUnit == 1) {
      const typename V::Vec rest = V::load(t.lse_rest + lane);
      x0 = V::sub(x0, rest);
      x1 = V::sub(x1, rest);
    }
    const typename V::Vec p0 = simd::exp2<V, F::kExpDegree>(V::max(lowest, x0)),
                          p1 = simd::exp2<V, F::kExpDegree>(V::max(lowest, x1));
    V::store(probs + from, p0);
    V::store(probs + from + kLanes, p1);
    F::put_two_rows(s.probs, kSpan, key + n / NQ * 2, t.at + lane, p0, p1);
  };
  const auto multiply = [&](int64_t key, int n) __attribute__((always_inline)) {
    const int64_t lane = n % NQ * kLanes, from = n * 2 * kLanes;
    const typename V::Vec delta = V::load(t.delta + lane);
    const typename V::Vec d0 =
        V::mul(V::load(probs + from), V::sub(V::load(products + from), delta));
    const typename V::Vec d1 =
        V::mul(V::load(probs + from + kLanes), V::sub(V::load(products + from + kLanes), delta));
    F::put_two_rows(s.grads, kSpan, key + n / NQ * 2, t.at + lane, d0, d1);
    if constexpr (kUnit > 1)
      F::put_pair(s.grads_pairs + (key / 2 + n / NQ) * kTile + lane, kTile, d0, d1);
  };
  for (int64_t n = 0; n < t.keys; n += MR) {
    Block<F, MR, NQ> acc;
    clear<F, MR, NQ>(acc);
    dot_beside<F, MR, NQ>(acc, s.k_rows + n * row, row, t.q_lanes, kTile, steps, n > 0,
                          [&](int job) __attribute__((always_inline)) { multiply(n - MR, job); });
    if (__builtin_expect(n + MR > t.keys, 0)) {
      JK_UNROLL for (int r = 1; r < MR; ++r) {
        if (n + r < t.keys) continue;
        JK_UNROLL for (int j = 0; j < NQ; ++j) acc[r][j] = V::set1(-INFINITY);
      }
    }
    store_jobs<F, MR, NQ>(acc, scores);
    clear<F, MR, NQ>(acc);
    dot_beside<F, MR, NQ>(acc, s.v_rows + n * row, row, t.grad_lanes, kTile, steps, true,
                          [&](int job) __attribute__((always_inline)) { exponentiate(n, job); });
    store_jobs<F, MR, NQ>(acc, products);
  }
  const int64_t padded = round_up(t.keys, MR);
  for (int n = 0; n < kJobs; ++n) multiply(padded - MR, n);
  if (!t.want_q) return;
  for (int64_t d = 0; d < t.head_dim; d += MR) {
    Block<F, MR, NQ> acc;
    clear<F, MR, NQ>(acc);
    const float* panel = s.k_panels + d * (kBackwardBlock / kUnit);
    if constexpr (kUnit > 1) {
      dot<F, MR, NQ>(acc, panel, 1, MR, s.grads_pairs, kTile, padded / kUnit);
    } else {
      dot<F, MR, NQ>(acc, panel, 1, MR, s.grads + t.at, kSpan, padded);
    }
    add<F, MR, NQ>(acc, t.grad_q + d * kTile, kTile);
  }
}

// sums[key][d] += sum over the queries of a group of weights[key][q] * rows[q][d], NR vectors of
// channels at a time
template <class F, int NR>
JK_INLINE void add_rows_part(const float* weights, const float* rows, float* sums, int64_t channels,
                             int64_t keys, int64_t units) {
  constexpr int MR = least(kBackwardRows, kTiles.accumulators / NR);
  constexpr int64_t kStride = BackwardShape<F>::kSpan / F::kPerUnit;
  for (int64_t n = 0; n < keys; n += MR) {
    Block<F, MR, NR> acc;
    clear<F, MR, NR>(acc);
    dot<F, MR, NR>(acc, weights + n * kStride, kStride, 1, rows, channels, units);
    add<F, MR, NR>(acc, sums + n * channels, channels);
  }
}

template <class F>
__attribute__((noinline)) void add_rows(const float* weights, const float* rows, float* sums,
                                        int64_t channels, int64_t head_dim, int64_t keys,
                                        int64_t queries) {
  constexpr int kLanes = F::Simd::kLanes, kMaxVecs = BackwardShape<F>::kMaxVecs;
  const int64_t units = queries / F::kPerUnit;
  int64_t vecs = (head_dim + kLanes - 1) / kLanes;
  for (; vecs >= kMaxVecs; vecs -= kMaxVecs, rows += kMaxVecs * kLanes, sums += kMaxVecs * kLanes) {
    add_rows_part<F, kMaxVecs>(weights, rows, sums, channels, keys, units);
  }
  if constexpr (kMaxVecs > 2) {
    if (vecs == 3) add_rows_part<F, 3>(weights, rows, sums, channels, keys, units);
    if (vecs == 2) add_rows_part<F, 2>(weights, rows, sums, channels, keys, units);
  }
  if (vecs == 1) add_rows_part<F, 1>(weights, rows, sums, channels, keys, units);
}

// All query tiles of the range against the packed block of keys.
template <class F>
void backward_block(const Head& head, const BackwardScratch& s, Range tiles, int64_t keys,
                    bool want_q, bool want_kv) {
  using S = BackwardShape<F>;
  const int64_t unit_lanes = s.channels / F::kPerUnit * S::kTile,
                origin = tile_begin<F>(head.len_q, tiles.begin);
  for (int64_t group = tiles.begin; group < tiles.end; group += S::kGroup) {
    const int64_t end = least(group + S::kGroup, tiles.end),
                  group_first = tile_begin<F>(head.len_q, group);
    for (int64_t tile = group; tile < end; ++tile) {
      const int64_t first = tile_begin<F>(head.len_q, tile), slot = tile - tiles.begin;
      const int64_t vecs = (tile_begin<F>(head.len_q, tile + 1) - first) / F::Simd::kLanes;
      const BackwardTile t = {s.q_lanes + slot * unit_lanes,
                              s.grad_lanes + slot * unit_lanes,
                              s.lse + slot * S::kTile,
                              s.lse_rest + slot * S::kTile,
                              s.delta + slot * S::kTile,
                              s.grad_q + slot * s.channels * S::kTile,
                              first - group_first,
                              keys,
                              head.head_dim,
                              scales_of(head.scale).score,
                              want_q};
      if (vecs == S::kVecs) {
        differentiate<F, S::kVecs>(s, t);
      } else if (vecs == 2) {
        differentiate<F, 2>(s, t);
      } else {
        differentiate<F, 1>(s, t);
      }
    }
    if (!want_kv) continue;
    const int64_t queries = tile_begin<F>(head.len_q, end) - group_first,
                  rows = (group_first - origin) / F::kPerUnit * s.channels;
    add_rows<F>(s.probs, s.grad_pairs + rows, s.grad_v, s.channels, head.head_dim, keys, queries);
    add_rows<F>(s.grads, s.q_pairs + rows, s.grad_k, s.channels, head.head_dim, keys, queries);
  }
}

template <class F, class T>
void write_queries(const Head& head, const BackwardScratch& s, Range tiles) {
  using V = typename F::Simd;
  constexpr int64_t kLanes = V::kLanes, kTile = Shape<F>::kTile;
  alignas(64) float rows[kLanes * kMaxHeadDim];
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const int64_t first = tile_begin<F>(head.len_q, tile),
                  last = tile_begin<F>(head.len_q, tile + 1);
    for (int64_t n = first; n < last; n += kLanes) {
      const float* sums = s.grad_q + (tile - tiles.begin) * s.channels * kTile + (n - first);
      for (int64_t d = 0; d < head.head_dim; d += kLanes) {
        typename V::Vec r[kLanes];
        JK_UNROLL for (int i = 0; i < kLanes; ++i) r[i] = V::load(sums + (d + i) * kTile);
        V::transpose(r);
        JK_UNROLL for (int i = 0; i < kLanes; ++i) V::store(rows + i * kMaxHeadDim + d, r[i]);
      }
      for (int64_t i = n; i < least(n + kLanes, head.len_q); ++i) {
        write_row<V, T>(head.grad_q, i, angle(head.rope, head.ids_q, i), head.head_dim, head.scale,
                        rows + (i - n) * kMaxHeadDim);
      }
    }
  }
}

template <class F, class T>
void backward(const Head& head, float* scratch, Range tiles, Range blocks, bool want_q,
              bool want_kv) {
  using V = typename F::Simd;
  const int64_t queries =
      tile_begin<F>(head.len_q, tiles.end) - tile_begin<F>(head.len_q, tiles.begin);
  const BackwardScratch s = backward_layout<F>(scratch, head.head_dim, queries);
  pack_queries<F, T>(head, s, tiles);
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    const int64_t first = block * kBackwardBlock, keys = least(head.len_k - first, kBackwardBlock);
    pack_keys<F, T>(head, s, first, keys);
    memset(s.grad_k, 0, (size_t)(kBackwardBlock * s.channels) * sizeof(float));
    memset(s.grad_v, 0, (size_t)(kBackwardBlock * s.channels) * sizeof(float));
    backward_block<F>(head, s, tiles, keys, want_q, want_kv);
    if (!want_kv) continue;
    for (int64_t i = 0; i < keys; ++i) {
      const Angle at = angle(head.rope, head.ids_k, first + i);
      write_row<V, T>(head.grad_k, first + i, at, head.head_dim, scales_of(head.scale).grad_k,
                      s.grad_k + i * s.channels);
      write_row<V, T>(head.grad_v, first + i, {nullptr, {}}, head.head_dim, 1.f,
                      s.grad_v + i * s.channels);
    }
  }
  if (want_q) write_queries<F, T>(head, s, tiles);
}

template <class F>
int64_t backward_scratch(int64_t head_dim, int64_t len_q) {
  return backward_layout<F>(nullptr, head_dim, len_q).floats;
}

template <class F>
int64_t block_count(int64_t len_k) {
  return (len_k + kBackwardBlock - 1) / kBackwardBlock;
}

}  // namespace
}  // namespace jk::attention
