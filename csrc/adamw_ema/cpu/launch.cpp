// adamw_ema on a CPU: one parallel region over the concatenated list. A piece reads param, grad,
// both moments and target once and writes all but grad once: 36 bytes per float32 element.
#include <vector>

#include "../../cpu/dispatch.h"
#include "body.h"

void jk_adamw_ema_body_avx2(int64_t begin, int64_t end, void* context);

JK_EXPORT const char* jk_adamw_ema_cpu_fwd(const jk_adamw_ema_params* p, int isa,
                                           jk_parallel_for parallel_for) {
  const int best = jk::best_isa(), chosen = isa == JK_ISA_AUTO ? best : isa;
  if (chosen < JK_ISA_PORTABLE || chosen > best)
    return "adamw_ema_: isa must be one that this processor has.";
  if (!(p->momentum >= 0.0 && p->momentum <= 1.0))
    return "adamw_ema_: momentum must be from 0 to 1.";
  if (p->found_inf != nullptr && *p->found_inf != 0.0f) return nullptr;
  const float grad_scale = p->grad_scale == nullptr ? 1.0f : *p->grad_scale;
  std::vector<int64_t> ends(static_cast<size_t>(p->num_tensors));
  std::vector<jk_adamw_step> steps(static_cast<size_t>(p->num_tensors));
  int64_t total = 0;
  for (int64_t i = 0; i < p->num_tensors; i++) {
    const jk_adamw_tensor& t = p->tensors[i];
    ends[static_cast<size_t>(i)] = total += t.numel;
    steps[static_cast<size_t>(i)] = adamw_step(p->hyper + t.group * JK_ADAMW_COLUMNS, t.step);
    steps[static_cast<size_t>(i)].grad_factor /= grad_scale;
  }
  if (total == 0) return nullptr;
  jk_adamw_ema_job job{p, ends.data(), steps.data()};
  parallel_for(total, kGrain, chosen >= JK_ISA_AVX2 ? jk_adamw_ema_body_avx2 : adamw_ema_body,
               &job);
  return nullptr;
}
