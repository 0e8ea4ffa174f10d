// What launch.cpp hands to the kernel of an instruction set.
#pragma once
#include "../step.h"

namespace jk::adamw {

struct Job {
  const jk_adamw_ema_params* params;
  const int64_t* ends;  // see ../../ema_update/cpu/list.h
  const Step* steps;    // one per tensor
};

// What one thread does: a jk_body whose context is a Job.
template <int kIsa>
void step(int64_t begin, int64_t end, void* job);

}  // namespace jk::adamw
