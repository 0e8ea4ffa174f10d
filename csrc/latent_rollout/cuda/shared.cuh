// How a block divides its shared memory: tiles of its rows, the matrices that stay there for a
// whole launch, and a ring through which the others stream. The host decides by bytes; the kernel
// walks the same memory in the same order.
#pragma once
#include "../../cuda/device.cuh"
#include "../params.h"

namespace jk::rollout {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 16;  // rows of a block: one mma tile
constexpr int kBlock =
    16;  // columns of a matrix that a warp multiplies by at a time: two mma tiles, one ldmatrix
constexpr int kSlotBytes =
    512;  // of a slot of the ring: kBlock columns by 32 bytes of terms, 16 bytes of each lane
constexpr int kManySlots =
    8;  // of a warp: 3.5 KiB in flight, 28 KiB of a block, hide the latency of the L2 cache
constexpr int kFewSlots = 3;  // where no more fit: one is read while two are filled

// Numbers of one asynchronous copy, and of 32 bytes: the terms of one step of a product.
template <class T>
constexpr int kChunk = 16 / int(sizeof(T));
template <class T>
constexpr int kTerms = 2 * kChunk<T>;

__host__ __device__ constexpr int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

// Numbers from row to row of an operand in shared memory. Whole mma tiles, in an odd number of
// 16-byte chunks: eight rows below one another, which one ldmatrix reads, then lie in different
// banks.
template <class T>
__host__ __device__ constexpr int64_t operand_stride(int64_t width) {
  return (round_up(width, kBlock) / kChunk<T> | 1) * kChunk<T>;
}
// The same for float tiles, which threads read and write in the places that products give them:
// rows are 8 banks apart.
__host__ __device__ constexpr int64_t float_stride(int64_t width) {
  return round_up(width, 32) + 8;
}

template <class T>
__host__ __device__ constexpr size_t operand_bytes(int64_t width) {
  return size_t(kTile * operand_stride<T>(width)) * sizeof(T);
}
__host__ __device__ constexpr size_t float_bytes(int64_t width) {
  return size_t(kTile * float_stride(width)) * sizeof(float);
}
__host__ __device__ constexpr size_t number_bytes(int64_t count) {
  return size_t(round_up(count, 4)) * sizeof(float);
}
__host__ __device__ constexpr size_t ring_bytes(int slots) {
  return size_t(slots) * kWarps * kSlotBytes;
}

// A matrix in memory: `gates` pieces of `lines` lines of `length` numbers. Kept, its last piece is
// padded to whole mma tiles.
struct Extent {
  int64_t lines, length;
  int gates = 1;
  int64_t reads = 0;  // by one block in one launch
  __host__ __device__ int64_t all_lines() const {
    return (gates - 1) * lines + round_up(lines, kBlock);
  }
};
template <class T>
__host__ __device__ size_t kept_bytes(const Extent& matrix) {
  return size_t(matrix.all_lines() * operand_stride<T>(matrix.length)) * sizeof(T);
}

// What the shared memory of a launch holds beside its tiles.
struct Placement {
  bool kept[2];  // whether a matrix is copied once and stays
  int slots;     // of the ring, 0 where nothing streams
  size_t bytes;  // of everything
};

// A matrix stays if a block reads it more than once and it fits beside what is there and, while the
// other one streams, a short ring; the ring is long where that fits too. Bytes above `limit` mean
// that not even the tiles and a short ring fit.
template <class T>
Placement place(size_t tiles, const Extent (&matrices)[2], size_t limit) {
  Placement to{{false, false}, 0, tiles};
  for (int i = 0; i < 2; i++) {
    const bool other_streams = matrices[1 - i].reads > 0 && !to.kept[1 - i];
    const size_t bytes = to.bytes + kept_bytes<T>(matrices[i]);
    to.kept[i] =
        matrices[i].reads > 1 && bytes + (other_streams ? ring_bytes(kFewSlots) : 0) <= limit;
    if (to.kept[i]) to.bytes = bytes;
  }
  const bool streams =
      (matrices[0].reads > 0 && !to.kept[0]) || (matrices[1].reads > 0 && !to.kept[1]);
  if (streams) to.slots = to.bytes + ring_bytes(kManySlots) <= limit ? kManySlots : kFewSlots;
  to.bytes += ring_bytes(to.slots);
  return to;
}

// kTile rows in shared memory.
template <class T>
struct Tile {
  T* data;
  int stride;
  JK_DEVICE T& operator()(int row, int column) const { return data[row * stride + column]; }
};

// Hands out the shared memory of a block from its start.
struct Arena {
  unsigned char* next;
  template <class E>
  JK_DEVICE E* take(size_t bytes) {
    E* taken = reinterpret_cast<E*>(next);
    next += bytes;
    return taken;
  }
  template <class T>
  JK_DEVICE Tile<T> operand(int width) {
    return {take<T>(operand_bytes<T>(width)), int(operand_stride<T>(width))};
  }
  JK_DEVICE Tile<float> floats(int width) {
    return {take<float>(float_bytes(width)), int(float_stride(width))};
  }
  JK_DEVICE float* numbers(int count) { return take<float>(number_bytes(count)); }
};

template <class T>
JK_DEVICE T zero_of() {
  return from_float<T>(0.f);
}

// fn(row, column) for every element of a rows x columns tile; a row belongs to one warp.
template <class F>
JK_DEVICE void each(int rows, int columns, const F& fn) {
  for (int r = threadIdx.x >> 5; r < rows; r += kWarps)
    for (int c = lane_id(); c < columns; c += 32) fn(r, c);
}

// Zeros wherever an operand has no number of its own: products run over whole mma tiles.
template <class T>
JK_DEVICE void clear_padding(const Tile<T>& tile, int rows, int columns) {
  each(kTile, tile.stride, [&](int r, int c) {
    if (r >= rows || c >= columns) tile(r, c) = zero_of<T>();
  });
}

// Rows of a block: those from `first` on that exist.
struct Rows {
  int64_t first;
  int count;
  JK_DEVICE explicit Rows(int64_t all)
      : first(int64_t(blockIdx.x) * kTile), count(int(all - first < kTile ? all - first : kTile)) {}
};

template <class T>
JK_DEVICE void swap(Tile<T>& a, Tile<T>& b) {
  const Tile<T> was = a;
  a = b;
  b = was;
}

}  // namespace
}  // namespace jk::rollout
