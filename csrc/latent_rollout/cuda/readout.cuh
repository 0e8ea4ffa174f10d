// From hidden sums to predictions, errors, or the gradient of errors: a block owns kTile rows of
// one step and walks the channels.
#pragma once
#include "product.cuh"

namespace jk::rollout {
namespace {

JK_DEVICE float number(const void* data, int64_t dtype, int64_t at) {
  if (dtype == JK_FLOAT32) return static_cast<const float*>(data)[at];
  if (dtype == JK_BFLOAT16) return to_float(static_cast<const bfloat16*>(data)[at]);
  return to_float(static_cast<const float16*>(data)[at]);
}
JK_DEVICE void set_number(void* data, int64_t dtype, int64_t at, float value) {
  if (dtype == JK_FLOAT32) {
    static_cast<float*>(data)[at] = value;
  } else if (dtype == JK_BFLOAT16) {
    static_cast<bfloat16*>(data)[at] = from_float<bfloat16>(value);
  } else {
    static_cast<float16*>(data)[at] = from_float<float16>(value);
  }
}

// |x|^exponent / exponent and its derivative.
JK_DEVICE float power(float x, float exponent) {
  const float size = fabsf(x);
  return exponent == 1.f ? size : exponent == 2.f ? 0.5f * x * x : powf(size, exponent) / exponent;
}
JK_DEVICE float power_slope(float x, float exponent) {
  if (exponent == 2.f) return x;
  const float sign = x > 0.f ? 1.f : x < 0.f ? -1.f : x;  // NaN stays NaN
  return exponent == 1.f ? sign : sign * powf(fabsf(x), exponent - 1.f);
}

// A block reads a weight once, so it streams. What each thread has summed of a row waits beside the
// operand.
constexpr int kPartial = 64;
template <class T>
size_t readout_tiles(int64_t hidden) {
  return operand_bytes<T>(hidden) + number_bytes(kTile * kPartial);
}

// One kernel for the three uses: p.out, p.errors or p.grad_errors is given.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    latent_rollout_readout_kernel(const jk_rollout_readout_params p, const Placement placement) {
  JK_DYNAMIC_SHARED(unsigned char, memory);
  const int h = int(p.hidden), channels = int(p.channels);
  const Rows rows(p.rows);
  const int64_t k = blockIdx.y;
  Arena arena{memory};
  const Tile<T> operand = arena.operand<T>(h);
  float* partial = arena.numbers(kTile * kPartial);
  Ring<T> ring(arena, placement.slots);
  // Lines are whatever lies side by side in memory: the terms of a channel, or the channels of a
  // term.
  const bool transposed = p.weight_row_stride != 1 && p.weight_column_stride == 1;
  const View<T> weight{
      weights_of<T>(p.weight, transposed ? p.weight_row_stride : p.weight_column_stride,
                    transposed ? p.weight_column_stride : p.weight_row_stride,
                    transposed ? channels : h),
      transposed, h, channels};
  const float times = float(p.first_step + k);
  const float* sums = p.sums + (k * p.rows + rows.first) * h;
  ring.begin(weight, 0);
  clear_padding(operand, rows.count, h);
  each(rows.count, h,
       [&](int r, int c) { operand(r, c) = from_float<T>(sums[int64_t(r) * h + c]); });
  __syncthreads();
  constexpr int kTiles = kTilesOfPass<T>;
  float total[Place<T>::kRows] = {};
  for (int column = 0; column < channels; column += View<T>::kPass) {
    float acc[kTiles][2][4] = {};
    add_product<kTiles - 1>(ring, operand, weight, column, acc);
    if (column + View<T>::kPass < channels) ring.begin(weight, column + View<T>::kPass);
#pragma unroll
    for (int n = 0; n < 8 * kTiles; n++) {
      const int b = n / 4 % 2, i = n % 4, r = Place<T>::row(i);
      const int c =
          column + (n / 8 * kWarps + int(threadIdx.x >> 5)) * kBlock + Place<T>::column(b, i);
      if (r >= rows.count || c >= channels) continue;
      const int64_t row = rows.first + r, at = k * p.rows + row,
                    base = p.base.index == nullptr ? row : p.base.index[row];
      const float y = number(p.base.data, p.base.dtype, base * p.base.stride + c) +
                      (p.bias == nullptr ? 0.f : times * p.bias[c]) + acc[n / 8][b][i];
      if (p.out != nullptr) {
        set_number(p.out, p.out_dtype, k * p.out_step_stride + row * p.out_row_stride + c, y);
        continue;
      }
      const int64_t target = p.targets.index == nullptr
                                 ? k * p.target_step_stride + row * p.targets.stride
                                 : p.targets.index[at] * p.targets.stride;
      const float residual = y - number(p.targets.data, p.targets.dtype, target + c);
      if (p.errors != nullptr) {
        total[Place<T>::which_row(i)] += power(residual, p.exponent);
        continue;
      }
      const float grad = power_slope(residual, p.exponent) * p.grad_errors[at] / float(channels);
      ((float*)p.grad)[at * channels + c] = grad;
      p.grad_base[row * p.grad_base_stride + c] += grad;
    }
  }
  if (p.errors == nullptr) return;
  // Lanes that see the same rows take a place each.
  constexpr int kLanes = sizeof(T) == 2 ? 4 : 8;
#pragma unroll
  for (int i = 0; i < 4; i++)
    partial[Place<T>::row(i) * kPartial + int(threadIdx.x >> 5) * kLanes + lane_id() % kLanes] =
        total[Place<T>::which_row(i)];
  __syncthreads();
  for (int r = threadIdx.x >> 5; r < rows.count; r += kWarps) {
    float sum = partial[r * kPartial + lane_id()];
    if (kLanes == 8) sum += partial[r * kPartial + 32 + lane_id()];
    sum = warp_sum(sum);
    if (lane_id() == 0) p.errors[k * p.rows + rows.first + r] = sum / float(channels);
  }
}

}  // namespace
}  // namespace jk::rollout
