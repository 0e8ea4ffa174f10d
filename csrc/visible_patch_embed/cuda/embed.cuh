// out = P W^T + bias: a block has kSide rows by kSide channels. Terms are the numbers of a token.
#pragma once
#include "product.cuh"

namespace jk::patches {
namespace {

// Two threads share a row of a tile.
template <class T>
struct Halved {
  int row, first, place;
  float numbers[kEach<T>];
  JK_DEVICE Halved()
      : row(int(threadIdx.x >> 1)),
        first(int(threadIdx.x & 1) * kEach<T>),
        place(row * kStride<T> + first) {}
  JK_DEVICE void prepare(Shared<T>&, int64_t) {}
};

// The pixels of the block's rows.
template <class T>
struct PixelRows : Halved<T> {
  const Params& p;
  int64_t corner;
  bool there;
  JK_DEVICE explicit PixelRows(const Params& params) : p(params) {
    const int64_t row = int64_t(blockIdx.x) * kSide + this->row;
    there = row < p.count;
    corner = there ? corner_of(p, p.rows[row]) : 0;
  }
  JK_DEVICE void load(const Shared<T>&, int64_t term) {
    if (there) {
      load_run<kEach<T>>(p, corner, int(term) + this->first, this->numbers);
    } else {
#pragma unroll
      for (int i = 0; i < kEach<T>; i++) this->numbers[i] = 0.f;
    }
  }
};

// The block's rows of the weight.
template <class T>
struct WeightRows : Halved<T> {
  const T* line;
  int64_t numbers_of_line;
  bool there;
  JK_DEVICE explicit WeightRows(const Params& p) : numbers_of_line(numbers_of(p)) {
    const int64_t channel = int64_t(blockIdx.y) * kSide + this->row;
    there = channel < p.width;
    line = static_cast<const T*>(p.weight) + channel * numbers_of_line;
  }
  JK_DEVICE void load(const Shared<T>&, int64_t term) {
    const int64_t k = term + this->first;
    if (there && k + kEach<T> <= numbers_of_line && is_aligned(line + k)) {
      if constexpr (sizeof(T) == 2) {
        load_halves<T>(this->numbers, line + k);
      } else {
        load_floats(this->numbers, line + k);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kEach<T>; i++)
      this->numbers[i] = there && k + i < numbers_of_line ? to_float(line[k + i]) : 0.f;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) visible_patch_embed_kernel(const Params p) {
  __shared__ Shared<T> shared;
  PixelRows<T> pixels(p);
  WeightRows<T> weight(p);
  const Sums<T> sums = multiply(shared, pixels, weight, 0, numbers_of(p));
  const int64_t first_row = int64_t(blockIdx.x) * kSide, first = int64_t(blockIdx.y) * kSide;
  const T* bias = static_cast<const T*>(p.bias);
  T* out = static_cast<T*>(p.out);
  sums.each([&](int row, int column, float sum) {
    const int64_t channel = first + column;
    if (first_row + row >= p.count || channel >= p.width) return;
    if (bias != nullptr) sum += to_float(bias[channel]);
    out[(first_row + row) * p.width + channel] = from_float<T>(sum);
  });
}

}  // namespace
}  // namespace jk::patches
