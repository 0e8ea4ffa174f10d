// visible_patch_embed on torch's stable ABI: describes tensors to the C ABI of params.h. No
// arithmetic here.
#include "../binding.h"
#include "params.h"

namespace jk::patches {
namespace {

using Params = jk_visible_patch_embed_params;

void check(bool holds, const char* argument, const char* requirement) {
  STD_TORCH_CHECK(holds, "visible_patch_embed: ", argument, " must ", requirement, ".");
}

void check_contiguous(const Tensor& t, const char* argument, ScalarType type, const Tensor& clip) {
  check(t.is_contiguous() && t.device() == clip.device(), argument,
        "be contiguous and lie where the clip does");
  check(t.scalar_type() == type, argument,
        type == ScalarType::Long    ? "have dtype int64"
        : type == ScalarType::Float ? "have dtype float32"
                                    : "have the dtype of weight");
}

// The clip [B, C, frames, height, width] and its grid.
Params describe(const Tensor& clip, const Tensor& normalisation, int64_t depth, int64_t high,
                int64_t wide) {
  Params p{};
  check(clip.dim() == 5, "clip", "be [B, C, frames, height, width]");
  check(depth >= 1 && high >= 1 && wide >= 1 && clip.size(2) % depth == 0 &&
            clip.size(3) % high == 0 && clip.size(4) % wide == 0,
        "clip", "be a whole number of tubelets");
  p.clip_dtype = clip.scalar_type() == ScalarType::Byte ? int64_t{JK_UINT8}
                                                        : dtype_code("visible_patch_embed", clip);
  p.clip = clip.const_data_ptr();
  p.batch = clip.size(0);
  p.channels = clip.size(1);
  p.steps = clip.size(2) / depth;
  p.lines = clip.size(3) / high;
  p.sites = clip.size(4) / wide;
  p.depth = depth;
  p.high = high;
  p.wide = wide;
  p.clip_stride = clip.stride(0);
  p.channel_stride = clip.stride(1);
  p.frame_stride = clip.stride(2);
  p.line_stride = clip.stride(3);
  p.pixel_stride = clip.stride(4);
  check_contiguous(normalisation, "normalisation", ScalarType::Float, clip);
  check(
      normalisation.dim() == 2 && normalisation.size(0) == 2 && normalisation.size(1) == p.channels,
      "normalisation", "be [2, C]");
  p.gain = normalisation.const_data_ptr<float>();
  p.shift = p.gain + p.channels;
  return p;
}

int64_t pixels_of(const Params& p) { return p.channels * p.depth * p.high * p.wide; }

void add_rows(Params& p, const Tensor& rows, const Tensor& clip) {
  check_contiguous(rows, "rows", ScalarType::Long, clip);
  check(rows.dim() == 1, "rows", "be [count]");
  check(rows.numel() == 0 || p.batch * p.steps * p.lines * p.sites > 0, "rows",
        "be empty without a token");
  p.rows = rows.const_data_ptr<int64_t>();
  p.count = rows.size(0);
}

void gather(Tensor pixels, const Tensor& clip, const Tensor& rows, const Tensor& normalisation,
            int64_t depth, int64_t high, int64_t wide, int64_t isa) {
  Params p = describe(clip, normalisation, depth, high, wide);
  add_rows(p, rows, clip);
  check(pixels.dim() == 2 && pixels.is_contiguous() && pixels.is_cpu() &&
            pixels.size(0) == p.count && pixels.size(1) == pixels_of(p),
        "pixels", "be contiguous [count, K]");
  p.pixels_dtype = dtype_code("visible_patch_embed", pixels);
  check(p.pixels_dtype != JK_FLOAT16, "pixels", "have dtype float32 or bfloat16");
  p.pixels = pixels.mutable_data_ptr();
  check_sentence(jk_visible_patch_embed_cpu_gather(&p, isa_code(isa), parallel_for));
}

void scatter(Tensor clip, const Tensor& of_pixels, const Tensor& order, const Tensor& starts,
             const Tensor& normalisation, int64_t depth, int64_t high, int64_t wide, int64_t isa) {
  Params p = describe(clip, normalisation, depth, high, wide);
  check(p.clip_dtype != JK_UINT8 && clip.is_contiguous(), "clip", "be contiguous and float");
  check_contiguous(of_pixels, "of_pixels", ScalarType::Float, clip);
  check_contiguous(order, "order", ScalarType::Long, clip);
  check_contiguous(starts, "starts", ScalarType::Long, clip);
  check(of_pixels.dim() == 2 && of_pixels.size(1) == pixels_of(p), "of_pixels", "be [count, K]");
  check(order.dim() == 1 && order.size(0) == of_pixels.size(0), "order", "be [count]");
  check(starts.dim() == 1 && starts.size(0) == p.batch * p.steps * p.lines * p.sites + 1, "starts",
        "be [tokens + 1]");
  p.count = order.size(0);
  p.of_pixels = of_pixels.const_data_ptr<float>();
  p.order = order.const_data_ptr<int64_t>();
  p.starts = starts.const_data_ptr<int64_t>();
  p.clip_gradient = clip.mutable_data_ptr();
  if (clip.numel() == 0) return;
  if (clip.is_cpu()) {
    check_sentence(jk_visible_patch_embed_cpu_scatter(&p, isa_code(isa), parallel_for));
    return;
  }
  run_on_gpu("jk_visible_patch_embed_cuda_scatter", p, clip);
}

// The weight as it is, or the gradient of the output, in the dtype of products.
void add_operand(Params& p, const Tensor& operand, const char* argument, const Tensor& clip) {
  p.dtype = dtype_code("visible_patch_embed", operand);
  check_contiguous(operand, argument, operand.scalar_type(), clip);
}

Tensor embed(const Tensor& clip, const Tensor& rows, const Tensor& normalisation,
             const Tensor& weight, std::optional<Tensor> bias) {
  check(weight.dim() == 5 && weight.size(1) == clip.size(1), "weight", "be [D, C, pt, ph, pw]");
  Params p = describe(clip, normalisation, weight.size(2), weight.size(3), weight.size(4));
  add_rows(p, rows, clip);
  add_operand(p, weight, "weight", clip);
  p.width = weight.size(0);
  p.weight = weight.const_data_ptr();
  if (bias) {
    check_contiguous(*bias, "bias", weight.scalar_type(), clip);
    check(bias->dim() == 1 && bias->size(0) == p.width, "bias", "be [D]");
    p.bias = bias->const_data_ptr();
  }
  Tensor out = fresh_tensor(weight, {p.count, p.width});
  p.out = out.mutable_data_ptr();
  run_on_gpu("jk_visible_patch_embed_cuda_embed", p, clip);
  return out;
}

Tensor weight_gradient(const Tensor& clip, const Tensor& rows, const Tensor& normalisation,
                       const Tensor& grad_out, int64_t depth, int64_t high, int64_t wide) {
  Params p = describe(clip, normalisation, depth, high, wide);
  add_rows(p, rows, clip);
  add_operand(p, grad_out, "grad_out", clip);
  check(grad_out.dim() == 2 && grad_out.size(0) == p.count, "grad_out", "be [count, D]");
  p.width = grad_out.size(1);
  p.grad_out = grad_out.const_data_ptr();
  p.piece_rows = reinterpret_cast<int64_t (*)(int64_t, int64_t, int64_t)>(
      cuda_symbol("jk_visible_patch_embed_cuda_piece_rows"))(p.count, p.width, pixels_of(p));
  p.pieces = std::max<int64_t>(1, (p.count + p.piece_rows - 1) / p.piece_rows);
  Tensor out = fresh_tensor(normalisation, {p.pieces, p.width, pixels_of(p)});
  p.weight_gradient = out.mutable_data_ptr<float>();
  run_on_gpu("jk_visible_patch_embed_cuda_weight_gradient", p, clip);
  return out;
}

}  // namespace
}  // namespace jk::patches

JK_LIBRARY_FRAGMENT(m) {
  m.def(
      "visible_patch_embed_gather_(Tensor(a!) pixels, Tensor clip, Tensor rows, Tensor "
      "normalisation, int depth, int high, int wide, int isa) -> ()");
  m.def(
      "visible_patch_embed_scatter_(Tensor(a!) clip, Tensor of_pixels, Tensor order, Tensor "
      "starts, "
      "Tensor normalisation, int depth, int high, int wide, int isa) -> ()");
  m.def(
      "visible_patch_embed_embed(Tensor clip, Tensor rows, Tensor normalisation, Tensor weight, "
      "Tensor? bias) -> Tensor");
  m.def(
      "visible_patch_embed_weight_gradient(Tensor clip, Tensor rows, Tensor normalisation, Tensor "
      "grad_out, int depth, int high, int wide) -> Tensor");
}

JK_LIBRARY_IMPL(CPU, m) {
  m.impl("visible_patch_embed_gather_", TORCH_BOX(&jk::patches::gather));
  m.impl("visible_patch_embed_scatter_", TORCH_BOX(&jk::patches::scatter));
}
JK_LIBRARY_IMPL(CUDA, m) {
  m.impl("visible_patch_embed_embed", TORCH_BOX(&jk::patches::embed));
  m.impl("visible_patch_embed_weight_gradient", TORCH_BOX(&jk::patches::weight_gradient));
  m.impl("visible_patch_embed_scatter_", TORCH_BOX(&jk::patches::scatter));
}
