// C ABI of visible_patch_embed's kernels, shared by the CPU kernels, the CUDA kernels and their
// build on the SIMT executor.
#pragma once
#include "../abi.h"

// What a clip may hold beside jk_dtype.
enum jk_pixel_dtype { JK_UINT8 = 3 };

// One call. A token is depth x high x wide pixels of every channel; token number clip * T * H * W +
// t * H * W + y * W + x, with (T, H, W) = (steps, lines, sites). Its K = channels * depth * high *
// wide numbers are in that order. A pixel x of channel c counts as x * gain[c] + shift[c].
typedef struct {
  const void* clip;
  int64_t clip_dtype, batch, channels, steps, lines, sites, depth, high, wide;
  int64_t clip_stride, channel_stride, frame_stride, line_stride, pixel_stride;
  const float *gain, *shift;
  const int64_t* rows;  // [count], token numbers
  int64_t count;
  // gather: [count, K] normalised pixels, float32 or bfloat16.
  void* pixels;
  int64_t pixels_dtype;
  // embed, weight_gradient: weight [width, K], bias [width] or NULL, out and grad_out [count,
  // width], all of dtype.
  const void *weight, *bias, *grad_out;
  void* out;
  int64_t width, dtype;
  // weight_gradient: [pieces, width, K]; piece i has the rows from i * piece_rows on.
  float* weight_gradient;
  int64_t pieces, piece_rows;
  // scatter: gradients of pixels [count, K], of the rows order[starts[n]] .. order[starts[n + 1] -
  // 1] of token n; written to the clip, contiguous and of clip_dtype, times gain.
  const float* of_pixels;
  const int64_t *order, *starts;
  void* clip_gradient;
} jk_visible_patch_embed_params;

// Each returns NULL, or one sentence saying what is wrong.
JK_EXPORT const char* jk_visible_patch_embed_cpu_gather(const jk_visible_patch_embed_params* p,
                                                        int isa, jk_parallel_for parallel_for);
JK_EXPORT const char* jk_visible_patch_embed_cpu_scatter(const jk_visible_patch_embed_params* p,
                                                         int isa, jk_parallel_for parallel_for);
JK_EXPORT const char* jk_visible_patch_embed_cuda_embed(const jk_visible_patch_embed_params* p,
                                                        void* stream);
JK_EXPORT const char* jk_visible_patch_embed_cuda_weight_gradient(
    const jk_visible_patch_embed_params* p, void* stream);
JK_EXPORT const char* jk_visible_patch_embed_cuda_scatter(const jk_visible_patch_embed_params* p,
                                                          void* stream);
// The rows of a piece, by which the caller sizes the weight gradient.
JK_EXPORT int64_t jk_visible_patch_embed_cuda_piece_rows(int64_t count, int64_t width, int64_t k);
