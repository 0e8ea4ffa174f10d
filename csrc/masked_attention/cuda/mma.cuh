// Products of shared tiles on the tensor cores, for one warp that owns 16 * kBands rows of the
// result.
//
// An accumulator is float[kBands][kColumns / 8][4]: of band b and column group n a lane holds, at
// rows lane / 4 (elements 0, 1) and lane / 4 + 8 (elements 2, 3), the columns 8 n + 2 (lane % 4)
// and the next one.
#pragma once
#include "times.cuh"

namespace jk::attention {

// Whether a head of 80 channels lacks the last 16 of its class of 96: they are zero, and products
// skip them.
template <int kDim>
JK_DEVICE bool is_empty(int step, int head_dim) {
  return kDim == 96 && step == 5 && head_dim <= 80;
}

// The left operand: 16 * kBands rows of a shared tile, kept in registers or read again for every
// product.
template <class T, int kDim, int kBands, bool kKeep>
struct Left {
  const T* tile;
  uint32_t kept[kKeep ? kBands : 1][kKeep ? kDim / 16 : 1][4];

  JK_DEVICE void get(uint32_t (&a)[4], int band, int step) const {
    const int lane = lane_id();
    ldmatrix_x4(a, tile + (band * 16 + lane % 16) * kStride<T, kDim> + step * 16 + lane / 16 * 8);
  }
  // Call once the rows are in shared memory.
  JK_DEVICE void set(const T* first_row) {
    tile = first_row;
    if constexpr (kKeep) {
#pragma unroll
      for (int band = 0; band < kBands; band++)
#pragma unroll
        for (int step = 0; step < kDim / 16; step++) get(kept[band][step], band, step);
    }
  }
};

// sum += left * right^T over kDim channels, `right` being kColumns rows of a shared tile.
template <class T, int kDim, int kBands, int kColumns, bool kKeep>
JK_DEVICE void multiply_rows(float (&sum)[kBands][kColumns / 8][4],
                             const Left<T, kDim, kBands, kKeep>& left, const T* right,
                             int head_dim) {
  const int lane = lane_id();
  const T* at = right + (lane % 8 + lane / 16 * 8) * kStride<T, kDim> + lane / 8 % 2 * 8;
#pragma unroll
  for (int step = 0; step < kDim / 16; step++) {
    if (is_empty<kDim>(step, head_dim)) break;
    uint32_t a[kBands][4];
#pragma unroll
    for (int band = 0; band < kBands; band++) {
      if constexpr (kKeep) {
#pragma unroll
        for (int i = 0; i < 4; i++) a[band][i] = left.kept[band][step][i];
      } else {
        left.get(a[band], band, step);
      }
    }
#pragma unroll
    for (int n = 0; n < kColumns / 16; n++) {
      uint32_t b[4];
      ldmatrix_x4(b, at + n * 16 * kStride<T, kDim> + step * 16);
#pragma unroll
      for (int band = 0; band < kBands; band++) {
        mma_16816<T>(sum[band][2 * n], a[band], b[0], b[1]);
        mma_16816<T>(sum[band][2 * n + 1], a[band], b[2], b[3]);
      }
    }
  }
}

// sum += weights * right, `weights` being an accumulator of kDepth columns that is rounded to T,
// `right` kDepth rows of a shared tile. An accumulator's registers are laid out as a left operand's
// already, so nothing moves between lanes.
template <class T, int kDim, int kBands, int kDepth>
JK_DEVICE void multiply_weights(float (&sum)[kBands][kDim / 8][4],
                                const float (&weights)[kBands][kDepth / 8][4], const T* right,
                                int head_dim) {
  const int lane = lane_id();
  const T* at = right + lane % 16 * kStride<T, kDim> + lane / 16 * 8;
#pragma unroll
  for (int step = 0; step < kDepth / 16; step++) {
    uint32_t a[kBands][4];
#pragma unroll
    for (int band = 0; band < kBands; band++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float* w = weights[band][2 * step + i / 2] + i % 2 * 2;
        a[band][i] = pack2<T>(w[0], w[1]);
      }
#pragma unroll
    for (int n = 0; n < kDim / 16; n++) {
      if (is_empty<kDim>(n, head_dim)) break;
      uint32_t b[4];
      ldmatrix_x4_trans(b, at + step * 16 * kStride<T, kDim> + n * 16);
#pragma unroll
      for (int band = 0; band < kBands; band++) {
        mma_16816<T>(sum[band][2 * n], a[band], b[0], b[1]);
        mma_16816<T>(sum[band][2 * n + 1], a[band], b[2], b[3]);
      }
    }
  }
}

template <int kBands, int kGroups>
JK_DEVICE void clear(float (&sum)[kBands][kGroups][4]) {
#pragma unroll
  for (int band = 0; band < kBands; band++)
#pragma unroll
    for (int n = 0; n < kGroups; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[band][n][e] = 0.f;
}

// Columns from `valid` on get `value`.
template <int kBands, int kGroups>
JK_DEVICE void fill_tail(float (&sum)[kBands][kGroups][4], int valid, float value) {
  const int column = lane_id() % 4 * 2;
#pragma unroll
  for (int band = 0; band < kBands; band++)
#pragma unroll
    for (int n = 0; n < kGroups; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (n * 8 + column + e % 2 >= valid) sum[band][n][e] = value;
}

// Pairs that do not see each other get `value`; the columns are rows of the other side from
// `first_column` on.
template <int kBands, int kGroups>
JK_DEVICE void fill_unseen(float (&sum)[kBands][kGroups][4], const Walk& walk, int first_column,
                           float value) {
  const int thread = here(static_cast<int>(threadIdx.x)),
            row = thread / 32 * 16 * kBands + thread % 32 / 4,
            column = first_column + thread % 4 * 2;
  Interval own[kBands][2];
#pragma unroll
  for (int band = 0; band < kBands; band++)
#pragma unroll
    for (int half = 0; half < 2; half++) own[band][half] = walk.own_at(row + band * 16 + half * 8);
#pragma unroll
  for (int n = 0; n < kGroups; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const Interval other = walk.other_at(column + n * 8 + e);
#pragma unroll
      for (int band = 0; band < kBands; band++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          if (!meet(own[band][half], other)) sum[band][n][2 * half + e] = value;
    }
}

// Writes a warp's rows: factor[band][half] * sum, with kTurnBack through the transpose of the
// rotation that `ids` name. Goes through the warp's own rows of a shared tile, so that global
// stores are 16 bytes wide and whole rows.
template <class T, int kDim, bool kTurnBack, int kBands>
JK_DEVICE void write_rows(const Args& a, const Sequence& s, const jk_ints& ids,
                          const float (&sum)[kBands][kDim / 8][4], const float (&factor)[kBands][2],
                          T* tile, T* target, int64_t stride, bool vector) {
  const int lane = lane_id(), warp_row = static_cast<int>(threadIdx.x) / 32 * 16 * kBands,
            head_dim = static_cast<int>(a.p.head_dim);
  // Other lanes may still be reading these rows as an operand.
  __syncwarp();
#pragma unroll
  for (int band = 0; band < kBands; band++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = warp_row + band * 16 + half * 8 + lane / 4;
      Angles angles;
      if (kTurnBack) angles.table = nullptr;
      if (kTurnBack && s.first + row < s.length)
        angles = angles_of(a.p, ids, s.seq, s.begin + s.first + row);
#pragma unroll
      for (int n = 0; n < kDim / 8; n++) {
        float x0 = sum[band][n][2 * half] * factor[band][half],
              x1 = sum[band][n][2 * half + 1] * factor[band][half];
        const int channel = n * 8 + lane % 4 * 2;
        if (kTurnBack) rotate_pair<true>(angles, channel, x0, x1);
        *reinterpret_cast<uint32_t*>(tile + row * kStride<T, kDim> + channel) = pack2<T>(x0, x1);
      }
    }
  __syncwarp();
  const int per_row = head_dim / 8;
  for (int i = lane; i < 16 * kBands * per_row; i += 32) {
    const int row = warp_row + i / per_row, channel = i % per_row * 8;
    if (s.first + row >= s.length) continue;
    const T* from = tile + row * kStride<T, kDim> + channel;
    T* to = target + row * stride + channel;
    if (vector) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll
      for (int e = 0; e < 8; e++) to[e] = from[e];
    }
  }
}

}  // namespace jk::attention
