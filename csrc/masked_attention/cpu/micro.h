// The two micro-kernels of attention on registers, and the packed number formats they read.
// Everything is packed in units of four bytes: one float, or two bfloat16 that one dot-product
// instruction multiplies and adds. Included by one translation unit per instruction set, hence the
// anonymous namespace: no two of them may share a definition.
#pragma once
#include <stdint.h>

#include "../../cpu/simd/exp2.h"
#include "../../cpu/simd/native.h"

namespace jk::attention {
namespace {

template <class V>
struct FloatFormat {
  using Simd = V;
  using Vec = typename V::Vec;
  static constexpr int kPerUnit = 1;  // numbers along the summed axis in one unit
  static constexpr int kExpDegree = 6;

  static JK_INLINE Vec step(Vec acc, Vec a, Vec b) { return V::fma(a, b, acc); }
  // Rows n and n + 1 of a matrix that is summed over n, lanes being the other axis.
  static JK_INLINE void put_pair(float* units, int64_t stride, Vec x0, Vec x1) {
    V::store(units, x0);
    V::store(units + stride, x1);
  }
  // The same with 2^(x0 * factor) and 2^(x1 * factor); returns the sum with both added to it.
  static JK_INLINE Vec put_exp2(float* units, int64_t stride, Vec x0, Vec x1, Vec factor, Vec sum) {
    const Vec p0 = simd::exp2<V, kExpDegree>(x0, factor),
              p1 = simd::exp2<V, kExpDegree>(x1, factor);
    put_pair(units, stride, p0, p1);
    return V::add(sum, V::add(p0, p1));
  }
  // What put_exp2 takes to lower a lane's exponents by an even integer.
  static JK_INLINE Vec offset(Vec shift) { return V::sub(V::set1(simd::kExp2Offset), shift); }
  // put_exp2 with lowered exponents; 0 where the bits of `seen` are not set.
  static JK_INLINE Vec put_exp2(float* units, int64_t stride, Vec x0, Vec x1, Vec factor,
                                Vec offset, Vec seen0, Vec seen1, Vec sum) {
    const Vec p0 = V::select(seen0, simd::exp2<V, kExpDegree>(x0, factor, offset), V::zero()),
              p1 = V::select(seen1, simd::exp2<V, kExpDegree>(x1, factor, offset), V::zero());
    put_pair(units, stride, p0, p1);
    return V::add(sum, V::add(p0, p1));
  }
  // Units of P times powers of two.
  static JK_INLINE Vec scaled(Vec units, Vec factor) { return V::mul(units, factor); }
  // Elements `at` .. of rows n and n + 1 of a matrix whose rows of `row` numbers are summed along.
  static JK_INLINE void put_two_rows(float* units, int64_t row, int64_t n, int64_t at, Vec x0,
                                     Vec x1) {
    V::store(units + n * row + at, x0);
    V::store(units + (n + 1) * row + at, x1);
  }
  // Part of a row of a matrix that is summed along the row.
  static JK_INLINE void put_row(float* units, Vec x) { V::store(units, x); }
};

// Blocks of NR * kLanes columns by MR rows, as many as the accumulator registers hold.
template <class F>
struct Shape {
  static constexpr int kLanes = F::Simd::kLanes;
  static constexpr int kRows = kTiles.attention_rows;
  static constexpr int kVecs = kTiles.accumulators / kRows;
  static constexpr int kTile = kVecs * kLanes;  // queries of a tile
};

template <class F, int MR, int NR>
using Block = typename F::Vec[MR][NR];

// acc[r][j] += sum over s < steps of a[r * a_row + s * a_step] * b[s * b_step + j * lanes .. +
// lanes]
template <class F, int MR, int NR>
JK_INLINE void dot(Block<F, MR, NR>& acc, const float* a, int64_t a_row, int64_t a_step,
                   const float* b, int64_t b_step, int64_t steps) {
  using V = typename F::Simd;
#pragma GCC unroll 4
  for (int64_t s = 0; s < steps; ++s, a += a_step, b += b_step) {
    typename V::Vec row[NR];
    JK_UNROLL for (int j = 0; j < NR; ++j) row[j] = V::load(b + j * V::kLanes);
    JK_UNROLL for (int r = 0; r < MR; ++r) {
      const typename V::Vec x = V::broadcast(a + r * a_row);
      JK_UNROLL for (int j = 0; j < NR; ++j) acc[r][j] = F::step(acc[r][j], x, row[j]);
    }
  }
}

// The same with side jobs, before the steps or spread over them (Tiles::attention_run).
template <class F, int MR, int NR, class Job>
JK_INLINE void dot_beside(Block<F, MR, NR>& acc, const float* a, int64_t a_row, const float* b,
                          int64_t b_step, int64_t steps, bool active, Job job) {
  constexpr int kJobs = MR / 2 * NR, kRun = kTiles.attention_run;
  if constexpr (kRun == 0) {
    if (active) {
      JK_UNROLL for (int i = 0; i < kJobs; ++i) job(i);
    }
    dot<F, MR, NR>(acc, a, a_row, 1, b, b_step, steps);
  } else {
    const int64_t chunks = steps / kRun;
    const int jobs = active ? kJobs : 0, each = (int)((jobs + chunks - 1) / chunks);
    int next = 0;
    for (int64_t c = 0; c < chunks; ++c, a += kRun, b += kRun * b_step) {
      dot<F, MR, NR>(acc, a, a_row, 1, b, b_step, kRun);
      for (int i = 0; i < each && next < jobs; ++i) job(next++);
    }
  }
}

template <class F, int MR, int NR>
JK_INLINE void clear(Block<F, MR, NR>& acc) {
  JK_UNROLL for (int r = 0; r < MR; ++r) JK_UNROLL for (int j = 0; j < NR; ++j) acc[r][j] =
      F::Simd::zero();
}

template <class F, int MR, int NR>
JK_INLINE void store(const Block<F, MR, NR>& acc, float* c, int64_t stride) {
  JK_UNROLL for (int r = 0; r < MR; ++r) {
    JK_UNROLL for (int j = 0; j < NR; ++j)
        F::Simd::store(c + r * stride + j * F::Simd::kLanes, acc[r][j]);
  }
}

// Sums of blocks are added to the total one block at a time: a single running sum over thousands of
// tokens would round several times worse.
template <class F, int MR, int NR>
JK_INLINE void add(const Block<F, MR, NR>& acc, float* c, int64_t stride) {
  using V = typename F::Simd;
  JK_UNROLL for (int r = 0; r < MR; ++r) {
    JK_UNROLL for (int j = 0; j < NR; ++j) {
      float* p = c + r * stride + j * V::kLanes;
      V::store(p, V::add(V::load(p), acc[r][j]));
    }
  }
}

// Scores of a tile of keys wait here for their side jobs: job n owns rows 2 * (n / NR) and the
// next, lanes n % NR.
template <class F, int MR, int NR>
JK_INLINE void store_jobs(const Block<F, MR, NR>& acc, float* jobs) {
  constexpr int kLanes = F::Simd::kLanes;
  JK_UNROLL for (int r = 0; r < MR; ++r) {
    JK_UNROLL for (int j = 0; j < NR; ++j)
        F::Simd::store(jobs + ((r / 2 * NR + j) * 2 + r % 2) * kLanes, acc[r][j]);
  }
}

}  // namespace
}  // namespace jk::attention
