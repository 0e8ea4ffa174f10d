// Registers ema_update's native ops: checks what a direct caller of torch.ops could get wrong,
// fills the C ABI's structs, calls the CPU kernel or the CUDA library. No arithmetic.
#include <algorithm>
#include <functional>
#include <numeric>
#include <utility>

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

// Whether two targets share memory.
bool overlap(const std::vector<jk_ema_tensor>& list) {
  const auto begin = [](const jk_ema_tensor& e) { return static_cast<const char*>(e.target); };
  const auto end = [&](const jk_ema_tensor& e) {
    return begin(e) + e.numel * (e.target_dtype == JK_FLOAT32 ? 4 : 2);
  };
  bool rising = true;
  for (size_t i = 1; i < list.size(); i++) rising = rising && end(list[i - 1]) <= begin(list[i]);
  if (rising) return false;
  std::vector<std::pair<const char*, const char*>> spans;
  for (const jk_ema_tensor& e : list) spans.emplace_back(begin(e), end(e));
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); i++)
    if (spans[i].first < spans[i - 1].second) return true;
  return false;
}

// A list argument by torch's handles. std::vector<Tensor> would share ownership of each entry,
// which takes longer than the update of a small one.
class Entries {
 public:
  explicit Entries(StableIValue value) {
    const auto list = torch::stable::detail::to<StableListHandle>(value);
    size_t size = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    handles_.resize(size);
    for (size_t i = 0; i < size; i++) {
      StableIValue entry;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &entry));
      handles_[i] = torch::stable::detail::to<AtenTensorHandle>(entry);
    }
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  }
  Entries(const Entries&) = delete;
  Entries& operator=(const Entries&) = delete;
  ~Entries() {
    for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
  }
  size_t size() const { return handles_.size(); }
  AtenTensorHandle operator[](size_t i) const { return handles_[i]; }

 private:
  std::vector<AtenTensorHandle> handles_;
};

struct Plain {
  void* data;
  int64_t* sizes;
  int64_t dim, numel;
  int32_t dtype;
};

// False unless `t` is a contiguous CPU tensor with elements of a dtype that kernels take.
bool read_plain(AtenTensorHandle t, Plain& plain) {
  static const int32_t cpu = aoti_torch_device_type_cpu(),
                       codes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                  aoti_torch_dtype_float16()};
  static const int32_t strided = aoti_torch_layout_strided();
  int32_t device = 0, dtype = 0, layout = 0;
  bool contiguous = false;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t, &device));
  if (device != cpu) return false;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t, &dtype));
  for (plain.dtype = 0; plain.dtype < 3 && codes[plain.dtype] != dtype;) plain.dtype++;
  if (plain.dtype == 3) return false;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t, &layout));
  if (layout != strided) return false;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(t, &contiguous));
  if (!contiguous) return false;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t, &plain.dim));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t, &plain.sizes));
  plain.numel =
      std::accumulate(plain.sizes, plain.sizes + plain.dim, int64_t{1}, std::multiplies<int64_t>());
  if (plain.numel == 0) return false;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(t, &plain.data));
  return true;
}

bool update_plain(const Entries& targets, const Entries& sources, double momentum, int64_t isa) {
  if (targets.size() != sources.size()) return false;
  std::vector<jk_ema_tensor> list(targets.size());
  for (size_t i = 0; i < targets.size(); i++) {
    Plain target, source;
    if (!read_plain(targets[i], target) || !read_plain(sources[i], source) ||
        target.dim != source.dim ||
        !std::equal(target.sizes, target.sizes + target.dim, source.sizes))
      return false;
    jk_ema_tensor& e = list[i];
    e.target = target.data;
    e.source = source.data;
    e.numel = target.numel;
    e.target_dtype = target.dtype;
    e.source_dtype = source.dtype;
  }
  if (overlap(list)) return false;
  jk_ema_update_params p{};
  p.tensors = list.data();
  p.num_tensors = static_cast<int64_t>(list.size());
  p.momentum = momentum;
  check_sentence(jk_ema_update_cpu_fwd(&p, isa_code(isa), parallel_for));
  return true;
}

// The update of a list in which nothing is special, checked here in one pass because Python would
// need longer for its checks than a short list for its update. False, with nothing written, where
// anything is: another device, dtype or shape, strides, no elements, a target that occurs twice.
void update_plain_cpu(StableIValue* stack, uint64_t, uint64_t) {
  const Entries targets(stack[0]), sources(stack[1]);
  const auto momentum = torch::stable::detail::to<double>(stack[2]);
  const auto isa = torch::stable::detail::to<int64_t>(stack[3]);
  stack[0] = torch::stable::detail::from(update_plain(targets, sources, momentum, isa));
}

void update_cuda(Tensors targets, Tensors sources, const Tensor& momentum, Tensors copies,
                 Tensors compensations, std::vector<int64_t> streams, int64_t rounding,
                 const std::optional<Tensor>& seed) {
  if (targets.empty()) return;
  const auto list = entries(targets, sources, copies, compensations, streams, rounding);
  const auto p = describe(list, momentum, rounding, seed);
  run_on_gpu("jk_ema_update_cuda_fwd", p, targets[0]);
}

}  // namespace
}  // namespace jk::ema

JK_LIBRARY_FRAGMENT(m) {
  m.def(
      "ema_update_cpu_(Tensor(a!)[] targets, Tensor[] sources, Tensor momentum, Tensor(b!)[] "
      "copies, Tensor(c!)[] compensations, "
      "int[] streams, int rounding, Tensor? seed, int isa) -> ()");
  m.def(
      "ema_update_plain_cpu_(Tensor(a!)[] targets, Tensor[] sources, float momentum, int isa) -> "
      "bool");
  m.def(
      "ema_update_cuda_(Tensor(a!)[] targets, Tensor[] sources, Tensor momentum, Tensor(b!)[] "
      "copies, Tensor(c!)[] compensations, "
      "int[] streams, int rounding, Tensor? seed) -> ()");
}

JK_LIBRARY_IMPL(CPU, m) { m.impl("ema_update_cpu_", TORCH_BOX(&jk::ema::update_cpu)); }
// It looks at the devices itself.
JK_LIBRARY_IMPL(CompositeExplicitAutograd, m) {
  m.impl("ema_update_plain_cpu_", &jk::ema::update_plain_cpu);
}
JK_LIBRARY_IMPL(CUDA, m) { m.impl("ema_update_cuda_", TORCH_BOX(&jk::ema::update_cuda)); }
