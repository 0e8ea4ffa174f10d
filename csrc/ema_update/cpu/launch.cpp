// ema_update on a CPU: one parallel region over the concatenated list. A piece reads target, source
// (and compensation) once and writes target (and copy) once: 12 bytes per float32 element.
#include <vector>

#include "../../cpu/dispatch.h"
#include "kernels.h"
#include "list.h"

using namespace jk::ema;

JK_EXPORT const char* jk_ema_update_cpu_fwd(const jk_ema_update_params* p, int isa,
                                            jk_parallel_for parallel_for) {
  if (const char* wrong = jk::choose_isa("ema_update_", isa)) return wrong;
  if (!(p->momentum >= 0.0 && p->momentum <= 1.0))
    return jk::refuse("ema_update_: momentum must be from 0 to 1, got %g.", p->momentum);
  std::vector<int64_t> ends(p->num_tensors);
  int64_t total = 0;
  for (int64_t i = 0; i < p->num_tensors; i++) ends[i] = total += p->tensors[i].numel;
  if (total == 0) return nullptr;
  constexpr jk_body kUpdate[] = {update<JK_ISA_PORTABLE>, JK_X86(update<JK_ISA_AVX2>)};
  Job job{p, ends.data()};
  const jk_body body = jk::best_of(kUpdate, isa);
  if (total <= kGrain) {
    body(0, total, &job);  // one piece needs no pool
  } else {
    parallel_for(total, kGrain, body, &job);
  }
  return nullptr;
}
