// Where the rows of a tile live: sequences, strided and possibly unaligned rows, the rotation of
// one row.
#pragma once
#include "../../cuda/device.cuh"
#include "../params.h"

namespace jk::attention {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Packed sequences of one side in the order of their work, longest first, for blocks that own rows
// of that side: sequence[i] is the number of the i-th in `boundary`, start[i] how many rows come
// before.
struct Ranks {
  int32_t* sequence;  // NULL: in the order of the rows
  int64_t* start;
};

// What every kernel gets by value. In `p` the rows that are streamed through shared memory have
// been replaced by 16-byte aligned copies in the scratch space where the caller's tensors are
// unaligned or must be rotated first.
struct Args {
  jk_masked_attention_params p;
  float2* stats;  // [heads, rows_q]: lse / ln 2, and delta = sum over channels of grad_out * out
                  // (backward only)
  int64_t rows_q, rows_k;    // rows of all sequences together
  int64_t tiles_q, tiles_k;  // dense: tiles of one sequence on each side, in this launch
  Ranks ranks_q, ranks_k;
  // Whether rows can be accessed 16 bytes at a time.
  bool vector_q, vector_out, vector_grad_q, vector_grad_k, vector_grad_v;
};

// 16 bytes of a row.
template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

// Elements from one row of a shared tile to the next. One chunk of padding makes it an odd number
// of 16-byte chunks, so that eight consecutive rows read at the same channel touch all banks once.
template <class T, int kDim>
constexpr int kStride = kDim + kChunk<T>;

JK_DEVICE int64_t load_int(const jk_ints& list, int64_t i) {
  return list.bytes == 4 ? static_cast<const int32_t*>(list.data)[i]
                         : static_cast<const int64_t*>(list.data)[i];
}

JK_DEVICE int64_t clamp_to(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : (x > high ? high : x);
}

// The sequence that a tile belongs to. Rows outside every sequence form sequences of their own,
// without partners.
struct Sequence {
  int64_t seq;  // of a dense batch; 0 if packed
  int64_t head;
  int64_t begin, partner;  // first row of the side that the tile is on, and of the other side
  int length, other;       // rows of the sequence on this side and on the other
  int first;               // first row of the tile within the sequence
};

// Boundary i of a packed tensor cut at 0, every offset and `total`; offsets are clamped so that bad
// ones stay inside.
JK_DEVICE int64_t boundary(const jk_ints& cu, int64_t num_seqs, int64_t total, int64_t i) {
  if (i == 0) return 0;
  return i == num_seqs + 2 ? total : clamp_to(load_int(cu, i - 1), 0, total);
}

// Finds the rows of the block's tile; false where it has none. `cu` is the offset list of the
// tile's side, `cu_other` of the other. Packed: the i-th sequence starts at tile start(i) / kRows +
// i, which grows with i and leaves every sequence tiles enough, so that no tile list has to be
// built; the warp searches 32 candidates at a time. Ranked sequences run for all heads before the
// next: only then do the long ones come first.
template <int kRows>
JK_DEVICE bool find_sequence(const Args& a, const jk_ints& cu, const jk_ints& cu_other,
                             const Ranks& ranks, int64_t tiles, int64_t total, int64_t total_other,
                             Sequence& s) {
  const bool ranked = ranks.sequence != nullptr;
  const unsigned heads = static_cast<unsigned>(a.p.heads);
  const int64_t tile = ranked ? blockIdx.x / heads : blockIdx.x;
  s.head = ranked ? blockIdx.x % heads : blockIdx.y;
  if (cu.data == nullptr) {
    if (tile >= tiles * a.p.num_seqs) return false;
    s.seq = tile / tiles;
    s.begin = s.partner = 0;
    s.length = static_cast<int>(total);
    s.other = static_cast<int>(total_other);
    s.first = static_cast<int>(tile % tiles) * kRows;
    return true;
  }
  const int64_t n = a.p.num_seqs;
  auto start = [&](int64_t i) { return ranked ? ranks.start[i] : boundary(cu, n, total, i); };
  int64_t low = 0, count = n + 2;
  while (count > 1) {
    const int64_t step = (count + 31) / 32, probe = lane_id() * step;
    const bool reached = probe < count && start(low + probe) / kRows + low + probe <= tile;
    const int64_t found = 31 - __clz(static_cast<int>(__ballot_sync(0xffffffffu, reached) | 1u));
    low += found * step;
    count = count - found * step < step ? count - found * step : step;
  }
  const int64_t i = ranked ? ranks.sequence[low] : low;
  s.seq = 0;
  s.begin = boundary(cu, n, total, i);
  s.length = static_cast<int>(boundary(cu, n, total, i + 1) - s.begin);
  s.first = static_cast<int>(tile - (start(low) / kRows + low)) * kRows;
  const bool outside = i == 0 || i == n + 1;
  s.partner = outside ? 0 : boundary(cu_other, n, total_other, i);
  const int64_t other = outside ? 0 : boundary(cu_other, n, total_other, i + 1) - s.partner;
  s.other = other > 0 ? static_cast<int>(other) : 0;
  return s.first < s.length;
}

template <int kRows>
JK_DEVICE bool find_queries(const Args& a, Sequence& s) {
  return find_sequence<kRows>(a, a.p.cu_q, a.p.cu_k, a.ranks_q, a.tiles_q, a.p.len_q, a.p.len_k, s);
}

template <int kRows>
JK_DEVICE bool find_keys(const Args& a, Sequence& s) {
  return find_sequence<kRows>(a, a.p.cu_k, a.p.cu_q, a.ranks_k, a.tiles_k, a.p.len_k, a.p.len_q, s);
}

template <class T>
JK_DEVICE T* row_pointer(const jk_rows& rows, const jk_ints& cu, int64_t seq, int64_t row,
                         int64_t head) {
  return static_cast<T*>(rows.data) + (cu.data ? 0 : seq * rows.stride_seq) +
         row * rows.stride_token + head * rows.stride_head;
}

JK_DEVICE float* lse_pointer(const Args& a, int64_t seq, int64_t head) {
  return a.p.lse + (a.p.cu_q.data ? 0 : seq * a.p.lse_stride_seq) + head * a.p.lse_stride_head;
}

JK_DEVICE float2* stats_pointer(const Args& a, int64_t seq, int64_t head) {
  return a.stats + head * a.rows_q + seq * a.p.len_q;
}

// Eight channels as floats, by vector access where `vector` allows it.
template <class T>
JK_DEVICE void load8(float (&x)[8], const T* source, bool vector) {
  if (!vector) {
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = to_float(source[i]);
    return;
  }
  if constexpr (sizeof(T) == 4) {
    const float4 low = *reinterpret_cast<const float4*>(source),
                 high = *reinterpret_cast<const float4*>(source + 4);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  } else {
    const uint4 bits = *reinterpret_cast<const uint4*>(source);
    const uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 pair = unpack2<T>(word[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
}

template <class T>
JK_DEVICE void store8(T* target, const float (&x)[8], bool vector) {
  if (!vector) {
#pragma unroll
    for (int i = 0; i < 8; i++) target[i] = from_float<T>(x[i]);
    return;
  }
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(target) = make_float4(x[0], x[1], x[2], x[3]);
    *reinterpret_cast<float4*>(target + 4) = make_float4(x[4], x[5], x[6], x[7]);
  } else {
    *reinterpret_cast<uint4*>(target) = make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]),
                                                   pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
  }
}

// The angles of one token: rows of the table for t, y, x; or no rotation.
struct Angles {
  const float* table;  // NULL: not rotated
  int64_t sines;       // elements from a cosine to its sine
  int width;           // channels per axis
  int row[3];
};

JK_DEVICE Angles angles_of(const jk_masked_attention_params& p, const jk_ints& ids, int64_t seq,
                           int64_t row) {
  Angles a;
  a.table = nullptr;
  a.width = static_cast<int>(p.rope_dim);
  a.sines = (p.grid_t + p.grid_h + p.grid_w) * p.rope_dim;
  a.row[0] = a.row[1] = a.row[2] = 0;
  if (ids.data == nullptr || a.width == 0) return a;
  const int64_t id = load_int(ids, seq * ids.stride_seq + row * ids.stride_token);
  if (id < 0) return a;
  const int height = static_cast<int>(p.grid_h), width = static_cast<int>(p.grid_w),
            depth = static_cast<int>(p.grid_t);
  const int n = static_cast<int>(clamp_to(id, 0, int64_t(depth) * height * width - 1));
  a.table = p.rope_table;
  a.row[0] = n / (height * width);
  a.row[1] = depth + n / width % height;
  a.row[2] = depth + height + n % width;
  return a;
}

// Replaces the channel pair (c, c + 1), c even, by its rotation:  x[c] cos[c] - x[c+1] sin[c],
// x[c+1] cos[c+1] + x[c] sin[c+1]; or by the transpose of that map, which is the gradient (the
// tiled layout is no rotation: transpose and inverse differ).
template <bool kTransposed>
JK_DEVICE void rotate_pair(const Angles& a, int c, float& x0, float& x1) {
  const int axis = (c >= a.width) + (c >= 2 * a.width);
  if (a.table == nullptr || c >= 3 * a.width) return;
  const int row = axis == 0 ? a.row[0] : (axis == 1 ? a.row[1] : a.row[2]);
  const float* at = a.table + int64_t(row) * a.width + (c - axis * a.width);
  const float2 cosine = *reinterpret_cast<const float2*>(at),
               sine = *reinterpret_cast<const float2*>(at + a.sines);
  const float y0 = kTransposed ? x0 * cosine.x + x1 * sine.y : x0 * cosine.x - x1 * sine.x;
  const float y1 = kTransposed ? x1 * cosine.y - x0 * sine.x : x1 * cosine.y + x0 * sine.y;
  x0 = y0;
  x1 = y1;
}

JK_DEVICE void rotate8(const Angles& a, int c, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += 2) rotate_pair<false>(a, c + i, x[i], x[i + 1]);
}

// Rows of one head that a block copies to shared memory, kRows of them at a time. Every thread
// keeps to one chunk of the channels and to a pointer that moves on, so that a step costs additions
// only. Distances are given at every step: a kernel's argument is then added from where it is,
// without a register.
template <class T, int kDim, int kRows>
struct RowStream {
  static constexpr int kPerRow = kDim / kChunk<T>, kRowsAtOnce = kThreads / kPerRow,
                       kPasses = (kRows + kRowsAtOnce - 1) / kRowsAtOnce;
  const T* from;

  JK_DEVICE RowStream(const T* source, int64_t stride)
      : from(source + static_cast<int>(threadIdx.x) / kPerRow * stride +
             static_cast<int>(threadIdx.x) % kPerRow * kChunk<T>) {}

  // Starts the copy of the next kRows rows; rows from `valid` on and channels from head_dim on
  // become zero.
  JK_DEVICE void stage(T* tile, int64_t stride, int valid, int head_dim) {
    stride = here(stride);
    const int thread = here(static_cast<int>(threadIdx.x)), first = thread / kPerRow,
              channel = thread % kPerRow * kChunk<T>;
    const int last = channel < head_dim ? valid : 0;
    T* to = tile + first * kStride<T, kDim> + channel;
    const bool idle = kThreads % kPerRow != 0 && first >= kRowsAtOnce;
#pragma unroll
    for (int pass = 0; pass < kPasses; pass++) {
      const int row = first + pass * kRowsAtOnce;
      if (!idle && (kRows % kRowsAtOnce == 0 || row < kRows))
        cp_async_16(to + pass * kRowsAtOnce * kStride<T, kDim>, from, row < last);
      from += kRowsAtOnce * stride;
    }
    from -= (kPasses * kRowsAtOnce - kRows) * stride;
  }
};

// Starts copying kRows rows of one head into a shared tile, once.
template <class T, int kDim, int kRows>
JK_DEVICE void stage_rows(T* tile, const T* source, int64_t stride, int valid, int head_dim) {
  RowStream<T, kDim, kRows>(source, stride).stage(tile, stride, valid, head_dim);
}

// Starts copying the stats of kRows query rows; zeros from `valid` on.
template <int kRows>
JK_DEVICE void stage_stats(float2* tile, const float2* source, int valid) {
  static_assert(kRows <= kThreads, "one row per thread");
  const int row = here(static_cast<int>(threadIdx.x));
  if (row < kRows) cp_async_8(tile + row, source + row, row < valid);
}

// Writes zeros to `rows` rows of one head.
template <class T>
JK_DEVICE void zero_rows(T* target, int64_t stride, int rows, int head_dim, bool vector) {
  const float zero[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
  const int per_row = head_dim / 8;
  for (int i = threadIdx.x; i < rows * per_row; i += kThreads)
    store8(target + i / per_row * stride + i % per_row * 8, zero, vector);
}

// Logits are scaled in the exponent, by a factor that must be positive for the largest logit to
// have the largest weight: its sign goes into the queries. A scale of 0 becomes the smallest normal
// number, so that masked logits stay -inf.
JK_DEVICE float positive_scale(const Args& a) { return fmaxf(fabsf(a.p.scale) * kLog2e, 1.2e-38f); }

// Rotates the tile's queries into shared memory, with the sign of the scale. Every thread has the
// ids and rows of kAtOnce chunks in flight before it turns any: nothing else hides their latency
// here.
template <class T, int kDim, int kRows>
JK_DEVICE void load_queries(const Args& a, const Sequence& s, int64_t head, T* tile) {
  constexpr int kPerRow = kDim / 8, kPasses = kRows * kPerRow / kThreads,
                kAtOnce = kPasses % 4 == 0 ? 4 : 2;
  static_assert(kRows * kPerRow % kThreads == 0 && kPasses % kAtOnce == 0, "whole passes");
  const int head_dim = static_cast<int>(a.p.head_dim);
  const float sign = a.p.scale < 0.f ? -1.f : 1.f;
#pragma unroll 1
  for (int begin = 0; begin < kPasses; begin += kAtOnce) {
    Angles angles[kAtOnce];
    float x[kAtOnce][8];
#pragma unroll
    for (int pass = 0; pass < kAtOnce; pass++) {
      const int i = (begin + pass) * kThreads + static_cast<int>(threadIdx.x), row = i / kPerRow,
                channel = i % kPerRow * 8;
      angles[pass].table = nullptr;
#pragma unroll
      for (int e = 0; e < 8; e++) x[pass][e] = 0.f;
      if (s.first + row >= s.length || channel >= head_dim) continue;
      const int64_t token = s.begin + s.first + row;
      angles[pass] = angles_of(a.p, a.p.ids_q, s.seq, token);
      load8(x[pass], row_pointer<const T>(a.p.q, a.p.cu_q, s.seq, token, head) + channel,
            a.vector_q);
    }
#pragma unroll
    for (int pass = 0; pass < kAtOnce; pass++) {
      const int i = (begin + pass) * kThreads + static_cast<int>(threadIdx.x), row = i / kPerRow,
                channel = i % kPerRow * 8;
      rotate8(angles[pass], channel, x[pass]);
#pragma unroll
      for (int e = 0; e < 8; e++) x[pass][e] *= sign;
      store8(tile + row * kStride<T, kDim> + channel, x[pass], true);
    }
  }
}

// A tile of queries that have no keys.
template <class T, int kRows>
JK_DEVICE void write_no_keys(const Args& a, const Sequence& s, int64_t head) {
  const int rows = s.length - s.first < kRows ? s.length - s.first : kRows;
  zero_rows(row_pointer<T>(a.p.out, a.p.cu_q, s.seq, s.begin + s.first, head), a.p.out.stride_token,
            rows, static_cast<int>(a.p.head_dim), a.vector_out);
  float* lse = lse_pointer(a, s.seq, head) + s.begin + s.first;
  for (int i = threadIdx.x; i < rows; i += kThreads) lse[i] = -INFINITY;
}

}  // namespace jk::attention
