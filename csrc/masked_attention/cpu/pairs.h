// The packed number format of bfloat16 calls on AVX512_BF16: two bfloat16 in a unit, multiplied and
// added by one dot-product instruction, summed in float.
#pragma once
#include "../../cpu/simd/native.h"

namespace jk::attention {
namespace {

struct Constants {
  float magic;
  int low_half, mantissa_bits, ones;
  uint8_t mantissa[128];  // 128 * (2^(i / 128) - 1)
};
alignas(64) constexpr Constants kConstants = {
    98304.f + 127.f,  // 1.5 * 2^16, whose last bit is worth 1 / 128, and the exponent's bias
    0xffff,
    0x007f007f,
    0x3f803f80,
    {
        0,   1,   1,   2,   3,   4,   4,   5,   6,   6,   7,   8,   9,   9,   10,  11,
        12,  12,  13,  14,  15,  15,  16,  17,  18,  19,  19,  20,  21,  22,  23,  23,
        24,  25,  26,  27,  28,  28,  29,  30,  31,  32,  33,  34,  34,  35,  36,  37,
        38,  39,  40,  41,  42,  43,  43,  44,  45,  46,  47,  48,  49,  50,  51,  52,
        53,  54,  55,  56,  57,  58,  59,  60,  61,  62,  63,  64,  65,  66,  67,  68,
        69,  70,  72,  73,  74,  75,  76,  77,  78,  79,  80,  82,  83,  84,  85,  86,
        87,  88,  90,  91,  92,  93,  94,  96,  97,  98,  99,  100, 102, 103, 104, 105,
        107, 108, 109, 111, 112, 113, 115, 116, 117, 118, 120, 121, 123, 124, 125, 127,
    }};
constexpr int kSelect = 0xca;  // a ? b : c, bit by bit

struct PairFormat {
  using Simd = simd::Avx512Bf16;
  using Vec = Simd::Vec;
  static constexpr int kPerUnit = 2;
  static constexpr int kExpDegree = 3;

  static JK_INLINE Vec step(Vec acc, Vec a, Vec b) { return Simd::dot(acc, a, b); }
  static JK_INLINE void put_pair(float* units, int64_t, Vec x0, Vec x1) {
    alignas(64) static constexpr uint16_t kInterleave[] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const uint16_t* indices = kInterleave;
    JK_KEEP_IN_MEMORY(indices);
    const __m512i order = _mm512_loadu_si512(indices);
    _mm512_storeu_ps(units,
                     _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, Simd::round(x0, x1))));
  }
  static JK_INLINE void put_two_rows(float* units, int64_t row, int64_t n, int64_t at, Vec x0,
                                     Vec x1) {
    const __m512i both = Simd::round(x0, x1);
    _mm256_storeu_si256((__m256i*)(units + (n * row + at) / 2), _mm512_castsi512_si256(both));
    _mm256_storeu_si256((__m256i*)(units + ((n + 1) * row + at) / 2),
                        _mm512_extracti64x4_epi64(both, 1));
  }
  // P = 2^(x * factor) of two keys, written as pairs: the sum of the product and a magic number has
  // the bits of a bfloat16 whose exponent is right and whose mantissa is the fraction in 128ths; a
  // table of bytes turns that into 2^fraction. Good to 2^-8.5, half a step more than rounding P
  // costs, for a third of a polynomial's instructions. The row sum adds the rounded numbers, so
  // their error cancels where few keys matter.
  static JK_INLINE Vec put_exp2(float* units, int64_t, Vec x0, Vec x1, Vec factor, Vec sum) {
    const Constants* c = &kConstants;
    JK_KEEP_IN_MEMORY(c);
    const Vec magic = _mm512_set1_ps(c->magic);
    const __m512i t0 = _mm512_castps_si512(_mm512_fmadd_ps(x0, factor, magic)),
                  t1 = _mm512_castps_si512(_mm512_fmadd_ps(x1, factor, magic));
    const __m512i linear = _mm512_ternarylogic_epi32(_mm512_set1_epi32(c->low_half), t0,
                                                     _mm512_slli_epi32(t1, 16), kSelect);
    const __m512i mantissa = _mm512_permutex2var_epi8(_mm512_loadu_si512(c->mantissa), linear,
                                                      _mm512_loadu_si512(c->mantissa + 64));
    const Vec pairs = _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(_mm512_set1_epi32(c->mantissa_bits), mantissa, linear, kSelect));
    _mm512_storeu_ps(units, pairs);
    return step(sum, pairs, _mm512_castsi512_ps(_mm512_set1_epi32(c->ones)));
  }
  static JK_INLINE Vec offset(Vec shift) {
    return _mm512_sub_ps(_mm512_set1_ps(kConstants.magic), shift);
  }
  static JK_INLINE Vec put_exp2(float* units, int64_t, Vec x0, Vec x1, Vec factor, Vec offset,
                                Vec seen0, Vec seen1, Vec sum) {
    const Vec lowest = _mm512_set1_ps(kConstants.magic - 125.f);
    const __m512i t0 = _mm512_castps_si512(
                      _mm512_max_ps(lowest, _mm512_fmadd_ps(x0, factor, offset))),
                  t1 = _mm512_castps_si512(
                      _mm512_max_ps(lowest, _mm512_fmadd_ps(x1, factor, offset)));
    const __m512i low_half = _mm512_set1_epi32(kConstants.low_half);
    const __m512i linear =
        _mm512_ternarylogic_epi32(low_half, t0, _mm512_slli_epi32(t1, 16), kSelect);
    const __m512i mantissa =
        _mm512_permutex2var_epi8(_mm512_loadu_si512(kConstants.mantissa), linear,
                                 _mm512_loadu_si512(kConstants.mantissa + 64));
    const __m512i pairs = _mm512_ternarylogic_epi32(_mm512_set1_epi32(kConstants.mantissa_bits),
                                                    mantissa, linear, kSelect);
    const __m512i seen = _mm512_ternarylogic_epi32(low_half, _mm512_castps_si512(seen0),
                                                   _mm512_castps_si512(seen1), kSelect);
    const Vec shown = _mm512_castsi512_ps(_mm512_and_si512(pairs, seen));
    _mm512_storeu_ps(units, shown);
    return step(sum, shown, _mm512_castsi512_ps(_mm512_set1_epi32(kConstants.ones)));
  }
  // The numbers have the same mantissas afterwards, so nothing is rounded.
  static JK_INLINE Vec scaled(Vec units, Vec factor) {
    const __m512i bits = _mm512_castps_si512(units), low_half = _mm512_set1_epi32(0xffff);
    const __m512i low = _mm512_castps_si512(
                      _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), factor)),
                  high = _mm512_castps_si512(_mm512_mul_ps(
                      _mm512_castsi512_ps(_mm512_andnot_si512(low_half, bits)), factor));
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(low_half, _mm512_srli_epi32(low, 16), high, kSelect));
  }
  static JK_INLINE void put_row(float* units, Vec x) {
    _mm256_storeu_si256((__m256i*)units, Simd::round(x));
  }
};

}  // namespace
}  // namespace jk::attention
