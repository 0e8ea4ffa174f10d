// latent_rollout's kernels as a table of functions, built once for every instruction set.
#include "gru.h"
#include "hamiltonian.h"
#include "mlp.h"
#include "readout.h"
#ifdef JK_BF16_PRODUCTS
#include "pairs.h"
#endif

namespace jk::rollout {
namespace {

template <class V>
int64_t packed_size(int64_t depth, int64_t columns) {
  return units<V>(depth) * Block<V>::padded(columns);
}

template <class V>
void pack_panels(const void* data, int64_t row_stride, int64_t column_stride, int64_t depth,
                 int64_t columns, int64_t begin, int64_t end, float* to) {
  for (int64_t panel = begin; panel < end; ++panel)
    pack_panel<V>({(const typename V::Number*)data, row_stride, column_stride}, depth, columns,
                  panel, to);
}

template <class V>
constexpr Kernels kTable = {
    packed_size<V>,          Block<V>::kColumns,     sizeof(typename V::Number),
    pack_panels<V>,          mlp_scratch<V>,         mlp_forward<V>,
    mlp_backward<V>,         hamiltonian_scratch<V>, hamiltonian_forward<V>,
    hamiltonian_backward<V>, readout_scratch<V>,     readout<V>,
    gradient_from_signs<V>,  gru_scratch<V>,         gru_forward<V>,
    gru_backward<V>};

}  // namespace

template <>
const Kernels* kernels<JK_KERNEL_ISA>(int64_t operand) {
#ifdef JK_BF16_PRODUCTS
  return operand == JK_BFLOAT16 ? &kTable<PairProducts> : nullptr;
#else
  return operand == JK_FLOAT32 ? &kTable<FloatProducts<simd::Native> > : nullptr;
#endif
}

}  // namespace jk::rollout
