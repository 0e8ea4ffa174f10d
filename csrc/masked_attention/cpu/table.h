// The kernels of one translation unit as a table of functions.
#pragma once
#include "backward.h"
#include "forward.h"

namespace jk::attention {
namespace {

template <class F, class T>
constexpr Kernels kernels() {
  return {tile_count<F>,         block_count<F>,      forward_scratch<F>, forward_keys<F, T>,
          forward_queries<F, T>, backward_scratch<F>, backward<F, T>};
}

}  // namespace
}  // namespace jk::attention
