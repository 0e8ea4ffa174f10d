// What launch.cpp hands to the kernels of an instruction set.
#pragma once
#include "../params.h"

namespace jk::patches {

// What one thread does of a call: jk_bodies whose context is the call's params, over rows to gather
// and over tokens to scatter to.
struct Kernels {
  jk_body gather, scatter;
};

template <int kIsa>
const Kernels* kernels();

}  // namespace jk::patches
