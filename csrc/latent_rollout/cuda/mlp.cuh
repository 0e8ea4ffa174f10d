// Residual MLP: a block owns kTile rows and takes them through every step in shared memory. Every
// product reads one operand tile and its results fill another, so one barrier of the block
// separates a product from the next.
#pragma once
#include "product.cuh"

namespace jk::rollout {
namespace {

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
    active(r, c) = from_float<T>(g);
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
    operand(r, c) = from_float<T>(g);
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
          reach(next, k, r, c, sizeof(T) == 4 ? to_float(now(r, c)) : grad(r, c), total + v, x);
          ((float*)p.activations)[k * step + at] = gelu(x);
        });
    swap(now, next);
  }
}

}  // namespace
}  // namespace jk::rollout
