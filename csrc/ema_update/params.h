// C ABI of ema_update, shared by the CPU kernel, the CUDA kernel and its build on the SIMT
// executor.
#pragma once
#include "../abi.h"

// How the new value of a 16-bit target is rounded. float32 targets are always rounded to nearest.
enum jk_rounding { JK_ROUND_NEAREST = 0, JK_ROUND_KAHAN = 1, JK_ROUND_STOCHASTIC = 2 };

// One target of the list: numel elements in the same memory order in all of its arrays.
typedef struct {
  void* target;
  const void* source;
  void* copy;          // the new target once more, in copy_dtype; NULL where none is wanted
  void* compensation;  // JK_ROUND_KAHAN with a 16-bit target: what rounding has lost so far, in
                       // target_dtype; else NULL
  int64_t numel;
  int32_t target_dtype, source_dtype, copy_dtype;  // jk_dtype
  int32_t index;  // stream of the stochastic rounding: the target's place in the caller's list
} jk_ema_tensor;

typedef struct {
  const jk_ema_tensor* tensors;
  int64_t num_tensors;
  double momentum;                // read where momentum_device is NULL
  const double* momentum_device;  // CUDA only: the momentum in device memory, so that nothing waits
                                  // for the host
  int64_t rounding;               // jk_rounding
  int64_t seed;                   // JK_ROUND_STOCHASTIC, read where seed_device is NULL
  const int64_t* seed_device;     // CUDA only
} jk_ema_update_params;

// Both update the whole list (one parallel region / as few launches as the argument space allows)
// and return NULL, or one sentence (static storage) saying what is wrong.
JK_EXPORT const char* jk_ema_update_cpu_fwd(const jk_ema_update_params* p, int isa,
                                            jk_parallel_for parallel_for);
JK_EXPORT const char* jk_ema_update_cuda_fwd(const jk_ema_update_params* p, void* stream);
