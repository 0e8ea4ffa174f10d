// sliced_gaussianity on torch's stable ABI: describes tensors to the C ABI of params.h. No
// arithmetic here.
#include "../binding.h"
#include "params.h"

namespace jk::gaussianity {
namespace {

void check(bool holds, const char* argument, const char* requirement) {
  STD_TORCH_CHECK(holds, "sliced_gaussianity: ", argument, " must ", requirement, ".");
}

void check_float(const Tensor& t, const char* argument) {
  check(t.scalar_type() == ScalarType::Float && t.is_contiguous(), argument,
        "be contiguous and float32");
}

jk_sliced_gaussianity_params describe(const Tensor& projections, int64_t knots, double spacing) {
  check_float(projections, "projections");
  check(projections.dim() == 2, "projections", "be [rows, columns]");
  check(knots >= 1 && knots <= JK_MOST_KNOTS, "knots", "be from 1 to 64");
  jk_sliced_gaussianity_params p{};
  p.rows = projections.size(0);
  p.columns = projections.size(1);
  p.knots = knots;
  p.spacing = (float)spacing;
  p.projections = projections.const_data_ptr<float>();
  return p;
}

// The C function of an op on the processor or, by name, on the GPU of `like`.
void run(const jk_sliced_gaussianity_params& p, const Tensor& like, int64_t isa,
         const char* (*cpu)(const jk_sliced_gaussianity_params*, int, jk_parallel_for),
         const char* name) {
  if (p.rows == 0 || p.columns == 0) return;
  if (like.is_cpu()) {
    check_sentence(cpu(&p, isa_code(isa), parallel_for));
    return;
  }
  run_on_gpu(name, p, like);
}

Tensor sums(const Tensor& projections, int64_t knots, double spacing, int64_t isa) {
  auto p = describe(projections, knots, spacing);
  p.piece_rows = projections.is_cpu() ? jk_sliced_gaussianity_cpu_piece_rows(p.rows)
                                      : reinterpret_cast<int64_t (*)(int64_t)>(cuda_symbol(
                                            "jk_sliced_gaussianity_cuda_piece_rows"))(p.rows);
  p.pieces = (p.rows + p.piece_rows - 1) / p.piece_rows;
  Tensor out = fresh_tensor(projections, {p.pieces, 2, knots, p.columns});
  p.sums = out.mutable_data_ptr<float>();
  run(p, projections, isa, jk_sliced_gaussianity_cpu_sums, "jk_sliced_gaussianity_cuda_sums");
  return out;
}

void slope(Tensor projections, const Tensor& coefficients, double spacing, int64_t isa) {
  check(coefficients.dim() == 3 && coefficients.size(0) == 2, "coefficients",
        "be [2, knots, columns]");
  auto p = describe(projections, coefficients.size(1), spacing);
  check_float(coefficients, "coefficients");
  check(coefficients.size(2) == p.columns && coefficients.device() == projections.device(),
        "coefficients", "have the columns of projections and lie where they do");
  p.coefficients = coefficients.const_data_ptr<float>();
  p.slope = projections.mutable_data_ptr<float>();
  run(p, projections, isa, jk_sliced_gaussianity_cpu_slope, "jk_sliced_gaussianity_cuda_slope");
}

void words(Tensor out, int64_t seed, int64_t step) {
  check(out.scalar_type() == ScalarType::Int && out.is_contiguous() && out.numel() % 4 == 0,
        "words", "be contiguous int32, a multiple of four");
  jk_sliced_gaussianity_words_params p{};
  p.blocks = out.numel() / 4;
  p.seed = seed;
  p.step = step;
  p.words = out.mutable_data_ptr<int32_t>();
  check_sentence(jk_sliced_gaussianity_cpu_words(&p, parallel_for));
}

}  // namespace
}  // namespace jk::gaussianity

JK_LIBRARY_FRAGMENT(m) {
  m.def("sliced_gaussianity_sums(Tensor projections, int knots, float spacing, int isa) -> Tensor");
  m.def(
      "sliced_gaussianity_slope_(Tensor(a!) projections, Tensor coefficients, float spacing, int "
      "isa) -> ()");
  m.def("sliced_gaussianity_words_(Tensor(a!) words, int seed, int step) -> ()");
}

JK_LIBRARY_IMPL(CPU, m) {
  m.impl("sliced_gaussianity_sums", TORCH_BOX(&jk::gaussianity::sums));
  m.impl("sliced_gaussianity_slope_", TORCH_BOX(&jk::gaussianity::slope));
  m.impl("sliced_gaussianity_words_", TORCH_BOX(&jk::gaussianity::words));
}
JK_LIBRARY_IMPL(CUDA, m) {
  m.impl("sliced_gaussianity_sums", TORCH_BOX(&jk::gaussianity::sums));
  m.impl("sliced_gaussianity_slope_", TORCH_BOX(&jk::gaussianity::slope));
}
