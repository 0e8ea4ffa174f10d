// Lists of tensors as kernel arguments: a launch takes up to kCapacity of them by value, so nothing
// is uploaded, nothing waits and a CUDA graph can record it. Blocks own chunks; a block finds its
// tensor by bisection of the chunk numbers.
#pragma once
#include "../../cuda/device.cuh"

namespace jk::ema {
namespace {

constexpr int kThreads = 256;

// Argument space is 32764 bytes from compute capability 7.0 and CUDA 12.1; small lists take a small
// struct, which launches faster.
template <class Entry, class Scalars, int kCapacity>
struct Chunks {
  Scalars scalars;
  int count;
  uint32_t chunk_ends[kCapacity];  // chunks of entries 0 .. i
  Entry entries[kCapacity];
};

// The entry that owns chunk `chunk`, by bisection; uniform over the block.
template <class List>
JK_DEVICE int entry_of(const List& list, uint32_t chunk) {
  int low = 0, high = list.count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (list.chunk_ends[middle] > chunk) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Calls launch(list, chunks) for runs of at most kCapacity entries that have elements. `fill(entry,
// i)` writes entry i.
template <int kCapacity, class Entry, class Scalars, class Numel, class Fill, class Launch>
inline const char* for_each_launch(int64_t count, const Scalars& scalars, int64_t chunk,
                                   Numel numel, Fill fill, Launch launch) {
  Chunks<Entry, Scalars, kCapacity> list;
  static_assert(sizeof(list) <= 32764, "a kernel's arguments must fit 32764 bytes");
  list.scalars = scalars;
  list.count = 0;
  uint64_t chunks = 0;
  for (int64_t i = 0; i < count; i++) {
    if (numel(i) > 0) {
      chunks += uint64_t((numel(i) + chunk - 1) / chunk);
      if (chunks > 0x7fffffffu) return "a list must have at most 2^31 - 1 chunks of elements.";
      fill(list.entries[list.count], i);
      list.chunk_ends[list.count] = uint32_t(chunks);
      list.count++;
    }
    if (list.count == kCapacity || (i + 1 == count && list.count > 0)) {
      if (const char* error = launch(list, unsigned(chunks))) return error;
      list.count = 0;
      chunks = 0;
    }
  }
  return nullptr;
}

}  // namespace
}  // namespace jk::ema
