// Eight float lanes on AVX2 + FMA. Include it only where these flags are on (native.h).
#pragma once
#include <immintrin.h>

#include "bf16.h"

namespace jk::simd {

struct Avx2 {
  typedef __m256 Vec;
  static constexpr int kLanes = 8;
  static constexpr bool kConstantsInMemory = false;
  static constexpr bool kMaskRegisters = false;

  static JK_INLINE Vec zero() { return _mm256_setzero_ps(); }
  static JK_INLINE Vec set1(float x) { return _mm256_set1_ps(x); }
  static JK_INLINE Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static JK_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
  // Past the caches, to memory on a boundary of vectors; other threads may read it after a fence.
  static JK_INLINE void stream(float* p, Vec v) { _mm256_stream_ps(p, v); }
  static JK_INLINE void fence() { _mm_sfence(); }
  static JK_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static JK_INLINE Vec load(const bf16* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
  }
  // Round to nearest even; a NaN keeps its upper bits and gets the quiet bit, so that the carry
  // cannot make it an infinity.
  static JK_INLINE void store(bf16* p, Vec v) {
    const __m256i bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i up = _mm256_srli_epi32(
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i r = _mm256_blendv_epi8(up, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
  }
  template <class T>
  static JK_INLINE Vec load_head(const T* p, int64_t) {
    return load(p);
  }
  template <class T>
  static JK_INLINE void store_head(T* p, Vec v, int64_t) {
    store(p, v);
  }

  static JK_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static JK_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static JK_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static JK_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static JK_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static JK_INLINE Vec fms(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a, b, c); }
  // The second operand if either is NaN.
  static JK_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static JK_INLINE bool any_greater(Vec a, Vec b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
  }
  // Bit i: whether lane i is positive.
  static JK_INLINE uint32_t positive_lanes(Vec v) {
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(v, zero(), _CMP_GT_OQ));
  }
  // All bits of a lane where low <= x <= high, else none.
  static JK_INLINE Vec between(const int32_t* low, const int32_t* high, int32_t x) {
    const __m256i all = _mm256_set1_epi32(x);
    const __m256i outside =
        _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_loadu_si256((const __m256i*)low), all),
                        _mm256_cmpgt_epi32(all, _mm256_loadu_si256((const __m256i*)high)));
    return _mm256_castsi256_ps(_mm256_xor_si256(outside, _mm256_set1_epi32(-1)));
  }
  // a where the bits are set, b elsewhere.
  static JK_INLINE Vec select(Vec bits, Vec a, Vec b) { return _mm256_blendv_ps(b, a, bits); }
  // p * 2^n, n being the integer in the low bits of the float `shifted` (x + 1.5 * 2^23).
  static JK_INLINE Vec scale_by_power(Vec p, Vec shifted) {
    return _mm256_castsi256_ps(_mm256_add_epi32(
        _mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
  }
  // -v in the lanes where that integer is odd, else v.
  static JK_INLINE Vec negate_odd(Vec v, Vec shifted) {
    return _mm256_xor_ps(v,
                         _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 31)));
  }
  static JK_INLINE Vec swap_pairs(Vec v) { return _mm256_permute_ps(v, 0xb1); }
  static JK_INLINE float sum(Vec v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static JK_INLINE void transpose(Vec (&r)[kLanes]) {
    Vec t[8];
    JK_UNROLL for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    Vec u[8];
    JK_UNROLL for (int i = 0; i < 2; ++i) {
      u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
      u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
      u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
      u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    JK_UNROLL for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
      r[4 + i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
    }
  }
};

}  // namespace jk::simd
