// GRU with LayerNorm: a block owns kTile rows and takes them through every step; the state stays in
// shared memory.
#pragma once
#include "product.cuh"

namespace jk::rollout {
namespace {

constexpr int kActions = 64;  // action channels in shared memory at a time

JK_DEVICE float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

struct Moments {
  float mean, inverse;  // 1 / sqrt(variance + epsilon)
};

// Of value(column) over the columns of a row, by one warp.
template <class Value>
JK_DEVICE Moments moments(int width, float epsilon, const Value& value) {
  float sum = 0.f, squares = 0.f;
  for (int c = lane_id(); c < width; c += 32) sum += value(c);
  const float mean = warp_sum(sum) / float(width);
  for (int c = lane_id(); c < width; c += 32) {
    const float d = value(c) - mean;
    squares = fmaf(d, d, squares);
  }
  return {mean, 1.f / sqrtf(warp_sum(squares) / float(width) + epsilon)};
}

template <class T>
size_t gru_fwd_tiles(int64_t channels) {
  return float_bytes(channels) + operand_bytes<T>(channels) + operand_bytes<T>(kActions);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    latent_rollout_gru_fwd_kernel(const jk_rollout_gru_params p, const Placement placement) {
  JK_DYNAMIC_SHARED(unsigned char, memory);
  const int d = int(p.channels), actions = int(p.actions);
  const Rows rows(p.rows);
  Arena arena{memory};
  const Tile<float> state = arena.floats(d);
  const Tile<T> operand = arena.operand<T>(d), action = arena.operand<T>(kActions);
  const View<T, 3> recurrent{weights_of<T>(arena, p.weight_state, {d, d, 3}, placement.kept[0]),
                             false, d, d};
  const Weights<T> input = weights_of<T>(arena, p.weight_input, {d, actions, 3}, placement.kept[1]);
  Ring<T> ring(arena, placement.slots);
  constexpr int kPass = View<T, 3>::kPass;
  const auto driven_by = [&](int from) {
    return View<T, 3>{input.numbers_from(from), false,
                      actions - from < kActions ? actions - from : kActions, d};
  };
  const auto load_actions = [&](int64_t k, int from) {
    each(rows.count, kActions, [&](int r, int c) {
      const bool inside = from + c < actions;
      action(r, c) =
          inside ? from_float<T>(p.action[(k * p.rows + rows.first + r) * actions + from + c])
                 : zero_of<T>();
    });
  };
  const auto column_of = [](int first, int b, int i) {
    return first + int(threadIdx.x >> 5) * kBlock + Place<T>::column(b, i);
  };
  clear_padding(operand, rows.count, d);
  clear_padding(action, rows.count, kActions);
  each(rows.count, d, [&](int r, int c) {
    const float z = p.start[(rows.first + r) * p.start_stride + c];
    state(r, c) = z;
    operand(r, c) = from_float<T>(z);
  });
  await_kept();
  for (int64_t k = 0; k < p.horizon; k++) {
    load_actions(k, 0);
    ring.begin(recurrent, 0);
    __syncthreads();
    for (int column = 0; column < d; column += kPass) {
      // Reset, update, W_s z + b_s of the candidate, and what the action adds to it: sums start at
      // their biases.
      float acc[4][2][4];
#pragma unroll
      for (int b = 0; b < 2; b++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int c = column_of(column, b, i), at = c < d ? c : 0;
          acc[0][b][i] = p.bias_input[at] + p.bias_state[at];
          acc[1][b][i] = p.bias_input[d + at] + p.bias_state[d + at];
          acc[2][b][i] = p.bias_state[2 * d + at];
          acc[3][b][i] = p.bias_input[2 * d + at];
        }
      add_product<2>(ring, operand, recurrent, column, acc);
      for (int from = 0; from < actions; from += kActions) {
        ring.begin(driven_by(from), column);
        if (actions > kActions) {
          __syncthreads();
          load_actions(k, from);
          __syncthreads();
        }
        add_product<3>(ring, action, driven_by(from), column, acc);
      }
      if (column + kPass < d) ring.begin(recurrent, column + kPass);
#pragma unroll
      for (int b = 0; b < 2; b++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int r = Place<T>::row(i), c = column_of(column, b, i);
          if (r >= rows.count || c >= d) continue;
          const float reset = sigmoid(acc[0][b][i]);
          const float update = sigmoid(acc[1][b][i]);
          const float hidden = acc[2][b][i], candidate = tanhf(acc[3][b][i] + reset * hidden);
          state(r, c) = candidate + update * (state(r, c) - candidate);
          if (p.gates != nullptr) {
            float* to = p.gates + (k * p.rows + rows.first + r) * 4 * d + c;
            to[0] = reset;
            to[d] = update;
            to[2 * d] = candidate;
            to[3 * d] = hidden;
          }
        }
    }
    __syncthreads();
    for (int r = threadIdx.x >> 5; r < rows.count; r += kWarps) {
      const Moments of = moments(d, p.epsilon, [&](int c) { return state(r, c); });
      for (int c = lane_id(); c < d; c += 32) {
        const float z = (state(r, c) - of.mean) * of.inverse * p.norm_weight[c] + p.norm_bias[c];
        state(r, c) = z;
        operand(r, c) = from_float<T>(z);
        if (p.kept > 1 || k + 1 == p.horizon)
          p.states[((p.kept > 1 ? k * p.rows : 0) + rows.first + r) * d + c] = z;
      }
    }
  }
}

// The normalised state of a step gives its room to the operand of the products.
template <class T>
__host__ __device__ size_t gru_bwd_shared_tile(int64_t channels) {
  return float_bytes(channels) > operand_bytes<T>(channels) ? float_bytes(channels)
                                                            : operand_bytes<T>(channels);
}
template <class T>
size_t gru_bwd_tiles(int64_t channels) {
  return float_bytes(channels) + gru_bwd_shared_tile<T>(channels) + number_bytes(2 * channels) +
         number_bytes(3 * kTile);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    latent_rollout_gru_bwd_kernel(const jk_rollout_gru_params p, const Placement placement) {
  JK_DYNAMIC_SHARED(unsigned char, memory);
  const int d = int(p.channels);
  const Rows rows(p.rows);
  Arena arena{memory};
  const Tile<float> carried = arena.floats(d), normal = Arena{arena.next}.floats(d);
  const Tile<T> operand = Arena{arena.next}.operand<T>(d);
  arena.next += gru_bwd_shared_tile<T>(d);
  float *norm = arena.numbers(2 * d), *inverse = arena.numbers(3 * kTile), *plain = inverse + kTile,
        *along = plain + kTile;
  const Weights<T> weight = weights_of<T>(arena, p.weight_state, {d, d, 3}, placement.kept[0]);
  Ring<T> ring(arena, placement.slots);
  const auto of_gate = [&](int which) {
    return View<T>{weight.lines_from(int64_t(which) * d), true, d, d};
  };
  each(rows.count, d, [&](int r, int c) { carried(r, c) = 0.f; });
  for (int c = threadIdx.x; c < 2 * d; c += kThreads) norm[c] = 0.f;
  await_kept();
  __syncthreads();
  for (int64_t k = p.horizon - 1; k >= 0; k--) {
    const int64_t row0 = k * p.rows + rows.first;
    const auto before = [&](int r, int c) {
      return k > 0 ? p.states[(row0 - p.rows + r) * d + c]
                   : p.start[(rows.first + r) * p.start_stride + c];
    };
    const auto gate = [&](int which, int r, int c) {
      return p.gates[((row0 + r) * 4 + which) * d + c];
    };
    ring.begin(of_gate(0), 0);
    for (int r = threadIdx.x >> 5; r < rows.count; r += kWarps) {
      for (int c = lane_id(); c < d; c += 32) {
        if (p.every_step || k + 1 == p.horizon)
          carried(r, c) += p.grad_states[((p.every_step ? row0 : rows.first) + r) * d + c];
        const float candidate = gate(2, r, c);
        normal(r, c) = candidate + gate(1, r, c) * (before(r, c) - candidate);
      }
      const Moments of = moments(d, p.epsilon, [&](int c) { return normal(r, c); });
      float sum = 0.f, dot = 0.f;
      for (int c = lane_id(); c < d; c += 32) {
        const float scaled = carried(r, c) * p.norm_weight[c],
                    z = (normal(r, c) - of.mean) * of.inverse;
        normal(r, c) = z;
        sum += scaled;
        dot = fmaf(scaled, z, dot);
      }
      sum = warp_sum(sum);
      dot = warp_sum(dot);
      if (lane_id() == 0) {
        inverse[r] = of.inverse;
        plain[r] = sum / float(d);
        along[r] = dot / float(d);
      }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < d; c += kThreads)
      for (int r = 0; r < rows.count; r++) {
        norm[c] = fmaf(carried(r, c), normal(r, c), norm[c]);
        norm[d + c] += carried(r, c);
      }
    __syncthreads();
    each(rows.count, d, [&](int r, int c) {
      const float mix =
          inverse[r] * (carried(r, c) * p.norm_weight[c] - plain[r] - normal(r, c) * along[r]);
      const float reset = gate(0, r, c), update = gate(1, r, c), candidate = gate(2, r, c);
      const float of_candidate = mix * (1.f - update) * (1.f - candidate * candidate);
      float* to = (float*)p.grad_gates + (row0 + r) * 4 * d + c;
      to[0] = of_candidate * gate(3, r, c) * reset * (1.f - reset);
      to[d] = mix * (before(r, c) - candidate) * update * (1.f - update);
      to[2 * d] = of_candidate;
      to[3 * d] = of_candidate * reset;
      carried(r, c) = mix * update;
    });
    __syncthreads();
    clear_padding(operand, rows.count, d);
#pragma unroll 1
    for (int which = 0; which < 3; which++) {
      const int place =
          which < 2 ? which : 3;  // the state reaches the candidate through W_s z + b_s
      each(rows.count, d, [&](int r, int c) {
        operand(r, c) =
            from_float<T>(((const float*)p.grad_gates)[((row0 + r) * 4 + place) * d + c]);
      });
      __syncthreads();
      multiply(
          ring, rows.count, operand, of_gate(which),
          [&] {
            if (which < 2) ring.begin(of_gate(which + 1), 0);
          },
          [&](int r, int c, float v) { carried(r, c) += v; });
      __syncthreads();
    }
  }
  each(rows.count, d,
       [&](int r, int c) { p.grad_start[(rows.first + r) * d + c] = carried(r, c); });
  for (int c = threadIdx.x; c < 2 * d; c += kThreads)
    p.grad_norm[int64_t(blockIdx.x) * 2 * d + c] = norm[c];
}

}  // namespace
}  // namespace jk::rollout
