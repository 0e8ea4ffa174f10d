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
// What one launch makes: the copies; in the backward pass the stats, from the caller's own grad_out
// since its copy is made at the same time; and the ranks of packed sequences.
struct Preparation {
  Copy copy[4];
  int copies;
  bool stats, ranks;
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

// One thread finds the rank of one sequence: by the length of its partner, which its tiles walk
// through, then by its number. Two sequences more than there are stand for the rows outside.
JK_DEVICE void write_ranks(const Args& a, const jk_ints& cu, const jk_ints& cu_other, int64_t total,
                           int64_t total_other, const Ranks& ranks) {
  const int64_t n = a.p.num_seqs, own = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (own >= n + 2 || blockIdx.y > 0 || ranks.sequence == nullptr) return;
  auto partner = [&](int64_t i) {
    if (i == 0 || i == n + 1) return int64_t(0);
    return boundary(cu_other, n, total_other, i + 1) - boundary(cu_other, n, total_other, i);
  };
  const int64_t length = partner(own);
  int64_t rank = 0, start = 0;
  for (int64_t i = 0; i < n + 2; i++) {
    const int64_t other = partner(i);
    if (other < length || (other == length && i >= own)) continue;
    rank++;
    start += clamp_to(boundary(cu, n, total, i + 1) - boundary(cu, n, total, i), 0, total);
  }
  ranks.sequence[rank] = static_cast<int32_t>(own);
  ranks.start[rank] = start;
}

// grid: (pieces of all rows, groups of heads, copies and stats and ranks).
template <class T>
__global__ void __launch_bounds__(kThreads)
    masked_attention_prepare_kernel(const Args a, const Preparation made) {
  const int part = static_cast<int>(blockIdx.z);
  if (part < made.copies) return copy_rows<T>(a, made.copy[part]);
  if (part == made.copies && made.stats) return write_stats<T>(a, made);
  write_ranks(a, a.p.cu_q, a.p.cu_k, a.p.len_q, a.p.len_k, a.ranks_q);
  write_ranks(a, a.p.cu_k, a.p.cu_q, a.p.len_k, a.p.len_q, a.ranks_k);
}

}  // namespace jk::attention
