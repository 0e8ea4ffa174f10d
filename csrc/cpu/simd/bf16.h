// The storage type of bfloat16 tensors: the upper half of a float.
#pragma once
#include <stdint.h>

namespace jk {
struct bf16 {
  uint16_t bits;
};
}  // namespace jk

#define JK_INLINE inline __attribute__((always_inline))
#define JK_UNROLL _Pragma("GCC unroll 32")
// Hides where a pointer points, so that what is behind it is read at each use and takes no register
// across a loop.
#define JK_KEEP_IN_MEMORY(pointer) asm volatile("" : "+r"(pointer))
