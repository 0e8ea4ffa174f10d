// The product at the heart of every kernel here: kTile rows of hidden units times 64 columns of a matrix, by one block of 256 threads.
#pragma once
#include "../device.cuh"
#include "params.h"

namespace {

constexpr int kThreads = 256;
constexpr int kTile = 16;     // rows of a block: one mma tile
constexpr int kColumns = 64;  // columns of one product: eight of each warp
constexpr int kDepth = 32;    // terms staged in shared memory at a time

// Staging in shared memory. Rows are padded so that neither ldmatrix nor column reads meet in one bank.
template <class T>
struct Stage {
  static constexpr int kStride = kDepth + (sizeof(T) == 2 ? 8 : 1);
  alignas(16) T left[kTile * kStride];
  alignas(16) T right[kColumns * kStride];
};

// A matrix whose element (column, term) is at column * column_stride + term * term_stride.
template <class T>
struct Matrix {
  const T* data;
  int64_t column_stride, term_stride;
};

// Which of the 16 x 64 results a thread holds: four, at (row(i), column(i)).
template <class T>
struct Place {
  JK_DEVICE static int row(int i) { return sizeof(T) == 2 ? (jk::lane_id() >> 2) + 8 * (i >> 1) : int(threadIdx.x >> 4); }
  JK_DEVICE static int column(int i) {
    return sizeof(T) == 2 ? int(threadIdx.x >> 5) * 8 + (jk::lane_id() & 3) * 2 + (i & 1) : int(threadIdx.x & 15) + 16 * i;
  }
};

JK_DEVICE void multiply_stage(const Stage<float>& stage, float (&acc)[4]) {
  const float* left = stage.left + (threadIdx.x >> 4) * Stage<float>::kStride;
  const float* right = stage.right + (threadIdx.x & 15) * Stage<float>::kStride;
#pragma unroll
  for (int k = 0; k < kDepth; k++) {
    const float x = left[k];
#pragma unroll
    for (int i = 0; i < 4; i++) acc[i] = fmaf(x, right[16 * i * Stage<float>::kStride + k], acc[i]);
  }
}

template <class T>
JK_DEVICE void multiply_stage(const Stage<T>& stage, float (&acc)[4]) {
  const int lane = jk::lane_id(), warp = threadIdx.x >> 5;
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a[4];
    jk::ldmatrix_x4(a, stage.left + (lane & 15) * Stage<T>::kStride + k + (lane >> 4) * 8);
    const T* b = stage.right + (warp * 8 + (lane >> 2)) * Stage<T>::kStride + k + (lane & 3) * 2;
    uint32_t pair[2];
    pair[0] = uint32_t(b[0].bits) | uint32_t(b[1].bits) << 16;
    pair[1] = uint32_t(b[8].bits) | uint32_t(b[9].bits) << 16;
    jk::mma_16816<T>(acc, a, pair[0], pair[1]);
  }
}

template <class T>
JK_DEVICE T zero_of() {
  return jk::from_float<T>(0.f);
}

// acc += left(row, term) * matrix(first_column + column, term) over `depth` terms; columns from `columns` on count as zero.
// left is called for rows 0 .. kTile - 1. Every thread of the block takes part; on return the stage may be overwritten.
template <class T, class Left>
JK_DEVICE void product(Stage<T>& stage, const Left& left, const Matrix<T>& matrix, int64_t depth, int64_t first_column, int64_t columns,
                       float (&acc)[4]) {
  const bool along_terms = matrix.term_stride == 1;
  for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
    for (int i = threadIdx.x; i < kTile * kDepth; i += kThreads) {
      const int row = i / kDepth, k = i % kDepth;
      stage.left[row * Stage<T>::kStride + k] = k0 + k < depth ? jk::from_float<T>(left(row, k0 + k)) : zero_of<T>();
    }
    for (int i = threadIdx.x; i < kColumns * kDepth; i += kThreads) {
      // Neighbouring threads read neighbouring numbers of memory.
      const int column = along_terms ? i / kDepth : i % kColumns, k = along_terms ? i % kDepth : i / kColumns;
      const bool inside = first_column + column < columns && k0 + k < depth;
      const int64_t at = (first_column + column) * matrix.column_stride + (k0 + k) * matrix.term_stride;
      stage.right[column * Stage<T>::kStride + k] = inside ? matrix.data[at] : zero_of<T>();
    }
    __syncthreads();
    multiply_stage(stage, acc);
    __syncthreads();
  }
}

// finish(row, column, value) for every element of left (rows x depth) times matrix, rows 0 .. rows - 1 and columns 0 .. columns - 1.
template <class T, class Left, class Finish>
JK_DEVICE void multiply(Stage<T>& stage, int rows, const Left& left, const Matrix<T>& matrix, int64_t depth, int64_t columns,
                        const Finish& finish) {
  for (int64_t first = 0; first < columns; first += kColumns) {
    float acc[4] = {0.f, 0.f, 0.f, 0.f};
    product(stage, left, matrix, depth, first, columns, acc);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int64_t column = first + Place<T>::column(i);
      if (Place<T>::row(i) < rows && column < columns) finish(Place<T>::row(i), column, acc[i]);
    }
  }
  __syncthreads();
}

// fn(row, column) for every element of a rows x columns tile.
template <class F>
JK_DEVICE void each(int rows, int64_t columns, const F& fn) {
  for (int64_t i = threadIdx.x; i < rows * columns; i += kThreads) fn(int(i / columns), i % columns);
}

// gelu(x) = x Phi(x) and its derivatives, exact (erf) form.
JK_DEVICE float phi_of(float x) { return 0.3989422804f * expf(-0.5f * x * x); }
JK_DEVICE float cumulative(float x) { return 0.5f * (1.f + erff(x * 0.7071067812f)); }
JK_DEVICE float gelu(float x) { return x * cumulative(x); }
JK_DEVICE float gelu_slope(float x) { return cumulative(x) + x * phi_of(x); }
JK_DEVICE float gelu_curvature(float x) { return (2.f - x * x) * phi_of(x); }

}  // namespace
