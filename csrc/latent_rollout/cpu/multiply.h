// Register-blocked products of a tile of rows with a packed matrix; what happens to a finished
// block is the caller's (fused) business. Both sides are packed in units of four bytes: one float,
// or two bfloat16 that one dot-product instruction multiplies and adds.
#pragma once
#include <stdint.h>
#include <string.h>

#include "../../cpu/simd/native.h"
#include "kernels.h"

namespace jk::rollout {
namespace {

// What the templates below take as V: lanes and their arithmetic, and how they multiply. Here
// floats, the numbers that S knows anyway.
template <class S>
struct FloatProducts : S {
  using Number = float;               // of matrices and tables
  static constexpr int kPerUnit = 1;  // numbers along the summed axis in one unit

  static JK_INLINE typename S::Vec step(typename S::Vec acc, typename S::Vec a, typename S::Vec b) {
    return S::fma(a, b, acc);
  }
  // One unit of each of kLanes columns that lie side by side; `row_stride` numbers on are the next
  // of a unit.
  static JK_INLINE typename S::Vec load_units(const float* p, int64_t) { return S::load(p); }
  static JK_INLINE void store_two(float* p, typename S::Vec x0, typename S::Vec x1) {
    S::store(p, x0);
    S::store(p + S::kLanes, x1);
  }
  // A row of numbers, and a row of units, the last filled up with zeros.
  static JK_INLINE void put_numbers(Number* to, const float* row, int64_t count) {
    memcpy(to, row, sizeof(float) * count);
  }
  static JK_INLINE void put_units(float* to, const float* row, int64_t count) {
    put_numbers(to, row, count);
  }
};

// Units of so many numbers.
template <class V>
constexpr int64_t units(int64_t depth) {
  return (depth + V::kPerUnit - 1) / V::kPerUnit;
}

template <class V>
struct Block {
  static constexpr int kRows = kTiles.accumulators / 2;
  static constexpr int kColumns = 2 * V::kLanes;
  static constexpr int64_t padded(int64_t columns) {
    return (columns + kColumns - 1) / kColumns * kColumns;
  }
};

// A matrix B [depth, columns] given by strides, packed as panels of kColumns columns, each [units
// of depth][kColumns], zeros beyond the edge.
template <class V>
struct Strided {
  const typename V::Number* data;
  int64_t row_stride, column_stride;
};

template <class V>
void pack_panel(const Strided<V>& b, int64_t depth, int64_t columns, int64_t panel, float* packed) {
  using Number = typename V::Number;
  constexpr int kColumns = Block<V>::kColumns, kLanes = V::kLanes, kPer = V::kPerUnit;
  float* to = packed + panel * units<V>(depth) * kColumns;
  const int64_t first = panel * kColumns,
                width = columns - first < kColumns ? columns - first : kColumns;
  const Number* from = b.data + first * b.column_stride;
  int64_t k = 0;
  if (width == kColumns && b.column_stride == 1) {
    for (; k + kPer <= depth; k += kPer, to += kColumns)
      for (int c = 0; c < kColumns; c += kLanes)
        V::store(to + c, V::load_units(from + k * b.row_stride + c, b.row_stride));
  } else if (width == kColumns && b.row_stride == 1) {
    // Columns are rows of memory: transpose squares of lanes, so that whole cache lines are read
    // and written.
    for (; k + kLanes * kPer <= depth; k += kLanes * kPer, to += kLanes * kColumns)
      for (int c0 = 0; c0 < kColumns; c0 += kLanes) {
        typename V::Vec square[kLanes];
        JK_UNROLL for (int c = 0; c < kLanes; ++c) square[c] =
            V::load((const float*)(from + (c0 + c) * b.column_stride + k));
        V::transpose(square);
        JK_UNROLL for (int i = 0; i < kLanes; ++i) V::store(to + i * kColumns + c0, square[i]);
      }
  }
  for (; k < depth; k += kPer, to += kColumns) {
    Number row[kColumns][kPer] = {};
    for (int64_t c = 0; c < width; ++c)
      for (int64_t i = 0; i < kPer && k + i < depth; ++i)
        row[c][i] = from[(k + i) * b.row_stride + c * b.column_stride];
    memcpy(to, row, sizeof(row));
  }
}

// The left side of products: `count` rows of `depth` units, in groups of kRows. Whole groups are at
// `rows`, `stride` units apart; where rows are left, one more group filled up with zeros is at
// `rest`.
template <class V>
struct Left {
  const float *rows, *rest;
  int64_t stride, count, depth, whole;
};

// Floats of scratch that a left side takes.
template <class V>
constexpr int64_t left_size(int64_t depth) {
  return (V::kPerUnit == 1 ? Block<V>::kRows : kTileRows) * units<V>(depth);
}

// The left side that `fill_left` puts into `scratch`, or, where units are floats, mostly leaves in
// a [rows, depth] (lda apart).
template <class V>
Left<V> left_at(const float* a, int64_t lda, int64_t rows, int64_t depth, const float* scratch) {
  constexpr int kRows = Block<V>::kRows;
  static_assert(kTileRows % kRows == 0, "a last group with fewer rows must fit in");
  const int64_t deep = units<V>(depth), whole = rows / kRows * kRows;
  if constexpr (V::kPerUnit == 1) return {a, scratch, lda, rows, deep, whole};
  return {scratch, scratch + whole * deep, deep, rows, deep, whole};
}
template <class V>
Left<V> fill_left(const float* a, int64_t lda, int64_t rows, int64_t depth, float* scratch) {
  constexpr int kRows = Block<V>::kRows;
  const Left<V> left = left_at<V>(a, lda, rows, depth, scratch);
  float* to = scratch;
  for (int64_t r = V::kPerUnit == 1 ? left.whole : 0; r < rows; ++r, to += left.depth)
    V::put_units(to, a + r * lda, depth);
  if (left.whole < rows) memset(to, 0, sizeof(float) * (left.whole + kRows - rows) * left.depth);
  return left;
}

// result[r] = rows r of a (lda apart) times one panel, added to `before` (kColumns a row) unless
// that is null.
template <class V>
JK_INLINE void multiply_block(const float* a, int64_t lda, int64_t depth, const float* panel,
                              const float* before, typename V::Vec (&result)[Block<V>::kRows][2]) {
  constexpr int kRows = Block<V>::kRows, kColumns = Block<V>::kColumns;
  typename V::Vec c[kRows][2];  // of its own, so that the compiler keeps it in registers
  JK_UNROLL for (int r = 0; r < kRows; ++r) {
    c[r][0] = before == nullptr ? V::zero() : V::load(before + r * kColumns);
    c[r][1] = before == nullptr ? V::zero() : V::load(before + r * kColumns + V::kLanes);
  }
  for (int64_t k = 0; k < depth; ++k) {
    const typename V::Vec b0 = V::load(panel), b1 = V::load(panel + V::kLanes);
    JK_UNROLL for (int r = 0; r < kRows; ++r) {
      const typename V::Vec x = V::broadcast(a + r * lda + k);
      c[r][0] = V::step(c[r][0], x, b0);
      c[r][1] = V::step(c[r][1], x, b1);
    }
    panel += kColumns;
  }
  JK_UNROLL for (int r = 0; r < kRows; ++r) {
    result[r][0] = c[r][0];
    result[r][1] = c[r][1];
  }
}

// A step of a product, into kColumns numbers for each row of `partial` (added to them with `add`),
// by whole groups of kRows rows.
template <class V>
void multiply_part(const float* a, int64_t lda, int64_t rows, int64_t depth, const float* panel,
                   bool add, float* partial) {
  constexpr int kRows = Block<V>::kRows, kColumns = Block<V>::kColumns;
  for (int64_t row = 0; row < rows; row += kRows) {
    typename V::Vec c[kRows][2];
    float* sums = partial + row * kColumns;
    multiply_block<V>(a + row * lda, lda, depth, panel, add ? sums : nullptr, c);
    JK_UNROLL for (int r = 0; r < kRows; ++r) {
      V::store(sums + r * kColumns, c[r][0]);
      V::store(sums + r * kColumns + V::kLanes, c[r][1]);
    }
  }
}

// store(row, column, left, right) for every row and block of kColumns columns of a left side times
// one packed panel; ahead(row, column) runs before a row's product, for prefetches.
template <class V, class Store, class Ahead>
JK_INLINE void multiply_panel(const Left<V>& left, const float* panel, int64_t column,
                              const Store& store, const Ahead& ahead) {
  constexpr int kRows = Block<V>::kRows, kColumns = Block<V>::kColumns;
  alignas(64) float partial[kTileRows * kColumns];
  const float *before = nullptr, *a = left.rows, *rest = left.rest;
  const int64_t steps = (left.depth + kDepth - 1) / kDepth,
                step = steps > 1 ? (left.depth + steps - 1) / steps : left.depth;
  int64_t deep = left.depth;
  for (; deep > step; deep -= step) {
    multiply_part<V>(a, left.stride, left.whole, step, panel, before != nullptr, partial);
    multiply_part<V>(rest, left.depth, left.count - left.whole, step, panel, before != nullptr,
                     partial + left.whole * kColumns);
    before = partial;
    a += step;
    rest += step;
    panel += step * kColumns;
  }
  typename V::Vec c[kRows][2];
  int64_t row = 0;
  for (; row < left.whole; row += kRows) {
    JK_UNROLL for (int r = 0; r < kRows; ++r) ahead(row + r, column);
    multiply_block<V>(a + row * left.stride, left.stride, deep, panel,
                      before == nullptr ? nullptr : before + row * kColumns, c);
    JK_UNROLL for (int r = 0; r < kRows; ++r) store(row + r, column, c[r][0], c[r][1]);
  }
  if (row == left.count) return;
  multiply_block<V>(rest, left.depth, deep, panel,
                    before == nullptr ? nullptr : before + row * kColumns, c);
  JK_UNROLL for (int r = 0; r < kRows; ++r) {
    if (row + r < left.count) store(row + r, column, c[r][0], c[r][1]);
  }
}

// A whole product of a [rows, depth] (lda apart) with a packed matrix; `scratch` holds
// left_size(depth) floats.
template <class V, class Store>
JK_INLINE void multiply(const float* a, int64_t lda, int64_t rows, int64_t depth,
                        const float* packed, int64_t columns, float* scratch, const Store& store) {
  const Left<V> left = fill_left<V>(a, lda, rows, depth, scratch);
  for (int64_t column = 0; column < columns; column += Block<V>::kColumns)
    multiply_panel<V>(left, packed + column * left.depth, column, store, [](int64_t, int64_t) {});
}

// total[i * columns + c] += left[i * lda + r] * right[r * ldb + c], summed over the rows r of a
// tile: the gradient of a narrow matrix. i runs over whole groups of kRows, c over whole blocks.
template <class V>
void add_outer(const float* left, int64_t lda, int64_t count, int64_t rows, const float* right,
               int64_t ldb, int64_t columns, float* total) {
  constexpr int kRows = Block<V>::kRows, kColumns = Block<V>::kColumns;
  for (int64_t column = 0; column < columns; column += kColumns)
    for (int64_t first = 0; first < count; first += kRows) {
      float* sums = total + first * columns + column;
      typename V::Vec c[kRows][2];
      JK_UNROLL for (int i = 0; i < kRows; ++i) {
        c[i][0] = V::load(sums + i * columns);
        c[i][1] = V::load(sums + i * columns + V::kLanes);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const typename V::Vec b0 = V::load(right + r * ldb + column),
                              b1 = V::load(right + r * ldb + column + V::kLanes);
        JK_UNROLL for (int i = 0; i < kRows; ++i) {
          const typename V::Vec x = V::broadcast(left + (first + i) * lda + r);
          c[i][0] = V::fma(x, b0, c[i][0]);
          c[i][1] = V::fma(x, b1, c[i][1]);
        }
      }
      JK_UNROLL for (int i = 0; i < kRows; ++i) {
        V::store(sums + i * columns, c[i][0]);
        V::store(sums + i * columns + V::kLanes, c[i][1]);
      }
    }
}

}  // namespace
}  // namespace jk::rollout
