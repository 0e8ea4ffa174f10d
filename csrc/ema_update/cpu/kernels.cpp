// What one thread does of an ema_update, built once for every instruction set.
#include "kernels.h"

#include "block.h"
#include "list.h"

namespace jk::ema {

template <>
void update<JK_KERNEL_ISA>(int64_t begin, int64_t end, void* context) {
  const Job& job = *(const Job*)context;
  const jk_ema_update_params& p = *job.params;
  const EmaWeights w = ema_weights(p.momentum);
  alignas(64) float buffer[kBlock];
  for_each_block(job.ends, p.num_tensors, begin, end, kBlock,
                 [&](int64_t tensor, int64_t first, int64_t n) {
                   const jk_ema_tensor& t = p.tensors[tensor];
                   const float* source = widen(t.source, t.source_dtype, first, n, buffer);
                   average_block(t, first, n, source, w, p.rounding,
                                 random_key((uint64_t)p.seed, (uint64_t)t.index));
                 });
}

}  // namespace jk::ema
