// Lists of ids and offsets as a CPU reads them. For baseline translation units.
#pragma once
#include "../params.h"

namespace jk::attention {

// Number i of a list whose numbers lie side by side, as those of offsets do.
inline int64_t number_at(const jk_ints& list, int64_t i) {
  return list.bytes == 4 ? ((const int32_t*)list.data)[i] : ((const int64_t*)list.data)[i];
}

// How many lists of numbers there are: one for all packed rows or for the whole batch, or one for
// each sequence.
inline int64_t lists_of(const jk_masked_attention_params& p, const jk_ints& list) {
  if (p.cu_q.data != nullptr) return 1;
  return list.stride_seq == 0 && p.num_seqs > 1 ? 1 : p.num_seqs;
}

// A sentence if the kernels do not take the call or its ids and offsets lead out of memory, else
// NULL.
const char* check(const jk_masked_attention_params& p);

}  // namespace jk::attention
