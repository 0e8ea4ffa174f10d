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
#include "sight.h"

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
  float* sights;  // a Sight of each query tile, where there are times
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
  s.sights = take(tile_count<F>(len_q) * (int64_t)(sizeof(Sight<F>) / sizeof(float)));
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

template <class F>
JK_INLINE Sight<F>& sight_of(const BackwardScratch& s, int64_t slot) {
  return ((Sight<F>*)s.sights)[slot];
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
    if (head.key_time != nullptr)
      look(head, first, least(head.len_q, last) - first, kTile, sight_of<F>(s, slot));
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

// The keys of one block in time: the range of each row block, and each key's time.
struct BlockTimes {
  TimeRange ranges[kBackwardBlock / 4];
  const int32_t* times;
};

// One query tile of a group against one block of keys: P and dS of `keys` at lane `at` of the
// group's buffers, 0 where a key is not seen, and dQ^T if wanted.
template <class F>
struct BackwardTile {
  const float *q_lanes, *grad_lanes, *lse, *lse_rest, *delta;
  float* grad_q;
  int64_t at;
  Range keys;
  int64_t head_dim;
  float scale;
  bool want_q;
  int64_t block_keys;     // of the block, without padding
  const Sight<F>* sight;  // NULL where every query sees every key
  const BlockTimes* block;
};

// P and dS of a row block that no query of the tile sees.
template <class F, int NQ>
__attribute__((noinline)) void clear_rows(const BackwardScratch& s, int64_t key, int64_t at) {
  using V = typename F::Simd;
  constexpr int64_t kSpan = BackwardShape<F>::kSpan, kTile = Shape<F>::kTile;
  for (int64_t r = 0; r < Shape<F>::kRows; r += 2) {
    for (int64_t lane = 0; lane < NQ * V::kLanes; lane += V::kLanes) {
      F::put_two_rows(s.probs, kSpan, key + r, at + lane, V::zero(), V::zero());
      F::put_two_rows(s.grads, kSpan, key + r, at + lane, V::zero(), V::zero());
      if constexpr (F::kPerUnit > 1)
        F::put_pair(s.grads_pairs + (key + r) / 2 * kTile + lane, kTile, V::zero(), V::zero());
    }
  }
}

template <class F, int NQ, bool kTimes>
__attribute__((noinline)) void differentiate(const BackwardScratch& s, const BackwardTile<F>& t) {
  using V = typename F::Simd;
  constexpr int MR = Shape<F>::kRows, kJobs = MR / 2 * NQ;
  constexpr int64_t kLanes = V::kLanes, kTile = Shape<F>::kTile, kSpan = BackwardShape<F>::kSpan,
                    kUnit = F::kPerUnit;
  const int64_t row = s.channels / kUnit, steps = t.head_dim / kUnit;
  alignas(64) float scores[MR * NQ * kLanes], probs[MR * NQ * kLanes], products[MR * NQ * kLanes];
  [[maybe_unused]] Meeting meeting = Meeting::kAll;
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
    typename V::Vec p0 = simd::exp2<V, F::kExpDegree>(V::max(lowest, x0)),
                    p1 = simd::exp2<V, F::kExpDegree>(V::max(lowest, x1));
    if constexpr (kTimes) {
      if (meeting == Meeting::kSome) {
        const SeenKeys<F> seen = {t.sight, t.block->times, t.block_keys};
        p0 = V::select(seen.lanes(lane, key + n / NQ * 2), p0, V::zero());
        p1 = V::select(seen.lanes(lane, key + n / NQ * 2 + 1), p1, V::zero());
      }
    }
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
  Range seen = {0, 0};   // from the first to the last row block that is seen
  int64_t waiting = -1;  // the row block whose dS is still to be computed
  for (int64_t n = t.keys.begin; n < t.keys.end; n += MR) {
    if constexpr (kTimes) {
      meeting = meet(*t.sight, t.block->ranges[n / MR]);
      if (meeting == Meeting::kNone) {
        clear_rows<F, NQ>(s, n, t.at);
        continue;
      }
    }
    Block<F, MR, NQ> acc;
    clear<F, MR, NQ>(acc);
    dot_beside<F, MR, NQ>(acc, s.k_rows + n * row, row, t.q_lanes, kTile, steps, waiting >= 0,
                          [&](int job) __attribute__((always_inline)) { multiply(waiting, job); });
    if (waiting < 0) seen.begin = n;
    waiting = n;
    if (__builtin_expect(n + MR > t.block_keys, 0)) {
      JK_UNROLL for (int r = 1; r < MR; ++r) {
        if (n + r < t.block_keys) continue;
        JK_UNROLL for (int j = 0; j < NQ; ++j) acc[r][j] = V::set1(-INFINITY);
      }
    }
    store_jobs<F, MR, NQ>(acc, scores);
    clear<F, MR, NQ>(acc);
    dot_beside<F, MR, NQ>(acc, s.v_rows + n * row, row, t.grad_lanes, kTile, steps, true,
                          [&](int job) __attribute__((always_inline)) { exponentiate(n, job); });
    store_jobs<F, MR, NQ>(acc, products);
  }
  if (waiting < 0) return;
  for (int n = 0; n < kJobs; ++n) multiply(waiting, n);
  seen.end = waiting + MR;
  if (!t.want_q) return;
  for (int64_t d = 0; d < t.head_dim; d += MR) {
    Block<F, MR, NQ> acc;
    clear<F, MR, NQ>(acc);
    const float* panel = s.k_panels + d * (kBackwardBlock / kUnit) + seen.begin / kUnit * MR;
    const int64_t units = (seen.end - seen.begin) / kUnit;
    if constexpr (kUnit > 1) {
      dot<F, MR, NQ>(acc, panel, 1, MR, s.grads_pairs + seen.begin / kUnit * kTile, kTile, units);
    } else {
      dot<F, MR, NQ>(acc, panel, 1, MR, s.grads + seen.begin * kSpan + t.at, kSpan, units);
    }
    add<F, MR, NQ>(acc, t.grad_q + d * kTile, kTile);
  }
}

template <class F, bool kTimes>
void differentiate_tile(const BackwardScratch& s, const BackwardTile<F>& t, int64_t vecs) {
  if (vecs == Shape<F>::kVecs) {
    differentiate<F, Shape<F>::kVecs, kTimes>(s, t);
  } else if (vecs == 2) {
    differentiate<F, 2, kTimes>(s, t);
  } else {
    differentiate<F, 1, kTimes>(s, t);
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

// The keys of a block that some query of a tile may see, as whole row blocks; none where it is
// empty.
template <class F>
Range keys_seen(const Sight<F>& sight, const BlockTimes& block) {
  constexpr int64_t kRows = Shape<F>::kRows;
  Range seen = {0, 0};
  for (int64_t n = 0; n < kBackwardBlock; n += kRows) {
    if (meet(sight, block.ranges[n / kRows]) == Meeting::kNone) continue;
    if (seen.end == 0) seen.begin = n;
    seen.end = n + kRows;
  }
  return seen;
}

// Query tiles of a group and keys of a block, both without a gap.
struct Part {
  Range tiles, keys;
};

// The part of a group and a block outside which no query sees a key.
template <class F>
Part part_seen(const BackwardScratch& s, Range group, int64_t origin, const BlockTimes& block) {
  Part part = {{group.begin, group.begin}, {kBackwardBlock, 0}};
  for (int64_t tile = group.begin; tile < group.end; ++tile) {
    const Range seen = keys_seen<F>(sight_of<F>(s, tile - origin), block);
    if (seen.end == 0) continue;
    if (part.keys.end == 0) part.tiles.begin = tile;
    part.tiles.end = tile + 1;
    part.keys.begin = least(part.keys.begin, seen.begin);
    part.keys.end = seen.end > part.keys.end ? seen.end : part.keys.end;
  }
  part.keys.begin = part.keys.begin / kBackwardRun * kBackwardRun;
  part.keys.end = round_up(part.keys.end, kBackwardRun);
  return part;
}

// All query tiles of the range against the packed block of keys; `times` is NULL where every query
// sees every key.
template <class F>
void backward_block(const Head& head, const BackwardScratch& s, Range tiles, int64_t keys,
                    const BlockTimes* times, bool want_q, bool want_kv) {
  using S = BackwardShape<F>;
  const int64_t unit_lanes = s.channels / F::kPerUnit * S::kTile,
                origin = tile_begin<F>(head.len_q, tiles.begin);
  for (int64_t group = tiles.begin; group < tiles.end; group += S::kGroup) {
    const int64_t end = least(group + S::kGroup, tiles.end),
                  group_first = tile_begin<F>(head.len_q, group);
    Part part = {{group, end}, {0, keys}};
    if (times != nullptr) part = part_seen<F>(s, part.tiles, tiles.begin, *times);
    for (int64_t tile = part.tiles.begin; tile < part.tiles.end; ++tile) {
      const int64_t first = tile_begin<F>(head.len_q, tile), slot = tile - tiles.begin;
      const int64_t vecs = (tile_begin<F>(head.len_q, tile + 1) - first) / F::Simd::kLanes;
      const BackwardTile<F> t = {s.q_lanes + slot * unit_lanes,
                                 s.grad_lanes + slot * unit_lanes,
                                 s.lse + slot * S::kTile,
                                 s.lse_rest + slot * S::kTile,
                                 s.delta + slot * S::kTile,
                                 s.grad_q + slot * s.channels * S::kTile,
                                 first - group_first,
                                 part.keys,
                                 head.head_dim,
                                 scales_of(head.scale).score,
                                 want_q,
                                 keys,
                                 times == nullptr ? nullptr : &sight_of<F>(s, slot),
                                 times};
      if (times == nullptr) {
        differentiate_tile<F, false>(s, t, vecs);
      } else {
        differentiate_tile<F, true>(s, t, vecs);
      }
    }
    if (!want_kv || part.tiles.begin == part.tiles.end) continue;
    const int64_t part_first = tile_begin<F>(head.len_q, part.tiles.begin),
                  queries = tile_begin<F>(head.len_q, part.tiles.end) - part_first,
                  rows = (part_first - origin) / F::kPerUnit * s.channels,
                  weights = (part.keys.begin * S::kSpan + part_first - group_first) / F::kPerUnit,
                  sums = part.keys.begin * s.channels, count = part.keys.end - part.keys.begin;
    add_rows<F>(s.probs + weights, s.grad_pairs + rows, s.grad_v + sums, s.channels, head.head_dim,
                count, queries);
    add_rows<F>(s.grads + weights, s.q_pairs + rows, s.grad_k + sums, s.channels, head.head_dim,
                count, queries);
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

// The times of a block; whether a query of `tiles` may see one of its keys.
template <class F>
bool read_block(const Head& head, const BackwardScratch& s, Range tiles, int64_t first,
                int64_t keys, BlockTimes& block) {
  constexpr int64_t kRows = Shape<F>::kRows;
  block.times = head.key_time + first;
  for (int64_t n = 0; n < kBackwardBlock; n += kRows)
    block.ranges[n / kRows] = range_of(block.times + n, least(keys - n, kRows));
  for (int64_t tile = 0; tile < tiles.end - tiles.begin; ++tile) {
    if (keys_seen<F>(sight_of<F>(s, tile), block).end > 0) return true;
  }
  return false;
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
    memset(s.grad_k, 0, (size_t)(kBackwardBlock * s.channels) * sizeof(float));
    memset(s.grad_v, 0, (size_t)(kBackwardBlock * s.channels) * sizeof(float));
    BlockTimes times;
    if (head.key_time == nullptr) {
      pack_keys<F, T>(head, s, first, keys);
      backward_block<F>(head, s, tiles, keys, nullptr, want_q, want_kv);
    } else if (read_block<F>(head, s, tiles, first, keys, times)) {
      pack_keys<F, T>(head, s, first, keys);
      backward_block<F>(head, s, tiles, keys, &times, want_q, want_kv);
    }
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
