// What the CUDA kernels of ema_update and adamw_ema share: eight consecutive elements in registers,
// of any dtype, and the average on them. Products and sums are rounded one by one, so that results
// equal the CPU's bit for bit.
#pragma once
#include "../../cuda/device.cuh"
#include "../average.h"
#include "../params.h"

namespace jk::ema {
namespace {

// Elements of one thread: 16 bytes of a 16-bit array, two 16-byte accesses of a float32 one.
constexpr int kLanes = 8;

struct Lanes {
  float x[kLanes];
};

template <class T>
JK_DEVICE void unpack8(const uint4& raw, float* x) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 pair = unpack2<T>(words[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

template <class T>
JK_DEVICE uint4 pack8(const float* x) {
  return make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]),
                    pack2<T>(x[6], x[7]));
}

// Elements [first, first + n), n <= kLanes; whole and aligned accesses when n == kLanes and `wide`.
template <class T>
JK_DEVICE void load_narrow(Lanes& out, const void* data, int64_t first, int n, bool wide) {
  const T* p = static_cast<const T*>(data) + first;
  if (wide && n == kLanes) {
    unpack8<T>(*reinterpret_cast<const uint4*>(p), out.x);
    return;
  }
#pragma unroll
  for (int i = 0; i < kLanes; i++) out.x[i] = i < n ? to_float(p[i]) : 0.0f;
}

JK_DEVICE void load_lanes(Lanes& out, const void* data, int dtype, int64_t first, int n,
                          bool wide) {
  if (dtype == JK_BFLOAT16) {
    load_narrow<bfloat16>(out, data, first, n, wide);
  } else if (dtype == JK_FLOAT16) {
    load_narrow<float16>(out, data, first, n, wide);
  } else {
    const float* p = static_cast<const float*>(data) + first;
    if (wide && n == kLanes) {
      const float4 a = *reinterpret_cast<const float4*>(p),
                   b = *reinterpret_cast<const float4*>(p + 4);
      out = {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
      return;
    }
#pragma unroll
    for (int i = 0; i < kLanes; i++) out.x[i] = i < n ? p[i] : 0.0f;
  }
}

template <class T>
JK_DEVICE void store_narrow(const Lanes& in, void* data, int64_t first, int n, bool wide) {
  T* p = static_cast<T*>(data) + first;
  if (wide && n == kLanes) {
    *reinterpret_cast<uint4*>(p) = pack8<T>(in.x);
    return;
  }
#pragma unroll
  for (int i = 0; i < kLanes; i++) {
    if (i < n) p[i] = from_float<T>(in.x[i]);
  }
}

// Rounds to nearest.
JK_DEVICE void store_lanes(const Lanes& in, void* data, int dtype, int64_t first, int n,
                           bool wide) {
  if (dtype == JK_BFLOAT16) {
    store_narrow<bfloat16>(in, data, first, n, wide);
  } else if (dtype == JK_FLOAT16) {
    store_narrow<float16>(in, data, first, n, wide);
  } else {
    float* p = static_cast<float*>(data) + first;
    if (wide && n == kLanes) {
      *reinterpret_cast<float4*>(p) = make_float4(in.x[0], in.x[1], in.x[2], in.x[3]);
      *reinterpret_cast<float4*>(p + 4) = make_float4(in.x[4], in.x[5], in.x[6], in.x[7]);
      return;
    }
#pragma unroll
    for (int i = 0; i < kLanes; i++) {
      if (i < n) p[i] = in.x[i];
    }
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

// Averages `source` into elements [first, first + n) of the target of `t` and writes compensation
// and copy.
JK_DEVICE void average_lanes(const jk_ema_tensor& t, const Lanes& source, int64_t first, int n,
                             bool wide, EmaWeights w, int rounding, RandomKey key) {
  Lanes value, lost;
  load_lanes(value, t.target, t.target_dtype, first, n, wide);
  const bool kahan = rounding == JK_ROUND_KAHAN && t.target_dtype != JK_FLOAT32;
  if (kahan) {
    load_lanes(lost, t.compensation, t.target_dtype, first, n, wide);
#pragma unroll
    for (int i = 0; i < kLanes; i++) value.x[i] = __fadd_rn(value.x[i], lost.x[i]);
  }
#pragma unroll
  for (int i = 0; i < kLanes; i++) value.x[i] = average(value.x[i], source.x[i], w);
  if (kahan) {
#pragma unroll
    for (int i = 0; i < kLanes; i++)
      lost.x[i] = __fsub_rn(value.x[i], rounded(value.x[i], t.target_dtype));
    store_lanes(lost, t.compensation, t.target_dtype, first, n, wide);
  } else if (rounding == JK_ROUND_STOCHASTIC && t.target_dtype == JK_BFLOAT16) {
#pragma unroll
    for (int i = 0; i < kLanes; i++) {
      const uint64_t element = uint64_t(first) + uint64_t(i);
      value.x[i] = rounded_randomly(
          value.x[i], element_bits(key, element_salt(key, element), uint32_t(element)));
    }
  }
#pragma unroll
  for (int i = 0; i < kLanes; i++) value.x[i] = rounded(value.x[i], t.target_dtype);
  store_lanes(value, t.target, t.target_dtype, first, n, wide);
  if (t.copy != nullptr) store_lanes(value, t.copy, t.copy_dtype, first, n, wide);
}

// 16-byte accesses are allowed when every array starts on 16 bytes; absent ones do not matter.
inline bool aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15u) == 0; }

}  // namespace
}  // namespace jk::ema
