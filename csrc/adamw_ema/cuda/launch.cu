// adamw_ema on a GPU: one launch over the list (up to 220 parameters; longer lists take more
// launches). A block owns one chunk of one parameter: it reads param, grad, both moments and target
// once and writes all but grad once.
#include "../../ema_update/cuda/lanes.h"
#include "../../ema_update/cuda/launch.h"
#include "../step.h"

namespace jk::adamw {
namespace {

using namespace jk::ema;

constexpr int kRounds = 4;
constexpr int64_t kChunk = kRounds * kThreads * kLanes;

// Where the scalars of a step come from: all from the host, the step number from the device, or the
// hyperparameters too.
enum Origin : uint8_t { kHost, kDeviceStep, kDeviceHyper };

// A jk_adamw_tensor without what the kernel does not read.
struct Entry {
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq, *target, *copy, *compensation;
  int64_t numel;
  const float* step_device;
  union {
    Step known;                      // kHost
    double hyper[JK_ADAMW_COLUMNS];  // kDeviceStep
    struct {
      const double* row;
      double step;  // where step_device is NULL
    } device;       // kDeviceHyper
  } scalars;
  int32_t index;
  uint8_t param_dtype, grad_dtype, state_dtype, target_dtype, copy_dtype;
  Origin origin;
  bool wide;
};

struct Scalars {
  const float* grad_scale;
  const float* found_inf;
  double momentum;
  const double* momentum_device;
  int64_t seed;
  const int64_t* seed_device;
  int rounding;
};

template <int kCapacity>
using List = Chunks<Entry, Scalars, kCapacity>;

JK_DEVICE Step step_of(const Entry& e, const float* grad_scale) {
  Step s;
  if (e.origin == kHost) {
    s = e.scalars.known;
  } else if (e.origin == kDeviceStep) {
    s = step_of(e.scalars.hyper, double(*e.step_device));
  } else {
    s = step_of(e.scalars.device.row,
                e.step_device == nullptr ? e.scalars.device.step : double(*e.step_device));
  }
  if (grad_scale != nullptr) s.grad_factor /= *grad_scale;
  return s;
}

// The elements of one thread by AdamW, rounded as the CPU kernel rounds them.
JK_DEVICE void adamw_lanes(Lanes& param, const Lanes& grad, Lanes& exp_avg, Lanes& exp_avg_sq,
                           const Step& s) {
#pragma unroll
  for (int i = 0; i < kLanes; i++) {
    const float g = __fmul_rn(grad.x[i], s.grad_factor);
    const float m = __fadd_rn(exp_avg.x[i], __fmul_rn(s.take1, __fsub_rn(g, exp_avg.x[i])));
    const float v =
        __fadd_rn(__fmul_rn(s.beta2, exp_avg_sq.x[i]), __fmul_rn(s.take2, __fmul_rn(g, g)));
    const float denominator = __fadd_rn(__fmul_rn(__fsqrt_rn(v), s.inverse_sqrt2), s.eps);
    param.x[i] = __fsub_rn(__fmul_rn(param.x[i], s.decay), __fmul_rn(s.size, m / denominator));
    exp_avg.x[i] = m;
    exp_avg_sq.x[i] = v;
  }
}

JK_DEVICE void adamw_ema_lanes(const Entry& e, const Place& at, const Step& s, EmaWeights w,
                               int rounding, RandomKey key) {
  const jk_ema_tensor t{e.target,       nullptr,    e.copy,       e.compensation, e.numel,
                        e.target_dtype, JK_FLOAT32, e.copy_dtype, e.index};
  Lanes param, grad, exp_avg, exp_avg_sq, target;
  load_lanes(param, e.param, e.param_dtype, at, e.wide);
  load_lanes(grad, e.grad, e.grad_dtype, at, e.wide);
  load_lanes(exp_avg, e.exp_avg, e.state_dtype, at, e.wide);
  load_lanes(exp_avg_sq, e.exp_avg_sq, e.state_dtype, at, e.wide);
  if (e.target != nullptr) load_lanes(target, e.target, e.target_dtype, at, e.wide);
  adamw_lanes(param, grad, exp_avg, exp_avg_sq, s);
  store_lanes(exp_avg, e.exp_avg, e.state_dtype, at, e.wide);
  store_lanes(exp_avg_sq, e.exp_avg_sq, e.state_dtype, at, e.wide);
  store_lanes(param, e.param, e.param_dtype, at, e.wide);
  if (e.target == nullptr) return;
  // The teacher follows the parameter as stored.
#pragma unroll
  for (int i = 0; i < kLanes; i++) param.x[i] = rounded(param.x[i], e.param_dtype);
  average_lanes(target, t, param, at, e.wide, w, rounding, key);
}

template <int kCapacity>
__global__ void __launch_bounds__(kThreads)
    adamw_ema_kernel(const __grid_constant__ List<kCapacity> list) {
  const Scalars& c = list.scalars;
  // A step whose gradients overflowed changes nothing, the teacher included.
  if (c.found_inf != nullptr && *c.found_inf != 0.0f) return;
  const int which = entry_of(list, blockIdx.x);
  const Entry& entry = list.entries[which];
  JK_DYNAMIC_SHARED(Step, shared_step);
  // Powers in double may be due: once for the block.
  if (threadIdx.x == 0) *shared_step = step_of(entry, c.grad_scale);
  __syncthreads();
  const Step s = *shared_step;
  const EmaWeights w = ema_weights(c.momentum_device == nullptr ? c.momentum : *c.momentum_device);
  const RandomKey key = random_key(uint64_t(c.seed_device == nullptr ? c.seed : *c.seed_device),
                                   uint64_t(entry.index));
  const int64_t chunk = blockIdx.x - (which == 0 ? 0 : list.chunk_ends[which - 1]);
#pragma unroll 1
  for (int round = 0; round < kRounds; round++) {
    const Place at = place_of(chunk * kChunk, round, kThreads, entry.numel);
    if (at.first < entry.numel) adamw_ema_lanes(entry, at, s, w, c.rounding, key);
  }
}

Entry make_entry(const jk_adamw_tensor& t, const jk_adamw_ema_params& p) {
  Entry e;
  e.param = t.param;
  e.grad = t.grad;
  e.exp_avg = t.exp_avg;
  e.exp_avg_sq = t.exp_avg_sq;
  e.target = t.ema.target;
  e.copy = t.ema.copy;
  e.compensation = t.ema.compensation;
  e.numel = t.numel;
  e.step_device = t.step_device;
  e.index = t.ema.index;
  e.param_dtype = uint8_t(t.param_dtype);
  e.grad_dtype = uint8_t(t.grad_dtype);
  e.state_dtype = uint8_t(t.state_dtype);
  e.target_dtype = uint8_t(t.ema.target_dtype);
  e.copy_dtype = uint8_t(t.ema.copy_dtype);
  e.wide = aligned16(t.param) && aligned16(t.grad) && aligned16(t.exp_avg) &&
           aligned16(t.exp_avg_sq) && aligned16(t.ema.target) && aligned16(t.ema.copy) &&
           aligned16(t.ema.compensation);
  const int64_t row = int64_t(t.group) * JK_ADAMW_COLUMNS;
  if (p.hyper_device != nullptr) {
    e.origin = kDeviceHyper;
    e.scalars.device.row = p.hyper_device + row;
    e.scalars.device.step = t.step;
  } else if (t.step_device != nullptr) {
    e.origin = kDeviceStep;
    for (int i = 0; i < JK_ADAMW_COLUMNS; i++) e.scalars.hyper[i] = p.hyper[row + i];
  } else {
    e.origin = kHost;
    e.scalars.known = step_of(p.hyper + row, t.step);
  }
  return e;
}

template <int kCapacity>
const char* step(const jk_adamw_ema_params& p, void* stream) {
  const Scalars scalars{p.grad_scale, p.found_inf,   p.momentum,     p.momentum_device,
                        p.seed,       p.seed_device, int(p.rounding)};
  return for_each_launch<kCapacity, Entry>(
      p.num_tensors, scalars, kChunk, [&](int64_t i) { return p.tensors[i].numel; },
      [&](Entry& entry, int64_t i) { entry = make_entry(p.tensors[i], p); },
      [&](const List<kCapacity>& list, unsigned chunks) {
        JK_LAUNCH((adamw_ema_kernel<kCapacity>), dim3(chunks), dim3(kThreads), sizeof(Step), stream,
                  list);
        return launch_error();
      });
}

}  // namespace
}  // namespace jk::adamw

using namespace jk::adamw;

JK_EXPORT const char* jk_adamw_ema_cuda_fwd(const jk_adamw_ema_params* p, void* stream) {
  if (p->momentum_device == nullptr && !(p->momentum >= 0.0 && p->momentum <= 1.0))
    return "adamw_ema_: momentum must be from 0 to 1.";
  return p->num_tensors <= 28 ? step<28>(*p, stream) : step<220>(*p, stream);
}
