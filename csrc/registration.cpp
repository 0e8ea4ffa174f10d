// The torch library of this package on the stable ABI: version, instruction set, and the CUDA
// kernel library's location. Each op registers itself in csrc/<op>/binding.cpp. No arithmetic here.
#include <dlfcn.h>

#include <mutex>

#include "binding.h"
#include "cpu/dispatch.h"

namespace jk {
namespace {

std::mutex cuda_mutex;
std::string cuda_path;
void* cuda_handle = nullptr;

int64_t abi_version() { return JK_ABI_VERSION; }
int64_t cpu_isa() { return static_cast<int64_t>(best_isa()); }

void set_cuda_library(std::string path) {
  std::lock_guard<std::mutex> lock(cuda_mutex);
  cuda_path = std::move(path);
}

}  // namespace

void* cuda_symbol(const char* name) {
  std::lock_guard<std::mutex> lock(cuda_mutex);
  if (cuda_handle == nullptr) {
    STD_TORCH_CHECK(!cuda_path.empty(), "jepa_kernels: the CUDA library is not built.");
    cuda_handle = dlopen(cuda_path.c_str(), RTLD_NOW | RTLD_LOCAL);
    STD_TORCH_CHECK(cuda_handle != nullptr,
                    "jepa_kernels: the CUDA library does not load: ", dlerror());
  }
  void* symbol = dlsym(cuda_handle, name);
  STD_TORCH_CHECK(symbol != nullptr, "jepa_kernels: the CUDA library has no function ", name, ".");
  return symbol;
}

void* cuda_stream(int32_t device) {
  // libtorch_cuda is already in the process when a CUDA tensor is; RTLD_DEFAULT would not find the
  // symbol.
  using current_stream = int32_t (*)(int32_t, void**);
  static current_stream function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<current_stream>(
                                    dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(function != nullptr, "jepa_kernels: this build of torch has no CUDA.");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0,
                  "jepa_kernels: torch gave no CUDA stream for device ", device, ".");
  return stream;
}

}  // namespace jk

JK_LIBRARY_FRAGMENT(m) {
  m.def("abi_version() -> int");
  m.def("cpu_isa() -> int");
  m.def("advise_huge_pages(Tensor fresh) -> ()");
  m.def("set_cuda_library(str path) -> ()");
}

JK_LIBRARY_IMPL(CompositeExplicitAutograd, m) {
  m.impl("advise_huge_pages", TORCH_BOX(&jk::advise_huge_pages));
  m.impl("abi_version", TORCH_BOX(&jk::abi_version));
  m.impl("cpu_isa", TORCH_BOX(&jk::cpu_isa));
  m.impl("set_cuda_library", TORCH_BOX(&jk::set_cuda_library));
}
