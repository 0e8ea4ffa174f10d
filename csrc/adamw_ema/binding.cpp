// Registers adamw_ema's native ops: checks what a direct caller of torch.ops could get wrong, fills
// the C ABI's structs, calls the CPU kernel or the CUDA library. No arithmetic.
#include "../ema_update/describe.h"
#include "params.h"

namespace jk::adamw {
namespace {

using namespace jk::ema;

constexpr const char* kOp = "adamw_ema_";

// The lists of one call. The first targets.size() parameters are followed by a teacher.
struct Lists {
  Tensors params, grads, exp_avgs, exp_avg_sqs, steps, targets, copies, compensations;
  std::vector<int64_t> groups, streams;
};

void check_lists(const Lists& l, const Tensor& hyper, int64_t rounding) {
  for (const auto& [list, name] :
       {std::pair{&l.grads, "grads"}, std::pair{&l.exp_avgs, "exp_avgs"},
        std::pair{&l.exp_avg_sqs, "exp_avg_sqs"}, std::pair{&l.steps, "steps"}}) {
    STD_TORCH_CHECK(list->size() == l.params.size(), kOp, ": ", name,
                    " must have one entry for each parameter.");
  }
  STD_TORCH_CHECK(l.groups.size() == l.params.size(), kOp,
                  ": groups must have one entry for each parameter.");
  STD_TORCH_CHECK(l.targets.size() <= l.params.size(), kOp,
                  ": targets must not be more than the parameters.");
  check_length(kOp, "copies", l.copies.size(), l.targets.size(), true);
  check_length(kOp, "compensations", l.compensations.size(), l.targets.size(),
               rounding != JK_ROUND_KAHAN);
  check_length(kOp, "streams", l.streams.size(), l.targets.size(), false);
  STD_TORCH_CHECK(hyper.dim() == 2 && hyper.size(1) == JK_ADAMW_COLUMNS &&
                      hyper.scalar_type() == ScalarType::Double && hyper.is_contiguous(),
                  kOp, ": hyper must be contiguous float64 of shape [groups, 6].");
  for (const int64_t group : l.groups)
    STD_TORCH_CHECK(group >= 0 && group < hyper.size(0), kOp, ": groups must hold rows of hyper.");
}

void describe_step(jk_adamw_tensor& e, const Tensor& step, const Tensor& param) {
  const bool wide = step.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(step.numel() == 1 && (wide || step.scalar_type() == ScalarType::Float), kOp,
                  ": steps must be float numbers.");
  if (!step.device().is_cpu()) {
    STD_TORCH_CHECK(!wide && step.device() == param.device(), kOp,
                    ": steps on a device must be float32 beside their parameters.");
    e.step_device = step.const_data_ptr<float>();
  } else {
    e.step =
        wide ? *step.const_data_ptr<double>() : static_cast<double>(*step.const_data_ptr<float>());
  }
}

std::vector<jk_adamw_tensor> entries(const Lists& l, int64_t rounding) {
  std::vector<jk_adamw_tensor> list;
  list.reserve(l.params.size());
  for (size_t i = 0; i < l.params.size(); i++) {
    const Tensor& param = l.params[i];
    check_array(kOp, "params", param, param);
    check_array(kOp, "grads", l.grads[i], param);
    check_array(kOp, "exp_avgs", l.exp_avgs[i], param);
    check_array(kOp, "exp_avg_sqs", l.exp_avg_sqs[i], param);
    STD_TORCH_CHECK(l.exp_avgs[i].scalar_type() == l.exp_avg_sqs[i].scalar_type(), kOp,
                    ": exp_avgs and exp_avg_sqs must have one dtype.");
    jk_adamw_tensor e{};
    e.param = const_cast<void*>(param.const_data_ptr());
    e.grad = l.grads[i].const_data_ptr();
    e.exp_avg = const_cast<void*>(l.exp_avgs[i].const_data_ptr());
    e.exp_avg_sq = const_cast<void*>(l.exp_avg_sqs[i].const_data_ptr());
    e.numel = param.numel();
    e.param_dtype = static_cast<int32_t>(dtype_code(kOp, param));
    e.grad_dtype = static_cast<int32_t>(dtype_code(kOp, l.grads[i]));
    e.state_dtype = static_cast<int32_t>(dtype_code(kOp, l.exp_avgs[i]));
    e.group = static_cast<int32_t>(l.groups[i]);
    describe_step(e, l.steps[i], param);
    if (i < l.targets.size()) {
      check_array(kOp, "targets", l.targets[i], param);
      e.ema = ema_entry(kOp, i, l.targets[i], l.copies, l.compensations, l.streams, rounding);
    }
    list.push_back(e);
  }
  return list;
}

const float* flag(const std::optional<Tensor>& t, const Tensor& like, const char* name) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(
      t->numel() == 1 && t->scalar_type() == ScalarType::Float && t->device() == like.device(), kOp,
      ": ", name, " must be one float32 number on the device of params.");
  return t->const_data_ptr<float>();
}

jk_adamw_ema_params describe(const Lists& l, const std::vector<jk_adamw_tensor>& list,
                             const Tensor& hyper, const Tensor& momentum, int64_t rounding,
                             const std::optional<Tensor>& seed,
                             const std::optional<Tensor>& grad_scale,
                             const std::optional<Tensor>& found_inf) {
  jk_adamw_ema_params p{};
  p.tensors = list.data();
  p.num_tensors = static_cast<int64_t>(list.size());
  (hyper.device().is_cpu() ? p.hyper : p.hyper_device) = hyper.const_data_ptr<double>();
  p.grad_scale = flag(grad_scale, l.params[0], "grad_scale");
  p.found_inf = flag(found_inf, l.params[0], "found_inf");
  describe_average(p, kOp, momentum, rounding, seed);
  return p;
}

void step_cpu(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps,
              const Tensor& hyper, std::vector<int64_t> groups, Tensors targets,
              const Tensor& momentum, Tensors copies, Tensors compensations,
              std::vector<int64_t> streams, int64_t rounding, const std::optional<Tensor>& seed,
              const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
              int64_t isa) {
  if (params.empty()) return;
  const Lists l{std::move(params),      std::move(grads),         std::move(exp_avgs),
                std::move(exp_avg_sqs), std::move(steps),         std::move(targets),
                std::move(copies),      std::move(compensations), std::move(groups),
                std::move(streams)};
  check_lists(l, hyper, rounding);
  STD_TORCH_CHECK(hyper.device().is_cpu(), kOp,
                  ": hyper must be on the CPU with parameters on the CPU.");
  const auto list = entries(l, rounding);
  const auto p = describe(l, list, hyper, momentum, rounding, seed, grad_scale, found_inf);
  check_on_host(p, kOp);
  check_sentence(jk_adamw_ema_cpu_fwd(&p, isa_code(isa), parallel_for));
}

void step_cuda(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps,
               const Tensor& hyper, std::vector<int64_t> groups, Tensors targets,
               const Tensor& momentum, Tensors copies, Tensors compensations,
               std::vector<int64_t> streams, int64_t rounding, const std::optional<Tensor>& seed,
               const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  if (params.empty()) return;
  const Lists l{std::move(params),      std::move(grads),         std::move(exp_avgs),
                std::move(exp_avg_sqs), std::move(steps),         std::move(targets),
                std::move(copies),      std::move(compensations), std::move(groups),
                std::move(streams)};
  check_lists(l, hyper, rounding);
  const auto list = entries(l, rounding);
  const auto p = describe(l, list, hyper, momentum, rounding, seed, grad_scale, found_inf);
  run_on_gpu("jk_adamw_ema_cuda_fwd", p, l.params[0]);
}

}  // namespace
}  // namespace jk::adamw

JK_LIBRARY_FRAGMENT(m) {
  m.def(
      "adamw_ema_cpu_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] "
      "exp_avg_sqs, Tensor[] steps, Tensor hyper, "
      "int[] groups, Tensor(d!)[] targets, Tensor momentum, Tensor(e!)[] copies, Tensor(f!)[] "
      "compensations, int[] streams, int rounding, "
      "Tensor? seed, Tensor? grad_scale, Tensor? found_inf, int isa) -> ()");
  m.def(
      "adamw_ema_cuda_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] "
      "exp_avg_sqs, Tensor[] steps, Tensor hyper, "
      "int[] groups, Tensor(d!)[] targets, Tensor momentum, Tensor(e!)[] copies, Tensor(f!)[] "
      "compensations, int[] streams, int rounding, "
      "Tensor? seed, Tensor? grad_scale, Tensor? found_inf) -> ()");
}

JK_LIBRARY_IMPL(CPU, m) { m.impl("adamw_ema_cpu_", TORCH_BOX(&jk::adamw::step_cpu)); }
JK_LIBRARY_IMPL(CUDA, m) { m.impl("adamw_ema_cuda_", TORCH_BOX(&jk::adamw::step_cuda)); }
