// C ABI of sliced_gaussianity's kernels, shared by the CPU kernels, the CUDA kernels and their
// build on the SIMT executor.
#pragma once
#include "../abi.h"

// Knots that a kernel takes.
enum jk_sliced_gaussianity_limits { JK_MOST_KNOTS = 64 };

// One block of projections u [rows, columns]. At knot k = 1 .. knots an angle is k * spacing * u.
typedef struct {
  int64_t rows, columns, knots;
  float spacing;
  const float* projections;
  // sums: [pieces, 2, knots, columns], cosines and sines summed over the rows of each piece.
  float* sums;
  int64_t pieces, piece_rows;  // piece i has the rows from i * piece_rows on
  // slope: [2, knots, columns], and where sum_k c[1, k] cos - c[0, k] sin is written: it may be the
  // projections themselves.
  const float* coefficients;
  float* slope;
} jk_sliced_gaussianity_params;

// Random words: four of each Philox block of (seed, step).
typedef struct {
  int64_t blocks, seed, step;
  int32_t* words;  // [4 * blocks]
} jk_sliced_gaussianity_words_params;

// Each returns NULL, or one sentence saying what is wrong.
JK_EXPORT const char* jk_sliced_gaussianity_cpu_sums(const jk_sliced_gaussianity_params* p, int isa,
                                                     jk_parallel_for parallel_for);
JK_EXPORT const char* jk_sliced_gaussianity_cpu_slope(const jk_sliced_gaussianity_params* p,
                                                      int isa, jk_parallel_for parallel_for);
JK_EXPORT const char* jk_sliced_gaussianity_cpu_words(const jk_sliced_gaussianity_words_params* p,
                                                      jk_parallel_for parallel_for);
// The rows of a piece, by which the caller sizes the sums.
JK_EXPORT int64_t jk_sliced_gaussianity_cpu_piece_rows(int64_t rows);
JK_EXPORT const char* jk_sliced_gaussianity_cuda_sums(const jk_sliced_gaussianity_params* p,
                                                      void* stream);
JK_EXPORT const char* jk_sliced_gaussianity_cuda_slope(const jk_sliced_gaussianity_params* p,
                                                       void* stream);
JK_EXPORT int64_t jk_sliced_gaussianity_cuda_piece_rows(int64_t rows);
