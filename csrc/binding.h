// What every op's binding.cpp shares: torch's thread pool as a jk_parallel_for, dtype codes,
// strided views, the CUDA library.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "abi.h"

// Copies of the package that meet in one process register their ops under names of their own, that
// of their Python package with _native behind it; setup.py passes one on (JEPA_KERNELS_NAMESPACE).
#ifndef JK_LIBRARY
#define JK_LIBRARY jepa_kernels_native
#endif
#define JK_EXPANDED(macro, ...) macro(__VA_ARGS__)
#define JK_LIBRARY_FRAGMENT(m) JK_EXPANDED(STABLE_TORCH_LIBRARY_FRAGMENT, JK_LIBRARY, m)
#define JK_LIBRARY_IMPL(key, m) JK_EXPANDED(STABLE_TORCH_LIBRARY_IMPL, JK_LIBRARY, key, m)

namespace jk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch's intra-op pool behind the C callback. A negative grain asks for one piece per unit of
// work.
inline void parallel_for(int64_t count, int64_t grain, jk_body body, void* context) {
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

inline bool is_kernel_dtype(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline int64_t dtype_code(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return JK_FLOAT32;
    case ScalarType::BFloat16:
      return JK_BFLOAT16;
    case ScalarType::Half:
      return JK_FLOAT16;
    default:
      STD_TORCH_CHECK(false, op, ": dtype must be float32, bfloat16 or float16.");
  }
  return -1;
}

// A contiguous tensor on the device of `like`. torch::stable::new_empty looks its op up by name at
// every call, which takes as long as a small kernel.
inline Tensor fresh_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                           std::optional<ScalarType> type = std::nullopt) {
  int32_t dtype = 0, device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  if (type) {
    dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*type));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  }
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1))
    strides[d] = stride;
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                         sizes.data(), strides.data(), dtype,
                                                         device, like.get_device_index(), &made));
  return Tensor(made);
}

// An isa argument as kernels take it; one beyond an int becomes one that no processor has.
inline int isa_code(int64_t isa) {
  return isa == static_cast<int>(isa) ? static_cast<int>(isa) : JK_ISA_COUNT;
}

// Asks for huge pages under a new CPU tensor of 32 MiB or more, which malloc takes from the system
// and gives back each time: filling 4 KiB pages for the first time takes as long as the kernels
// that fill them. A wish: where the system has none, nothing changes.
inline void advise_huge_pages(const Tensor& t) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t kLarge = int64_t{1} << 25, kPage = int64_t{1} << 21;
  const int64_t bytes = t.numel() * static_cast<int64_t>(t.element_size());
  if (!t.is_cpu() || bytes < kLarge) return;
  const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage,
                  last = (begin + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)t;
#endif
}

inline void check_sentence(const char* sentence) { STD_TORCH_CHECK(sentence == nullptr, sentence); }

// A function of the CUDA kernel library, which is opened at its first use. Throws a sentence when
// it is missing.
void* cuda_symbol(const char* name);
// The current CUDA stream of the device, as torch sees it.
void* cuda_stream(int32_t device);
// Calls one of its functions, by name, on the current stream of the device of `like`.
template <class Params>
inline void run_on_gpu(const char* name, const Params& p, const Tensor& like) {
  const auto run = reinterpret_cast<const char* (*)(const Params*, void*)>(cuda_symbol(name));
  const int32_t device = like.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  check_sentence(run(&p, cuda_stream(device)));
}

}  // namespace jk
