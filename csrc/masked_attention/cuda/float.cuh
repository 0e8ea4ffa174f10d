// Forward and backward kernels for float32, on the FMA units: TF32 tensor cores keep 10 bits of a
// product, this keeps 23.
//
// A block of 16 x 8 threads works on kRows = 16 R rows that it owns and kStep rows of the other
// side at a time. Thread (y, x) holds rows y R .. y R + R - 1 of every product; columns x, x + 8, x
// + 16, x + 24 of a kRows x kStep product; and channels 4 x + 32 g .. + 3 of a kRows x kDim
// product. A row's columns are thus spread over 8 lanes of one warp.
#pragma once
#include "rows.cuh"

namespace jk::attention {

template <int kDim_, int kR_>
struct FloatTile {
  static constexpr int kDim = kDim_, kR = kR_, kRows = 16 * kR_, kStep = 32,
                       kLd = kStride<float, kDim_>, kWeightLd = kStep + 4;
  static constexpr int kGroups = kDim / 32;
  static constexpr size_t kForwardBytes =
      size_t((kRows + 2 * kStep) * kLd + kRows * kWeightLd) * sizeof(float);
  static constexpr size_t kBackwardBytes =
      size_t((2 * kRows + 2 * kStep) * kLd + 2 * kRows * kWeightLd + 2 * kStep) * sizeof(float);
};

JK_DEVICE float4 read4(const float* p) { return *reinterpret_cast<const float4*>(p); }

// sum = own * other^T over the channels.
template <class Tile>
JK_DEVICE void float_rows(float (&sum)[Tile::kR][4], const float* own, const float* other) {
  constexpr int kR = Tile::kR, kLd = Tile::kLd;
  const int y = static_cast<int>(threadIdx.x) / 8, x = static_cast<int>(threadIdx.x) % 8;
#pragma unroll
  for (int r = 0; r < kR; r++)
#pragma unroll
    for (int c = 0; c < 4; c++) sum[r][c] = 0.f;
#pragma unroll 4
  for (int d = 0; d < Tile::kDim; d += 4) {
    float4 left[kR];
#pragma unroll
    for (int r = 0; r < kR; r++) left[r] = read4(own + (y * kR + r) * kLd + d);
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const float4 right = read4(other + (x + 8 * c) * kLd + d);
#pragma unroll
      for (int r = 0; r < kR; r++)
        sum[r][c] = fmaf(left[r].w, right.w,
                         fmaf(left[r].z, right.z,
                              fmaf(left[r].y, right.y, fmaf(left[r].x, right.x, sum[r][c]))));
    }
  }
}

// Puts a thread's weights where its warp can read them.
template <class Tile>
JK_DEVICE void share_weights(float* weights, const float (&value)[Tile::kR][4]) {
  const int y = static_cast<int>(threadIdx.x) / 8, x = static_cast<int>(threadIdx.x) % 8;
#pragma unroll
  for (int r = 0; r < Tile::kR; r++)
#pragma unroll
    for (int c = 0; c < 4; c++)
      weights[(y * Tile::kR + r) * Tile::kWeightLd + x + 8 * c] = value[r][c];
}

// sum += weights * other over kStep rows. Weight rows are read only by the warp that wrote them.
template <class Tile>
JK_DEVICE void float_weights(float (&sum)[Tile::kR][Tile::kGroups][4], const float* weights,
                             const float* other) {
  constexpr int kR = Tile::kR;
  const int y = static_cast<int>(threadIdx.x) / 8, x = static_cast<int>(threadIdx.x) % 8;
#pragma unroll 4
  for (int j = 0; j < Tile::kStep; j++) {
    float w[kR];
#pragma unroll
    for (int r = 0; r < kR; r++) w[r] = weights[(y * kR + r) * Tile::kWeightLd + j];
#pragma unroll
    for (int g = 0; g < Tile::kGroups; g++) {
      const float4 right = read4(other + j * Tile::kLd + 4 * x + 32 * g);
#pragma unroll
      for (int r = 0; r < kR; r++) {
        sum[r][g][0] = fmaf(w[r], right.x, sum[r][g][0]);
        sum[r][g][1] = fmaf(w[r], right.y, sum[r][g][1]);
        sum[r][g][2] = fmaf(w[r], right.z, sum[r][g][2]);
        sum[r][g][3] = fmaf(w[r], right.w, sum[r][g][3]);
      }
    }
  }
}

template <class Tile>
JK_DEVICE void float_clear(float (&sum)[Tile::kR][Tile::kGroups][4]) {
#pragma unroll
  for (int r = 0; r < Tile::kR; r++)
#pragma unroll
    for (int g = 0; g < Tile::kGroups; g++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[r][g][e] = 0.f;
}

// Writes factor[r] * sum, with kTurnBack through the transpose of the rotation that `ids` name.
template <class Tile, bool kTurnBack>
JK_DEVICE void float_write(const Args& a, const Sequence& s, const jk_ints& ids,
                           const float (&sum)[Tile::kR][Tile::kGroups][4],
                           const float (&factor)[Tile::kR], float* target, int64_t stride,
                           bool vector) {
  const int y = static_cast<int>(threadIdx.x) / 8, x = static_cast<int>(threadIdx.x) % 8,
            head_dim = static_cast<int>(a.p.head_dim);
#pragma unroll
  for (int r = 0; r < Tile::kR; r++) {
    const int row = y * Tile::kR + r;
    if (s.first + row >= s.length) continue;
    Angles angles;
    if (kTurnBack) angles = angles_of(a.p, ids, s.seq, s.begin + s.first + row);
#pragma unroll
    for (int g = 0; g < Tile::kGroups; g++) {
      const int channel = 4 * x + 32 * g;
      if (channel >= head_dim) continue;
      float v[4];
#pragma unroll
      for (int e = 0; e < 4; e++) v[e] = sum[r][g][e] * factor[r];
      if (kTurnBack) {
        rotate_pair<true>(angles, channel, v[0], v[1]);
        rotate_pair<true>(angles, channel + 2, v[2], v[3]);
      }
      float* to = target + row * stride + channel;
      if (vector) {
        *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
      } else {
#pragma unroll
        for (int e = 0; e < 4; e++) to[e] = v[e];
      }
    }
  }
}

// As masked_attention_fwd_kernel. Loads are not double buffered: shared memory goes into larger
// tiles instead.
template <class Tile>
__global__ void __launch_bounds__(kThreads, 2) masked_attention_fwd_float_kernel(const Args a) {
  constexpr int kDim = Tile::kDim, kR = Tile::kR, kStep = Tile::kStep, kLd = Tile::kLd;
  JK_DYNAMIC_SHARED(float, queries);
  float* keys = queries + Tile::kRows * kLd;
  float* values = keys + kStep * kLd;
  float* weights = values + kStep * kLd;
  Sequence s;
  if (!find_queries<Tile::kRows>(a, s)) return;
  const int64_t head = s.head;
  if (s.other == 0) return write_no_keys<float, Tile::kRows>(a, s, head);
  const float* key = row_pointer<const float>(a.p.k, a.p.cu_k, s.seq, s.partner, head);
  const float* value = row_pointer<const float>(a.p.v, a.p.cu_k, s.seq, s.partner, head);
  const int head_dim = static_cast<int>(a.p.head_dim), y = static_cast<int>(threadIdx.x) / 8,
            x = static_cast<int>(threadIdx.x) % 8;
  const float scale = positive_scale(a);
  load_queries<float, kDim, Tile::kRows>(a, s, head, queries);

  float out[kR][Tile::kGroups][4], top[kR], total[kR];
  float_clear<Tile>(out);
#pragma unroll
  for (int r = 0; r < kR; r++) {
    top[r] = -INFINITY;
    total[r] = 0.f;
  }
  for (int first = 0; first < s.other; first += kStep) {
    const int valid = s.other - first;
    stage_rows<float, kDim, kStep>(keys, key + first * a.p.k.stride_token, a.p.k.stride_token,
                                   valid, head_dim);
    stage_rows<float, kDim, kStep>(values, value + first * a.p.v.stride_token, a.p.v.stride_token,
                                   valid, head_dim);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    float p[kR][4];
    float_rows<Tile>(p, queries, keys);
#pragma unroll
    for (int r = 0; r < kR; r++) {
      float best = top[r];
#pragma unroll
      for (int c = 0; c < 4; c++) {
        if (x + 8 * c >= valid) p[r][c] = -INFINITY;
        best = fmaxf(best, p[r][c]);
      }
      best = warp_max<8>(best);
      const float shrink = exp2_fast((top[r] - best) * scale), shift = best * scale;
      top[r] = best;
      float sum = 0.f;
#pragma unroll
      for (int c = 0; c < 4; c++) {
        p[r][c] = exp2_fast(fmaf(p[r][c], scale, -shift));
        sum += p[r][c];
      }
      total[r] = total[r] * shrink + sum;
#pragma unroll
      for (int g = 0; g < Tile::kGroups; g++)
#pragma unroll
        for (int e = 0; e < 4; e++) out[r][g][e] *= shrink;
    }
    share_weights<Tile>(weights, p);
    __syncwarp();
    float_weights<Tile>(out, weights, values);
    __syncthreads();
  }
  float factor[kR];
  float* lse = lse_pointer(a, s.seq, head) + s.begin + s.first;
#pragma unroll
  for (int r = 0; r < kR; r++) {
    const float sum = warp_sum<8>(total[r]);
    factor[r] = 1.f / sum;
    const int row = y * kR + r;
    if (x == 0 && s.first + row < s.length) lse[row] = (top[r] * scale + log2f(sum)) * kLn2;
  }
  float_write<Tile, false>(a, s, a.p.ids_q, out, factor,
                           row_pointer<float>(a.p.out, a.p.cu_q, s.seq, s.begin + s.first, head),
                           a.p.out.stride_token, a.vector_out);
}

// As own_keys (kKeysOwned) and own_queries: the block owns one side's rows.
template <class Tile, bool kKeysOwned>
JK_DEVICE void own_floats(const Args& a) {
  constexpr int kDim = Tile::kDim, kR = Tile::kR, kStep = Tile::kStep, kLd = Tile::kLd,
                kRows = Tile::kRows;
  JK_DYNAMIC_SHARED(float, own_first);            // keys or queries
  float* own_second = own_first + kRows * kLd;    // values or output gradients
  float* other_first = own_second + kRows * kLd;  // queries or keys
  float* other_second = other_first + kStep * kLd;
  float* weights_p = other_second + kStep * kLd;
  float* weights_ds = weights_p + kRows * Tile::kWeightLd;
  float2* stats = reinterpret_cast<float2*>(weights_ds + kRows * Tile::kWeightLd);
  const jk_ints &cu_own = kKeysOwned ? a.p.cu_k : a.p.cu_q,
                &cu_other = kKeysOwned ? a.p.cu_q : a.p.cu_k;
  Sequence s;
  if (!(kKeysOwned ? find_keys<kRows>(a, s) : find_queries<kRows>(a, s))) return;
  const int64_t head = s.head, own = s.begin + s.first;
  const int head_dim = static_cast<int>(a.p.head_dim), y = static_cast<int>(threadIdx.x) / 8,
            x = static_cast<int>(threadIdx.x) % 8;
  const int rows = s.length - s.first < kRows ? s.length - s.first : kRows;
  float* target =
      row_pointer<float>(kKeysOwned ? a.p.grad_k : a.p.grad_q, cu_own, s.seq, own, head);
  float* target_value = row_pointer<float>(a.p.grad_v, a.p.cu_k, s.seq, own, head);
  const int64_t target_stride = kKeysOwned ? a.p.grad_k.stride_token : a.p.grad_q.stride_token;
  const bool target_vector = kKeysOwned ? a.vector_grad_k : a.vector_grad_q;
  if (s.other == 0) {
    zero_rows(target, target_stride, rows, head_dim, target_vector);
    if (kKeysOwned)
      zero_rows(target_value, a.p.grad_v.stride_token, rows, head_dim, a.vector_grad_v);
    return;
  }
  const jk_rows &rows_own_1 = kKeysOwned ? a.p.k : a.p.q,
                &rows_own_2 = kKeysOwned ? a.p.v : a.p.grad_out;
  const jk_rows &rows_other_1 = kKeysOwned ? a.p.q : a.p.k,
                &rows_other_2 = kKeysOwned ? a.p.grad_out : a.p.v;
  stage_rows<float, kDim, kRows>(own_first,
                                 row_pointer<const float>(rows_own_1, cu_own, s.seq, own, head),
                                 rows_own_1.stride_token, rows, head_dim);
  stage_rows<float, kDim, kRows>(own_second,
                                 row_pointer<const float>(rows_own_2, cu_own, s.seq, own, head),
                                 rows_own_2.stride_token, rows, head_dim);
  const float* first_row = row_pointer<const float>(rows_other_1, cu_other, s.seq, s.partner, head);
  const float* second_row =
      row_pointer<const float>(rows_other_2, cu_other, s.seq, s.partner, head);
  // Stats belong to queries: per column of a step where keys are owned, else per owned row.
  const float2* stat = stats_pointer(a, s.seq, head) + (kKeysOwned ? s.partner : own);
  const float scale = a.p.scale * kLog2e;

  float grad[kR][Tile::kGroups][4], grad_value[kR][Tile::kGroups][4], factor[kR], ones[kR];
  float2 row_stat[kR];
  float_clear<Tile>(grad);
  float_clear<Tile>(grad_value);
#pragma unroll
  for (int r = 0; r < kR; r++) {
    factor[r] = a.p.scale;
    ones[r] = 1.f;
    const bool inside = !kKeysOwned && y * kR + r < rows;
    row_stat[r] = inside ? stat[y * kR + r] : make_float2(0.f, 0.f);
  }
  for (int first = 0; first < s.other; first += kStep) {
    const int valid = s.other - first;
    stage_rows<float, kDim, kStep>(other_first, first_row + first * rows_other_1.stride_token,
                                   rows_other_1.stride_token, valid, head_dim);
    stage_rows<float, kDim, kStep>(other_second, second_row + first * rows_other_2.stride_token,
                                   rows_other_2.stride_token, valid, head_dim);
    if (kKeysOwned) stage_stats<kStep>(stats, stat + first, valid);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    float p[kR][4], ds[kR][4];
    float_rows<Tile>(p, own_first, other_first);
    float_rows<Tile>(ds, own_second, other_second);
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const int column = x + 8 * c;
#pragma unroll
      for (int r = 0; r < kR; r++) {
        const float2 both = kKeysOwned ? stats[column] : row_stat[r];
        // A key beyond the end has logit 0, whose weight overflows where lse is very negative.
        p[r][c] = column < valid ? exp2_fast(p[r][c] * scale - both.x) : 0.f;
        ds[r][c] = p[r][c] * (ds[r][c] - both.y);
      }
    }
    if (kKeysOwned) share_weights<Tile>(weights_p, p);
    share_weights<Tile>(weights_ds, ds);
    __syncwarp();
    if (kKeysOwned) float_weights<Tile>(grad_value, weights_p, other_second);
    float_weights<Tile>(grad, weights_ds, other_first);
    __syncthreads();
  }
  float_write<Tile, true>(a, s, kKeysOwned ? a.p.ids_k : a.p.ids_q, grad, factor, target,
                          target_stride, target_vector);
  if (kKeysOwned)
    float_write<Tile, false>(a, s, a.p.ids_k, grad_value, ones, target_value,
                             a.p.grad_v.stride_token, a.vector_grad_v);
}

// grid: as masked_attention_bwd_kernel.
template <class Tile>
__global__ void __launch_bounds__(kThreads, 2) masked_attention_bwd_float_kernel(const Args a) {
  if (blockIdx.z == 0)
    own_floats<Tile, true>(a);
  else
    own_floats<Tile, false>(a);
}

}  // namespace jk::attention
