// A list of tensors seen as one range of elements, so that a parallel region over it is balanced
// whatever their sizes. Included once per instruction set: no inline functions of the standard
// library here, the linker would keep one copy of them.
#pragma once
#include <stdint.h>

namespace jk::ema {
namespace {

// Pieces begin at multiples of this within a tensor: threads then share no cache line and vector
// loads stay aligned.
constexpr int64_t kPieceAlign = 32;
// Elements below which another thread costs more than it saves.
constexpr int64_t kGrain = 32768;

// A piece boundary that fell on `element` of a tensor, moved up to where a piece may begin.
inline int64_t piece_boundary(int64_t element, int64_t numel) {
  if (element <= 0) return 0;
  const int64_t up = (element + kPieceAlign - 1) / kPieceAlign * kPieceAlign;
  return up < numel ? up : numel;
}

// The first tensor that ends after `element`. ends[i] = elements of tensors 0 .. i.
inline int64_t tensor_of(const int64_t* ends, int64_t count, int64_t element) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (ends[middle] > element) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// visit(tensor, first, n): blocks of at most `block` elements that cover piece [begin, end) of the
// concatenated list.
template <class Visit>
inline void for_each_block(const int64_t* ends, int64_t count, int64_t begin, int64_t end,
                           int64_t block, Visit visit) {
  for (int64_t tensor = tensor_of(ends, count, begin); tensor < count; tensor++) {
    const int64_t start = tensor == 0 ? 0 : ends[tensor - 1], numel = ends[tensor] - start;
    if (start >= end) break;
    const int64_t last = piece_boundary(end - start, numel);
    for (int64_t i = piece_boundary(begin - start, numel); i < last; i += block)
      visit(tensor, i, i + block < last ? block : last - i);
  }
}

}  // namespace
}  // namespace jk::ema
