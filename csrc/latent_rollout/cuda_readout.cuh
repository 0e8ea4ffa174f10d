// From hidden sums to predictions, errors, or the gradient of errors: a block owns kTile rows of one step and walks the channels.
#pragma once
#include "cuda_recurrence.cuh"

namespace {

JK_DEVICE float number(const void* data, int64_t dtype, int64_t at) {
  if (dtype == JK_FLOAT32) return static_cast<const float*>(data)[at];
  if (dtype == JK_BFLOAT16) return jk::to_float(static_cast<const jk::bfloat16*>(data)[at]);
  return jk::to_float(static_cast<const jk::float16*>(data)[at]);
}
JK_DEVICE void set_number(void* data, int64_t dtype, int64_t at, float value) {
  if (dtype == JK_FLOAT32) {
    static_cast<float*>(data)[at] = value;
  } else if (dtype == JK_BFLOAT16) {
    static_cast<jk::bfloat16*>(data)[at] = jk::from_float<jk::bfloat16>(value);
  } else {
    static_cast<jk::float16*>(data)[at] = jk::from_float<jk::float16>(value);
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

// One kernel for the three uses: p.out, p.errors or p.grad_errors is given.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) latent_rollout_readout_kernel(const jk_rollout_readout_params p) {
  JK_DYNAMIC_SHARED(float, partial);  // kTile x kColumns: what each place of a product has summed
  Stage<T>& stage = stage_after<T>(partial, kTile * kColumns);
  const int64_t first = int64_t(blockIdx.x) * kTile, k = blockIdx.y;
  const int rows = int(p.rows - first < kTile ? p.rows - first : kTile);
  const float times = float(p.first_step + k);
  const float* sums = p.sums + (k * p.rows + first) * p.hidden;
  const Matrix<T> weight{static_cast<const T*>(p.weight), p.weight_column_stride, p.weight_row_stride};
  float total[4] = {0.f, 0.f, 0.f, 0.f};
  for (int64_t column = 0; column < p.channels; column += kColumns) {
    float acc[4] = {0.f, 0.f, 0.f, 0.f};
    product(stage, [&](int r, int64_t c) { return r < rows ? sums[r * p.hidden + c] : 0.f; }, weight, p.hidden, column, p.channels, acc);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int64_t c = column + Place<T>::column(i), row = first + Place<T>::row(i), at = k * p.rows + row;
      if (row >= p.rows || c >= p.channels) continue;
      const int64_t base = p.base.index == nullptr ? row : p.base.index[row];
      const float y = number(p.base.data, p.base.dtype, base * p.base.stride + c) + (p.bias == nullptr ? 0.f : times * p.bias[c]) + acc[i];
      if (p.out != nullptr) {
        set_number(p.out, p.out_dtype, k * p.out_step_stride + row * p.out_row_stride + c, y);
        continue;
      }
      const int64_t target =
          p.targets.index == nullptr ? k * p.target_step_stride + row * p.targets.stride : p.targets.index[at] * p.targets.stride;
      const float residual = y - number(p.targets.data, p.targets.dtype, target + c);
      if (p.errors != nullptr) {
        total[i] += power(residual, p.exponent);
        continue;
      }
      const float grad = power_slope(residual, p.exponent) * p.grad_errors[at] / float(p.channels);
      p.grad[at * p.channels + c] = grad;
      p.grad_base[row * p.grad_base_stride + c] += grad;
    }
  }
  if (p.errors == nullptr) return;
#pragma unroll
  for (int i = 0; i < 4; i++) partial[Place<T>::row(i) * kColumns + Place<T>::column(i)] = total[i];
  __syncthreads();
  if (int(threadIdx.x) < rows) {
    float sum = 0.f;
    for (int c = 0; c < kColumns; c++) sum += partial[threadIdx.x * kColumns + c];
    p.errors[k * p.rows + first + threadIdx.x] = sum / float(p.channels);
  }
}

}  // namespace
