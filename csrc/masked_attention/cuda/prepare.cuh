// What runs before the attention kernels: aligned and rotated copies of rows, and row statistics
// for the backward pass.
#pragma once
#include "rows.cuh"

namespace jk::attention {

// Tensors that are streamed through shared memory must be rotated and 16-byte aligned.
// One tensor to copy: rows of all sequences to [heads, rows, head_dim], rotated where ids are
// given.
struct Copy {
  jk_rows from;
  jk_ints ids, cu;
  void* to;
  int64_t rows, length;  // rows in all; dense: rows of one sequence
  bool vector;
};
// What one launch makes: the copies, and in the backward pass the stats, from the caller's own
// grad_out since its copy is made at the same time.
struct Preparation {
  Copy copy[4];
  int copies;
  bool stats;
  jk_rows grad_out;
  bool vector_grad_out;
};

constexpr int kHeadsAtOnce = 4;

// One thread owns eight channels of one row for up to kHeadsAtOnce heads: to = R(from, ids),
// rounded once.
template <class T>
JK_DEVICE void copy_rows(const Args& a, const Copy& c) {
  const int head_dim = static_cast<int>(a.p.head_dim), per_row = head_dim / 8;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = i / per_row;
  if (row >= c.rows) return;
  const int channel = static_cast<int>(i % per_row) * 8;
  const int64_t seq = c.cu.data ? 0 : row / c.length, token = c.cu.data ? row : row % c.length;
  const Angles angles = angles_of(a.p, c.ids, seq, token);
  for (int64_t head = int64_t(blockIdx.y) * kHeadsAtOnce;
       head < a.p.heads && head < (int64_t(blockIdx.y) + 1) * kHeadsAtOnce; head++) {
    float x[8];
    load8(x, row_pointer<const T>(c.from, c.cu, seq, token, head) + channel, c.vector);
    rotate8(angles, channel, x);
    store8(static_cast<T*>(c.to) + (head * c.rows + row) * head_dim + channel, x, true);
  }
}

constexpr int kLanesPerRow = 16, kRowsOfStats = kThreads / kLanesPerRow;

// Sixteen lanes own one query row of up to kHeadsAtOnce heads: delta = sum over channels of
// grad_out * out, stored beside lse / ln 2.
template <class T>
JK_DEVICE void write_stats(const Args& a, const Preparation& made) {
  const int64_t row = int64_t(blockIdx.x) * kRowsOfStats + threadIdx.x / kLanesPerRow;
  const int channel = threadIdx.x % kLanesPerRow * 8;
  const bool packed = a.p.cu_q.data != nullptr;
  const int64_t seq = packed ? 0 : row / a.p.len_q, token = packed ? row : row % a.p.len_q;
  for (int64_t head = int64_t(blockIdx.y) * kHeadsAtOnce;
       head < a.p.heads && head < (int64_t(blockIdx.y) + 1) * kHeadsAtOnce; head++) {
    float delta = 0.f;
    if (row < a.rows_q && channel < a.p.head_dim) {
      float x[8], y[8];
      load8(x, row_pointer<const T>(a.p.out, a.p.cu_q, seq, token, head) + channel, a.vector_out);
      load8(y, row_pointer<const T>(made.grad_out, a.p.cu_q, seq, token, head) + channel,
            made.vector_grad_out);
#pragma unroll
      for (int i = 0; i < 8; i++) delta += x[i] * y[i];
    }
    delta = warp_sum<kLanesPerRow>(delta);
    if (row < a.rows_q && channel == 0)
      a.stats[head * a.rows_q + row] =
          make_float2(lse_pointer(a, seq, head)[token] * kLog2e, delta);
  }
}

// grid: (pieces of all rows, groups of heads, copies and stats).
template <class T>
__global__ void __launch_bounds__(kThreads)
    masked_attention_prepare_kernel(const Args a, const Preparation made) {
  if (static_cast<int>(blockIdx.z) < made.copies)
    copy_rows<T>(a, made.copy[blockIdx.z]);
  else
    write_stats<T>(a, made);
}

}  // namespace jk::attention
