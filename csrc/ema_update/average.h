// The arithmetic of the moving average that CPU and CUDA kernels share, so that they agree bit for
// bit:
//     target <- momentum * target + (1 - momentum) * source
// written as torch.lerp writes it, exact at momentum 0 and 1 and where source == target. Every
// product and sum is rounded by itself (no fused multiply-add), on every instruction set.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define JK_SHARED_INLINE __host__ __device__ __forceinline__
#else
#define JK_SHARED_INLINE inline
#endif

namespace jk::ema {
namespace {

struct EmaWeights {
  float keep, take;  // momentum, 1 - momentum
};

JK_SHARED_INLINE EmaWeights ema_weights(double momentum) {
  return {(float)momentum, (float)(1.0 - momentum)};
}

// Random bits are a pure function of (seed, list index, element), so a result does not depend on
// threads or launches.
JK_SHARED_INLINE uint32_t mix32(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

struct RandomKey {
  uint32_t low, high;
};

JK_SHARED_INLINE RandomKey random_key(uint64_t seed, uint64_t index) {
  uint64_t z = seed + 0x9e3779b97f4a7c15ull * (index + 1);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  return {(uint32_t)z, (uint32_t)(z >> 32)};
}

// Folds the upper half of the element number into the key; element_bits then needs only the lower
// half.
JK_SHARED_INLINE uint32_t element_salt(RandomKey key, uint64_t element) {
  return key.high + (uint32_t)(element >> 32) * 0x9e3779b9u;
}

// 16 random bits for one element.
JK_SHARED_INLINE uint32_t element_bits(RandomKey key, uint32_t salt, uint32_t element_low) {
  return mix32(mix32(element_low ^ key.low) + salt) >> 16;
}

}  // namespace
}  // namespace jk::ema
