// Forward attention where queries see some of the keys (sight.h): tiles of keys that none of a
// tile's queries sees cost nothing, and only those that some see are masked.
//
// No query's result depends on a token that it does not see, to the bit. Keys are summed in the
// same order whatever is skipped, since P of what is not seen is exactly 0 and blocks of keys are
// cut from the start of the sequence. Whether a lane needs a shift does depend on its neighbours;
// shifts are even integers, which P, sums and outputs follow as powers of two, and lse undoes.
#pragma once
#include "forward.h"
#include "sight.h"

namespace jk::attention {
namespace {

// P of one key tile whose scores wait in `jobs`, 0 where it is not seen.
template <class F, int NQ>
__attribute__((noinline)) void exponentiate_seen(const float* jobs, float scale,
                                                 const SeenKeys<F>& keys, float* units,
                                                 Softmax<F>& state) {
  using V = typename F::Simd;
  constexpr int64_t kLanes = V::kLanes, kTile = Shape<F>::kTile;
  for (int64_t n = 0; n < Shape<F>::kRows / 2 * NQ; ++n) {
    const int64_t lane = n % NQ * kLanes, key = n / NQ * 2;
    float* sum = state.part + lane;
    V::store(sum, F::put_exp2(units + key / F::kPerUnit * kTile + lane, kTile,
                              V::load(jobs + n * 2 * kLanes), V::load(jobs + (n * 2 + 1) * kLanes),
                              V::set1(scale), F::offset(V::load(state.shift + lane)),
                              keys.lanes(lane, key), keys.lanes(lane, key + 1), V::load(sum)));
  }
}

// Raises the shifts of the lanes whose scores outgrow them, and brings their sums, outputs and P of
// `units` rows to the new scale, in place.
template <class F, int NQ>
__attribute__((noinline)) void raise_lanes(const float* jobs, float scale, const SeenKeys<F>& keys,
                                           int64_t head_dim, bool have_out, int64_t units,
                                           float* probs, Softmax<F>& state, float* out) {
  using V = typename F::Simd;
  constexpr int64_t kLanes = V::kLanes, kTile = Shape<F>::kTile;
  for (int64_t j = 0; j < NQ; ++j) {
    const int64_t lane = j * kLanes;
    typename V::Vec top = V::set1(-INFINITY);
    for (int64_t r = 0; r < Shape<F>::kRows; ++r) {
      const typename V::Vec score =
          V::mul(V::set1(scale), V::load(jobs + ((r / 2 * NQ + j) * 2 + r % 2) * kLanes));
      top = V::max(V::select(keys.lanes(lane, r), score, V::set1(-INFINITY)), top);
    }
    const typename V::Vec old = V::load(state.shift + lane);
    if (!V::any_greater(top, V::add(old, V::set1(kShiftMargin)))) continue;
    alignas(64) float tops[kLanes];
    V::store(tops, top);
    for (int64_t i = 0; i < kLanes; ++i) {
      if (tops[i] > state.shift[lane + i] + kShiftMargin)
        state.shift[lane + i] = 2.f * rintf(tops[i] / 2.f);
    }
    // The difference of a lane that has seen nothing is NaN, which this maximum drops.
    const typename V::Vec factor = simd::exp2<V, 6>(
        V::max(V::sub(old, V::load(state.shift + lane)), V::set1(kLowestExponent)));
    const auto follow = [&](float* p) { V::store(p, V::mul(factor, V::load(p))); };
    follow(state.sum + lane);
    follow(state.part + lane);
    for (int64_t u = 0; u < units; ++u) {
      float* p = probs + u * kTile + lane;
      V::store(p, F::scaled(V::load(p), factor));
    }
    for (int64_t d = 0; have_out && d < head_dim; ++d) follow(out + d * kTile + lane);
  }
}

// One query tile against the keys that it sees; false where it sees none, and `out` is not written.
template <class F, int NQ, bool kBounded>
__attribute__((noinline)) bool attend_seen(const PackedKeys& keys, const Sight<F>& sight,
                                           const TimeRange* ranges, const int32_t* times,
                                           const float* lanes, float scale, float* probs,
                                           Softmax<F>& state, float* out) {
  using V = typename F::Simd;
  constexpr int MR = Shape<F>::kRows, kJobs = MR / 2 * NQ;
  constexpr int64_t kLanes = V::kLanes, kTile = Shape<F>::kTile;
  const int64_t row = keys.channels / F::kPerUnit, steps = keys.head_dim / F::kPerUnit;
  alignas(64) float jobs[MR * NQ * kLanes];
  for (int64_t i = 0; i < kTile; ++i)
    state.sum[i] = state.part[i] = 0, state.shift[i] = kBounded ? 0 : -INFINITY;
  float* pending = probs;
  const auto exponentiate = [&](int n) __attribute__((always_inline)) {
    const int j = n % NQ;
    const float* factor = &scale;
    if constexpr (V::kConstantsInMemory) JK_KEEP_IN_MEMORY(factor);
    float* sum = state.part + j * kLanes;
    V::store(sum, F::put_exp2(pending + n / NQ * (2 / F::kPerUnit) * kTile + j * kLanes, kTile,
                              V::load(jobs + n * 2 * kLanes), V::load(jobs + (n * 2 + 1) * kLanes),
                              V::broadcast(factor), V::load(sum)));
  };
  // Keys whose P waits for V: those of one block, from the first to the last tile that is seen.
  int64_t first = 0, end = 0;
  bool waiting = false, have_out = false;
  for (int64_t n = 0; n < keys.count; n += MR) {
    const Meeting meeting = meet(sight, ranges[n / MR]);
    if (meeting == Meeting::kNone) continue;
    Block<F, MR, NQ> acc;
    clear<F, MR, NQ>(acc);
    dot_beside<F, MR, NQ>(acc, keys.rows + n * row, row, lanes, kTile, steps, waiting,
                          exponentiate);
    waiting = false;
    if (end > first && n / kForwardBlock != first / kForwardBlock) {
      add_values<F, NQ>(keys, probs, state, out, first, end, have_out);
      have_out = true;
      end = first;
    }
    if (end == first) first = end = n;
    const auto units = [&](int64_t key) { return probs + (key - first) / F::kPerUnit * kTile; };
    for (float* p = units(end); p < units(n); p += kTile) {
      JK_UNROLL for (int j = 0; j < NQ; ++j) V::store(p + j * kLanes, V::zero());
    }
    store_jobs<F, MR, NQ>(acc, jobs);
    const int64_t count = least(keys.count - n, MR);
    if (kBounded && meeting == Meeting::kAll && count == MR) {
      pending = units(n);
      waiting = true;
    } else {
      const SeenKeys<F> seen = {&sight, times + n, count};
      if constexpr (!kBounded) {
        raise_lanes<F, NQ>(jobs, scale, seen, keys.head_dim, have_out, (n - first) / F::kPerUnit,
                           probs, state, out);
      }
      exponentiate_seen<F, NQ>(jobs, scale, seen, units(n), state);
    }
    end = n + MR;
  }
  if (waiting) {
    for (int n = 0; n < kJobs; ++n) exponentiate(n);
  }
  if (end == first) return have_out;
  add_values<F, NQ>(keys, probs, state, out, first, end, have_out);
  return true;
}

// Lanes that saw nothing have no shift. Those that saw a key have one, unless their scores are not
// numbers, which write_out tells by it.
template <class F>
void forgive_unused_lanes(const Sight<F>& sight, const int32_t* times, int64_t keys, int64_t lanes,
                          Softmax<F>& state) {
  for (int64_t i = 0; i < lanes; ++i) {
    if (state.shift[i] != -INFINITY) continue;
    bool sees = false;
    for (int64_t n = 0; n < keys && !sees; ++n)
      sees = sight.first[i] <= times[n] && times[n] <= sight.last[i];
    if (!sees) state.shift[i] = state.sum[i] = 0;
  }
}

// The part of forward_tile after the queries have been packed, `largest` being their largest
// squared norm. Returns NaN where a key that may be seen is not a number, else 0.
template <class F, int NQ>
float attend_in_time(const Head& head, const ForwardScratch& s, int64_t first, float largest,
                     float scale, Softmax<F>& state) {
  constexpr int MR = Shape<F>::kRows;
  constexpr int64_t kLanes = F::Simd::kLanes, kTile = Shape<F>::kTile;
  Sight<F> sight;
  look(head, first, least(head.len_q - first, NQ * kLanes), NQ * kLanes, sight);
  float norm = 0;
  for (int64_t n = 0; n < head.len_k; n += MR) {
    if (meet(sight, s.key_times[n / MR]) != Meeting::kNone)
      norm = largest_of(norm, s.key_norms[n / kLanes]);
  }
  bool seen;
  if (within_bound(largest, sqrtf(norm), scale)) {
    seen = attend_seen<F, NQ, true>(s.keys, sight, s.key_times, head.key_time, s.lanes, scale,
                                    s.probs, state, s.out);
  } else {
    seen = attend_seen<F, NQ, false>(s.keys, sight, s.key_times, head.key_time, s.lanes, scale,
                                     s.probs, state, s.out);
    forgive_unused_lanes(sight, head.key_time, head.len_k, NQ * kLanes, state);
  }
  if (!seen) memset(s.out, 0, (size_t)(s.keys.channels * kTile) * sizeof(float));
  return norm == norm ? 0.f : NAN;
}

}  // namespace
}  // namespace jk::attention
