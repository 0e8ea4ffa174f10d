// Which tiles of queries and keys meet in time. A query sees keys whose time lies in an interval of
// its own; tiles compare ranges of these, so tokens in the order of their times skip most. Included
// by one translation unit per instruction set, hence the anonymous namespace.
#pragma once
#include "kernels.h"
#include "micro.h"

namespace jk::attention {
namespace {

// Of times, both ends included; of no times where low > high.
struct TimeRange {
  int32_t low, high;
};

// When the queries of one tile see, lane by lane and as ranges over those lanes that hold one;
// lanes without a query see nothing.
template <class F>
struct Sight {
  alignas(64) int32_t first[Shape<F>::kTile];
  alignas(64) int32_t last[Shape<F>::kTile];
  TimeRange firsts, lasts;
};

enum class Meeting { kNone, kSome, kAll };

template <class F>
JK_INLINE Meeting meet(const Sight<F>& queries, TimeRange keys) {
  if (keys.low > keys.high || keys.low > queries.lasts.high || keys.high < queries.firsts.low)
    return Meeting::kNone;
  return keys.high <= queries.lasts.low && keys.low >= queries.firsts.high ? Meeting::kAll
                                                                           : Meeting::kSome;
}

JK_INLINE TimeRange range_of(const int32_t* times, int64_t count) {
  TimeRange range = {INT32_MAX, INT32_MIN};
  for (int64_t i = 0; i < count; ++i) {
    range.low = times[i] < range.low ? times[i] : range.low;
    range.high = times[i] > range.high ? times[i] : range.high;
  }
  return range;
}

// That of queries first .. first + count, the tile having `lanes`.
template <class F>
void look(const Head& head, int64_t first, int64_t count, int64_t lanes, Sight<F>& sight) {
  for (int64_t i = 0; i < lanes; ++i) {
    sight.first[i] = i < count ? head.first_time[first + i] : INT32_MAX;
    sight.last[i] = i < count ? head.last_time[first + i] : INT32_MIN;
  }
  sight.firsts = range_of(sight.first, count);
  sight.lasts = range_of(sight.last, count);
}

// Some keys to the queries of a tile.
template <class F>
struct SeenKeys {
  const Sight<F>* sight;
  const int32_t* times;
  int64_t count;  // without padding, which nobody sees

  // The bits of those lanes of a vector that see a key.
  JK_INLINE typename F::Vec lanes(int64_t lane, int64_t key) const {
    if (key >= count) return F::Simd::zero();
    return F::Simd::between(sight->first + lane, sight->last + lane, times[key]);
  }
};

}  // namespace
}  // namespace jk::attention
