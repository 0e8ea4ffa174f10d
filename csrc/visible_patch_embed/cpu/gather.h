// Pixels of a tubelet to a row of normalised numbers, and sums of gradients of rows back to the
// clip. Included once per instruction set, so everything here has internal linkage; the loops are
// written for the vectoriser.
#pragma once
#include <string.h>

#include "../../cpu/simd/native.h"
#include "../params.h"

namespace jk::patches {
namespace {

// Numbers that are normalised at a time: a multiple of vectors.
constexpr int64_t kChunk = 16;

inline float widen(float x) { return x; }
inline float widen(uint8_t x) { return (float)x; }
inline float widen(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline float widen(_Float16 x) { return (float)x; }

// The first n of a chunk, rounded to nearest even.
inline void narrow(const float (&chunk)[kChunk], float* to, int64_t n) {
  memcpy(to, chunk, sizeof(float) * n);
}
inline void narrow(const float (&chunk)[kChunk], bf16* to, int64_t n) {
  using V = simd::Native;
  bf16 rounded[kChunk];
  for (int64_t i = 0; i < kChunk; i += V::kLanes) V::store(rounded + i, V::load(chunk + i));
  memcpy(to, rounded, sizeof(bf16) * n);
}
inline void narrow(const float (&chunk)[kChunk], _Float16* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = (_Float16)chunk[i];
}

// Where a token begins in the clip, in frames, lines and pixels.
struct Corner {
  int64_t clip, frame, line, pixel;
  Corner(const jk_visible_patch_embed_params& p, int64_t token) {
    pixel = token % p.sites * p.wide;
    token /= p.sites;
    line = token % p.lines * p.high;
    token /= p.lines;
    frame = token % p.steps * p.depth;
    clip = token / p.steps;
  }
  int64_t offset(const jk_visible_patch_embed_params& p) const {
    return clip * p.clip_stride + frame * p.frame_stride + line * p.line_stride +
           pixel * p.pixel_stride;
  }
};

// A line of one channel of a tubelet. kWide and kStride are the line's length and the distance of
// its pixels where they are known, or 0.
template <int kWide, int kStride, class From, class To>
inline void gather_line(const From* __restrict from, To* __restrict to, int64_t wide,
                        int64_t stride, float gain, float shift) {
  const int64_t step = kStride ? kStride : stride, length = kWide ? kWide : wide;
  for (int64_t first = 0; first < length; first += kChunk) {
    const int64_t n = kWide || length - first > kChunk ? kChunk : length - first;
    float chunk[kChunk] = {};
    for (int64_t i = 0; i < n; i++) chunk[i] = widen(from[(first + i) * step]) * gain + shift;
    narrow(chunk, to + first, n);
  }
}

template <int kWide, int kStride, class From, class To>
void gather_row(const jk_visible_patch_embed_params& p, int64_t row) {
  const int64_t corner = Corner(p, p.rows[row]).offset(p);
  // Lines lie too far apart for the hardware to fetch them ahead.
  const int64_t to_next = row + 1 < p.count ? Corner(p, p.rows[row + 1]).offset(p) - corner : 0;
  To* to = (To*)p.pixels + row * p.channels * p.depth * p.high * p.wide;
  for (int64_t c = 0; c < p.channels; c++)
    for (int64_t d = 0; d < p.depth; d++)
      for (int64_t h = 0; h < p.high; h++, to += p.wide) {
        const From* from = (const From*)p.clip + corner + c * p.channel_stride +
                           d * p.frame_stride + h * p.line_stride;
        __builtin_prefetch(from + to_next);
        gather_line<kWide, kStride>(from, to, p.wide, p.pixel_stride, p.gain[c], p.shift[c]);
      }
}

// The usual widths and layouts (one channel after another, or three channels side by side) have
// loops of their own.
template <int kWide, class From, class To>
void gather_rows_of(const jk_visible_patch_embed_params& p, int64_t begin, int64_t end) {
  const auto run = [&](auto gather) {
    for (int64_t row = begin; row < end; row++) gather(p, row);
  };
  if (p.pixel_stride == 1) {
    run(gather_row<kWide, 1, From, To>);
  } else if (p.pixel_stride == 3) {
    run(gather_row<kWide, 3, From, To>);
  } else {
    run(gather_row<kWide, 0, From, To>);
  }
}

template <class From, class To>
void gather_rows(const jk_visible_patch_embed_params& p, int64_t begin, int64_t end) {
  if (p.wide == kChunk) {
    gather_rows_of<kChunk, From, To>(p, begin, end);
  } else {
    gather_rows_of<0, From, To>(p, begin, end);
  }
}

// A token of the clip's gradient: the sum of its rows in their order, 0 where there is none.
template <class To>
void scatter_token(const jk_visible_patch_embed_params& p, int64_t token) {
  const Corner at(p, token);
  const int64_t width = p.sites * p.wide, height = p.lines * p.high, frames = p.steps * p.depth;
  const int64_t size = p.channels * p.depth * p.high * p.wide;
  const int64_t first = p.starts[token], last = p.starts[token + 1];
  To* clip = (To*)p.clip_gradient;
  int64_t k = 0;
  for (int64_t c = 0; c < p.channels; c++)
    for (int64_t d = 0; d < p.depth; d++)
      for (int64_t h = 0; h < p.high; h++) {
        To* to =
            clip +
            (((at.clip * p.channels + c) * frames + at.frame + d) * height + at.line + h) * width +
            at.pixel;
        for (int64_t w = 0; w < p.wide; w += kChunk) {
          const int64_t n = p.wide - w < kChunk ? p.wide - w : kChunk;
          float sum[kChunk] = {};
          for (int64_t r = first; r < last; r++) {
            const float* from = p.of_pixels + p.order[r] * size + k;
            for (int64_t i = 0; i < n; i++) sum[i] += from[i];
          }
          for (int64_t i = 0; i < n; i++) sum[i] *= p.gain[c];
          narrow(sum, to + w, n);
          k += n;
        }
      }
}

template <class To>
void scatter_tokens(const jk_visible_patch_embed_params& p, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; token++) scatter_token<To>(p, token);
}

}  // namespace
}  // namespace jk::patches
