// Hamiltonian half-steps, with barriers as in mlp.cuh: forward all of them, backward one.
#pragma once
#include "product.cuh"

namespace jk::rollout {
namespace {

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
    active(r, c) = from_float<T>(gelu(x));
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
          next(r, c) = from_float<T>(p.energy[c] * gelu_slope(v + p.bias[c]));
        });
    __syncthreads();
    multiply(
        ring, rows.count, next, down,
        [&] {
          if (!last) ring.begin(move, 0);
        },
        [&](int r, int c, float v) {
          const float u = v * gelu_slope(a(r, c));
          now(r, c) = from_float<T>(u);
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
    one(r, c) = from_float<T>(g);
    if (moves) other(r, c) = from_float<T>(p.carried[row(r) + c]);
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
        other(r, c) = from_float<T>(pulled);
      });
  __syncthreads();
  multiply(
      ring, rows.count, other, down, [&] { ring.begin(up, 0); },
      [&](int r, int c, float v) {
        const float x = p.input[row(r) + c], slope = gelu_slope(x), grad = into(r, c);
        p.force[row(r) + c] = slope * v;
        p.carried[row(r) + c] += gelu_curvature(x) * v * grad;
        p.grad_returned[row(r) + c] = slope * grad;
        one(r, c) = from_float<T>(slope * grad);
      });
  __syncthreads();
  multiply(
      ring, rows.count, one, up, [&] { ring.begin(down, 0); },
      [&](int r, int c, float v) {
        const int64_t at = (rows.first + r) * m + c;
        const float x = p.grad_middle[at], grad = v * p.energy[c] * gelu_curvature(x);
        p.grad_energy[at] = v * gelu_slope(x);
        p.grad_middle[at] = grad;
        other(r, c) = from_float<T>(grad);
      });
  __syncthreads();
  multiply(
      ring, rows.count, other, down, [] {},
      [&](int r, int c, float v) { p.carried[row(r) + c] += v * gelu_slope(p.input[row(r) + c]); });
}

}  // namespace
}  // namespace jk::rollout
