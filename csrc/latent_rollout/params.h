// C ABI of latent_rollout: the parts of a rollout that a plain matrix product does not cover.
// Everything is contiguous float32 unless a stride or a dtype is named; h hidden units, D channels,
// row-major, rows are independent of one another. `operand` is the jk_dtype of the matrices that
// multiply (`const void*`), to which the other side is rounded; sums are float32. CPUs: float32, or
// bfloat16 on JK_ISA_AVX512_BF16, where predictions and what only goes into products (`void*`) are
// bfloat16 too; GPUs write the latter as float32.
#pragma once
#include "../abi.h"

// Rows of a table: row i is at data + (index == NULL ? i : index[i]) * stride, `channels` numbers
// of `dtype` with stride 1.
typedef struct {
  const void* data;
  const int64_t* index;
  int64_t stride;
  int64_t dtype;  // jk_dtype; CPUs: float32 or bfloat16
} jk_rollout_rows;

// Residual MLP: a_{i+1} = a_i + C gelu(a_i) + drift, s_k = sum of gelu(a_i), i < k.
typedef struct {
  int64_t rows, hidden, horizon;
  int64_t kept;  // sums kept: horizon, or 1 for the last alone
  int64_t operand;
  const float* start;      // [rows, h] a_0
  const void* coupling;    // [h, h] C, NULL at horizon 1
  const float* drift;      // [h], NULL at horizon 1
  float* sums;             // [kept, rows, h]
  float* inputs;           // [horizon, rows, h] every a_i, or NULL; read by backward
  const float* grad_sums;  // backward: [kept, rows, h]
  void* grad_inputs;       // backward: [horizon, rows, h]
  void* activations;       // backward: [horizon - 1, rows, h] gelu(a_i)
} jk_rollout_mlp_params;

// Hamiltonian: u(a) = gelu'(a) W2^T (w3 gelu'(W2 gelu(a) + b2)); half-steps alternate a += dt C
// u(a) and a -= dt C^T u(a).
typedef struct {
  int64_t rows, hidden, middle, horizon;
  int64_t kept;
  int64_t operand;
  float time_step;
  const float* start;    // [rows, h]
  const void* weight;    // [middle, h] W2
  const float* bias;     // [middle] b2
  const float* energy;   // [middle] w3
  const void* coupling;  // [h, h] C
  float* sums;           // [2, kept, rows, h]
  float* inputs;         // [2 horizon, rows, h] or NULL
} jk_rollout_hamiltonian_params;

// The transpose of one half-step: carried (the gradient of the hidden state after it) becomes that
// before it.
typedef struct {
  int64_t rows, hidden, middle;
  int64_t operand;
  int64_t transposed;  // whether the half-step moved by C^T
  float time_step;     // dt, or -dt for the second half-step; 0 where the force moves nothing
  const void *weight, *coupling;
  const float *bias, *energy;
  const float* input;                 // [rows, h] a
  const float* following;             // [rows, h] gradient that reaches the force from the sums
  float* carried;                     // [rows, h] in and out
  float* force;                       // [rows, h] u(a)
  float *activation, *grad_returned;  // [rows, h]: gelu(a); gradient of W2^T(...)
  float *pulled, *grad_middle, *grad_energy;  // [rows, middle]: w3 gelu'(.); gradient of W2 gelu(a)
                                              // + b2; its part of w3's gradient
} jk_rollout_hamiltonian_step_params;

// y_k = base + sums_k @ weight + (k + first_step) * bias for `channels` columns, written, compared
// with targets, or differentiated.
typedef struct {
  int64_t rows, hidden, channels, steps;
  int64_t first_step;
  int64_t operand;
  const float* sums;   // [steps, rows, h]
  const void* weight;  // [h, channels] by strides
  int64_t weight_row_stride, weight_column_stride;
  const float* bias;  // [channels] or NULL
  jk_rollout_rows base;
  void* out;  // predictions: row i of step k at k * out_step_stride + i * out_row_stride, or NULL
  int64_t out_step_stride, out_row_stride, out_dtype;
  jk_rollout_rows
      targets;  // row i of step k: index[k * rows + i], or k * target_step_stride + i * stride
  int64_t target_step_stride;
  float exponent;
  float* errors;  // [steps, rows], or NULL
  uint8_t*
      signs;  // [steps, rows, 2, ceil(channels / 8)] bits residual > 0, then residual < 0, or NULL
  const float* grad_errors;  // gradient: [steps, rows]
  void* grad;                // gradient: [steps, rows, channels]
  float* grad_base;          // gradient: [rows, channels] with grad_base_stride, added to
  int64_t grad_base_stride;
} jk_rollout_readout_params;

// GRU with LayerNorm. Gates of a step are r, u, n and W_s z + b_s of the candidate, four times D.
typedef struct {
  int64_t rows, channels, actions, horizon;
  int64_t kept;
  int64_t operand;
  float epsilon;
  const float* start;  // [rows, D] by start_stride (0: one state for all rows)
  int64_t start_stride;
  const float* action;                      // [horizon, rows, A]
  const void *weight_input, *weight_state;  // [3 D, A], [3 D, D]
  const float *bias_input, *bias_state;     // [3 D]
  const float *norm_weight, *norm_bias;     // [D]
  float* states;                            // [kept, rows, D]
  float* gates;                             // [horizon, rows, 4 D] or NULL
  const float* grad_states;                 // backward: [kept_gradients, rows, D]
  int64_t every_step;                       // whether every step has a gradient, or the last alone
  void* grad_gates;  // of r, u, n before their functions and of W_s z + b_s of n: GPU [horizon,
                     // rows, 4 D]; CPU [horizon, rows, 3 D] without that of n, whose products are
                     // the next two
  float* grad_actions;  // CPU: [horizon, rows, A]
  float* grad_small;    // CPU: [tiles, 1 + A, 4 D], the same four summed over rows and steps, then
                        // times each action
  float* grad_start;    // [rows, D]
  float* grad_norm;     // [tiles, 2, D], one piece per tile of rows, see the tile function
} jk_rollout_gru_params;

// Each returns NULL, or one sentence (static storage) saying what is wrong.
JK_EXPORT const char* jk_latent_rollout_cpu_mlp_fwd(const jk_rollout_mlp_params* p, int isa,
                                                    jk_parallel_for parallel_for);
JK_EXPORT const char* jk_latent_rollout_cpu_mlp_bwd(const jk_rollout_mlp_params* p, int isa,
                                                    jk_parallel_for parallel_for);
JK_EXPORT const char* jk_latent_rollout_cpu_hamiltonian_fwd(const jk_rollout_hamiltonian_params* p,
                                                            int isa, jk_parallel_for parallel_for);
JK_EXPORT const char* jk_latent_rollout_cpu_hamiltonian_bwd(
    const jk_rollout_hamiltonian_step_params* p, int isa, jk_parallel_for parallel_for);
JK_EXPORT const char* jk_latent_rollout_cpu_readout(const jk_rollout_readout_params* p, int isa,
                                                    jk_parallel_for parallel_for);
JK_EXPORT const char* jk_latent_rollout_cpu_readout_gradient(const jk_rollout_readout_params* p,
                                                             int isa, jk_parallel_for parallel_for);
JK_EXPORT const char* jk_latent_rollout_cpu_gru_fwd(const jk_rollout_gru_params* p, int isa,
                                                    jk_parallel_for parallel_for);
JK_EXPORT const char* jk_latent_rollout_cpu_gru_bwd(const jk_rollout_gru_params* p, int isa,
                                                    jk_parallel_for parallel_for);
// Pieces of grad_norm and grad_small that a backward pass over so many rows writes.
JK_EXPORT int64_t jk_latent_rollout_cpu_gru_tiles(int64_t rows);

// The same on a GPU, on `stream`. Widths that a block's shared memory cannot hold are refused.
JK_EXPORT const char* jk_latent_rollout_cuda_mlp_fwd(const jk_rollout_mlp_params* p, void* stream);
JK_EXPORT const char* jk_latent_rollout_cuda_mlp_bwd(const jk_rollout_mlp_params* p, void* stream);
JK_EXPORT const char* jk_latent_rollout_cuda_hamiltonian_fwd(const jk_rollout_hamiltonian_params* p,
                                                             void* stream);
JK_EXPORT const char* jk_latent_rollout_cuda_hamiltonian_bwd(
    const jk_rollout_hamiltonian_step_params* p, void* stream);
JK_EXPORT const char* jk_latent_rollout_cuda_readout(const jk_rollout_readout_params* p,
                                                     void* stream);
JK_EXPORT const char* jk_latent_rollout_cuda_readout_gradient(const jk_rollout_readout_params* p,
                                                              void* stream);
JK_EXPORT const char* jk_latent_rollout_cuda_gru_fwd(const jk_rollout_gru_params* p, void* stream);
JK_EXPORT const char* jk_latent_rollout_cuda_gru_bwd(const jk_rollout_gru_params* p, void* stream);
JK_EXPORT int64_t jk_latent_rollout_cuda_gru_tiles(int64_t rows);
