// Lets the AVX-512 translation units run on a machine without AVX-512: SIMDe supplies the
// intrinsics under their own names, and this file those that SIMDe 0.7 lacks. Included by the
// compiler's -include, so that the sources under test stay as they are.
#pragma once
// Without optimisation GCC's own header has some intrinsics as macros, which would meet those
// below.
#include <immintrin.h>
#undef _mm512_extractf32x8_ps
#undef _mm512_permute_ps
#undef _mm512_shuffle_f32x4

#define SIMDE_ENABLE_NATIVE_ALIASES
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wall"
#pragma GCC diagnostic ignored "-Wextra"
#include <simde/x86/avx512.h>
#pragma GCC diagnostic pop

#include <string.h>

namespace emulate {

template <class To, class From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a cast keeps all bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

struct Floats {
  float x[16];
};
struct Words {
  uint32_t x[16];
};
struct Halves {
  uint16_t x[16];
};
struct TwoHalves {
  uint16_t x[32];
};

inline simde__m512i cvtepu16_epi32(simde__m256i a) {
  const Halves half = as<Halves>(a);
  Words w;
  for (int i = 0; i < 16; ++i) w.x[i] = half.x[i];
  return as<simde__m512i>(w);
}

inline simde__m256i cvtepi32_epi16(simde__m512i a) {
  const Words w = as<Words>(a);
  Halves half;
  for (int i = 0; i < 16; ++i) half.x[i] = (uint16_t)w.x[i];
  return as<simde__m256i>(half);
}

// Round to nearest even; a NaN becomes quiet.
inline uint16_t narrow(float f) {
  const uint32_t bits = as<uint32_t>(f);
  if (f != f) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline simde__m512i cvtne2ps_pbh(simde__m512 high, simde__m512 low) {
  const Floats h = as<Floats>(high), l = as<Floats>(low);
  TwoHalves r;
  for (int i = 0; i < 16; ++i) r.x[i] = narrow(l.x[i]), r.x[16 + i] = narrow(h.x[i]);
  return as<simde__m512i>(r);
}

inline simde__m256i cvtneps_pbh(simde__m512 a) {
  const Floats f = as<Floats>(a);
  Halves r;
  for (int i = 0; i < 16; ++i) r.x[i] = narrow(f.x[i]);
  return as<simde__m256i>(r);
}

inline simde__m256 extractf32x8_ps(simde__m512 a, int part) {
  float x[2][8];
  memcpy(x, &a, sizeof x);
  simde__m256 r;
  memcpy(&r, x[part], sizeof r);
  return r;
}

inline simde__m512 permute_ps(simde__m512 a, int order) {
  const Floats f = as<Floats>(a);
  Floats r;
  for (int i = 0; i < 16; ++i) r.x[i] = f.x[i / 4 * 4 + (order >> i % 4 * 2 & 3)];
  return as<simde__m512>(r);
}

inline simde__m512 shuffle_f32x4(simde__m512 a, simde__m512 b, int order) {
  const Floats fa = as<Floats>(a), fb = as<Floats>(b);
  Floats r;
  for (int i = 0; i < 16; ++i) r.x[i] = (i < 8 ? fa : fb).x[(order >> i / 4 * 2 & 3) * 4 + i % 4];
  return as<simde__m512>(r);
}

inline void stream_ps(float* p, simde__m512 a) { memcpy(p, &a, sizeof a); }

}  // namespace emulate

#define _mm512_cvtepu16_epi32 emulate::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulate::cvtepi32_epi16
#define _mm512_cvtne2ps_pbh emulate::cvtne2ps_pbh
#define _mm512_cvtneps_pbh emulate::cvtneps_pbh
#define _mm512_extractf32x8_ps emulate::extractf32x8_ps
#define _mm512_permute_ps emulate::permute_ps
#define _mm512_shuffle_f32x4 emulate::shuffle_f32x4
#define _mm512_stream_ps emulate::stream_ps
