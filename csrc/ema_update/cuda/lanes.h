// What the CUDA kernels of ema_update and adamw_ema share: four consecutive elements in registers,
// of any dtype, and the average on them. Products and sums are rounded one by one, so that results
// equal the CPU's bit for bit.
#pragma once
#include "../../cuda/device.cuh"
#include "../average.h"
#include "../params.h"

namespace jk::ema {
namespace {

// Elements of one thread: neighbours of those of the next, so that an access of a warp covers whole
// sectors of 32 bytes in every dtype (16 bytes of a thread in float32, 8 in 16 bits).
constexpr int kLanes = 4;

struct Lanes {
  float x[kLanes];
};

// The elements [first, first + kLanes) of an array of `end`, as far as they are there.
struct Place {
  int64_t first, end;

  JK_DEVICE bool whole() const { return first + kLanes <= end; }
};

// The place of this thread in round `round` of a chunk that starts at `begin`.
JK_DEVICE Place place_of(int64_t begin, int round, int threads, int64_t end) {
  return {begin + (int64_t(round) * threads + threadIdx.x) * kLanes, end};
}

template <class T>
JK_DEVICE void load_as(Lanes& out, const void* data, const Place& at, bool wide) {
  const T* p = static_cast<const T*>(data) + at.first;
  if (wide && at.whole()) {
    if constexpr (sizeof(T) == 4) {
      const float4 raw = *reinterpret_cast<const float4*>(p);
      out = {{raw.x, raw.y, raw.z, raw.w}};
    } else {
      const uint2 raw = *reinterpret_cast<const uint2*>(p);
      const float2 low = unpack2<T>(raw.x), high = unpack2<T>(raw.y);
      out = {{low.x, low.y, high.x, high.y}};
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kLanes; i++) out.x[i] = at.first + i < at.end ? to_float(p[i]) : 0.0f;
}

JK_DEVICE void load_lanes(Lanes& out, const void* data, int dtype, const Place& at, bool wide) {
  if (dtype == JK_BFLOAT16) {
    load_as<bfloat16>(out, data, at, wide);
  } else if (dtype == JK_FLOAT16) {
    load_as<float16>(out, data, at, wide);
  } else {
    load_as<float>(out, data, at, wide);
  }
}

template <class T>
JK_DEVICE void store_as(const Lanes& in, void* data, const Place& at, bool wide) {
  T* p = static_cast<T*>(data) + at.first;
  if (wide && at.whole()) {
    if constexpr (sizeof(T) == 4) {
      store_float4(p, in.x);
    } else {
      store_uint2(p, pack2<T>(in.x[0], in.x[1]), pack2<T>(in.x[2], in.x[3]));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kLanes; i++) {
    if (at.first + i < at.end) p[i] = from_float<T>(in.x[i]);
  }
}

// Rounds to nearest.
JK_DEVICE void store_lanes(const Lanes& in, void* data, int dtype, const Place& at, bool wide) {
  if (dtype == JK_BFLOAT16) {
    store_as<bfloat16>(in, data, at, wide);
  } else if (dtype == JK_FLOAT16) {
    store_as<float16>(in, data, at, wide);
  } else {
    store_as<float>(in, data, at, wide);
  }
}

// The value that a `dtype` array keeps of x.
JK_DEVICE float rounded(float x, int dtype) {
  if (dtype == JK_BFLOAT16) return to_float(from_float<bfloat16>(x));
  if (dtype == JK_FLOAT16) return to_float(from_float<float16>(x));
  return x;
}

// bfloat16 value of x after adding 16 random bits to its discarded fraction.
JK_DEVICE float rounded_randomly(float x, uint32_t random16) {
  const uint32_t bits = __float_as_uint(x);
  return __uint_as_float((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u
                                                            : (bits + random16) & 0xffff0000u);
}

JK_DEVICE float average(float target, float source, EmaWeights w) {
  const float difference = __fsub_rn(source, target);
  return w.take < 0.5f ? __fadd_rn(target, __fmul_rn(w.take, difference))
                       : __fsub_rn(source, __fmul_rn(w.keep, difference));
}

// Averages `source` into the target of `t`, whose elements are `value`, and writes compensation and
// copy. The caller loads the target before it stores anything, so that the latency hides behind
// that of its other arrays.
JK_DEVICE void average_lanes(Lanes& value, const jk_ema_tensor& t, const Lanes& source,
                             const Place& at, bool wide, EmaWeights w, int rounding,
                             RandomKey key) {
  Lanes lost;
  const bool kahan = rounding == JK_ROUND_KAHAN && t.target_dtype != JK_FLOAT32;
  if (kahan) {
    load_lanes(lost, t.compensation, t.target_dtype, at, wide);
#pragma unroll
    for (int i = 0; i < kLanes; i++) value.x[i] = __fadd_rn(value.x[i], lost.x[i]);
  }
#pragma unroll
  for (int i = 0; i < kLanes; i++) value.x[i] = average(value.x[i], source.x[i], w);
  if (kahan) {
#pragma unroll
    for (int i = 0; i < kLanes; i++)
      lost.x[i] = __fsub_rn(value.x[i], rounded(value.x[i], t.target_dtype));
    store_lanes(lost, t.compensation, t.target_dtype, at, wide);
  } else if (rounding == JK_ROUND_STOCHASTIC && t.target_dtype == JK_BFLOAT16) {
#pragma unroll
    for (int i = 0; i < kLanes; i++) {
      const uint64_t element = uint64_t(at.first) + uint64_t(i);
      value.x[i] = rounded_randomly(
          value.x[i], element_bits(key, element_salt(key, element), uint32_t(element)));
    }
  }
#pragma unroll
  for (int i = 0; i < kLanes; i++) value.x[i] = rounded(value.x[i], t.target_dtype);
  store_lanes(value, t.target, t.target_dtype, at, wide);
  if (t.copy != nullptr) store_lanes(value, t.copy, t.copy_dtype, at, wide);
}

// Elements are accessed four at a time where every array starts on 16 bytes; absent ones do not
// matter.
inline bool aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15u) == 0; }

}  // namespace
}  // namespace jk::ema
