// What one thread does of a sliced_gaussianity call, built once for every instruction set.
#include "kernels.h"

#include "harmonics.h"

namespace jk::gaussianity {
namespace {

using Params = jk_sliced_gaussianity_params;

// body(block of rows, first column) for every vector of columns of cells [begin, end).
template <class Body>
void each_column(const Params& p, int64_t begin, int64_t end, const Body& body) {
  const int64_t across = (p.columns + kTurnedColumns - 1) / kTurnedColumns;
  for (int64_t cell = begin; cell < end; ++cell) {
    const int64_t start = cell % across * kTurnedColumns,
                  stop = start + kTurnedColumns < p.columns ? start + kTurnedColumns : p.columns;
    for (int64_t column = start; column < stop; column += simd::Native::kLanes)
      body(cell / across, column);
  }
}

int64_t bound(int64_t row, int64_t rows) { return row < rows ? row : rows; }

void sums(int64_t begin, int64_t end, void* context) {
  const Params& p = *(const Params*)context;
  each_column(p, begin, end, [&](int64_t piece, int64_t column) {
    const int64_t first = piece * p.piece_rows;
    sum_columns<simd::Native>(p, first, bound(first + p.piece_rows, p.rows), column,
                              p.sums + piece * 2 * p.knots * p.columns);
  });
}

void slope(int64_t begin, int64_t end, void* context) {
  const Params& p = *(const Params*)context;
  each_column(p, begin, end, [&](int64_t block, int64_t column) {
    const int64_t first = block * kTurnedRows;
    slope_columns<simd::Native>(p, first, bound(first + kTurnedRows, p.rows), column);
  });
}

}  // namespace

template <>
const Kernels* kernels<JK_KERNEL_ISA>() {
  static constexpr Kernels table = {sums, slope};
  return &table;
}

}  // namespace jk::gaussianity
