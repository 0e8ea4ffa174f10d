// Registers ema_update's native ops: checks what a direct caller of torch.ops could get wrong,
// fills the C ABI's structs, calls the CPU kernel or the CUDA library. No arithmetic.
#include "describe.h"

namespace jk::ema {
namespace {

constexpr const char* kOp = "ema_update_";

std::vector<jk_ema_tensor> entries(const Tensors& targets, const Tensors& sources,
                                   const Tensors& copies, const Tensors& compensations,
                                   const std::vector<int64_t>& streams, int64_t rounding) {
  check_length(kOp, "sources", sources.size(), targets.size(), false);
  check_length(kOp, "copies", copies.size(), targets.size(), true);
  check_length(kOp, "compensations", compensations.size(), targets.size(),
               rounding != JK_ROUND_KAHAN);
  check_length(kOp, "streams", streams.size(), targets.size(), false);
  std::vector<jk_ema_tensor> list;
  list.reserve(targets.size());
  for (size_t i = 0; i < targets.size(); i++) {
    check_array(kOp, "targets", targets[i], targets[i]);
    check_array(kOp, "sources", sources[i], targets[i]);
    jk_ema_tensor e = ema_entry(kOp, i, targets[i], copies, compensations, streams, rounding);
    e.source = sources[i].const_data_ptr();
    e.source_dtype = static_cast<int32_t>(dtype_code(kOp, sources[i]));
    list.push_back(e);
  }
  return list;
}

jk_ema_update_params describe(const std::vector<jk_ema_tensor>& list, const Tensor& momentum,
                              int64_t rounding, const std::optional<Tensor>& seed) {
  jk_ema_update_params p{};
  p.tensors = list.data();
  p.num_tensors = static_cast<int64_t>(list.size());
  describe_average(p, kOp, momentum, rounding, seed);
  return p;
}

void update_cpu(Tensors targets, Tensors sources, const Tensor& momentum, Tensors copies,
                Tensors compensations, std::vector<int64_t> streams, int64_t rounding,
                const std::optional<Tensor>& seed, int64_t isa) {
  const auto list = entries(targets, sources, copies, compensations, streams, rounding);
  const auto p = describe(list, momentum, rounding, seed);
  check_on_host(p, kOp);
  check_sentence(jk_ema_update_cpu_fwd(&p, isa_code(isa), parallel_for));
}

void update_cuda(Tensors targets, Tensors sources, const Tensor& momentum, Tensors copies,
                 Tensors compensations, std::vector<int64_t> streams, int64_t rounding,
                 const std::optional<Tensor>& seed) {
  if (targets.empty()) return;
  const auto list = entries(targets, sources, copies, compensations, streams, rounding);
  const auto p = describe(list, momentum, rounding, seed);
  const auto run = reinterpret_cast<const char* (*)(const jk_ema_update_params*, void*)>(
      cuda_symbol("jk_ema_update_cuda_fwd"));
  const int32_t device = targets[0].get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  check_sentence(run(&p, cuda_stream(device)));
}

}  // namespace
}  // namespace jk::ema

JK_LIBRARY_FRAGMENT(m) {
  m.def(
      "ema_update_cpu_(Tensor(a!)[] targets, Tensor[] sources, Tensor momentum, Tensor(b!)[] "
      "copies, Tensor(c!)[] compensations, "
      "int[] streams, int rounding, Tensor? seed, int isa) -> ()");
  m.def(
      "ema_update_cuda_(Tensor(a!)[] targets, Tensor[] sources, Tensor momentum, Tensor(b!)[] "
      "copies, Tensor(c!)[] compensations, "
      "int[] streams, int rounding, Tensor? seed) -> ()");
}

JK_LIBRARY_IMPL(CPU, m) { m.impl("ema_update_cpu_", TORCH_BOX(&jk::ema::update_cpu)); }
JK_LIBRARY_IMPL(CUDA, m) { m.impl("ema_update_cuda_", TORCH_BOX(&jk::ema::update_cuda)); }
