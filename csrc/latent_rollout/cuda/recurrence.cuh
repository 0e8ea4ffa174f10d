// Residual-MLP and Hamiltonian recurrences: a block owns kTile rows and takes them through every
// step in shared memory. Every product reads one operand tile and its results fill another, so one
// barrier of the block separates a product from the next.
#pragma once
#include "product.cuh"

namespace {

// Rows of a block: those from `first` on that exist.
struct Rows {
  int64_t first;
  int count;
  JK_DEVICE explicit Rows(int64_t all)
      : first(int64_t(blockIdx.x) * kTile), count(int(all - first < kTile ? all - first : kTile)) {}
};

template <class T>
JK_DEVICE void swap(Tile<T>& a, Tile<T>& b) {
  const Tile<T> was = a;
  a = b;
  b = was;
}

template <class T>
size_t mlp_fwd_tiles(int64_t hidden) {
  return float_bytes(hidden) + 2 * operand_bytes<T>(hidden);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    latent_rollout_mlp_fwd_kernel(const jk_rollout_mlp_params p, const Placement placement) {
  JK_DYNAMIC_SHARED(unsigned char, memory);
  const int h = int(p.hidden);
  const Rows rows(p.rows);
  const int64_t step = p.rows * h;
  Arena arena{memory};
  const Tile<float> a = arena.floats(h);
  Tile<T> now = arena.operand<T>(h), next = arena.operand<T>(h);  // gelu(a_k), gelu(a_{k+1})
  const View<T> coupling{weights_of<T>(arena, p.coupling, {h, h}, placement.kept[0]), false, h, h};
  Ring<T> ring(arena, placement.slots);
  const auto reach = [&](const Tile<T>& active, int64_t k, int r, int c, float x) {
    const int64_t at = (rows.first + r) * h + c;
    const float g = gelu(x);
    a(r, c) = x;
    active(r, c) = jk::from_float<T>(g);
    if (p.inputs != nullptr) p.inputs[k * step + at] = x;
    float* sum = p.sums + (p.kept > 1 ? k * step : 0) + at;  // s_{k+1} = s_k + gelu(a_k)
    *sum = k == 0 ? g : (p.kept > 1 ? sum[-step] : *sum) + g;
  };
  clear_padding(now, rows.count, h);
  clear_padding(next, rows.count, h);
  each(rows.count, h,
       [&](int r, int c) { reach(now, 0, r, c, p.start[(rows.first + r) * h + c]); });
  await_kept();
  if (p.horizon > 1) ring.begin(coupling, 0);
  for (int64_t k = 1; k < p.horizon; k++) {
    __syncthreads();
    multiply(
        ring, rows.count, now, coupling,
        [&] {
          if (k + 1 < p.horizon) ring.begin(coupling, 0);
        },
        [&](int r, int c, float v) { reach(next, k, r, c, a(r, c) + (v + p.drift[c])); });
    swap(now, next);
  }
}

// In 32 bits the operand is the gradient itself; in 16 bits the gradient has a tile of its own.
template <class T>
size_t mlp_bwd_tiles(int64_t hidden) {
  return (sizeof(T) == 4 ? 1 : 2) * float_bytes(hidden) + 2 * operand_bytes<T>(hidden);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    latent_rollout_mlp_bwd_kernel(const jk_rollout_mlp_params p, const Placement placement) {
  JK_DYNAMIC_SHARED(unsigned char, memory);
  const int h = int(p.hidden);
  const Rows rows(p.rows);
  const int64_t step = p.rows * h;
  Arena arena{memory};
  const Tile<float> following =
      arena.floats(h);  // gradient of the sums of this step and all later ones
  const Tile<float> grad = sizeof(T) == 4 ? following : arena.floats(h);
  Tile<T> now = arena.operand<T>(h), next = arena.operand<T>(h);  // gradients of a_{k+1}, a_k
  const View<T> coupling{weights_of<T>(arena, p.coupling, {h, h}, placement.kept[0]), true, h, h};
  Ring<T> ring(arena, placement.slots);
  const auto reach = [&](const Tile<T>& operand, int64_t k, int r, int c, float later, float total,
                         float x) {
    const float g = later + gelu_slope(x) * total;
    operand(r, c) = jk::from_float<T>(g);
    if (sizeof(T) != 4) grad(r, c) = g;
    ((float*)p.grad_inputs)[k * step + (rows.first + r) * h + c] = g;
  };
  clear_padding(now, rows.count, h);
  clear_padding(next, rows.count, h);
  const int64_t last = p.horizon - 1;
  each(rows.count, h, [&](int r, int c) {
    const int64_t at = (rows.first + r) * h + c;
    const float total = p.grad_sums[(p.kept > 1 ? last : 0) * step + at];
    following(r, c) = total;
    reach(now, last, r, c, 0.f, total, p.inputs[last * step + at]);
  });
  await_kept();
  if (last > 0) ring.begin(coupling, 0);
  for (int64_t k = last - 1; k >= 0; k--) {
    __syncthreads();
    multiply(
        ring, rows.count, now, coupling,
        [&] {
          if (k > 0) ring.begin(coupling, 0);
        },
        [&](int r, int c, float v) {
          const int64_t at = (rows.first + r) * h + c;
          const float x = p.inputs[k * step + at];
          const float total = following(r, c) + (p.kept > 1 ? p.grad_sums[k * step + at] : 0.f);
          following(r, c) = total;
          reach(next, k, r, c, sizeof(T) == 4 ? jk::to_float(now(r, c)) : grad(r, c), total + v, x);
          ((float*)p.activations)[k * step + at] = gelu(x);
        });
    swap(now, next);
  }
}

// Both operands hold either layer in turn.
template <class T>
size_t hamiltonian_tiles(int64_t hidden, int64_t middle) {
  return float_bytes(hidden) + 2 * operand_bytes<T>(hidden > middle ? hidden : middle);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    latent_rollout_hamiltonian_fwd_kernel(const jk_rollout_hamiltonian_params p,
                                          const Placement placement) {
  JK_DYNAMIC_SHARED(unsigned char, memory);
  const int h = int(p.hidden), m = int(p.middle);
  const Rows rows(p.rows);
  const int64_t step = p.rows * h;
  Arena arena{memory};
  const Tile<float> a = arena.floats(h);
  Tile<T> now = arena.operand<T>(h > m ? h : m), next = arena.operand<T>(h > m ? h : m);
  const Weights<T> weight = weights_of<T>(arena, p.weight, {m, h}, placement.kept[0]);
  const Weights<T> coupling = weights_of<T>(arena, p.coupling, {h, h}, placement.kept[1]);
  const View<T> up{weight, false, h, m}, down{weight, true, m, h};
  Ring<T> ring(arena, placement.slots);
  const auto reach = [&](const Tile<T>& active, int64_t j, int r, int c, float x) {
    a(r, c) = x;
    active(r, c) = jk::from_float<T>(gelu(x));
    if (p.inputs != nullptr) p.inputs[j * step + (rows.first + r) * h + c] = x;
  };
  clear_padding(now, rows.count, h);
  clear_padding(next, rows.count, h);
  each(rows.count, h,
       [&](int r, int c) { reach(now, 0, r, c, p.start[(rows.first + r) * h + c]); });
  await_kept();
  ring.begin(up, 0);
  for (int64_t j = 0; j < 2 * p.horizon; j++) {
    const int64_t which = j % 2, k = j / 2;
    const bool last = j + 1 == 2 * p.horizon;
    const View<T> move{coupling, which == 1, h, h};
    __syncthreads();
    multiply(
        ring, rows.count, now, up, [&] { ring.begin(down, 0); },
        [&](int r, int c, float v) {
          next(r, c) = jk::from_float<T>(p.energy[c] * gelu_slope(v + p.bias[c]));
        });
    __syncthreads();
    multiply(
        ring, rows.count, next, down,
        [&] {
          if (!last) ring.begin(move, 0);
        },
        [&](int r, int c, float v) {
          const float u = v * gelu_slope(a(r, c));
          now(r, c) = jk::from_float<T>(u);
          float* sum =
              p.sums + (which * p.kept + (p.kept > 1 ? k : 0)) * step + (rows.first + r) * h + c;
          *sum = k == 0 ? u : (p.kept > 1 ? sum[-step] : *sum) + u;
        });
    if (last) break;
    const float dt = which ? -p.time_step : p.time_step;
    __syncthreads();
    multiply(
        ring, rows.count, now, move, [&] { ring.begin(up, 0); },
        [&](int r, int c, float v) { reach(next, j + 1, r, c, a(r, c) + dt * v); });
    swap(now, next);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    latent_rollout_hamiltonian_bwd_kernel(const jk_rollout_hamiltonian_step_params p,
                                          const Placement placement) {
  JK_DYNAMIC_SHARED(unsigned char, memory);
  const int h = int(p.hidden), m = int(p.middle);
  const Rows rows(p.rows);
  const bool moves = p.time_step != 0.f;
  Arena arena{memory};
  const Tile<float> into = arena.floats(h);  // the gradient that reaches the force
  const Tile<T> one = arena.operand<T>(h > m ? h : m), other = arena.operand<T>(h > m ? h : m);
  const Weights<T> weight = weights_of<T>(arena, p.weight, {m, h}, placement.kept[0]);
  const View<T> back{weights_of<T>(arena, p.coupling, {h, h}, placement.kept[1]), p.transposed == 0,
                     h, h};
  const View<T> up{weight, false, h, m}, down{weight, true, m, h};
  Ring<T> ring(arena, placement.slots);
  const auto row = [&](int r) { return (rows.first + r) * h; };
  clear_padding(one, rows.count, h);
  clear_padding(other, rows.count, h);
  each(rows.count, h, [&](int r, int c) {
    const float g = gelu(p.input[row(r) + c]);
    into(r, c) = p.following[row(r) + c];
    p.activation[row(r) + c] = g;
    one(r, c) = jk::from_float<T>(g);
    if (moves) other(r, c) = jk::from_float<T>(p.carried[row(r) + c]);
  });
  await_kept();
  if (moves) {
    ring.begin(back, 0);
  } else {
    ring.begin(up, 0);
  }
  __syncthreads();
  if (moves) {
    multiply(
        ring, rows.count, other, back, [&] { ring.begin(up, 0); },
        [&](int r, int c, float v) { into(r, c) += p.time_step * v; });
    __syncthreads();
  }
  // The middle layer before its function waits in grad_middle until its gradient replaces it.
  multiply(
      ring, rows.count, one, up, [&] { ring.begin(down, 0); },
      [&](int r, int c, float v) {
        const int64_t at = (rows.first + r) * m + c;
        const float x = v + p.bias[c], pulled = p.energy[c] * gelu_slope(x);
        p.grad_middle[at] = x;
        p.pulled[at] = pulled;
        other(r, c) = jk::from_float<T>(pulled);
      });
  __syncthreads();
  multiply(
      ring, rows.count, other, down, [&] { ring.begin(up, 0); },
      [&](int r, int c, float v) {
        const float x = p.input[row(r) + c], slope = gelu_slope(x), grad = into(r, c);
        p.force[row(r) + c] = slope * v;
        p.carried[row(r) + c] += gelu_curvature(x) * v * grad;
        p.grad_returned[row(r) + c] = slope * grad;
        one(r, c) = jk::from_float<T>(slope * grad);
      });
  __syncthreads();
  multiply(
      ring, rows.count, one, up, [&] { ring.begin(down, 0); },
      [&](int r, int c, float v) {
        const int64_t at = (rows.first + r) * m + c;
        const float x = p.grad_middle[at], grad = v * p.energy[c] * gelu_curvature(x);
        p.grad_energy[at] = v * gelu_slope(x);
        p.grad_middle[at] = grad;
        other(r, c) = jk::from_float<T>(grad);
      });
  __syncthreads();
  multiply(
      ring, rows.count, other, down, [] {},
      [&](int r, int c, float v) { p.carried[row(r) + c] += v * gelu_slope(p.input[row(r) + c]); });
}

}  // namespace
