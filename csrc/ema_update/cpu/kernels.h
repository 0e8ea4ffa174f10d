// What launch.cpp hands to the kernel of an instruction set.
#pragma once
#include "../params.h"

namespace jk::ema {

struct Job {
  const jk_ema_update_params* params;
  const int64_t* ends;  // see list.h
};

// What one thread does: a jk_body whose context is a Job.
template <int kIsa>
void update(int64_t begin, int64_t end, void* job);

}  // namespace jk::ema
