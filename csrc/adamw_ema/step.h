// The scalars of one AdamW step, computed in double as torch.optim.AdamW computes them, for CPU and
// CUDA kernels alike.
#pragma once
#include <math.h>

#include "../ema_update/average.h"
#include "params.h"

namespace jk::adamw {

struct Step {
  float decay;                // 1 - lr * weight_decay
  float grad_factor;          // -1 to maximize, else 1; the caller divides it by grad_scale
  float take1, beta2, take2;  // 1 - beta1, beta2, 1 - beta2
  float size;                 // lr / (1 - beta1^step)
  float inverse_sqrt2;        // 1 / sqrt(1 - beta2^step)
  float eps;
};

namespace {

JK_SHARED_INLINE Step step_of(const double* hyper, double step) {
  Step s;
  s.decay = (float)(1.0 - hyper[JK_LR] * hyper[JK_WEIGHT_DECAY]);
  s.grad_factor = hyper[JK_MAXIMIZE] != 0.0 ? -1.0f : 1.0f;
  s.take1 = (float)(1.0 - hyper[JK_BETA1]);
  s.beta2 = (float)hyper[JK_BETA2];
  s.take2 = (float)(1.0 - hyper[JK_BETA2]);
  s.size = (float)(hyper[JK_LR] / (1.0 - pow(hyper[JK_BETA1], step)));
  s.inverse_sqrt2 = (float)(1.0 / sqrt(1.0 - pow(hyper[JK_BETA2], step)));
  s.eps = (float)hyper[JK_EPS];
  return s;
}

}  // namespace
}  // namespace jk::adamw
