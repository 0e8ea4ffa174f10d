// sliced_gaussianity on a GPU: one launch for the sums of a block of projections, one for its
// slope. No atomics, so results repeat bitwise.
#include "harmonics.cuh"

namespace jk::gaussianity {
namespace {

const char* const kKnots = "sliced_gaussianity: knots must be from 1 to 64.";
const char* const kColumns = "sliced_gaussianity: columns must be at most 2097120.";

// Rows of a piece: enough for a few rounds of every warp, few enough for many blocks.
constexpr int64_t kFewestPieceRows = 128, kMostPieces = 256;

dim3 grid_of(const jk_sliced_gaussianity_params& p, int64_t rows_each) {
  return dim3(unsigned((p.rows + rows_each - 1) / rows_each), unsigned((p.columns + 31) / 32));
}

const char* refused(const jk_sliced_gaussianity_params& p) {
  if (p.knots < 1 || p.knots > JK_MOST_KNOTS) return kKnots;
  return (p.columns + 31) / 32 > 65535 ? kColumns : nullptr;
}

}  // namespace
}  // namespace jk::gaussianity

using namespace jk::gaussianity;

JK_EXPORT int64_t jk_sliced_gaussianity_cuda_piece_rows(int64_t rows) {
  constexpr int64_t kRound = kWarps * kRows;
  const int64_t wanted = (rows + kMostPieces - 1) / kMostPieces;
  return wanted < kFewestPieceRows ? kFewestPieceRows : (wanted + kRound - 1) / kRound * kRound;
}

JK_EXPORT const char* jk_sliced_gaussianity_cuda_sums(const jk_sliced_gaussianity_params* p,
                                                      void* stream) {
  if (const char* wrong = refused(*p)) return wrong;
  if (p->rows == 0 || p->columns == 0) return nullptr;
  const size_t bytes = sums_bytes(p->knots);
  if (const char* error = jk::allow_dynamic_shared(sliced_gaussianity_sums_kernel, bytes))
    return error;
  JK_LAUNCH(sliced_gaussianity_sums_kernel, grid_of(*p, p->piece_rows), dim3(kThreads), bytes,
            stream, *p);
  return jk::launch_error();
}

JK_EXPORT const char* jk_sliced_gaussianity_cuda_slope(const jk_sliced_gaussianity_params* p,
                                                       void* stream) {
  if (const char* wrong = refused(*p)) return wrong;
  if (p->rows == 0 || p->columns == 0) return nullptr;
  JK_LAUNCH(sliced_gaussianity_slope_kernel, grid_of(*p, kSlopeRows), dim3(kThreads),
            slope_bytes(p->knots), stream, *p);
  return jk::launch_error();
}
