// Pixels of a tubelet to a row of normalised numbers, and sums of gradients of rows back to the
// clip. Included once per instruction set, so everything here has internal linkage; the loops are
// written for the vectoriser.
#pragma once
#include <string.h>

#include "../params.h"

namespace jk::patches {
namespace {

struct bfloat16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(uint8_t x) { return (float)x; }
inline float widen(bfloat16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline float widen(_Float16 x) { return (float)x; }

inline void narrow(float f, float& to) { to = f; }
// 0x7fff is every fraction bit below bfloat16 but the last; adding the lowest kept bit makes it
// round to even.
inline void narrow(float f, bfloat16& to) {
  uint32_t u;
  memcpy(&u, &f, 4);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  to.bits = (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
inline void narrow(float f, _Float16& to) { to = (_Float16)f; }

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
};

// A line of one channel of a tubelet. kWide and kStride are the line's length and the distance of
// its pixels where they are known, or 0.
template <int kWide, int kStride, class From, class To>
inline void gather_line(const From* __restrict from, To* __restrict to, int64_t wide,
                        int64_t stride, float gain, float shift) {
  const int64_t n = kWide ? kWide : wide, step = kStride ? kStride : stride;
  for (int64_t i = 0; i < n; i++) narrow(widen(from[i * step]) * gain + shift, to[i]);
}

template <int kWide, int kStride, class From, class To>
void gather_row(const jk_visible_patch_embed_params& p, int64_t row) {
  const Corner at(p, p.rows[row]);
  const From* corner = (const From*)p.clip + at.clip * p.clip_stride + at.frame * p.frame_stride +
                       at.line * p.line_stride + at.pixel * p.pixel_stride;
  To* to = (To*)p.pixels + row * p.channels * p.depth * p.high * p.wide;
  for (int64_t c = 0; c < p.channels; c++)
    for (int64_t d = 0; d < p.depth; d++)
      for (int64_t h = 0; h < p.high; h++, to += p.wide)
        gather_line<kWide, kStride>(
            corner + c * p.channel_stride + d * p.frame_stride + h * p.line_stride, to, p.wide,
            p.pixel_stride, p.gain[c], p.shift[c]);
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
  if (p.wide == 16) {
    gather_rows_of<16, From, To>(p, begin, end);
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
        To* to = clip + (((at.clip * p.channels + c) * frames + at.frame + d) * height + at.line +
                         h) * width + at.pixel;
        for (int64_t w = 0; w < p.wide; w++, k++) {
          float sum = 0.f;
          for (int64_t r = first; r < last; r++) sum += p.of_pixels[p.order[r] * size + k];
          narrow(sum * p.gain[c], to[w]);
        }
      }
}

template <class To>
void scatter_tokens(const jk_visible_patch_embed_params& p, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; token++) scatter_token<To>(p, token);
}

}  // namespace
}  // namespace jk::patches
