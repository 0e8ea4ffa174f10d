// Normalised pixels of a token, read from the clip a run at a time.
#pragma once
#include "../../cuda/device.cuh"
#include "../params.h"

namespace jk::patches {
namespace {

using Params = jk_visible_patch_embed_params;

JK_DEVICE int64_t numbers_of(const Params& p) { return p.channels * p.depth * p.high * p.wide; }

// Where a token begins in the clip. There are fewer than 2^31 tokens.
JK_DEVICE int64_t corner_of(const Params& p, int64_t token) {
  const int sites = int(p.sites), lines = int(p.lines), steps = int(p.steps);
  int rest = int(token);
  const int64_t pixel = rest % sites * p.wide;
  rest /= sites;
  const int64_t line = rest % lines * p.high;
  rest /= lines;
  const int64_t frame = rest % steps * p.depth;
  return rest / steps * p.clip_stride + frame * p.frame_stride + line * p.line_stride +
         pixel * p.pixel_stride;
}

// One of a token's numbers: its channel, and its distance from the token's first.
struct Place {
  int pixel, line, frame, channel;
  int64_t offset;
  JK_DEVICE Place(const Params& p, int k) {
    const int wide = int(p.wide), high = int(p.high), depth = int(p.depth);
    pixel = k % wide;
    k /= wide;
    line = k % high;
    k /= high;
    frame = k % depth;
    channel = k / depth;
    offset = channel * p.channel_stride + frame * p.frame_stride + line * p.line_stride +
             pixel * p.pixel_stride;
  }
};

JK_DEVICE float pixel_at(const Params& p, int64_t at) {
  switch (p.clip_dtype) {
    case JK_UINT8:
      return float(static_cast<const uint8_t*>(p.clip)[at]);
    case JK_BFLOAT16:
      return to_float(static_cast<const bfloat16*>(p.clip)[at]);
    case JK_FLOAT16:
      return to_float(static_cast<const float16*>(p.clip)[at]);
    default:
      return static_cast<const float*>(p.clip)[at];
  }
}

JK_DEVICE bool is_aligned(const void* at, int bytes = 16) {
  return (reinterpret_cast<uintptr_t>(at) & (bytes - 1)) == 0;
}

// kCount numbers side by side: bytes 8 at a time, others in 16 bytes.
template <int kCount>
JK_DEVICE void load_bytes(float (&x)[kCount], const uint8_t* from) {
#pragma unroll
  for (int i = 0; i < kCount; i += 8) {
    const uint2 words = *reinterpret_cast<const uint2*>(from + i);
#pragma unroll
    for (int j = 0; j < 8; j++) x[i + j] = float((j < 4 ? words.x : words.y) >> 8 * (j & 3) & 255u);
  }
}
template <class T, int kCount>
JK_DEVICE void load_halves(float (&x)[kCount], const T* from) {
#pragma unroll
  for (int i = 0; i < kCount; i += 8) {
    const uint4 words = *reinterpret_cast<const uint4*>(from + i);
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float2 pair = unpack2<T>(pairs[j]);
      x[i + 2 * j] = pair.x;
      x[i + 2 * j + 1] = pair.y;
    }
  }
}
template <int kCount>
JK_DEVICE void load_floats(float (&x)[kCount], const float* from) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    x[i] = four.x;
    x[i + 1] = four.y;
    x[i + 2] = four.z;
    x[i + 3] = four.w;
  }
}

// Numbers k .. k + kCount - 1 of the token at `corner`, 0 beyond the last.
template <int kCount>
JK_DEVICE void load_run(const Params& p, int64_t corner, int k, float (&x)[kCount]) {
  const int numbers = int(numbers_of(p));
  Place place(p, k);
  const int64_t at = corner + place.offset;
  const int size = p.clip_dtype == JK_UINT8 ? 1 : p.clip_dtype == JK_FLOAT32 ? 4 : 2;
  const char* from = static_cast<const char*>(p.clip) + at * size;
  if (p.pixel_stride == 1 && place.pixel + kCount <= p.wide && k < numbers &&
      is_aligned(from, size == 1 ? 8 : 16)) {
    if (p.clip_dtype == JK_UINT8) {
      load_bytes(x, reinterpret_cast<const uint8_t*>(from));
    } else if (p.clip_dtype == JK_FLOAT32) {
      load_floats(x, reinterpret_cast<const float*>(from));
    } else if (p.clip_dtype == JK_BFLOAT16) {
      load_halves(x, reinterpret_cast<const bfloat16*>(from));
    } else {
      load_halves(x, reinterpret_cast<const float16*>(from));
    }
    const float gain = p.gain[place.channel], shift = p.shift[place.channel];
#pragma unroll
    for (int i = 0; i < kCount; i++) x[i] = fmaf(x[i], gain, shift);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    x[i] = 0.f;
    if (k + i < numbers) {
      const Place one(p, k + i);
      x[i] = fmaf(pixel_at(p, corner + one.offset), p.gain[one.channel], p.shift[one.channel]);
    }
  }
}

}  // namespace
}  // namespace jk::patches
