// A block of the moving average on a CPU: at most kBlock consecutive elements of one target, in
// float32 buffers that stay in the L1 cache. Included once per instruction set, so everything here
// has internal linkage; the loops are written for the vectoriser. FMA contraction is off because
// the average is specified without it (average.h).
#pragma once
#include <string.h>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "../average.h"
#include "../params.h"

#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")

namespace jk::ema {
namespace {

constexpr int64_t kBlock = 1024;

inline uint32_t bits_of(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

inline float widen_bfloat16(uint16_t h) { return float_of((uint32_t)h << 16); }

// 0x7fff is every fraction bit below bfloat16 but the last; adding the lowest kept bit makes it
// round to even.
inline uint16_t narrow_bfloat16(float f) {
  const uint32_t u = bits_of(f);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Rounds away from zero with the probability of the discarded fraction. An infinity has no fraction
// and stays.
inline uint16_t narrow_bfloat16_random(float f, uint32_t random16) {
  const uint32_t u = bits_of(f);
  return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (u + random16) >> 16);
}

inline float widen_float16(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  // A subnormal half is an integer multiple of 2^-24.
  const float subnormal = (float)(int32_t)magnitude * 0x1p-24f;
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);
  return float_of((magnitude < 0x400u ? bits_of(subnormal) : normal) | sign);
}

inline uint16_t narrow_float16(float f) {
  const uint32_t u = bits_of(f), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the last place is 2^-24: adding 0.5, whose last place in float32 is 2^-24, rounds
  // there.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return (uint16_t)(sign | (magnitude >= 0x477ff000u ? special : finite));
}

// Elements [first, first + n) as float32: the array itself, or a widened copy in `buffer`.
inline const float* widen(const void* data, int32_t dtype, int64_t first, int64_t n,
                          float* buffer) {
  if (dtype == JK_FLOAT32) return (const float*)data + first;
  const uint16_t* half = (const uint16_t*)data + first;
  if (dtype == JK_BFLOAT16) {
    for (int64_t i = 0; i < n; i++) buffer[i] = widen_bfloat16(half[i]);
    return buffer;
  }
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(half + i))));
#endif
  for (; i < n; i++) buffer[i] = widen_float16(half[i]);
  return buffer;
}

// Writes `values` to elements [first, first + n), rounded to nearest.
inline void narrow(void* data, int32_t dtype, int64_t first, int64_t n, const float* values) {
  if (dtype == JK_FLOAT32) {
    memcpy((float*)data + first, values, sizeof(float) * (size_t)n);
    return;
  }
  uint16_t* half = (uint16_t*)data + first;
  if (dtype == JK_BFLOAT16) {
    for (int64_t i = 0; i < n; i++) half[i] = narrow_bfloat16(values[i]);
    return;
  }
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128((__m128i*)(half + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; i++) half[i] = narrow_float16(values[i]);
}

inline void average(float* __restrict target, const float* __restrict source, int64_t n,
                    EmaWeights w) {
  if (w.take < 0.5f) {
    for (int64_t i = 0; i < n; i++) target[i] = target[i] + w.take * (source[i] - target[i]);
  } else {
    for (int64_t i = 0; i < n; i++) target[i] = source[i] - w.keep * (source[i] - target[i]);
  }
}

// A 16-bit target and what its rounding lost, as one value; `average` moves it and the pair is
// split again.
inline void average_kahan(const jk_ema_tensor& t, int64_t first, int64_t n, const float* source,
                          EmaWeights w, float* value, float* lost) {
  widen(t.target, t.target_dtype, first, n, value);
  const float* carried = widen(t.compensation, t.target_dtype, first, n, lost);
  for (int64_t i = 0; i < n; i++) value[i] += carried[i];
  average(value, source, n, w);
  narrow(t.target, t.target_dtype, first, n, value);
  const float* kept = widen(t.target, t.target_dtype, first, n, lost);
  for (int64_t i = 0; i < n; i++) value[i] -= kept[i];
  narrow(t.compensation, t.target_dtype, first, n, value);
}

inline void narrow_stochastic(uint16_t* target, const float* value, int64_t first, int64_t n,
                              RandomKey key) {
  for (int64_t done = 0; done < n;) {
    // The salt is constant up to the next multiple of 2^32 elements.
    const uint64_t element = (uint64_t)(first + done);
    const uint64_t until_wrap = (uint64_t(1) << 32) - (element & 0xffffffffu);
    const int64_t run = (uint64_t)(n - done) < until_wrap ? n - done : (int64_t)until_wrap;
    const uint32_t salt = element_salt(key, element), low = (uint32_t)element;
    uint16_t* to = target + done;
    const float* from = value + done;
    for (int64_t i = 0; i < run; i++)
      to[i] = narrow_bfloat16_random(from[i], element_bits(key, salt, low + (uint32_t)i));
    done += run;
  }
}

// target <- average(target, source) for elements [first, first + n) of `t`, n <= kBlock, and the
// copy of the result.
inline void average_block(const jk_ema_tensor& t, int64_t first, int64_t n, const float* source,
                          EmaWeights w, int64_t rounding, RandomKey key) {
  alignas(64) float value[kBlock], scratch[kBlock];
  const float* result = value;
  if (t.target_dtype == JK_FLOAT32) {
    float* target = (float*)t.target + first;
    average(target, source, n, w);
    result = target;
  } else if (rounding == JK_ROUND_KAHAN) {
    average_kahan(t, first, n, source, w, value, scratch);
  } else {
    widen(t.target, t.target_dtype, first, n, value);
    average(value, source, n, w);
    if (rounding == JK_ROUND_STOCHASTIC) {
      narrow_stochastic((uint16_t*)t.target + first, value, first, n, key);
    } else {
      narrow(t.target, t.target_dtype, first, n, value);
    }
  }
  if (t.copy == nullptr) return;
  if (t.target_dtype != JK_FLOAT32) result = widen(t.target, t.target_dtype, first, n, scratch);
  narrow(t.copy, t.copy_dtype, first, n, result);
}

}  // namespace
}  // namespace jk::ema

#pragma GCC pop_options
