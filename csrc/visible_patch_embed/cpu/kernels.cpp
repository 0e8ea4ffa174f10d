// What one thread does of a visible_patch_embed call, built once for every instruction set.
#include "kernels.h"

#include "gather.h"

namespace jk::patches {
namespace {

using Params = jk_visible_patch_embed_params;

template <class From>
void gather_from(const Params& p, int64_t begin, int64_t end) {
  if (p.pixels_dtype == JK_BFLOAT16) {
    gather_rows<From, bf16>(p, begin, end);
  } else {
    gather_rows<From, float>(p, begin, end);
  }
}

void gather(int64_t begin, int64_t end, void* context) {
  const Params& p = *(const Params*)context;
  switch (p.clip_dtype) {
    case JK_UINT8:
      return gather_from<uint8_t>(p, begin, end);
    case JK_BFLOAT16:
      return gather_from<bf16>(p, begin, end);
    case JK_FLOAT16:
      return gather_from<_Float16>(p, begin, end);
    default:
      return gather_from<float>(p, begin, end);
  }
}

void scatter(int64_t begin, int64_t end, void* context) {
  const Params& p = *(const Params*)context;
  switch (p.clip_dtype) {
    case JK_BFLOAT16:
      return scatter_tokens<bf16>(p, begin, end);
    case JK_FLOAT16:
      return scatter_tokens<_Float16>(p, begin, end);
    default:
      return scatter_tokens<float>(p, begin, end);
  }
}

}  // namespace

template <>
const Kernels* kernels<JK_KERNEL_ISA>() {
  static constexpr Kernels table = {gather, scatter};
  return &table;
}

}  // namespace jk::patches
