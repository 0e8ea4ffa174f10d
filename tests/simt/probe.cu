// Small kernels that exercise the executor itself; test_executor.py runs them right and with
// planted faults.
#include "../../csrc/abi.h"
#include "../../csrc/cuda/device.cuh"

namespace {

enum Fault {
  kNone,
  kDivergentBarrier,
  kEarlyExit,
  kTwoBarriers,
  kOverrun,
  kMissingBarrier,
  kMissingWarpSync,
  kMissingWait,
  kEarlyCopy,
};

// out[block] = sum of the block's threads' x, through shared memory and two warp reductions.
__global__ void block_sum_kernel(const float* x, float* out, int fault) {
  JK_DYNAMIC_SHARED(float, partial);
  const int tid = threadIdx.x, warp = tid / 32, warps = blockDim.x / 32;
  const float sum = jk::warp_sum(x[size_t(blockIdx.x) * blockDim.x + tid]);
  if (jk::lane_id() == 0) partial[fault == kOverrun ? warp + 1 : warp] = sum;
  if (fault == kEarlyExit && warp == 1) return;
  if (fault == kTwoBarriers && warp == 0) {
    __syncthreads();
  } else if (fault != kMissingBarrier && !(fault == kDivergentBarrier && warp == 0)) {
    __syncthreads();
  }
  if (tid == 0) {
    float total = 0.f;
    for (int w = 0; w < warps; w++) total += partial[w];
    out[blockIdx.x] = total;
  }
}

// Reverses each warp's 32 values through shared memory; without __syncwarp lanes read what others
// have yet to write.
__global__ void warp_reverse_kernel(const float* x, float* out, int fault) {
  JK_DYNAMIC_SHARED(float, line);
  const int lane = threadIdx.x;
  line[lane] = x[lane];
  if (fault != kMissingWarpSync) __syncwarp();
  out[lane] = line[31 - lane];
}

// c[16, 8] = a[16, 16] * b[8, 16]^T by one warp: cp.async in, ldmatrix, mma.
template <class T>
__global__ void mma_kernel(const T* a, const T* b, float* c, int fault) {
  constexpr int kStride = 24;  // 16 channels and 8 of padding
  JK_DYNAMIC_SHARED(T, tile);
  const int lane = threadIdx.x;
  float d[4] = {0.f, 0.f, 0.f, 0.f};
  // Two rounds, so that the second one overwrites a tile that has been read.
  for (int round = 0; round < 2; round++) {
    for (int i = lane; i < 48; i += 32) {
      const int row = i / 2, part = i % 2 * 8;
      jk::cp_async_16(tile + row * kStride + part,
                      row < 16 ? a + row * 16 + part : b + (row - 16) * 16 + part);
    }
    jk::cp_async_commit();
    if (fault != kMissingWait) jk::cp_async_wait<0>();
    __syncthreads();
    uint32_t left[4], right[4];
    jk::ldmatrix_x4(left, tile + (lane % 16) * kStride + lane / 16 * 8);
    jk::ldmatrix_x4(right, tile + (16 + lane % 8) * kStride + lane / 8 % 2 * 8);
    jk::mma_16816<T>(d, left, right[0], right[1]);
    if (fault != kEarlyCopy) __syncthreads();
  }
  for (int e = 0; e < 4; e++) c[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = 0.5f * d[e];
}

// The same product of b given as [16, 8], through the transposing ldmatrix (b rows padded to 8 +
// 8).
template <class T>
__global__ void mma_trans_kernel(const T* a, const T* b, float* c, int) {
  JK_DYNAMIC_SHARED(T, tile);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) tile[i / 16 * 24 + i % 16] = a[i];
  T* right_tile = tile + 16 * 24;
  for (int i = lane; i < 128; i += 32) right_tile[i / 8 * 8 + i % 8] = b[i];
  __syncthreads();
  uint32_t left[4], right[4];
  jk::ldmatrix_x4(left, tile + (lane % 16) * 24 + lane / 16 * 8);
  jk::ldmatrix_x4_trans(right, right_tile + (lane % 16) * 8);
  float d[4] = {0.f, 0.f, 0.f, 0.f};
  jk::mma_16816<T>(d, left, right[0], right[1]);
  for (int e = 0; e < 4; e++) c[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = d[e];
}

// c[16, 8] = a[16, 8] * b[8, 8]^T in tf32.
__global__ void mma_tf32_kernel(const float* a, const float* b, float* c) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const uint32_t left[4] = {jk::to_tf32(a[g * 8 + t]), jk::to_tf32(a[(g + 8) * 8 + t]),
                            jk::to_tf32(a[g * 8 + t + 4]), jk::to_tf32(a[(g + 8) * 8 + t + 4])};
  float d[4] = {0.f, 0.f, 0.f, 0.f};
  jk::mma_1688_tf32(d, left, jk::to_tf32(b[g * 8 + t]), jk::to_tf32(b[g * 8 + t + 4]));
  for (int e = 0; e < 4; e++) c[(g + e / 2 * 8) * 8 + t * 2 + e % 2] = d[e];
}

// Two half-warps run their own collectives side by side: out = sum over the half, then a ballot.
__global__ void half_warp_kernel(const float* x, float* out, unsigned* votes) {
  const int lane = threadIdx.x;
  const unsigned mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  float sum = x[lane];
  const int rounds = lane < 16 ? 4 : 3;
  for (int r = 0; r < rounds; r++) sum += __shfl_xor_sync(mask, sum, 1 << r);
  out[lane] = sum;
  votes[lane] = __ballot_sync(mask, lane % 3 == 0);
}

__global__ void count_kernel(int* counter, float* total, int* order) {
  order[atomicAdd(counter, 1)] = int(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(total, 0.5f);
}

__global__ void convert_kernel(const float* x, uint16_t* bf16, uint16_t* fp16, float* back, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) {
    bf16[i] = jk::from_float<jk::bfloat16>(x[i]).bits;
    fp16[i] = jk::from_float<jk::float16>(x[i]).bits;
    back[i] = jk::to_float(jk::float16{fp16[i]});
  }
}

}  // namespace

JK_EXPORT const char* probe_block_sum(const float* x, float* out, int blocks, int threads,
                                      int fault) {
  JK_LAUNCH(block_sum_kernel, dim3(blocks), dim3(threads), threads / 32 * sizeof(float), nullptr, x,
            out, fault);
  return jk::launch_error();
}
JK_EXPORT const char* probe_warp_reverse(const float* x, float* out, int fault) {
  JK_LAUNCH(warp_reverse_kernel, dim3(1), dim3(32), 32 * sizeof(float), nullptr, x, out, fault);
  return jk::launch_error();
}
JK_EXPORT const char* probe_mma(const void* a, const void* b, float* c, int is_fp16, int transposed,
                                int fault) {
  const size_t bytes = (16 + 8) * 24 * 2;
  if (is_fp16) {
    auto kernel = transposed ? mma_trans_kernel<jk::float16> : mma_kernel<jk::float16>;
    JK_LAUNCH(kernel, dim3(1), dim3(32), bytes, nullptr, static_cast<const jk::float16*>(a),
              static_cast<const jk::float16*>(b), c, fault);
  } else {
    auto kernel = transposed ? mma_trans_kernel<jk::bfloat16> : mma_kernel<jk::bfloat16>;
    JK_LAUNCH(kernel, dim3(1), dim3(32), bytes, nullptr, static_cast<const jk::bfloat16*>(a),
              static_cast<const jk::bfloat16*>(b), c, fault);
  }
  return jk::launch_error();
}
JK_EXPORT const char* probe_mma_tf32(const float* a, const float* b, float* c) {
  JK_LAUNCH(mma_tf32_kernel, dim3(1), dim3(32), 0, nullptr, a, b, c);
  return jk::launch_error();
}
JK_EXPORT const char* probe_half_warps(const float* x, float* out, unsigned* votes) {
  JK_LAUNCH(half_warp_kernel, dim3(1), dim3(32), 0, nullptr, x, out, votes);
  return jk::launch_error();
}
JK_EXPORT const char* probe_count(int* counter, float* total, int* order, int blocks, int threads) {
  JK_LAUNCH(count_kernel, dim3(blocks), dim3(threads), 0, nullptr, counter, total, order);
  return jk::launch_error();
}
JK_EXPORT const char* probe_convert(const float* x, uint16_t* bf16, uint16_t* fp16, float* back,
                                    int n) {
  JK_LAUNCH(convert_kernel, dim3((n + 63) / 64), dim3(64), 0, nullptr, x, bf16, fp16, back, n);
  return jk::launch_error();
}
// Asks for `bytes` of dynamic shared memory, with or without permission.
JK_EXPORT const char* probe_shared_bytes(const float* x, float* out, int64_t bytes, int allow) {
  if (allow) jk::allow_dynamic_shared(warp_reverse_kernel, size_t(bytes));
  JK_LAUNCH(warp_reverse_kernel, dim3(1), dim3(32), size_t(bytes), nullptr, x, out, kNone);
  return jk::launch_error();
}
JK_EXPORT const char* probe_empty_grid(const float* x, float* out) {
  JK_LAUNCH(warp_reverse_kernel, dim3(0), dim3(32), 128, nullptr, x, out, kNone);
  return jk::launch_error();
}
