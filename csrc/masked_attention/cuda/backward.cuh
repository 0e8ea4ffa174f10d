// Backward kernel for bfloat16 and float16. A block owns the rows it writes, of keys or of queries,
// so nothing is added up by atomics and the result does not depend on scheduling.
//   P_ij = exp(scale q_i k_j - lse_i),  dP_ij = grad_out_i v_j,  dS_ij = P_ij (dP_ij - delta_i)
//   grad_v_j = sum_i P_ij grad_out_i,  grad_k_j = R^T scale sum_i dS_ij q_i,  grad_q_i = R^T scale
//   sum_j dS_ij k_j
// Queries and keys come rotated.
#pragma once
#include "mma.cuh"

namespace jk::attention {

// kOwn: rows that a block owns (16 * kBands per warp); kStep: rows of the other side per step,
// kPart of them at a time in registers.
template <int kDim_, int kBands_, int kStep_, bool kKeep_, int kPart_ = kStep_>
struct BackwardTile {
  static constexpr int kDim = kDim_, kBands = kBands_, kStep = kStep_, kPart = kPart_,
                       kOwn = kWarps * 16 * kBands_;
  static constexpr bool kKeep = kKeep_;
  template <class T>
  static constexpr size_t bytes(bool keys) {
    return size_t(2 * kOwn + 4 * kStep) * kStride<T, kDim> * sizeof(T) +
           (keys ? 2 * kStep * sizeof(float2) + sizeof(Sequence) : 0);
  }
};

// The stats of a lane's two columns in a column group of an accumulator: lse, delta, lse, delta.
JK_DEVICE float4 read_pair(const float2* group) {
  return *reinterpret_cast<const float4*>(group + lane_id() % 4 * 2);
}

// A block that owns kOwn keys of one head reads the queries and output gradients of their sequence.
// Everything is transposed (rows are keys), so that P and dS are left operands where they stand.
template <class T, class Tile>
JK_DEVICE void own_keys(const Args& a) {
  constexpr int kDim = Tile::kDim, kBands = Tile::kBands, kStep = Tile::kStep, kPart = Tile::kPart,
                kLd = kStride<T, kDim>;
  JK_DYNAMIC_SHARED(T, keys);
  T* values = keys + Tile::kOwn * kLd;
  T* queries = values + Tile::kOwn * kLd;  // two stages, as all that follow
  T* grads = queries + 2 * kStep * kLd;
  float2* stats = reinterpret_cast<float2*>(grads + 2 * kStep * kLd);
  Sequence s;
  if (!find_keys<Tile::kOwn>(a, s)) return;
  const int64_t head = s.head, own = s.begin + s.first;
  const int head_dim = static_cast<int>(a.p.head_dim), steps = (s.other + kStep - 1) / kStep;
  // The loop needs the registers: what follows it finds the sequence here.
  Sequence* const kept = reinterpret_cast<Sequence*>(stats + 2 * kStep);
  if (threadIdx.x == 0) *kept = s;
  const int rows = s.length - s.first < Tile::kOwn ? s.length - s.first : Tile::kOwn;
  if (steps == 0) {
    zero_rows(row_pointer<T>(a.p.grad_k, a.p.cu_k, s.seq, own, head), a.p.grad_k.stride_token, rows,
              head_dim, a.vector_grad_k);
    return zero_rows(row_pointer<T>(a.p.grad_v, a.p.cu_k, s.seq, own, head),
                     a.p.grad_v.stride_token, rows, head_dim, a.vector_grad_v);
  }

  RowStream<T, kDim, kStep> query(row_pointer<const T>(a.p.q, a.p.cu_q, s.seq, s.partner, head),
                                  a.p.q.stride_token);
  RowStream<T, kDim, kStep> grad(
      row_pointer<const T>(a.p.grad_out, a.p.cu_q, s.seq, s.partner, head),
      a.p.grad_out.stride_token);
  const float2* stat = stats_pointer(a, s.seq, head) + s.partner;
  auto stage = [&](int step) {
    const int valid = s.other - step * kStep, slot = step % 2 * kStep;
    query.stage(queries + slot * kLd, a.p.q.stride_token, valid, head_dim);
    grad.stage(grads + slot * kLd, a.p.grad_out.stride_token, valid, head_dim);
    stage_stats<kStep>(stats + slot, stat, valid);
    stat += kStep;
    cp_async_commit();
  };
  stage_rows<T, kDim, Tile::kOwn>(keys, row_pointer<const T>(a.p.k, a.p.cu_k, s.seq, own, head),
                                  a.p.k.stride_token, rows, head_dim);
  stage_rows<T, kDim, Tile::kOwn>(values, row_pointer<const T>(a.p.v, a.p.cu_k, s.seq, own, head),
                                  a.p.v.stride_token, rows, head_dim);
  stage(0);

  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16 * kBands;
  const bool idle = warp_row >= rows;  // of a warp beyond the sequence, which only copies
  Left<T, kDim, kBands, Tile::kKeep> left_key, left_value;
  float grad_key[kBands][kDim / 8][4], grad_value[kBands][kDim / 8][4];
  clear(grad_key);
  clear(grad_value);
  for (int step = 0; step < steps; step++) {
    cp_async_wait<0>();
    __syncthreads();
    if (step == 0) {
      left_key.set(keys + warp_row * kLd);
      left_value.set(values + warp_row * kLd);
    }
    if (step + 1 < steps) stage(step + 1);
    if (idle) continue;
    const float scale = a.p.scale * kLog2e;
#pragma unroll 1
    for (int part = 0; part < kStep / kPart; part++) {
      const int slot = step % 2 * kStep + part * kPart;
      // Queries from `valid` on are zero rows with zero stats, so P is 1 and dS is 0 there: they
      // add nothing.
      float p[kBands][kPart / 8][4], ds[kBands][kPart / 8][4];
      clear(p);
      multiply_rows<T, kDim, kBands, kPart>(p, left_key, queries + slot * kLd, head_dim);
#pragma unroll
      for (int n = 0; n < kPart / 8; n++) {
        const float4 stat_pair = read_pair(stats + slot + n * 8);
#pragma unroll
        for (int band = 0; band < kBands; band++)
#pragma unroll
          for (int e = 0; e < 4; e++)
            p[band][n][e] = exp2_fast(p[band][n][e] * scale - (e % 2 ? stat_pair.z : stat_pair.x));
      }
      clear(ds);
      multiply_rows<T, kDim, kBands, kPart>(ds, left_value, grads + slot * kLd, head_dim);
#pragma unroll
      for (int n = 0; n < kPart / 8; n++) {
        const float4 stat_pair = read_pair(stats + slot + n * 8);
#pragma unroll
        for (int band = 0; band < kBands; band++)
#pragma unroll
          for (int e = 0; e < 4; e++)
            ds[band][n][e] = p[band][n][e] * (ds[band][n][e] - (e % 2 ? stat_pair.w : stat_pair.y));
      }
      multiply_weights<T, kDim, kBands, kPart>(grad_value, p, grads + slot * kLd, head_dim);
      multiply_weights<T, kDim, kBands, kPart>(grad_key, ds, queries + slot * kLd, head_dim);
    }
  }

  const Sequence at = *kept;
  float scales[kBands][2], ones[kBands][2];
#pragma unroll
  for (int band = 0; band < kBands; band++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      scales[band][half] = a.p.scale;
      ones[band][half] = 1.f;
    }
  write_rows<T, kDim, true>(
      a, at, a.p.ids_k, grad_key, scales, keys,
      row_pointer<T>(a.p.grad_k, a.p.cu_k, at.seq, at.begin + at.first, at.head),
      a.p.grad_k.stride_token, a.vector_grad_k);
  write_rows<T, kDim, false>(
      a, at, a.p.ids_k, grad_value, ones, values,
      row_pointer<T>(a.p.grad_v, a.p.cu_k, at.seq, at.begin + at.first, at.head),
      a.p.grad_v.stride_token, a.vector_grad_v);
}

// A block that owns kOwn queries of one head reads the keys and values of their sequence.
template <class T, class Tile>
JK_DEVICE void own_queries(const Args& a) {
  constexpr int kDim = Tile::kDim, kBands = Tile::kBands, kStep = Tile::kStep,
                kLd = kStride<T, kDim>;
  JK_DYNAMIC_SHARED(T, queries);
  T* grads = queries + Tile::kOwn * kLd;
  T* keys = grads + Tile::kOwn * kLd;  // two stages
  T* values = keys + 2 * kStep * kLd;  // two stages
  Sequence s;
  if (!find_queries<Tile::kOwn>(a, s)) return;
  const int64_t head = s.head, own = s.begin + s.first;
  const int head_dim = static_cast<int>(a.p.head_dim), steps = (s.other + kStep - 1) / kStep;
  T* target = row_pointer<T>(a.p.grad_q, a.p.cu_q, s.seq, own, head);
  const int rows = s.length - s.first < Tile::kOwn ? s.length - s.first : Tile::kOwn;
  if (steps == 0)
    return zero_rows(target, a.p.grad_q.stride_token, rows, head_dim, a.vector_grad_q);

  RowStream<T, kDim, kStep> key(row_pointer<const T>(a.p.k, a.p.cu_k, s.seq, s.partner, head),
                                a.p.k.stride_token);
  RowStream<T, kDim, kStep> value(row_pointer<const T>(a.p.v, a.p.cu_k, s.seq, s.partner, head),
                                  a.p.v.stride_token);
  auto stage = [&](int step) {
    const int valid = s.other - step * kStep, slot = step % 2 * kStep * kLd;
    key.stage(keys + slot, a.p.k.stride_token, valid, head_dim);
    value.stage(values + slot, a.p.v.stride_token, valid, head_dim);
    cp_async_commit();
  };
  stage_rows<T, kDim, Tile::kOwn>(queries, row_pointer<const T>(a.p.q, a.p.cu_q, s.seq, own, head),
                                  a.p.q.stride_token, rows, head_dim);
  stage_rows<T, kDim, Tile::kOwn>(grads,
                                  row_pointer<const T>(a.p.grad_out, a.p.cu_q, s.seq, own, head),
                                  a.p.grad_out.stride_token, rows, head_dim);
  stage(0);

  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16 * kBands;
  const bool idle = warp_row >= rows;  // of a warp beyond the sequence, which only copies
  const float scale = a.p.scale * kLog2e;
  const float2* stat = stats_pointer(a, s.seq, head) + own;
  float shift[kBands][2], mean[kBands][2], scales[kBands][2];
#pragma unroll
  for (int band = 0; band < kBands; band++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = warp_row + band * 16 + half * 8 + lane_id() / 4;
      shift[band][half] = row < rows ? stat[row].x : 0.f;
      mean[band][half] = row < rows ? stat[row].y : 0.f;
      scales[band][half] = a.p.scale;
    }
  Left<T, kDim, kBands, Tile::kKeep> left_query, left_grad;
  float grad_query[kBands][kDim / 8][4];
  clear(grad_query);
  for (int step = 0; step < steps; step++) {
    cp_async_wait<0>();
    __syncthreads();
    if (step == 0) {
      left_query.set(queries + warp_row * kLd);
      left_grad.set(grads + warp_row * kLd);
    }
    if (step + 1 < steps) stage(step + 1);
    if (idle) continue;
    const int slot = step % 2 * kStep * kLd;
    float p[kBands][kStep / 8][4], ds[kBands][kStep / 8][4];
    clear(p);
    multiply_rows<T, kDim, kBands, kStep>(p, left_query, keys + slot, head_dim);
    clear(ds);
    multiply_rows<T, kDim, kBands, kStep>(ds, left_grad, values + slot, head_dim);
#pragma unroll
    for (int band = 0; band < kBands; band++)
#pragma unroll
      for (int n = 0; n < kStep / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          ds[band][n][e] = exp2_fast(p[band][n][e] * scale - shift[band][e / 2]) *
                           (ds[band][n][e] - mean[band][e / 2]);
    // A key beyond the end has logit 0, whose weight overflows where lse is very negative.
    if ((step + 1) * kStep > s.other) fill_tail(ds, s.other - step * kStep, 0.f);
    multiply_weights<T, kDim, kBands, kStep>(grad_query, ds, keys + slot, head_dim);
  }
  write_rows<T, kDim, true>(a, s, a.p.ids_q, grad_query, scales, queries, target,
                            a.p.grad_q.stride_token, a.vector_grad_q);
}

// grid: (tiles, heads, 2): blocks that own keys, whose steps are longer, come first. In one launch
// the last of them run beside the first that own queries.
template <class T, class Keys, class Queries>
__global__ void __launch_bounds__(kThreads, 2) masked_attention_bwd_kernel(const Args a) {
  if (blockIdx.z == 0)
    own_keys<T, Keys>(a);
  else
    own_queries<T, Queries>(a);
}

}  // namespace jk::attention
