// Sums of the powers of z = exp(i spacing u) over rows, and the polynomial in z that is their
// gradient. A lane owns a direction, so that a warp reads whole lines; it turns kRows rows at once.
#pragma once
#include "../params.h"
#include "turn.cuh"

namespace jk::gaussianity {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 4;
constexpr int kSlopeRows = 64;  // of a block

// What a thread sees of a block of projections: its column, and rows [first, last) of its block.
struct Place {
  int64_t first, last, column;
  bool there;
  JK_DEVICE Place(const jk_sliced_gaussianity_params& p, int64_t rows_each)
      : first(int64_t(blockIdx.x) * rows_each),
        last(first + rows_each < p.rows ? first + rows_each : p.rows),
        column(int64_t(blockIdx.y) * 32 + lane_id()),
        there(column < p.columns) {}
};

// z of kRows rows from `row` on; 0, and so are its powers, where there is no row.
JK_DEVICE void load_turns(const jk_sliced_gaussianity_params& p, const Place& place, int64_t row,
                          Turn (&z)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    z[r] = {0.f, 0.f};
    if (row + r < place.last && place.there)
      z[r] = turn(p.projections[(row + r) * p.columns + place.column] * p.spacing);
  }
}

inline size_t sums_bytes(int64_t knots) { return size_t(2 * knots * kThreads) * sizeof(float); }

// sums[piece, plane, knot, column]: a block has a piece of rows and 32 columns. Sums of a thread
// wait in shared memory, at the end those of the warps are added in a fixed order.
__global__ void __launch_bounds__(kThreads)
    sliced_gaussianity_sums_kernel(const jk_sliced_gaussianity_params p) {
  JK_DYNAMIC_SHARED(float, shared);
  const Place place(p, p.piece_rows);
  const int knots = int(p.knots), warp = int(threadIdx.x >> 5);
  float* mine = shared + threadIdx.x;
  for (int k = 0; k < 2 * knots; k++) mine[k * kThreads] = 0.f;
  for (int64_t row = place.first + warp * kRows; row < place.last; row += kWarps * kRows) {
    Turn z[kRows], power[kRows];
    load_turns(p, place, row, z);
#pragma unroll
    for (int r = 0; r < kRows; r++) power[r] = z[r];
    float* to = mine;
#pragma unroll 1
    for (int k = 0; k < knots; k++, to += kThreads) {
      float cosine = 0.f, sine = 0.f;
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        const Turn w = power[r];
        cosine += w.cosine;
        sine += w.sine;
        power[r].cosine = fmaf(w.cosine, z[r].cosine, -(w.sine * z[r].sine));
        power[r].sine = fmaf(w.cosine, z[r].sine, w.sine * z[r].cosine);
      }
      to[0] += cosine;
      to[knots * kThreads] += sine;
    }
  }
  __syncthreads();
  if (!place.there) return;
  float* out = p.sums + int64_t(blockIdx.x) * 2 * knots * p.columns + place.column;
  for (int k = warp; k < 2 * knots; k += kWarps) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; w++) sum += shared[k * kThreads + w * 32 + lane_id()];
    out[k * p.columns] = sum;
  }
}

inline size_t slope_bytes(int64_t knots) { return size_t(2 * knots * 32) * sizeof(float); }

// slope = the real part of sum_k (c[1, k] + i c[0, k]) z^k, by Horner's rule: a block has
// kSlopeRows rows and 32 columns, whose coefficients are in shared memory.
__global__ void __launch_bounds__(kThreads)
    sliced_gaussianity_slope_kernel(const jk_sliced_gaussianity_params p) {
  JK_DYNAMIC_SHARED(float, shared);
  const Place place(p, kSlopeRows);
  const int knots = int(p.knots), warp = int(threadIdx.x >> 5);
  for (int k = warp; k < 2 * knots; k += kWarps)
    shared[k * 32 + lane_id()] = place.there ? p.coefficients[k * p.columns + place.column] : 0.f;
  __syncthreads();
  for (int64_t row = place.first + warp * kRows; row < place.last; row += kWarps * kRows) {
    Turn z[kRows], h[kRows];
    load_turns(p, place, row, z);
#pragma unroll
    for (int r = 0; r < kRows; r++) h[r] = {0.f, 0.f};
    const float* imaginary = shared + (knots - 1) * 32 + lane_id();
    const float* real = imaginary + knots * 32;
#pragma unroll 1
    for (int k = 0; k < knots; k++, imaginary -= 32, real -= 32) {
      const float a = real[0], b = imaginary[0];
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        const float x = h[r].cosine + a, y = h[r].sine + b;
        h[r].cosine = fmaf(x, z[r].cosine, -(y * z[r].sine));
        h[r].sine = fmaf(x, z[r].sine, y * z[r].cosine);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; r++)
      if (row + r < place.last && place.there)
        p.slope[(row + r) * p.columns + place.column] = h[r].cosine;
  }
}

}  // namespace
}  // namespace jk::gaussianity
