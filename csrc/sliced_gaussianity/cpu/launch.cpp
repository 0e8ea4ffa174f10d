// sliced_gaussianity on a CPU: chooses the instruction set and cuts a block of projections into
// cells of rows by columns. A cell computes the same bits on any thread, and cells share no
// element, so results do not depend on the thread count.
#include "../../cpu/dispatch.h"
#include "../../cpu/tiles.h"
#include "../../host/philox.h"
#include "kernels.h"

namespace jk::gaussianity {
namespace {

// Apart from the streams of jepa.counter_rng; jepa_kernels/ops/sliced_gaussianity/directions.py has
// the same number.
constexpr uint32_t kStream = 0x5347;

using KernelsOfIsa = const Kernels* (*)();
constexpr KernelsOfIsa kKernels[] = {
    kernels<JK_ISA_PORTABLE>,
    JK_X86(kernels<JK_ISA_AVX2>, kernels<JK_ISA_AVX512>, kernels<JK_ISA_AVX512_BF16>)};

const char* choose(const jk_sliced_gaussianity_params& p, int& isa) {
  if (p.knots < 1 || p.knots > JK_MOST_KNOTS)
    return refuse("sliced_gaussianity: knots must be from 1 to %d, got %lld.", int(JK_MOST_KNOTS),
                  (long long)p.knots);
  return choose_isa("sliced_gaussianity", isa);
}

int64_t across(int64_t columns) { return (columns + kTurnedColumns - 1) / kTurnedColumns; }

void words(int64_t begin, int64_t end, void* context) {
  const auto& p = *(const jk_sliced_gaussianity_words_params*)context;
  const auto step = (uint64_t)p.step;
  for (int64_t block = begin; block < end; ++block) {
    const jk_host::Words found =
        jk_host::philox4x32({(uint32_t)block, (uint32_t)((uint64_t)block >> 32), (uint32_t)step,
                             kStream + ((uint32_t)(step >> 32) << 16)},
                            (uint64_t)p.seed);
    for (int i = 0; i < 4; ++i) p.words[4 * block + i] = (int32_t)found[i];
  }
}

}  // namespace
}  // namespace jk::gaussianity

using namespace jk::gaussianity;

JK_EXPORT int64_t jk_sliced_gaussianity_cpu_piece_rows(int64_t rows) {
  const int64_t fewest = (rows + jk::kMostPieces - 1) / jk::kMostPieces;
  return fewest < jk::kTurnedRows ? jk::kTurnedRows : fewest;
}

JK_EXPORT const char* jk_sliced_gaussianity_cpu_sums(const jk_sliced_gaussianity_params* p, int isa,
                                                     jk_parallel_for parallel_for) {
  if (const char* wrong = choose(*p, isa)) return wrong;
  parallel_for(p->pieces * across(p->columns), 1, jk::best_of(kKernels, isa)()->sums, (void*)p);
  return nullptr;
}

JK_EXPORT const char* jk_sliced_gaussianity_cpu_slope(const jk_sliced_gaussianity_params* p,
                                                      int isa, jk_parallel_for parallel_for) {
  if (const char* wrong = choose(*p, isa)) return wrong;
  const int64_t blocks = (p->rows + jk::kTurnedRows - 1) / jk::kTurnedRows;
  parallel_for(blocks * across(p->columns), 1, jk::best_of(kKernels, isa)()->slope, (void*)p);
  return nullptr;
}

JK_EXPORT const char* jk_sliced_gaussianity_cpu_words(const jk_sliced_gaussianity_words_params* p,
                                                      jk_parallel_for parallel_for) {
  parallel_for(p->blocks, 4096, words, (void*)p);
  return nullptr;
}
