// GRU with LayerNorm: a block owns kTile rows and takes them through every step; the state stays in shared memory.
#pragma once
#include "cuda_recurrence.cuh"

namespace {

JK_DEVICE float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// Mean and 1 / sqrt(variance + epsilon) of rows 0 .. rows - 1; value(row, column). A warp takes every eighth row.
template <class Value>
JK_DEVICE void moments(int rows, int64_t width, float epsilon, float* mean, float* inverse, const Value& value) {
  const int warp = threadIdx.x >> 5, lane = jk::lane_id();
  for (int r = warp; r < rows; r += kThreads / 32) {
    float sum = 0.f;
    for (int64_t c = lane; c < width; c += 32) sum += value(r, c);
    const float m = jk::warp_sum(sum) / float(width);
    float squares = 0.f;
    for (int64_t c = lane; c < width; c += 32) {
      const float d = value(r, c) - m;
      squares = fmaf(d, d, squares);
    }
    const float v = jk::warp_sum(squares) / float(width);
    if (lane == 0) {
      mean[r] = m;
      inverse[r] = 1.f / sqrtf(v + epsilon);
    }
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) latent_rollout_gru_fwd_kernel(const jk_rollout_gru_params p) {
  JK_DYNAMIC_SHARED(float, tiles);
  const int64_t d = p.channels, first = int64_t(blockIdx.x) * kTile;
  const int rows = int(p.rows - first < kTile ? p.rows - first : kTile);
  float *state = tiles, *mixed = state + kTile * d, *mean = mixed + kTile * d, *inverse = mean + kTile;
  Stage<T>& stage = stage_after<T>(tiles, kTile * (2 * d + 2));
  const T *weight_input = static_cast<const T*>(p.weight_input), *weight_state = static_cast<const T*>(p.weight_state);
  each(rows, d, [&](int r, int64_t c) { state[r * d + c] = p.start[(first + r) * p.start_stride + c]; });
  __syncthreads();
  for (int64_t k = 0; k < p.horizon; k++) {
    const int64_t row0 = k * p.rows + first;
    const auto action = [&](int r, int64_t c) { return r < rows ? p.action[(row0 + r) * p.actions + c] : 0.f; };
    const auto before = [&](int r, int64_t c) { return r < rows ? state[r * d + c] : 0.f; };
    for (int64_t column = 0; column < d; column += kColumns) {
      float from_action[3][4] = {}, from_state[3][4] = {};
#pragma unroll
      for (int gate = 0; gate < 3; gate++) {
        product(stage, action, Matrix<T>{weight_input + gate * d * p.actions, p.actions, 1}, p.actions, column, d, from_action[gate]);
        product(stage, before, Matrix<T>{weight_state + gate * d * d, d, 1}, d, column, d, from_state[gate]);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int r = Place<T>::row(i);
        const int64_t c = column + Place<T>::column(i);
        if (r >= rows || c >= d) continue;
        const float reset = sigmoid(from_action[0][i] + from_state[0][i] + p.bias_input[c] + p.bias_state[c]);
        const float update = sigmoid(from_action[1][i] + from_state[1][i] + p.bias_input[d + c] + p.bias_state[d + c]);
        const float hidden = from_state[2][i] + p.bias_state[2 * d + c];
        const float candidate = tanhf(from_action[2][i] + p.bias_input[2 * d + c] + reset * hidden);
        mixed[r * d + c] = candidate + update * (state[r * d + c] - candidate);
        if (p.gates != nullptr) {
          float* to = p.gates + (row0 + r) * 4 * d + c;
          to[0] = reset;
          to[d] = update;
          to[2 * d] = candidate;
          to[3 * d] = hidden;
        }
      }
    }
    __syncthreads();
    moments(rows, d, p.epsilon, mean, inverse, [&](int r, int64_t c) { return mixed[r * d + c]; });
    each(rows, d, [&](int r, int64_t c) {
      const float z = (mixed[r * d + c] - mean[r]) * inverse[r] * p.norm_weight[c] + p.norm_bias[c];
      state[r * d + c] = z;
      if (p.kept > 1 || k + 1 == p.horizon) p.states[((p.kept > 1 ? k * p.rows : 0) + first + r) * d + c] = z;
    });
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) latent_rollout_gru_bwd_kernel(const jk_rollout_gru_params p) {
  JK_DYNAMIC_SHARED(float, tiles);
  const int64_t d = p.channels, first = int64_t(blockIdx.x) * kTile;
  const int rows = int(p.rows - first < kTile ? p.rows - first : kTile);
  float *carried = tiles, *mixed = carried + kTile * d, *mean = mixed + kTile * d, *inverse = mean + kTile;
  float *plain = inverse + kTile, *along = plain + kTile, *norm = along + kTile;
  Stage<T>& stage = stage_after<T>(tiles, kTile * (2 * d + 4) + 2 * d);
  const T* weight_state = static_cast<const T*>(p.weight_state);
  each(rows, d, [&](int r, int64_t c) { carried[r * d + c] = 0.f; });
  for (int64_t c = threadIdx.x; c < 2 * d; c += kThreads) norm[c] = 0.f;
  __syncthreads();
  for (int64_t k = p.horizon - 1; k >= 0; k--) {
    const int64_t row0 = k * p.rows + first;
    const auto before = [&](int r, int64_t c) {
      return k > 0 ? p.states[(row0 - p.rows + r) * d + c] : p.start[(first + r) * p.start_stride + c];
    };
    const auto gate = [&](int which, int r, int64_t c) { return p.gates[((row0 + r) * 4 + which) * d + c]; };
    each(rows, d, [&](int r, int64_t c) {
      if (p.every_step || k + 1 == p.horizon) carried[r * d + c] += p.grad_states[((p.every_step ? row0 : first) + r) * d + c];
      const float candidate = gate(2, r, c);
      mixed[r * d + c] = candidate + gate(1, r, c) * (before(r, c) - candidate);
    });
    __syncthreads();
    moments(rows, d, p.epsilon, mean, inverse, [&](int r, int64_t c) { return mixed[r * d + c]; });
    const auto normal = [&](int r, int64_t c) { return (mixed[r * d + c] - mean[r]) * inverse[r]; };
    for (int r = threadIdx.x >> 5; r < rows; r += kThreads / 32) {
      float sum = 0.f, dot = 0.f;
      for (int64_t c = jk::lane_id(); c < d; c += 32) {
        const float scaled = carried[r * d + c] * p.norm_weight[c];
        sum += scaled;
        dot = fmaf(scaled, normal(r, c), dot);
      }
      sum = jk::warp_sum(sum);
      dot = jk::warp_sum(dot);
      if (jk::lane_id() == 0) {
        plain[r] = sum / float(d);
        along[r] = dot / float(d);
      }
    }
    for (int64_t c = threadIdx.x; c < d; c += kThreads)
      for (int r = 0; r < rows; r++) {
        norm[c] = fmaf(carried[r * d + c], normal(r, c), norm[c]);
        norm[d + c] += carried[r * d + c];
      }
    __syncthreads();
    each(rows, d, [&](int r, int64_t c) {
      const float mix = inverse[r] * (carried[r * d + c] * p.norm_weight[c] - plain[r] - normal(r, c) * along[r]);
      const float reset = gate(0, r, c), update = gate(1, r, c), candidate = gate(2, r, c);
      const float of_candidate = mix * (1.f - update) * (1.f - candidate * candidate);
      float* to = p.grad_gates + (row0 + r) * 4 * d + c;
      to[0] = of_candidate * gate(3, r, c) * reset * (1.f - reset);
      to[d] = mix * (before(r, c) - candidate) * update * (1.f - update);
      to[2 * d] = of_candidate;
      to[3 * d] = of_candidate * reset;
      carried[r * d + c] = mix * update;
    });
    __syncthreads();
#pragma unroll 1
    for (int which = 0; which < 3; which++) {
      const int64_t place = which < 2 ? which : 3;  // the state reaches the candidate through W_s z + b_s
      multiply(
          stage, rows, [&](int r, int64_t c) { return r < rows ? p.grad_gates[((row0 + r) * 4 + place) * d + c] : 0.f; },
          Matrix<T>{weight_state + which * d * d, 1, d}, d, d, [&](int r, int64_t c, float v) { carried[r * d + c] += v; });
    }
  }
  each(rows, d, [&](int r, int64_t c) { p.grad_start[(first + r) * d + c] = carried[r * d + c]; });
  for (int64_t c = threadIdx.x; c < 2 * d; c += kThreads) p.grad_norm[blockIdx.x * 2 * d + c] = norm[c];
}

}  // namespace
