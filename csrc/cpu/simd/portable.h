// Four float lanes on the compiler's own vector types: runs on every machine, used where nothing
// better is there.
#pragma once
#include <string.h>

#include "bf16.h"

namespace jk::simd {

struct Portable {
  typedef float Vec __attribute__((vector_size(16), may_alias));
  typedef int32_t Int __attribute__((vector_size(16), may_alias));
  static constexpr int kLanes = 4;
  static constexpr bool kConstantsInMemory = false;
  static constexpr bool kMaskRegisters = false;

  static JK_INLINE Vec zero() { return Vec{}; }
  static JK_INLINE Vec set1(float x) { return Vec{x, x, x, x}; }
  static JK_INLINE Vec broadcast(const float* p) { return set1(*p); }
  static JK_INLINE Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static JK_INLINE void stream(float* p, Vec v) { store(p, v); }
  static JK_INLINE void fence() {}
  static JK_INLINE void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
  static JK_INLINE Vec load(const bf16* p) {
    return (Vec)(Int{(int32_t)((uint32_t)p[0].bits << 16), (int32_t)((uint32_t)p[1].bits << 16),
                     (int32_t)((uint32_t)p[2].bits << 16), (int32_t)((uint32_t)p[3].bits << 16)});
  }
  // Round to nearest even; a NaN keeps its upper bits and gets the quiet bit, so that the carry
  // cannot make it an infinity.
  static JK_INLINE void store(bf16* p, Vec v) {
    for (int i = 0; i < kLanes; ++i) {
      uint32_t bits;
      memcpy(&bits, (const char*)&v + 4 * i, 4);
      const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
      p[i].bits =
          (uint16_t)(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
  }
  template <class T>
  static JK_INLINE Vec load_head(const T* p, int64_t) {
    return load(p);
  }
  template <class T>
  static JK_INLINE void store_head(T* p, Vec v, int64_t) {
    store(p, v);
  }

  static JK_INLINE Vec add(Vec a, Vec b) { return a + b; }
  static JK_INLINE Vec sub(Vec a, Vec b) { return a - b; }
  static JK_INLINE Vec mul(Vec a, Vec b) { return a * b; }
  static JK_INLINE Vec div(Vec a, Vec b) { return a / b; }
  static JK_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static JK_INLINE Vec fms(Vec a, Vec b, Vec c) { return a * b - c; }
  // The second operand if either is NaN.
  static JK_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
  static JK_INLINE bool any_greater(Vec a, Vec b) {
    const Int m = a > b;
    return (m[0] | m[1] | m[2] | m[3]) != 0;
  }
  // Bit i: whether lane i is positive.
  static JK_INLINE uint32_t positive_lanes(Vec v) {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= (uint32_t)(v[i] > 0.f) << i;
    return bits;
  }
  // All bits of a lane where low <= x <= high, else none.
  static JK_INLINE Vec between(const int32_t* low, const int32_t* high, int32_t x) {
    Int first, last;
    memcpy(&first, low, sizeof first);
    memcpy(&last, high, sizeof last);
    return (Vec)((first <= x) & (last >= x));
  }
  // a where the bits are set, b elsewhere.
  static JK_INLINE Vec select(Vec bits, Vec a, Vec b) {
    return (Vec)(((Int)a & (Int)bits) | ((Int)b & ~(Int)bits));
  }
  // p * 2^n, n being the integer in the low bits of the float `shifted` (x + 1.5 * 2^23).
  static JK_INLINE Vec scale_by_power(Vec p, Vec shifted) {
    return (Vec)((Int)p + ((Int)shifted << 23));
  }
  // -v in the lanes where that integer is odd, else v.
  static JK_INLINE Vec negate_odd(Vec v, Vec shifted) {
    return (Vec)((Int)v ^ ((Int)shifted << 31));
  }
  static JK_INLINE Vec swap_pairs(Vec v) { return Vec{v[1], v[0], v[3], v[2]}; }
  static JK_INLINE float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static JK_INLINE void transpose(Vec (&r)[kLanes]) {
    const Vec a = r[0], b = r[1], c = r[2], d = r[3];
    JK_UNROLL for (int i = 0; i < kLanes; ++i) r[i] = Vec{a[i], b[i], c[i], d[i]};
  }
};

}  // namespace jk::simd
