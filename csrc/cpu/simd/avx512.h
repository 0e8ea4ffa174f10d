// Sixteen float lanes on AVX-512 F/BW/DQ/VL. Include it only where these flags are on (native.h).
#pragma once
#include <immintrin.h>

#include "bf16.h"

// GCC 12's own header initialises an undefined register with itself and warns wherever that is
// inlined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace jk::simd {

struct Avx512 {
  typedef __m512 Vec;
  static constexpr int kLanes = 16;
  // Accumulators and operands of a dot product leave no register to the constants of the jobs
  // beside it.
  static constexpr bool kConstantsInMemory = true;
  static constexpr bool kMaskRegisters = true;

  static JK_INLINE Vec zero() { return _mm512_setzero_ps(); }
  static JK_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
  static JK_INLINE Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static JK_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
  // Past the caches, to memory on a boundary of vectors; other threads may read it after a fence.
  static JK_INLINE void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }
  static JK_INLINE void fence() { _mm_sfence(); }
  static JK_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static JK_INLINE Vec widen(__m256i half) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static JK_INLINE Vec load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  // Round to nearest even; a NaN keeps its upper bits and gets the quiet bit, so that the carry
  // cannot make it an infinity.
  static JK_INLINE __m256i narrow(Vec v) {
    const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i up = _mm512_srli_epi32(
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_mask_blend_epi32(nan, up, _mm512_or_si512(high, _mm512_set1_epi32(0x40))));
  }
  static JK_INLINE void store(bf16* p, Vec v) { _mm256_storeu_si256((__m256i*)p, narrow(v)); }
  // The first 8 lanes alone where fewer than 16 numbers are left of a row (head_dim is a multiple
  // of 8); the rest reads as 0.
  static JK_INLINE Vec load_head(const float* p, int64_t left) {
    return left >= kLanes ? load(p) : _mm512_insertf32x8(zero(), _mm256_loadu_ps(p), 0);
  }
  static JK_INLINE Vec load_head(const bf16* p, int64_t left) {
    return left >= kLanes ? load(p)
                          : widen(_mm256_inserti128_si256(_mm256_setzero_si256(),
                                                          _mm_loadu_si128((const __m128i*)p), 0));
  }
  static JK_INLINE void store_head(float* p, Vec v, int64_t left) {
    if (left >= kLanes) {
      store(p, v);
    } else {
      _mm256_storeu_ps(p, _mm512_castps512_ps256(v));
    }
  }
  static JK_INLINE void store_head(bf16* p, Vec v, int64_t left) {
    if (left >= kLanes) {
      store(p, v);
    } else {
      _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(narrow(v)));
    }
  }

  static JK_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static JK_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static JK_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static JK_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static JK_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static JK_INLINE Vec fms(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }
  // The second operand if either is NaN.
  static JK_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static JK_INLINE bool any_greater(Vec a, Vec b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
  }
  // Bit i: whether lane i is positive.
  static JK_INLINE uint32_t positive_lanes(Vec v) {
    return _mm512_cmp_ps_mask(v, zero(), _CMP_GT_OQ);
  }
  // All bits of a lane where low <= x <= high, else none.
  static JK_INLINE Vec between(const int32_t* low, const int32_t* high, int32_t x) {
    const __m512i all = _mm512_set1_epi32(x);
    const __mmask16 outside = _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(low), all) |
                              _mm512_cmpgt_epi32_mask(all, _mm512_loadu_si512(high));
    return _mm512_castsi512_ps(_mm512_maskz_set1_epi32((__mmask16)~outside, -1));
  }
  // a where the bits are set, b elsewhere.
  static JK_INLINE Vec select(Vec bits, Vec a, Vec b) {
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
        _mm512_castps_si512(bits), _mm512_castps_si512(a), _mm512_castps_si512(b), 0xca));
  }
  // `v` in the lanes of `plus`, minus `v` in those of `minus`.
  static JK_INLINE Vec signed_by(uint16_t plus, uint16_t minus, Vec v) {
    const Vec raised = _mm512_maskz_mov_ps(plus, v);
    return _mm512_mask_sub_ps(raised, minus, raised, v);
  }
  // p * 2^n, n being the integer in the low bits of the float `shifted` (x + 1.5 * 2^23).
  static JK_INLINE Vec scale_by_power(Vec p, Vec shifted) {
    return _mm512_castsi512_ps(_mm512_add_epi32(
        _mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
  }
  // -v in the lanes where that integer is odd, else v.
  static JK_INLINE Vec negate_odd(Vec v, Vec shifted) {
    return _mm512_castsi512_ps(_mm512_xor_si512(
        _mm512_castps_si512(v), _mm512_slli_epi32(_mm512_castps_si512(shifted), 31)));
  }
  static JK_INLINE Vec swap_pairs(Vec v) { return _mm512_permute_ps(v, 0xb1); }
  static JK_INLINE float sum(Vec v) {
    const __m256 s = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
  }
  static JK_INLINE void transpose(Vec (&r)[kLanes]) {
    Vec t[16];
    JK_UNROLL for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    JK_UNROLL for (int i = 0; i < 4; ++i) {
      r[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
      r[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
      r[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
      r[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    JK_UNROLL for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
      t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
      t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
      t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
    }
    JK_UNROLL for (int i = 0; i < 4; ++i) {
      r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
      r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
      r[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
      r[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
    }
  }
};

}  // namespace jk::simd
