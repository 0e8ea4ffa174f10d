// ema_update on a GPU: one launch over the list (up to 470 tensors; longer lists take more
// launches). A block owns one chunk of one target: it reads target, source (and compensation) once
// and writes target (and copy) once.
#include "lanes.h"
#include "launch.h"

namespace jk::ema {
namespace {

// Elements of a block. A thread has the loads of kAtOnce rounds in flight before it stores any.
constexpr int kRounds = 4, kAtOnce = 2;
constexpr int64_t kChunk = kRounds * kThreads * kLanes;

struct Entry {
  jk_ema_tensor tensor;
  bool wide;
};

struct Scalars {
  double momentum;
  const double* momentum_device;
  int64_t seed;
  const int64_t* seed_device;
  int rounding;
};

template <int kCapacity>
using List = Chunks<Entry, Scalars, kCapacity>;

// target <- momentum * target + (1 - momentum) * source for one chunk of elements.
template <int kCapacity>
__global__ void __launch_bounds__(kThreads)
    ema_update_kernel(const __grid_constant__ List<kCapacity> list) {
  const int which = entry_of(list, blockIdx.x);
  const Entry& entry = list.entries[which];
  const jk_ema_tensor& t = entry.tensor;
  const Scalars& s = list.scalars;
  const EmaWeights w = ema_weights(s.momentum_device == nullptr ? s.momentum : *s.momentum_device);
  const RandomKey key =
      random_key(uint64_t(s.seed_device == nullptr ? s.seed : *s.seed_device), uint64_t(t.index));
  const int64_t chunk = blockIdx.x - (which == 0 ? 0 : list.chunk_ends[which - 1]);
#pragma unroll 1
  for (int round = 0; round < kRounds; round += kAtOnce) {
    Lanes source[kAtOnce], target[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      const Place at = place_of(chunk * kChunk, round + i, kThreads, t.numel);
      if (at.first >= t.numel) continue;
      load_lanes(source[i], t.source, t.source_dtype, at, entry.wide);
      load_lanes(target[i], t.target, t.target_dtype, at, entry.wide);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      const Place at = place_of(chunk * kChunk, round + i, kThreads, t.numel);
      if (at.first < t.numel)
        average_lanes(target[i], t, source[i], at, entry.wide, w, s.rounding, key);
    }
  }
}

template <int kCapacity>
const char* update(const jk_ema_update_params& p, void* stream) {
  const Scalars scalars{p.momentum, p.momentum_device, p.seed, p.seed_device, int(p.rounding)};
  return for_each_launch<kCapacity, Entry>(
      p.num_tensors, scalars, kChunk, [&](int64_t i) { return p.tensors[i].numel; },
      [&](Entry& entry, int64_t i) {
        const jk_ema_tensor& t = p.tensors[i];
        entry = {t, aligned16(t.target) && aligned16(t.source) && aligned16(t.copy) &&
                        aligned16(t.compensation)};
      },
      [&](const List<kCapacity>& list, unsigned chunks) {
        JK_LAUNCH((ema_update_kernel<kCapacity>), dim3(chunks), dim3(kThreads), 0, stream, list);
        return launch_error();
      });
}

}  // namespace
}  // namespace jk::ema

using namespace jk::ema;

JK_EXPORT const char* jk_ema_update_cuda_fwd(const jk_ema_update_params* p, void* stream) {
  if (p->momentum_device == nullptr && !(p->momentum >= 0.0 && p->momentum <= 1.0))
    return "ema_update_: momentum must be from 0 to 1.";
  return p->num_tensors <= 48 ? update<48>(*p, stream) : update<470>(*p, stream);
}
