// Forward kernel for bfloat16 and float16: out = softmax(scale R(q) R(k)^T) v by online softmax.
#pragma once
#include "mma.cuh"

namespace jk::attention {

// Tile of one thread block: kBands bands of 16 queries per warp, kKeys keys per step.
template <int kDim_, int kBands_, int kKeys_, bool kKeep_>
struct ForwardTile {
  static constexpr int kDim = kDim_, kBands = kBands_, kKeys = kKeys_,
                       kQueries = kWarps * 16 * kBands_;
  static constexpr bool kKeep = kKeep_;
  template <class T>
  static constexpr size_t bytes() {
    return size_t(kQueries + 4 * kKeys) * kStride<T, kDim> * sizeof(T);
  }
};

// Running maximum and sum of the rows that a lane holds.
template <int kBands>
struct Softmax {
  float top[kBands][2], total[kBands][2];

  JK_DEVICE void clear() {
#pragma unroll
    for (int band = 0; band < kBands; band++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        top[band][half] = -INFINITY;
        total[band][half] = 0.f;
      }
  }

  // Turns logits into weights exp2(scale * (logit - top)) and rescales what has been summed so far
  // to the new maximum.
  template <int kGroups, int kOutGroups>
  JK_DEVICE void step(float (&logits)[kBands][kGroups][4], float (&out)[kBands][kOutGroups][4],
                      float scale) {
    float shrink[kBands][2];
    bool moved = false;
#pragma unroll
    for (int band = 0; band < kBands; band++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float best = top[band][half];
#pragma unroll
        for (int n = 0; n < kGroups; n++)
          best = fmaxf(best, fmaxf(logits[band][n][2 * half], logits[band][n][2 * half + 1]));
        best = warp_max<4>(best);
        shrink[band][half] = exp2_fast((top[band][half] - best) * scale);
        moved = moved || best > top[band][half];
        top[band][half] = best;
        const float shift = best * scale;
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < kGroups; n++)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; e++) {
            logits[band][n][e] = exp2_fast(logits[band][n][e] * scale - shift);
            sum += logits[band][n][e];
          }
        total[band][half] = total[band][half] * shrink[band][half] + sum;
      }
    // The maximum rarely moves after the first steps, and multiplying by one changes nothing.
    if (!__any_sync(0xffffffffu, moved)) return;
#pragma unroll
    for (int band = 0; band < kBands; band++)
#pragma unroll
      for (int n = 0; n < kOutGroups; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) out[band][n][e] *= shrink[band][e / 2];
  }
};

// One block owns kQueries queries of one head and reads all keys and values of their sequence;
// grid: (tiles, heads), in one axis where sequences are ranked. m_i = max_j s_ij,
// out_i = sum_j exp(s_ij - m_i) v_j / sum_j exp(s_ij - m_i),  s = scale R(q) R(k)^T; keys come
// rotated.
template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, 2) masked_attention_fwd_kernel(const Args a) {
  constexpr int kDim = Tile::kDim, kBands = Tile::kBands, kKeys = Tile::kKeys,
                kLd = kStride<T, kDim>;
  JK_DYNAMIC_SHARED(T, queries);
  T* keys = queries + Tile::kQueries * kLd;  // two stages
  T* values = keys + 2 * kKeys * kLd;        // two stages
  Sequence s;
  if (!find_queries<Tile::kQueries>(a, s)) return;
  const int64_t head = s.head;
  if (s.other == 0) return write_no_keys<T, Tile::kQueries>(a, s, head);

  const int head_dim = static_cast<int>(a.p.head_dim), steps = (s.other + kKeys - 1) / kKeys;
  RowStream<T, kDim, kKeys> key(row_pointer<const T>(a.p.k, a.p.cu_k, s.seq, s.partner, head),
                                a.p.k.stride_token);
  RowStream<T, kDim, kKeys> value(row_pointer<const T>(a.p.v, a.p.cu_k, s.seq, s.partner, head),
                                  a.p.v.stride_token);
  auto stage = [&](int step) {
    const int valid = s.other - step * kKeys, slot = step % 2 * kKeys * kLd;
    key.stage(keys + slot, a.p.k.stride_token, valid, head_dim);
    value.stage(values + slot, a.p.v.stride_token, valid, head_dim);
    cp_async_commit();
  };
  stage(0);
  load_queries<T, kDim, Tile::kQueries>(a, s, head, queries);
  const float scale = positive_scale(a);

  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16 * kBands;
  const bool idle = s.first + warp_row >= s.length;  // of a warp that only copies
  Left<T, kDim, kBands, Tile::kKeep> left;
  float out[kBands][kDim / 8][4];
  clear(out);
  Softmax<kBands> softmax;
  softmax.clear();
  for (int step = 0; step < steps; step++) {
    cp_async_wait<0>();
    __syncthreads();
    if (step == 0) left.set(queries + warp_row * kLd);
    // The barrier also says that everyone is done with the slot that is filled next.
    if (step + 1 < steps) stage(step + 1);
    if (idle) continue;
    const int slot = step % 2 * kKeys * kLd;
    float logits[kBands][kKeys / 8][4];
    clear(logits);
    multiply_rows<T, kDim, kBands, kKeys>(logits, left, keys + slot, head_dim);
    if ((step + 1) * kKeys > s.other) fill_tail(logits, s.other - step * kKeys, -INFINITY);
    softmax.step(logits, out, scale);
    multiply_weights<T, kDim, kBands, kKeys>(out, logits, values + slot, head_dim);
  }

  float factor[kBands][2];
  float* lse = lse_pointer(a, s.seq, head) + s.begin + s.first;
#pragma unroll
  for (int band = 0; band < kBands; band++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float total = warp_sum<4>(softmax.total[band][half]);
      factor[band][half] = 1.f / total;
      const int row = warp_row + band * 16 + half * 8 + lane_id() / 4;
      if (lane_id() % 4 == 0 && s.first + row < s.length)
        lse[row] = (softmax.top[band][half] * scale + log2f(total)) * kLn2;
    }
  write_rows<T, kDim, false>(a, s, a.p.ids_q, out, factor, queries,
                             row_pointer<T>(a.p.out, a.p.cu_q, s.seq, s.begin + s.first, head),
                             a.p.out.stride_token, a.vector_out);
}

}  // namespace jk::attention
