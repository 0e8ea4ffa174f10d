// masked_attention's kernels as a table of functions, built once for every instruction set.
#include "backward.h"
#include "forward_times.h"
#ifdef JK_BF16_PRODUCTS
#include "pairs.h"
#endif

namespace jk::attention {
namespace {

template <class F, class T>
constexpr Kernels kTable = {tile_count<F>,      block_count<F>,        forward_scratch<F>,
                            forward_keys<F, T>, forward_queries<F, T>, backward_scratch<F>,
                            backward<F, T>};

}  // namespace

template <>
const Kernels* kernels<JK_KERNEL_ISA>(int64_t dtype) {
#ifdef JK_BF16_PRODUCTS
  return dtype == JK_BFLOAT16 ? &kTable<PairFormat, bf16> : nullptr;
#else
  using Format = FloatFormat<simd::Native>;
  return dtype == JK_BFLOAT16 ? &kTable<Format, bf16> : &kTable<Format, float>;
#endif
}

}  // namespace jk::attention
