// Tiles of rows in scratch, and their way from and to tensors.
#pragma once
#include "functions.h"
#include "kernels.h"
#include "multiply.h"

namespace jk::rollout {
namespace {

// Tiles in scratch have rows of `wide` floats (whole blocks, zeros beyond the edge); tensors have
// rows of `width`.
inline void load_tile(float* tile, int64_t wide, const float* from, int64_t width, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    memcpy(tile + r * wide, from + r * width, sizeof(float) * width);
    memset(tile + r * wide + width, 0, sizeof(float) * (wide - width));
  }
}
inline void store_tile(float* to, int64_t width, const float* tile, int64_t wide, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) memcpy(to + r * width, tile + r * wide, sizeof(float) * width);
}
template <class V>
void store_numbers(void* to, int64_t first, int64_t width, const float* tile, int64_t wide,
                   int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    V::put_numbers((typename V::Number*)to + (first + r) * width, tile + r * wide, width);
}
template <class V>
JK_INLINE void add_tile(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += V::kLanes)
    V::store(to + i, V::add(V::load(to + i), V::load(from + i)));
}
template <class V>
JK_INLINE void add_to(float* p, typename V::Vec v) {
  V::store(p, V::add(V::load(p), v));
}
// A vector of `width` numbers, zeros to `wide`.
inline void load_vector(float* to, int64_t wide, const float* from, int64_t width) {
  memcpy(to, from, sizeof(float) * width);
  memset(to + width, 0, sizeof(float) * (wide - width));
}

}  // namespace
}  // namespace jk::rollout
