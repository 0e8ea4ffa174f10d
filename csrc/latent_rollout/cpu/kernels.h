// What every instruction set provides: functions over a tile of rows, chosen at run time by
// launch.cpp.
#pragma once
#include "../params.h"

namespace jk::rollout {

// Matrices packed once per call and shared by its tiles; which ones depends on the function.
struct Packed {
  const float* matrix[4];
};

struct Kernels {
  int64_t (*packed_size)(int64_t depth, int64_t columns);
  int64_t columns_of_panel;
  int64_t number_bytes;  // of the matrices' numbers
  // Packs panels [begin, end) of a matrix given by strides.
  void (*pack)(const void* data, int64_t row_stride, int64_t column_stride, int64_t depth,
               int64_t columns, int64_t begin, int64_t end, float* to);
  int64_t (*mlp_scratch)(const jk_rollout_mlp_params& p);
  void (*mlp_forward)(const jk_rollout_mlp_params& p, const Packed& packed, int64_t first,
                      int64_t rows, float* scratch);
  void (*mlp_backward)(const jk_rollout_mlp_params& p, const Packed& packed, int64_t first,
                       int64_t rows, float* scratch);
  int64_t (*hamiltonian_scratch)(int64_t hidden, int64_t middle);
  void (*hamiltonian_forward)(const jk_rollout_hamiltonian_params& p, const Packed& packed,
                              int64_t first, int64_t rows, float* scratch);
  void (*hamiltonian_backward)(const jk_rollout_hamiltonian_step_params& p, const Packed& packed,
                               int64_t first, int64_t rows, float* scratch);
  int64_t (*readout_scratch)(const jk_rollout_readout_params& p);
  void (*readout)(const jk_rollout_readout_params& p, const Packed& packed, int64_t first,
                  int64_t rows, float* scratch);
  void (*gradient_from_signs)(const jk_rollout_readout_params& p, int64_t first, int64_t rows);
  int64_t (*gru_scratch)(const jk_rollout_gru_params& p);
  void (*gru_forward)(const jk_rollout_gru_params& p, const Packed& packed, int64_t first,
                      int64_t rows, float* scratch);
  // `piece`: which of the pieces of grad_norm and grad_small this tile writes.
  void (*gru_backward)(const jk_rollout_gru_params& p, const Packed& packed, int64_t first,
                       int64_t rows, int64_t piece, float* scratch);
};

// Those of kernels.cpp as built for an instruction set, NULL where it has none of its own for
// matrices of a dtype.
template <int kIsa>
const Kernels* kernels(int64_t operand);

}  // namespace jk::rollout
