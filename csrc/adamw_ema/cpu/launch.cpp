// adamw_ema on a CPU: one parallel region over the concatenated list. A piece reads param, grad,
// both moments and target once and writes all but grad once: 36 bytes per float32 element.
#include <vector>

#include "../../cpu/dispatch.h"
#include "../../ema_update/cpu/list.h"
#include "kernels.h"

using namespace jk::adamw;

JK_EXPORT const char* jk_adamw_ema_cpu_fwd(const jk_adamw_ema_params* p, int isa,
                                           jk_parallel_for parallel_for) {
  if (const char* wrong = jk::choose_isa("adamw_ema_", isa)) return wrong;
  if (!(p->momentum >= 0.0 && p->momentum <= 1.0))
    return jk::refuse("adamw_ema_: momentum must be from 0 to 1, got %g.", p->momentum);
  if (p->found_inf != nullptr && *p->found_inf != 0.0f) return nullptr;
  const float grad_scale = p->grad_scale == nullptr ? 1.0f : *p->grad_scale;
  std::vector<int64_t> ends(p->num_tensors);
  std::vector<Step> steps(p->num_tensors);
  int64_t total = 0;
  for (int64_t i = 0; i < p->num_tensors; i++) {
    const jk_adamw_tensor& t = p->tensors[i];
    ends[i] = total += t.numel;
    steps[i] = step_of(p->hyper + t.group * JK_ADAMW_COLUMNS, t.step);
    steps[i].grad_factor /= grad_scale;
  }
  if (total == 0) return nullptr;
  constexpr jk_body kStep[] = {step<JK_ISA_PORTABLE>, JK_X86(step<JK_ISA_AVX2>)};
  Job job{p, ends.data(), steps.data()};
  parallel_for(total, jk::ema::kGrain, jk::best_of(kStep, isa), &job);
  return nullptr;
}
