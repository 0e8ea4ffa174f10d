// The names of CUDA C++ that kernel source may use, with the executor's meaning.
#pragma once
#include <cmath>
#include <cstring>

#include "simt.h"

#define __global__ __attribute__((unused)) static
#define __device__
#define __host__
#define __forceinline__ inline
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__ __restrict
// Static shared memory: one copy per host thread, since a host thread runs one block at a time. It
// is not poisoned between blocks, so prefer JK_DYNAMIC_SHARED.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

namespace simt {
inline dim3 thread_index() {
  Quiet quiet;
  return fiber->thread;
}
inline dim3 block_index() {
  Quiet quiet;
  return block->index;
}
inline dim3 block_size() {
  Quiet quiet;
  return block->threads;
}
inline dim3 grid_size() {
  Quiet quiet;
  return block->grid;
}
inline unsigned lane() {
  Quiet quiet;
  return fiber->linear & 31;
}
inline unsigned char* shared_memory() {
  Quiet quiet;
  return block->shared;
}
}  // namespace simt

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())
#define warpSize 32

// The site of a call, for the sentence that reports divergence; a caller never passes these.
#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_HERE) { simt::block_barrier(0, {"__syncthreads", file, line}); }
inline int __syncthreads_count(int vote, SIMT_HERE) {
  return simt::block_barrier(vote, {"__syncthreads_count", file, line});
}
inline int __syncthreads_or(int vote, SIMT_HERE) {
  return simt::block_barrier(vote, {"__syncthreads_or", file, line}) > 0;
}
inline int __syncthreads_and(int vote, SIMT_HERE) {
  return simt::block_barrier(!vote, {"__syncthreads_and", file, line}) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_HERE) {
  simt::warp_collective(
      mask, 0, {"__syncwarp", file, line}, true, [](auto&) {}, [](auto&) { return 0; });
}

namespace simt {
template <class T>
inline T shuffle(unsigned mask, T value, unsigned source, Site site) {
  return warp_collective(
      mask, value, site, false, [](auto&) {},
      [&](Collective& c) {
        if (!(mask >> (source & 31) & 1))
          fail("simt: " + site.text() + " reads lane " + std::to_string(source & 31) +
               ", which is not in its mask.");
        return peek<T>(c, source);
      });
}
inline unsigned ballot(unsigned mask, int vote, Site site) {
  return warp_collective(
      mask, vote, site, false, [](auto&) {},
      [&](Collective& c) {
        unsigned bits = 0;
        for (unsigned i = 0; i < 32; i++)
          if (mask >> i & 1) bits |= unsigned(peek<int>(c, i) != 0) << i;
        return bits;
      });
}
}  // namespace simt

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_HERE) {
  const unsigned base = simt::lane() & ~unsigned(width - 1);
  return simt::shuffle(mask, value, base + (unsigned(source) & unsigned(width - 1)),
                       {"__shfl_sync", file, line});
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SIMT_HERE) {
  const unsigned self = simt::lane(), other = self ^ unsigned(lanes);
  return simt::shuffle(mask, value,
                       other < (self & ~unsigned(width - 1)) + unsigned(width) ? other : self,
                       {"__shfl_xor_sync", file, line});
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_HERE) {
  const unsigned self = simt::lane(), end = (self & ~unsigned(width - 1)) + unsigned(width);
  return simt::shuffle(mask, value, self + delta < end ? self + delta : self,
                       {"__shfl_down_sync", file, line});
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_HERE) {
  const unsigned self = simt::lane(), begin = self & ~unsigned(width - 1);
  return simt::shuffle(mask, value, self >= begin + delta ? self - delta : self,
                       {"__shfl_up_sync", file, line});
}
inline unsigned __ballot_sync(unsigned mask, int vote, SIMT_HERE) {
  return simt::ballot(mask, vote, {"__ballot_sync", file, line});
}
inline int __any_sync(unsigned mask, int vote, SIMT_HERE) {
  return simt::ballot(mask, vote, {"__any_sync", file, line}) != 0;
}
inline int __all_sync(unsigned mask, int vote, SIMT_HERE) {
  return simt::ballot(mask, vote, {"__all_sync", file, line}) == mask;
}

// Atomics order memory here, which is more than CUDA's relaxed ones do; with __threadfence around
// them the two agree.
template <class T>
inline T atomicAdd(T* p, T value) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, T(old + value), true, __ATOMIC_ACQ_REL,
                                      __ATOMIC_RELAXED)) {
  }
  return old;
}
inline float atomicAdd(float* p, float value) {
  uint32_t* bits = reinterpret_cast<uint32_t*>(p);
  uint32_t old = __atomic_load_n(bits, __ATOMIC_RELAXED), sum_bits;
  float before;
  do {
    std::memcpy(&before, &old, 4);
    const float sum = before + value;
    std::memcpy(&sum_bits, &sum, 4);
  } while (
      !__atomic_compare_exchange_n(bits, &old, sum_bits, true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
  return before;
}
template <class T>
inline T atomicMax(T* p, T value) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (old < value &&
         !__atomic_compare_exchange_n(p, &old, value, true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
  }
  return old;
}
template <class T>
inline T atomicExch(T* p, T value) {
  return __atomic_exchange_n(p, value, __ATOMIC_ACQ_REL);
}
template <class T>
inline T atomicCAS(T* p, T expected, T value) {
  __atomic_compare_exchange_n(p, &expected, value, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
  return expected;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

struct float2 {
  float x, y;
} __attribute__((aligned(8)));
struct float4 {
  float x, y, z, w;
} __attribute__((aligned(16)));
struct uint2 {
  unsigned x, y;
} __attribute__((aligned(8)));
struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));
struct int2 {
  int x, y;
} __attribute__((aligned(8)));
struct int4 {
  int x, y, z, w;
} __attribute__((aligned(16)));
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

inline unsigned __float_as_uint(float f) { return __builtin_bit_cast(unsigned, f); }
inline float __uint_as_float(unsigned u) { return __builtin_bit_cast(float, u); }
inline int __float_as_int(float f) { return __builtin_bit_cast(int, f); }
inline float __int_as_float(int i) { return __builtin_bit_cast(float, i); }
inline int __popc(unsigned u) { return __builtin_popcount(u); }
inline int __clz(int i) { return i ? __builtin_clz(unsigned(i)) : 32; }
inline int __ffs(int i) { return __builtin_ffs(i); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
// The empty asm keeps the compiler from contracting the product or sum into an fma.
inline float __fmul_rn(float a, float b) {
  float r = a * b;
  asm("" : "+x"(r));
  return r;
}
inline float __fadd_rn(float a, float b) {
  float r = a + b;
  asm("" : "+x"(r));
  return r;
}
inline float __fsub_rn(float a, float b) { return __fadd_rn(a, -b); }
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
using std::max;
using std::min;
