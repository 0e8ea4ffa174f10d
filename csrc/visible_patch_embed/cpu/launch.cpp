// visible_patch_embed on a CPU: chooses the instruction set, checks the row numbers, and cuts the
// rows (or the tokens of the clip) into pieces. Pieces share no element and a row is computed the
// same way on any thread, so results do not depend on the thread count.
#include "../../cpu/dispatch.h"
#include "kernels.h"

namespace jk::patches {
namespace {

constexpr int64_t kGrain = 8;  // rows: a few microseconds

using KernelsOfIsa = const Kernels* (*)();
constexpr KernelsOfIsa kKernels[] = {kernels<JK_ISA_PORTABLE>, JK_X86(kernels<JK_ISA_AVX2>)};

const char* check_numbers(const char* what, const int64_t* numbers, int64_t count, int64_t most) {
  for (int64_t i = 0; i < count; i++)
    if (numbers[i] < 0 || numbers[i] >= most)
      return refuse("visible_patch_embed: %s must hold numbers from 0 to %lld, got %lld.", what,
                    (long long)most - 1, (long long)numbers[i]);
  return nullptr;
}

int64_t tokens_of(const jk_visible_patch_embed_params& p) {
  return p.batch * p.steps * p.lines * p.sites;
}

}  // namespace
}  // namespace jk::patches

using namespace jk::patches;

JK_EXPORT const char* jk_visible_patch_embed_cpu_gather(const jk_visible_patch_embed_params* p,
                                                        int isa, jk_parallel_for parallel_for) {
  if (const char* wrong = jk::choose_isa("visible_patch_embed", isa)) return wrong;
  if (const char* wrong = check_numbers("rows", p->rows, p->count, tokens_of(*p))) return wrong;
  parallel_for(p->count, kGrain, jk::best_of(kKernels, isa)()->gather, (void*)p);
  return nullptr;
}

JK_EXPORT const char* jk_visible_patch_embed_cpu_scatter(const jk_visible_patch_embed_params* p,
                                                         int isa, jk_parallel_for parallel_for) {
  if (const char* wrong = jk::choose_isa("visible_patch_embed", isa)) return wrong;
  const int64_t tokens = tokens_of(*p);
  if (const char* wrong = check_numbers("order", p->order, p->count, p->count)) return wrong;
  if (const char* wrong = check_numbers("starts", p->starts, tokens + 1, p->count + 1))
    return wrong;
  parallel_for(tokens, kGrain, jk::best_of(kKernels, isa)()->scatter, (void*)p);
  return nullptr;
}
