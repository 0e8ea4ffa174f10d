// The thin layer under which one kernel source is compiled by nvcc for a GPU and by g++ for the
// SIMT executor of tests/simt. Kernels use CUDA C++ plus the names in namespace jk below; nothing
// here allocates or synchronises.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

// Launches `kernel` (a function pointer or a parenthesised template) with `bytes` of dynamic shared
// memory.
#define JK_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  kernel<<<grid, block, bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define JK_DYNAMIC_SHARED(type, name)                           \
  extern __shared__ __align__(128) unsigned char jk_dynamic_[]; \
  type* name = reinterpret_cast<type*>(jk_dynamic_)
#define JK_DEVICE __device__ __forceinline__
#else
#include "simt_tensor.h"

#define JK_LAUNCH(kernel, grid, block, bytes, stream, ...)                \
  simt::launch(reinterpret_cast<const void*>(kernel), grid, block, bytes, \
               [=] { (kernel)(__VA_ARGS__); })
#define JK_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(simt::shared_memory())
#define JK_DEVICE inline
#endif

namespace jk {

// Storage types: bits only, arithmetic is done in float.
struct alignas(2) bfloat16 {
  uint16_t bits;
};
struct alignas(2) float16 {
  uint16_t bits;
};

#if defined(__CUDACC__)

// NULL, or what went wrong with the launches since the last call.
inline const char* launch_error() {
  const cudaError_t e = cudaGetLastError();
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

// Needed once per process and device before a launch with more than 48 KiB of dynamic shared
// memory.
template <class Kernel>
inline const char* allow_dynamic_shared(Kernel kernel, size_t bytes) {
  const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(bytes));
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

// The dynamic shared memory that a block may ask for on the current device, with
// `allow_dynamic_shared`. If the device does not answer, what every device has: `launch_error` then
// says what is wrong.
inline size_t most_dynamic_shared() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 48 * 1024;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
      cudaSuccess)
    return 48 * 1024;
  return static_cast<size_t>(bytes);
}

JK_DEVICE int lane_id() { return static_cast<int>(threadIdx.x & 31); }
JK_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// `x`, in a way that keeps the compiler from computing with it ahead of a loop and holding the
// result in registers.
JK_DEVICE int64_t here(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}
JK_DEVICE int here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 2^x to about 2^-22; denormal results become zero.
JK_DEVICE float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

JK_DEVICE float to_float(float x) { return x; }
JK_DEVICE float to_float(bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
JK_DEVICE float to_float(float16 x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
  return r;
}

// Round to nearest even.
template <class T>
JK_DEVICE T from_float(float x);
template <>
JK_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
JK_DEVICE bfloat16 from_float<bfloat16>(float x) {
  uint16_t r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return {r};
}
template <>
JK_DEVICE float16 from_float<float16>(float x) {
  uint16_t r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return {r};
}

// Two halves in one register, `low` in the low 16 bits (the element with the smaller index).
template <class T>
JK_DEVICE uint32_t pack2(float low, float high);
template <>
JK_DEVICE uint32_t pack2<bfloat16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
JK_DEVICE uint32_t pack2<float16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// One store of 16 or 8 aligned bytes of global memory. In C++ the compiler would merge it with the
// element-wise stores of another branch, and split it.
JK_DEVICE void store_float4(void* to, const float (&x)[4]) {
  asm volatile("st.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(to)),
               "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
}
JK_DEVICE void store_uint2(void* to, uint32_t low, uint32_t high) {
  asm volatile("st.global.v2.b32 [%0], {%1,%2};" ::"l"(__cvta_generic_to_global(to)), "r"(low),
               "r"(high)
               : "memory");
}

// d += a * b on the tensor cores, 16 x 8 x 16, float accumulation. Lane l holds rows l/4 and l/4 +
// 8 of a and d.
template <class T>
JK_DEVICE void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
JK_DEVICE void mma_16816<bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                   uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
JK_DEVICE void mma_16816<float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A float rounded to the 10-bit mantissa that mma_1688_tf32 multiplies.
JK_DEVICE uint32_t to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}
JK_DEVICE void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 tiles of 16-bit elements; lane l gives the address of row l % 8 of tile l / 8 (16-byte
// aligned).
JK_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
JK_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Asynchronous copy of 16 bytes to shared memory; zeros where `valid` is false (then `from` is not
// read).
JK_DEVICE void cp_async_16(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
// The same for 8 and 4 bytes.
JK_DEVICE void cp_async_8(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 8 : 0)
               : "memory");
}
JK_DEVICE void cp_async_4(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 4 : 0)
               : "memory");
}
JK_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `kGroupsLeft` of this thread's newest groups are in flight; a barrier must
// follow before others read.
template <int kGroupsLeft>
JK_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

#else  // the SIMT executor

inline const char* launch_error() { return simt::take_error(); }

template <class Kernel>
inline const char* allow_dynamic_shared(Kernel kernel, size_t bytes) {
  simt::allowed_shared[reinterpret_cast<const void*>(kernel)] = bytes;
  return nullptr;
}

inline size_t most_dynamic_shared() { return simt::settings.shared_limit; }

inline int lane_id() { return int(simt::lane()); }
inline int64_t here(int64_t x) { return x; }
inline int here(int x) { return x; }
inline float exp2_fast(float x) { return std::exp2(x); }

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
inline float to_float(float16 x) { return float(__builtin_bit_cast(_Float16, x.bits)); }

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bfloat16 from_float<bfloat16>(float x) {
  const uint32_t u = __float_as_uint(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16)};
}
template <>
inline float16 from_float<float16>(float x) {
  return {__builtin_bit_cast(uint16_t, _Float16(x))};
}
template <class T>
inline uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

inline void store_float4(void* to, const float (&x)[4]) {
  *static_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}
inline void store_uint2(void* to, uint32_t low, uint32_t high) {
  *static_cast<uint2*>(to) = make_uint2(low, high);
}

template <class T>
inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_HERE) {
  simt::mma_16x8<2>(d, a, b0, b1, {"mma_16816", file, line}, [](uint32_t bits, int which) {
    return to_float(T{uint16_t(bits >> (16 * which))});
  });
}
inline uint32_t to_tf32(float x) { return (__float_as_uint(x) + 0x1000u) & 0xffffe000u; }
inline void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                          SIMT_HERE) {
  simt::mma_16x8<1>(d, a, b0, b1, {"mma_1688_tf32", file, line},
                    [](uint32_t bits, int) { return __uint_as_float(bits & 0xffffe000u); });
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, SIMT_HERE) {
  simt::ldmatrix<false>(r, row, {"ldmatrix_x4", file, line});
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, SIMT_HERE) {
  simt::ldmatrix<true>(r, row, {"ldmatrix_x4_trans", file, line});
}
inline void cp_async_16(void* to, const void* from, bool valid = true, SIMT_HERE) {
  simt::async_copy(to, from, 16, valid ? 16 : 0, {"cp_async_16", file, line});
}
inline void cp_async_8(void* to, const void* from, bool valid = true, SIMT_HERE) {
  simt::async_copy(to, from, 8, valid ? 8 : 0, {"cp_async_8", file, line});
}
inline void cp_async_4(void* to, const void* from, bool valid = true, SIMT_HERE) {
  simt::async_copy(to, from, 4, valid ? 4 : 0, {"cp_async_4", file, line});
}
inline void cp_async_commit() { simt::async_commit(); }
template <int kGroupsLeft>
inline void cp_async_wait() {
  simt::async_wait(kGroupsLeft);
}
#endif

// Both floats of a packed register: x is the low half.
template <class T>
JK_DEVICE float2 unpack2(uint32_t pair) {
  return make_float2(to_float(T{uint16_t(pair & 0xffffu)}), to_float(T{uint16_t(pair >> 16)}));
}

// Reductions over the lanes whose number differs in the bits below kLanes (32: the whole warp);
// every lane gets the result. The order of additions is fixed, so results are bitwise reproducible.
template <int kLanes = 32>
JK_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
template <int kLanes = 32>
JK_DEVICE float warp_max(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

}  // namespace jk
