// What masked_attention's CPU scheduler (launch.cpp) and its kernels (one translation unit per
// instruction set) share. Plain data only: nothing here may compile to code that two translation
// units could both define.
#pragma once
#include "../params.h"

namespace jk::attention {

// Rows of one (sequence, head): row i at data + i * stride elements.
struct Rows {
  void* data;
  int64_t stride;
};

// Ids of one sequence; data is NULL where nothing is rotated.
struct Ids {
  const void* data;
  int64_t bytes, stride;
};

// The caller's cos/sin table spread over whole head vectors, so that a token's rotation is the sum
// of one row of each axis. A row is `padded` cosines, then `padded` sines with the sign of the even
// channels flipped; it is 0 outside the channels of its axis. Channels behind the three axes count
// as x's and have cosine 1. Rows: grid_t, grid_h, grid_w, then one of each axis that rotates
// nothing. first_axis and last_axis name the axes that meet in each run of eight channels.
struct RopeRows {
  const float* data;
  int64_t padded;
  int64_t grid_t, grid_h, grid_w;
  uint8_t first_axis[16], last_axis[16];
};

// One (sequence, head): the unit over which K and V are packed.
struct Head {
  int64_t len_q, len_k, head_dim;
  float scale;
  Rows q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  Ids ids_q, ids_k;
  const RopeRows* rope;
  float* lse;
  // Query i sees the keys whose time lies from first_time[i] to last_time[i]; NULL where every
  // query sees every key.
  const int32_t *first_time, *last_time, *key_time;
};

struct Range {
  int64_t begin, end;
};

// The kernels of one instruction set for one storage type. Sizes are in floats. `tiles` counts
// query tiles, `blocks` counts key blocks; both are cut from the start of a sequence, so results do
// not depend on how ranges of them are handed out.
struct Kernels {
  int64_t (*tiles)(int64_t len_q);
  int64_t (*blocks)(int64_t len_k);
  int64_t (*forward_scratch)(int64_t head_dim, int64_t len_k);
  void (*forward_keys)(const Head& head, float* scratch);  // rotates and packs K and V
  void (*forward_queries)(const Head& head, float* scratch, Range tiles);
  int64_t (*backward_scratch)(int64_t head_dim, int64_t len_q);
  // Gradients of the queries of `tiles` when want_q, of the keys and values of `blocks` when
  // want_kv. Complete gradients need all blocks for want_q and all tiles for want_kv.
  void (*backward)(const Head& head, float* scratch, Range tiles, Range blocks, bool want_q,
                   bool want_kv);
};

// Those of kernels.cpp as built for an instruction set, NULL where it has none of its own for a
// dtype.
template <int kIsa>
const Kernels* kernels(int64_t dtype);

// The widest heads, whose rows fit the kernels' buffers.
constexpr int64_t kMaxHeadDim = 128;

}  // namespace jk::attention
