// Which rows of the other side a block meets in time, and which of their pairs see each other.
#pragma once
#include "rows.cuh"

namespace jk::attention {

// The same tile, for calls with times.
template <class Tile>
struct Timed : Tile {
  static constexpr bool kTimed = true;
};

constexpr Span kNoSpan = {INT32_MAX, INT32_MIN, INT32_MAX, INT32_MIN};

JK_DEVICE bool meet(Interval a, Interval b) { return a.first <= b.last && b.first <= a.last; }

JK_DEVICE Span join(Span a, Span b) {
  return {min(a.earliest_first, b.earliest_first), max(a.latest_first, b.latest_first),
          min(a.earliest_last, b.earliest_last), max(a.latest_last, b.latest_last)};
}

// Whether any row of one span can meet any of the other; whether each meets all.
JK_DEVICE bool can_meet(Span a, Span b) {
  return a.earliest_first <= b.latest_last && b.earliest_first <= a.latest_last;
}
JK_DEVICE bool all_meet(Span a, Span b) {
  return a.latest_first <= b.earliest_last && b.latest_first <= a.earliest_last;
}

// The steps that a block takes through the other side: those that its rows can meet in time. A warp
// looks at 32 steps at a time and keeps one bit of each, on its own and without a barrier. All of
// it lies in shared memory, and indices are found where they are used, since the loops need the
// registers.
struct Walk {
  const Interval *own, *other;  // of the block's rows, and of the other side's of the sequence
  const Span* other_groups;
  int rows, others, groups_of_step, steps;
  Sequence sequence;                          // of the block
  Span block, warp[kWarps];                   // of their rows
  unsigned taken[kWarps];                     // steps that the block takes
  unsigned seen[kWarps];                      // that some row of this warp can meet
  unsigned open[kWarps];                      // that every row of this warp meets
  int following[kThreads], masked[kThreads];  // see `next` and `enter`; a thread reads its own

  JK_DEVICE static int thread() { return here(static_cast<int>(threadIdx.x)); }

  // Called by all threads of a block that owns `rows_` rows, `of_warp` of them in each warp.
  template <int kStep>
  JK_DEVICE void begin(const Args& a, const Sequence& s, bool own_keys, int rows_, int of_warp) {
    static_assert(kStep % kGroup == 0, "whole groups");
    const Times &mine = own_keys ? a.times_k : a.times_q,
                &theirs = own_keys ? a.times_q : a.times_k;
    const int64_t first = s.seq * (own_keys ? a.p.len_k : a.p.len_q) + s.begin,
                  first_other = s.seq * (own_keys ? a.p.len_q : a.p.len_k) + s.partner;
    const Span* const groups = mine.groups + first + s.first / kGroup;
    const int row = static_cast<int>(threadIdx.x) / 32 * of_warp;
    if (lane_id() == 0) warp[threadIdx.x / 32] = row < rows_ ? groups[row / kGroup] : kNoSpan;
    if (threadIdx.x == 0) {
      own = mine.rows + first + s.first;
      other = theirs.rows + first_other;
      other_groups = theirs.groups + first_other;
      sequence = s;
      rows = rows_;
      others = s.other;
      groups_of_step = kStep / kGroup;
      steps = (s.other + kStep - 1) / kStep;
      Span all = kNoSpan;
      for (int group = 0; group * kGroup < rows_; group++) all = join(all, groups[group]);
      block = all;
    }
    __syncthreads();
  }

  JK_DEVICE void look(int first_step) {
    const int step = first_step + thread() % 32, number = thread() / 32;
    Span there = kNoSpan;
    for (int i = 0; step < steps && i < groups_of_step; i++) {
      const int group = step * groups_of_step + i;
      if (group * kGroup < others) there = join(there, other_groups[group]);
    }
    auto vote = [&](bool yes) { return __ballot_sync(0xffffffffu, step < steps && yes); };
    const unsigned of_block = vote(can_meet(block, there)),
                   of_warp = vote(can_meet(warp[number], there)),
                   whole = vote(all_meet(warp[number], there));
    __syncwarp();
    if (lane_id() == 0) {
      taken[number] = of_block;
      seen[number] = of_warp;
      open[number] = whole;
    }
    __syncwarp();
  }

  // The first step from `step` on that the block takes; `steps` if none is left. Call it with 0 and
  // then with what follows the last step; `following` has its last answer.
  JK_DEVICE int next(int step) {
    int found = steps;
    while (step < steps) {
      if (step % 32 == 0) look(step);
      const unsigned left = taken[thread() / 32] >> step % 32;
      if (left != 0) {
        found = step + __ffs(static_cast<int>(left)) - 1;
        break;
      }
      step = (step / 32 + 1) * 32;
    }
    following[thread()] = found;
    return found;
  }
  JK_DEVICE int last_next() const { return following[thread()]; }

  // Whether this warp has work in the step that `next` gave last. `masked_step` gives it back where
  // some pairs do not see each other, else -1.
  JK_DEVICE bool enter(int step) {
    const unsigned bit = 1u << step % 32;
    masked[thread()] = open[thread() / 32] & bit ? -1 : step;
    return seen[thread() / 32] & bit;
  }
  JK_DEVICE int masked_step() const { return masked[thread()]; }

  JK_DEVICE Interval own_at(int row) const { return row < rows ? own[row] : Interval{0, 0}; }
  JK_DEVICE Interval other_at(int row) const { return row < others ? other[row] : Interval{0, 0}; }
};

// Writes the intervals of one side, a warp those of one group. A key is seen at its own time: its
// window is 1.
JK_DEVICE void write_times(const Args& a, const jk_ints& times, int64_t window, const jk_ints& cu,
                           int64_t length, const Times& to) {
  const int64_t group = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  Sequence s;
  if (blockIdx.y > 0 || !find_tile<kGroup>(a, cu, cu, Ranks{}, (length + kGroup - 1) / kGroup,
                                           length, length, group, s))
    return;
  const int row = s.first + lane_id();
  const int64_t token = s.begin + row;
  Span span = kNoSpan;
  if (row < s.length) {
    const int64_t time =
        clamp_to(load_int(times, s.seq * times.stride_seq + token * times.stride_token), INT32_MIN,
                 INT32_MAX);
    const int32_t last = static_cast<int32_t>(time),
                  first =
                      window == 0
                          ? INT32_MIN
                          : static_cast<int32_t>(clamp_to(time - window + 1, INT32_MIN, INT32_MAX));
    to.rows[s.seq * length + token] = {first, last};
    span = {first, first, last, last};
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    span = join(span, {__shfl_xor_sync(0xffffffffu, span.earliest_first, offset),
                       __shfl_xor_sync(0xffffffffu, span.latest_first, offset),
                       __shfl_xor_sync(0xffffffffu, span.earliest_last, offset),
                       __shfl_xor_sync(0xffffffffu, span.latest_last, offset)});
  if (lane_id() == 0) to.groups[s.seq * length + s.begin + s.first / kGroup] = span;
}

}  // namespace jk::attention
