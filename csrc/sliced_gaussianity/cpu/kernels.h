// What launch.cpp hands to the kernels of an instruction set.
#pragma once
#include "../params.h"

namespace jk::gaussianity {

// What one thread does of a call: jk_bodies over its cells, whose context is the call's params. A
// cell is kTurnedRows rows or a piece by kTurnedColumns columns.
struct Kernels {
  jk_body sums, slope;
};

template <int kIsa>
const Kernels* kernels();

}  // namespace jk::gaussianity
