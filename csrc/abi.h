// The C ABI between the torch binding (registration.cpp) and every kernel library: plain pointers
// and sizes, no torch types, so that one native library serves every torch version and the CUDA
// library needs no torch headers at all. All strides count elements, all sizes are int64.
#pragma once
#include <stdint.h>

#define JK_ABI_VERSION 1
#define JK_EXPORT extern "C" __attribute__((visibility("default")))

enum jk_dtype { JK_FLOAT32 = 0, JK_BFLOAT16 = 1, JK_FLOAT16 = 2 };

// Instruction sets a CPU kernel can be asked to use; JK_ISA_AUTO takes the best the machine has.
enum jk_isa {
  JK_ISA_AUTO = -1,
  JK_ISA_PORTABLE = 0,
  JK_ISA_AVX2 = 1,
  JK_ISA_AVX512 = 2,
  JK_ISA_AVX512_BF16 = 3,
  JK_ISA_COUNT
};

// Runs body(begin, end, context) over disjoint pieces that cover [0, count), possibly on several
// threads. The binding passes torch's thread pool; a test may pass a plain loop.
typedef void (*jk_body)(int64_t begin, int64_t end, void* context);
typedef void (*jk_parallel_for)(int64_t count, int64_t grain, jk_body body, void* context);
