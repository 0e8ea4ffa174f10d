// Register-blocked products of a tile of rows with a packed matrix; what happens to a finished block is the caller's (fused) business.
#pragma once
#include <stdint.h>
#include <string.h>

#include "../simd/bf16.h"
#include "cpu_kernels.h"

namespace jk::rollout {
namespace {

template <class V>
struct Block {
  static constexpr int kRows = V::kAccumulators / 2;
  static constexpr int kColumns = 2 * V::kLanes;
  static constexpr int64_t padded(int64_t columns) { return (columns + kColumns - 1) / kColumns * kColumns; }
};

// A matrix B [depth, columns] given by strides, packed as panels of kColumns columns, each [depth][kColumns], zeros beyond the edge.
struct Strided {
  const float* data;
  int64_t row_stride, column_stride;
};

template <class V>
void pack_panel(const Strided& b, int64_t depth, int64_t columns, int64_t panel, float* packed) {
  constexpr int kColumns = Block<V>::kColumns;
  float* to = packed + panel * depth * kColumns;
  const int64_t first = panel * kColumns, width = columns - first < kColumns ? columns - first : kColumns;
  const float* from = b.data + first * b.column_stride;
  if (b.column_stride == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      memcpy(to + k * kColumns, from + k * b.row_stride, sizeof(float) * width);
      memset(to + k * kColumns + width, 0, sizeof(float) * (kColumns - width));
    }
    return;
  }
  // Columns are rows of memory: transpose squares of lanes, so that whole cache lines are read and written.
  constexpr int kLanes = V::kLanes;
  int64_t k = 0;
  if (b.row_stride == 1 && width == kColumns) {
    for (; k + kLanes <= depth; k += kLanes)
      for (int c0 = 0; c0 < kColumns; c0 += kLanes) {
        typename V::Vec square[kLanes];
        JK_UNROLL for (int c = 0; c < kLanes; ++c) square[c] = V::load(from + (c0 + c) * b.column_stride + k);
        V::transpose(square);
        JK_UNROLL for (int i = 0; i < kLanes; ++i) V::store(to + (k + i) * kColumns + c0, square[i]);
      }
  }
  for (; k < depth; ++k) {
    for (int64_t c = 0; c < width; ++c) to[k * kColumns + c] = from[k * b.row_stride + c * b.column_stride];
    memset(to + k * kColumns + width, 0, sizeof(float) * (kColumns - width));
  }
}

// A product goes over the depth in steps of at most so many: a step's panel (16 KiB with 8 lanes) stays in the L1 cache while all rows of
// the tile pass by.
constexpr int64_t kDepth = 256;

// result[r] = rows r of a (lda apart) times one panel, added to `before` (kColumns a row) unless that is null.
template <class V>
JK_INLINE void multiply_block(const float* a, int64_t lda, int64_t depth, const float* panel, const float* before,
                              typename V::Vec (&result)[Block<V>::kRows][2]) {
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
      c[r][0] = V::fma(x, b0, c[r][0]);
      c[r][1] = V::fma(x, b1, c[r][1]);
    }
    panel += kColumns;
  }
  JK_UNROLL for (int r = 0; r < kRows; ++r) {
    result[r][0] = c[r][0];
    result[r][1] = c[r][1];
  }
}

// A step of a product, into kColumns numbers for each row of `partial` (added to them with `add`), by whole groups of kRows rows.
template <class V>
void multiply_part(const float* a, int64_t lda, int64_t rows, int64_t depth, const float* panel, bool add, float* partial) {
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

// store(row, column, left, right) for every row and block of kColumns columns of a [rows, depth] times one packed panel.
// `spare` holds kRows * depth floats for a last group with fewer rows; ahead(row, column) runs before a row's product, for prefetches.
template <class V, class Store, class Ahead>
JK_INLINE void multiply_panel(const float* a, int64_t lda, int64_t rows, int64_t depth, const float* panel, int64_t column, float* spare,
                              const Store& store, const Ahead& ahead) {
  constexpr int kRows = Block<V>::kRows, kColumns = Block<V>::kColumns;
  static_assert(kTileRows % kRows == 0, "a last group with fewer rows must fit in");
  alignas(64) float partial[kTileRows * kColumns];
  const int64_t whole = rows / kRows * kRows;
  if (whole < rows) {
    memset(spare, 0, sizeof(float) * kRows * depth);
    for (int64_t r = whole; r < rows; ++r) memcpy(spare + (r - whole) * depth, a + r * lda, sizeof(float) * depth);
  }
  const float *before = nullptr, *left = spare;
  const int64_t steps = (depth + kDepth - 1) / kDepth, step = steps > 1 ? (depth + steps - 1) / steps : depth;
  int64_t deep = depth;
  for (; deep > step; deep -= step) {
    multiply_part<V>(a, lda, whole, step, panel, before != nullptr, partial);
    multiply_part<V>(left, depth, rows - whole, step, panel, before != nullptr, partial + whole * kColumns);
    before = partial;
    a += step;
    left += step;
    panel += step * kColumns;
  }
  typename V::Vec c[kRows][2];
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    JK_UNROLL for (int r = 0; r < kRows; ++r) ahead(row + r, column);
    multiply_block<V>(a + row * lda, lda, deep, panel, before == nullptr ? nullptr : before + row * kColumns, c);
    JK_UNROLL for (int r = 0; r < kRows; ++r) store(row + r, column, c[r][0], c[r][1]);
  }
  if (row == rows) return;
  multiply_block<V>(left, depth, deep, panel, before == nullptr ? nullptr : before + row * kColumns, c);
  JK_UNROLL for (int r = 0; r < kRows; ++r) {
    if (row + r < rows) store(row + r, column, c[r][0], c[r][1]);
  }
}

template <class V, class Store>
JK_INLINE void multiply(const float* a, int64_t lda, int64_t rows, int64_t depth, const float* packed, int64_t columns, float* spare,
                        const Store& store) {
  constexpr int kColumns = Block<V>::kColumns;
  for (int64_t column = 0; column < columns; column += kColumns)
    multiply_panel<V>(a, lda, rows, depth, packed + column * depth, column, spare, store, [](int64_t, int64_t) {});
}

// total[i * columns + c] += left[i * lda + r] * right[r * ldb + c], summed over the rows r of a tile: the gradient of a narrow matrix.
// i runs over whole groups of kRows, c over whole blocks.
template <class V>
void add_outer(const float* left, int64_t lda, int64_t count, int64_t rows, const float* right, int64_t ldb, int64_t columns,
               float* total) {
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
        const typename V::Vec b0 = V::load(right + r * ldb + column), b1 = V::load(right + r * ldb + column + V::kLanes);
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
