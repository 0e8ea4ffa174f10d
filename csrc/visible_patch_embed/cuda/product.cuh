// A tile of a product of two matrices that are read in their own ways: kSide rows of the left side
// by kSide of the right, whose terms pass through shared memory kTerms at a time. While one part is
// multiplied, the next is on its way to registers.
#pragma once
#include "pixels.cuh"

namespace jk::patches {
namespace {

constexpr int kThreads = 128;
constexpr int kSide = 64;

template <class T>
constexpr int kTerms = sizeof(T) == 2 ? 32 : 16;
// What a thread loads of a side.
template <class T>
constexpr int kEach = kSide * kTerms<T> / kThreads;
// From row to row of a tile, in numbers: an odd number of 16-byte chunks, so that eight rows lie in
// different banks.
template <class T>
constexpr int kStride = kTerms<T> + 16 / int(sizeof(T));

template <class T>
struct Shared {
  alignas(16) T left[kSide * kStride<T>];
  alignas(16) T right[kSide * kStride<T>];
  int64_t corners[kTerms<T>];  // of the rows that are the terms of a weight gradient
};

// A thread's numbers of a side, side by side in one row of a tile.
template <class T>
JK_DEVICE void store_run(T* to, const float (&x)[kEach<T>]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < kEach<T>; i += 8)
      *reinterpret_cast<uint4*>(to + i) =
          make_uint4(pack2<T>(x[i], x[i + 1]), pack2<T>(x[i + 2], x[i + 3]),
                     pack2<T>(x[i + 4], x[i + 5]), pack2<T>(x[i + 6], x[i + 7]));
  } else {
#pragma unroll
    for (int i = 0; i < kEach<T>; i += 4)
      *reinterpret_cast<float4*>(to + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
  }
}

// The sums that a thread holds of a tile.
template <class T>
struct Sums {  // 16-bit: a warp has 32 x 32, two bands of 16 rows by four groups of 8 columns
  float of[2][4][4] = {};

  JK_DEVICE void add(const Shared<T>& shared) {
    const int lane = lane_id(), warp = int(threadIdx.x >> 5);
    const T* left = shared.left + (warp / 2 * 32 + lane % 16) * kStride<T> + lane / 16 * 8;
    const T* right =
        shared.right + (warp % 2 * 32 + lane % 8 + lane / 16 * 8) * kStride<T> + lane / 8 % 2 * 8;
#pragma unroll
    for (int term = 0; term < kTerms<T>; term += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int band = 0; band < 2; band++)
        ldmatrix_x4(a[band], left + band * 16 * kStride<T> + term);
#pragma unroll
      for (int n = 0; n < 2; n++) {
        uint32_t b[4];
        ldmatrix_x4(b, right + n * 16 * kStride<T> + term);
#pragma unroll
        for (int band = 0; band < 2; band++) {
          mma_16816<T>(of[band][2 * n], a[band], b[0], b[1]);
          mma_16816<T>(of[band][2 * n + 1], a[band], b[2], b[3]);
        }
      }
    }
  }

  // finish(row, column, sum) of every sum.
  template <class Finish>
  JK_DEVICE void each(const Finish& finish) const {
    const int lane = lane_id(), warp = int(threadIdx.x >> 5);
#pragma unroll
    for (int band = 0; band < 2; band++)
#pragma unroll
      for (int n = 0; n < 4; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          finish(warp / 2 * 32 + band * 16 + lane / 4 + i / 2 * 8,
                 warp % 2 * 32 + n * 8 + lane % 4 * 2 + i % 2, of[band][n][i]);
  }
};

template <>
struct Sums<float> {  // rows t / 16 + 8 i by columns t % 16 + 16 j
  float of[8][4] = {};

  JK_DEVICE void add(const Shared<float>& shared) {
    const float* left = shared.left + int(threadIdx.x >> 4) * kStride<float>;
    const float* right = shared.right + int(threadIdx.x & 15) * kStride<float>;
#pragma unroll
    for (int term = 0; term < kTerms<float>; term += 4) {
      float4 b[4];
#pragma unroll
      for (int j = 0; j < 4; j++)
        b[j] = *reinterpret_cast<const float4*>(right + j * 16 * kStride<float> + term);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float4 a = *reinterpret_cast<const float4*>(left + i * 8 * kStride<float> + term);
#pragma unroll
        for (int j = 0; j < 4; j++)
          of[i][j] =
              fmaf(a.w, b[j].w, fmaf(a.z, b[j].z, fmaf(a.y, b[j].y, fmaf(a.x, b[j].x, of[i][j]))));
      }
    }
  }

  template <class Finish>
  JK_DEVICE void each(const Finish& finish) const {
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        finish(int(threadIdx.x >> 4) + 8 * i, int(threadIdx.x & 15) + 16 * j, of[i][j]);
  }
};

// The product over terms [first, last). A side says with prepare(shared, term) what all threads
// will need, between two barriers, and then loads its part with load(shared, term).
template <class T, class Left, class Right>
JK_DEVICE Sums<T> multiply(Shared<T>& shared, Left& left, Right& right, int64_t first,
                           int64_t last) {
  Sums<T> sums;
  if (first >= last) return sums;
  right.prepare(shared, first);
  __syncthreads();
  left.load(shared, first);
  right.load(shared, first);
  for (int64_t term = first; term < last; term += kTerms<T>) {
    __syncthreads();
    store_run<T>(shared.left + left.place, left.numbers);
    store_run<T>(shared.right + right.place, right.numbers);
    const int64_t next = term + kTerms<T>;
    if (next < last) right.prepare(shared, next);
    __syncthreads();
    if (next < last) {
      left.load(shared, next);
      right.load(shared, next);
    }
    sums.add(shared);
  }
  return sums;
}

}  // namespace
}  // namespace jk::patches
