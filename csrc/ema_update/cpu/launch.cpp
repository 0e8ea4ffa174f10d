// ema_update on a CPU: one parallel region over the concatenated list. A piece reads target, source
// (and compensation) once and writes target (and copy) once: 12 bytes per float32 element.
#include <vector>

#include "../../cpu/dispatch.h"
#include "body.h"

void jk_ema_update_body_avx2(int64_t begin, int64_t end, void* context);

JK_EXPORT const char* jk_ema_update_cpu_fwd(const jk_ema_update_params* p, int isa,
                                            jk_parallel_for parallel_for) {
  const int best = jk::best_isa(), chosen = isa == JK_ISA_AUTO ? best : isa;
  if (chosen < JK_ISA_PORTABLE || chosen > best)
    return "ema_update_: isa must be one that this processor has.";
  if (!(p->momentum >= 0.0 && p->momentum <= 1.0))
    return "ema_update_: momentum must be from 0 to 1.";
  std::vector<int64_t> ends(static_cast<size_t>(p->num_tensors));
  int64_t total = 0;
  for (int64_t i = 0; i < p->num_tensors; i++)
    ends[static_cast<size_t>(i)] = total += p->tensors[i].numel;
  if (total == 0) return nullptr;
  jk_ema_update_job job{p, ends.data()};
  parallel_for(total, kGrain, chosen >= JK_ISA_AVX2 ? jk_ema_update_body_avx2 : ema_update_body,
               &job);
  return nullptr;
}
