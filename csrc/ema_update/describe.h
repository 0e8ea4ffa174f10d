// From torch tensor lists to the entries of the C ABI, for the bindings of ema_update and
// adamw_ema. No arithmetic.
#pragma once
#include "../binding.h"
#include "params.h"

namespace jk::ema {

using Tensors = std::vector<Tensor>;

// Arrays of one entry: same number of elements, one memory order (contiguous), one device.
inline void check_array(const char* op, const char* list, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.numel() == like.numel() && t.is_contiguous() && t.device() == like.device(), op,
                  ": ", list,
                  " must be contiguous, on the device of targets and as long as its target.");
}

inline void check_length(const char* op, const char* list, size_t length, size_t wanted,
                         bool optional) {
  STD_TORCH_CHECK(length == wanted || (optional && length == 0), op, ": ", list,
                  " must have one entry for each target.");
}

// Target, copy and compensation of entry i; the source is the caller's.
inline jk_ema_tensor ema_entry(const char* op, size_t i, const Tensor& target,
                               const Tensors& copies, const Tensors& compensations,
                               const std::vector<int64_t>& streams, int64_t rounding) {
  STD_TORCH_CHECK(target.is_contiguous(), op, ": targets must be contiguous.");
  jk_ema_tensor e{};
  e.target = const_cast<void*>(target.const_data_ptr());
  e.numel = target.numel();
  e.target_dtype = static_cast<int32_t>(dtype_code(op, target));
  e.index = static_cast<int32_t>(streams[i]);
  if (!copies.empty()) {
    check_array(op, "copies", copies[i], target);
    e.copy = const_cast<void*>(copies[i].const_data_ptr());
    e.copy_dtype = static_cast<int32_t>(dtype_code(op, copies[i]));
  }
  if (rounding == JK_ROUND_KAHAN && e.target_dtype != JK_FLOAT32) {
    check_array(op, "compensations", compensations[i], target);
    STD_TORCH_CHECK(compensations[i].scalar_type() == target.scalar_type(), op,
                    ": compensations must have the dtype of their targets.");
    e.compensation = const_cast<void*>(compensations[i].const_data_ptr());
  }
  return e;
}

// A 0-d tensor by value when it is on the host, else its address on the device, so that nothing
// waits.
template <class T>
inline void host_or_device(const Tensor& t, ScalarType type, const char* op, const char* name,
                           T& value, const T*& device) {
  STD_TORCH_CHECK(t.numel() == 1 && t.scalar_type() == type, op, ": ", name,
                  " must be one number of the right dtype.");
  if (t.device().is_cpu()) {
    value = *static_cast<const T*>(t.const_data_ptr());
  } else {
    device = static_cast<const T*>(t.const_data_ptr());
  }
}

// The fields that jk_ema_update_params and jk_adamw_ema_params share.
template <class Params>
inline void describe_average(Params& p, const char* op, const Tensor& momentum, int64_t rounding,
                             const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(rounding >= JK_ROUND_NEAREST && rounding <= JK_ROUND_STOCHASTIC, op,
                  ": rounding must be 0, 1 or 2.");
  STD_TORCH_CHECK(seed.has_value() || rounding != JK_ROUND_STOCHASTIC, op,
                  ": seed must be given with stochastic rounding.");
  p.rounding = rounding;
  host_or_device(momentum, ScalarType::Double, op, "momentum", p.momentum, p.momentum_device);
  if (seed) host_or_device(*seed, ScalarType::Long, op, "seed", p.seed, p.seed_device);
}

// A CPU kernel reads momentum and seed by value.
template <class Params>
inline void check_on_host(const Params& p, const char* op) {
  STD_TORCH_CHECK(p.momentum_device == nullptr && p.seed_device == nullptr, op,
                  ": momentum and seed must be on the CPU with targets on the CPU.");
}

}  // namespace jk::ema
