// dW = G^T P over the pieces of the rows, and the gradient of the clip.
#pragma once
#include "product.cuh"

namespace jk::patches {
namespace {

// Here terms are rows. A thread has one row of a tile, of which another has the other half of the
// terms, so that neighbours read neighbouring numbers.
template <class T>
struct Columns {
  int row, first, place;
  float numbers[kEach<T>];
  JK_DEVICE Columns()
      : row(int(threadIdx.x % kSide)),
        first(int(threadIdx.x / kSide) * kEach<T>),
        place(row * kStride<T> + first) {}
};

// Channels of the gradient of the output.
template <class T>
struct GradientColumns : Columns<T> {
  const Params& p;
  int64_t last, channel;
  JK_DEVICE GradientColumns(const Params& params, int64_t last_row)
      : p(params), last(last_row), channel(int64_t(blockIdx.x) * kSide + this->row) {}
  JK_DEVICE void load(const Shared<T>&, int64_t term) {
    const T* from = static_cast<const T*>(p.grad_out) + channel;
#pragma unroll
    for (int i = 0; i < kEach<T>; i++) {
      const int64_t row = term + this->first + i;
      this->numbers[i] = row < last && channel < p.width ? to_float(from[row * p.width]) : 0.f;
    }
  }
};

// One of the numbers of every row's token.
template <class T>
struct PixelColumns : Columns<T> {
  const Params& p;
  int64_t last, offset = 0;
  float gain = 0.f, shift = 0.f;
  bool there;
  JK_DEVICE PixelColumns(const Params& params, int64_t last_row) : p(params), last(last_row) {
    const int64_t k = int64_t(blockIdx.y) * kSide + this->row;
    there = k < numbers_of(p);
    if (there) {
      const Place place(p, int(k));
      offset = place.offset;
      gain = p.gain[place.channel];
      shift = p.shift[place.channel];
    }
  }
  JK_DEVICE void prepare(Shared<T>& shared, int64_t term) {
    const int64_t row = term + threadIdx.x;
    if (threadIdx.x < kTerms<T> && row < last)
      shared.corners[threadIdx.x] = corner_of(p, p.rows[row]);
  }
  JK_DEVICE void load(const Shared<T>& shared, int64_t term) {
#pragma unroll
    for (int i = 0; i < kEach<T>; i++) {
      const int at = this->first + i;
      this->numbers[i] = there && term + at < last
                             ? fmaf(pixel_at(p, shared.corners[at] + offset), gain, shift)
                             : 0.f;
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    visible_patch_embed_weight_gradient_kernel(const Params p) {
  __shared__ Shared<T> shared;
  const int64_t piece = blockIdx.z, first = piece * p.piece_rows;
  const int64_t last = first + p.piece_rows < p.count ? first + p.piece_rows : p.count;
  GradientColumns<T> gradient(p, last);
  PixelColumns<T> pixels(p, last);
  const Sums<T> sums = multiply(shared, gradient, pixels, first, last);
  const int64_t numbers = numbers_of(p), first_channel = int64_t(blockIdx.x) * kSide,
                first_number = int64_t(blockIdx.y) * kSide;
  sums.each([&](int row, int column, float sum) {
    const int64_t channel = first_channel + row, k = first_number + column;
    if (channel < p.width && k < numbers)
      p.weight_gradient[(piece * p.width + channel) * numbers + k] = sum;
  });
}

// The gradient of the clip, whose strides these are: a block has a token, and adds its rows in
// their order; 0 where there is none.
template <class T>
__global__ void __launch_bounds__(kThreads) visible_patch_embed_scatter_kernel(const Params p) {
  const int64_t token = blockIdx.x, corner = corner_of(p, token);
  const int64_t first = p.starts[token], last = p.starts[token + 1], numbers = numbers_of(p);
  T* clip = static_cast<T*>(p.clip_gradient) + corner;
  for (int k = int(threadIdx.x); k < numbers; k += kThreads) {
    float sum = 0.f;
    for (int64_t i = first; i < last; i++) sum += p.of_pixels[p.order[i] * numbers + k];
    const Place place(p, k);
    clip[place.offset] = from_float<T>(sum * p.gain[place.channel]);
  }
}

}  // namespace
}  // namespace jk::patches
