// Residual-MLP and Hamiltonian recurrences: a block owns kTile rows and takes them through every step; its hidden state stays in
// shared memory, and the coupling streams through the stage from the L2 cache.
#pragma once
#include "cuda_product.cuh"

namespace {

// Tiles of a block in dynamic shared memory, then the stage of its products.
template <class T>
constexpr size_t shared_bytes(int64_t floats_of_a_row) {
  return sizeof(float) * size_t(kTile) * size_t(floats_of_a_row) + sizeof(Stage<T>) + 16;
}
template <class T>
JK_DEVICE Stage<T>& stage_after(float* tiles, int64_t floats) {
  return *reinterpret_cast<Stage<T>*>(tiles + (floats + 3) / 4 * 4);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) latent_rollout_mlp_fwd_kernel(const jk_rollout_mlp_params p) {
  JK_DYNAMIC_SHARED(float, tiles);
  const int64_t h = p.hidden, first = int64_t(blockIdx.x) * kTile, step = p.rows * h;
  const int rows = int(p.rows - first < kTile ? p.rows - first : kTile);
  float *a = tiles, *active = a + kTile * h;
  Stage<T>& stage = stage_after<T>(tiles, 2 * kTile * h);
  each(rows, h, [&](int r, int64_t c) { a[r * h + c] = p.start[(first + r) * h + c]; });
  for (int64_t k = 0; k < p.horizon; k++) {
    // s_{k+1} = s_k + gelu(a_k); the thread that owns an element is the one that wrote it.
    each(rows, h, [&](int r, int64_t c) {
      const int64_t at = (first + r) * h + c;
      const float x = a[r * h + c], g = gelu(x);
      active[r * h + c] = g;
      if (p.inputs != nullptr) p.inputs[k * step + at] = x;
      float* sum = p.sums + (p.kept > 1 ? k * step : 0) + at;
      *sum = k == 0 ? g : (p.kept > 1 ? sum[-step] : *sum) + g;
    });
    __syncthreads();
    if (k + 1 == p.horizon) break;
    multiply(
        stage, rows, [&](int r, int64_t c) { return r < rows ? active[r * h + c] : 0.f; },
        Matrix<T>{static_cast<const T*>(p.coupling), h, 1}, h, h, [&](int r, int64_t c, float v) { a[r * h + c] += v + p.drift[c]; });
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) latent_rollout_mlp_bwd_kernel(const jk_rollout_mlp_params p) {
  JK_DYNAMIC_SHARED(float, tiles);
  const int64_t h = p.hidden, first = int64_t(blockIdx.x) * kTile, step = p.rows * h;
  const int rows = int(p.rows - first < kTile ? p.rows - first : kTile);
  // into: the gradient that reaches gelu(a_k) through the coupling; following: that of the sums of this step and all later ones.
  float *grad = tiles, *into = grad + kTile * h, *following = into + kTile * h;
  Stage<T>& stage = stage_after<T>(tiles, 3 * kTile * h);
  for (int64_t k = p.horizon - 1; k >= 0; k--) {
    const bool last = k + 1 == p.horizon;
    if (!last) {
      multiply(
          stage, rows, [&](int r, int64_t c) { return r < rows ? grad[r * h + c] : 0.f; },
          Matrix<T>{static_cast<const T*>(p.coupling), 1, h}, h, h, [&](int r, int64_t c, float v) { into[r * h + c] = v; });
    }
    each(rows, h, [&](int r, int64_t c) {
      const int64_t at = (first + r) * h + c, here = r * h + c;
      const float x = p.inputs[k * step + at];
      const float total = (last ? 0.f : following[here]) + (last || p.kept > 1 ? p.grad_sums[(p.kept > 1 ? k : 0) * step + at] : 0.f);
      const float g = (last ? 0.f : grad[here]) + gelu_slope(x) * (last ? total : total + into[here]);
      following[here] = total;
      grad[here] = g;
      p.grad_inputs[k * step + at] = g;
      if (!last) p.activations[k * step + at] = gelu(x);
    });
    __syncthreads();
  }
}

// active becomes W2^T pulled, pulled = w3 gelu'(W2 active + b2); finish_middle(row, column, W2 active + b2) sees the middle layer.
template <class T, class Middle, class Finish>
JK_DEVICE void pull(Stage<T>& stage, int rows, const float* active, float* pulled, const T* weight, int64_t h, int64_t m,
                    const Middle& middle, const Finish& finish) {
  multiply(
      stage, rows, [&](int r, int64_t c) { return r < rows ? active[r * h + c] : 0.f; }, Matrix<T>{weight, h, 1}, h, m,
      [&](int r, int64_t c, float v) { pulled[r * m + c] = middle(r, c, v); });
  multiply(stage, rows, [&](int r, int64_t c) { return r < rows ? pulled[r * m + c] : 0.f; }, Matrix<T>{weight, 1, h}, m, h, finish);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) latent_rollout_hamiltonian_fwd_kernel(const jk_rollout_hamiltonian_params p) {
  JK_DYNAMIC_SHARED(float, tiles);
  const int64_t h = p.hidden, m = p.middle, first = int64_t(blockIdx.x) * kTile, step = p.rows * h;
  const int rows = int(p.rows - first < kTile ? p.rows - first : kTile);
  float *a = tiles, *active = a + kTile * h, *pulled = active + kTile * h;
  Stage<T>& stage = stage_after<T>(tiles, kTile * (2 * h + m));
  const T *weight = static_cast<const T*>(p.weight), *coupling = static_cast<const T*>(p.coupling);
  each(rows, h, [&](int r, int64_t c) { a[r * h + c] = p.start[(first + r) * h + c]; });
  for (int64_t j = 0; j < 2 * p.horizon; j++) {
    const int64_t which = j % 2, k = j / 2;
    __syncthreads();
    each(rows, h, [&](int r, int64_t c) {
      const float x = a[r * h + c];
      active[r * h + c] = gelu(x);
      if (p.inputs != nullptr) p.inputs[j * step + (first + r) * h + c] = x;
    });
    __syncthreads();
    pull(
        stage, rows, active, pulled, weight, h, m, [&](int, int64_t c, float v) { return p.energy[c] * gelu_slope(v + p.bias[c]); },
        [&](int r, int64_t c, float v) {
          const float u = v * gelu_slope(a[r * h + c]);
          active[r * h + c] = u;  // its gelu has been read
          float* sum = p.sums + (which * p.kept + (p.kept > 1 ? k : 0)) * step + (first + r) * h + c;
          *sum = k == 0 ? u : (p.kept > 1 ? sum[-step] : *sum) + u;
        });
    if (j + 1 == 2 * p.horizon) break;
    const float dt = which ? -p.time_step : p.time_step;
    const Matrix<T> move{coupling, which ? 1 : h, which ? h : 1};
    multiply(
        stage, rows, [&](int r, int64_t c) { return r < rows ? active[r * h + c] : 0.f; }, move, h, h,
        [&](int r, int64_t c, float v) { a[r * h + c] += dt * v; });
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) latent_rollout_hamiltonian_bwd_kernel(const jk_rollout_hamiltonian_step_params p) {
  JK_DYNAMIC_SHARED(float, tiles);
  const int64_t h = p.hidden, m = p.middle, first = int64_t(blockIdx.x) * kTile, here = first * h;
  const int rows = int(p.rows - first < kTile ? p.rows - first : kTile);
  float *into = tiles, *active = into + kTile * h, *pulled = active + kTile * h;
  Stage<T>& stage = stage_after<T>(tiles, kTile * (2 * h + m));
  const T *weight = static_cast<const T*>(p.weight), *coupling = static_cast<const T*>(p.coupling);
  const auto input = [&](int r, int64_t c) { return p.input[here + r * h + c]; };
  each(rows, h, [&](int r, int64_t c) {
    into[r * h + c] = p.following[here + r * h + c];
    active[r * h + c] = p.activation[here + r * h + c] = gelu(input(r, c));
  });
  __syncthreads();
  if (p.time_step != 0.f) {
    const Matrix<T> back{coupling, p.transposed ? h : 1, p.transposed ? 1 : h};
    multiply(
        stage, rows, [&](int r, int64_t c) { return r < rows ? p.carried[here + r * h + c] : 0.f; }, back, h, h,
        [&](int r, int64_t c, float v) { into[r * h + c] += p.time_step * v; });
  }
  // The middle layer before its function waits in grad_middle until its gradient replaces it.
  pull(
      stage, rows, active, pulled, weight, h, m,
      [&](int r, int64_t c, float v) {
        const int64_t at = (first + r) * m + c;
        p.grad_middle[at] = v + p.bias[c];
        return p.pulled[at] = p.energy[c] * gelu_slope(v + p.bias[c]);
      },
      [&](int r, int64_t c, float v) {
        const float x = input(r, c), slope = gelu_slope(x), grad = into[r * h + c];
        p.force[here + r * h + c] = slope * v;
        p.carried[here + r * h + c] += gelu_curvature(x) * v * grad;
        into[r * h + c] = p.grad_returned[here + r * h + c] = slope * grad;
      });
  pull(
      stage, rows, into, pulled, weight, h, m,
      [&](int r, int64_t c, float v) {
        const int64_t at = (first + r) * m + c;
        const float x = p.grad_middle[at];
        p.grad_energy[at] = v * gelu_slope(x);
        return p.grad_middle[at] = v * p.energy[c] * gelu_curvature(x);
      },
      [&](int r, int64_t c, float v) { p.carried[here + r * h + c] += v * gelu_slope(input(r, c)); });
}

}  // namespace
