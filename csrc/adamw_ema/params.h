// C ABI of adamw_ema: an AdamW step and the moving average of its result, in one pass over memory.
#pragma once
#include "../ema_update/params.h"

// One parameter: numel elements in the same memory order in all of its arrays.
typedef struct {
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq;
  int64_t numel;
  jk_ema_tensor ema;  // target NULL where no teacher follows this parameter; source, source_dtype
                      // and numel are not read
  int32_t param_dtype, grad_dtype,
      state_dtype;           // jk_dtype; exp_avg and exp_avg_sq are of state_dtype
  int32_t group;             // row of the hyperparameter table
  double step;               // number of this step from 1, read where step_device is NULL
  const float* step_device;  // CUDA only
} jk_adamw_tensor;

// Columns of a row of the hyperparameter table.
enum jk_adamw_hyper {
  JK_LR = 0,
  JK_BETA1,
  JK_BETA2,
  JK_EPS,
  JK_WEIGHT_DECAY,
  JK_MAXIMIZE,
  JK_ADAMW_COLUMNS
};

typedef struct {
  const jk_adamw_tensor* tensors;
  int64_t num_tensors;
  const double*
      hyper;  // [groups, JK_ADAMW_COLUMNS] in host memory, read where hyper_device is NULL
  const double* hyper_device;  // CUDA only
  const float* grad_scale;     // gradients are divided by it; NULL = 1. Host memory for the CPU
                               // kernel, device memory for CUDA
  const float* found_inf;      // not 0: nothing is changed; NULL = 0. Memory as for grad_scale
  double momentum;             // of the average, as in jk_ema_update_params
  const double* momentum_device;
  int64_t rounding;  // jk_rounding
  int64_t seed;
  const int64_t* seed_device;
} jk_adamw_ema_params;

JK_EXPORT const char* jk_adamw_ema_cpu_fwd(const jk_adamw_ema_params* p, int isa,
                                           jk_parallel_for parallel_for);
JK_EXPORT const char* jk_adamw_ema_cuda_fwd(const jk_adamw_ema_params* p, void* stream);
