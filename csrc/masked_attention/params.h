// C ABI of masked_attention, shared by the CPU kernel, the CUDA kernel and its build on the SIMT
// executor.
#pragma once
#include "../abi.h"

// Rows of head vectors: element (sequence s, token i, head h, channel c) of a dense tensor is at
// data + s*stride_seq + i*stride_token + h*stride_head + c. In a packed tensor sequence s starts at
// token cu[s] and stride_seq is not read. The channel stride is always 1.
typedef struct {
  void* data;
  int64_t stride_seq, stride_token, stride_head;
} jk_rows;

// A list of int32 or int64 numbers (bytes = 4 or 8); data is NULL where the list is absent.
// stride_seq is 0 where one list serves every sequence of a dense batch; it is not read for packed
// tensors.
typedef struct {
  const void* data;
  int64_t bytes, stride_seq, stride_token;
} jk_ints;

typedef struct {
  int64_t dtype;  // jk_dtype of q, k, v, out and their gradients
  int64_t num_seqs, heads, head_dim;
  int64_t len_q, len_k;  // dense: tokens of each sequence; packed: rows of the whole tensor
  jk_ints cu_q, cu_k;    // packed: num_seqs + 1 offsets each, contiguous; dense: data == NULL
  jk_ints ids_q, ids_k;  // flat token ids of the grid, -1 = not rotated; data == NULL without RoPE
  const float* rope_table;  // [2, grid_t + grid_h + grid_w, rope_dim] cosines, then sines; or NULL
  int64_t rope_dim, grid_t, grid_h,
      grid_w;  // rope_dim channels for each of t, y, x, in that order (even)
  float scale;
  jk_rows q, k, v, out;
  float* lse;  // natural log; (s, h, i) at s*lse_stride_seq + h*lse_stride_head + i, packed:
               // h*lse_stride_head + cu_q[s] + i
  int64_t lse_stride_seq, lse_stride_head;
  jk_rows grad_out, grad_q, grad_k, grad_v;  // backward only
  void* scratch;  // device scratch of at least the size that the library asks for; CPU kernels may
                  // ignore it
  int64_t scratch_bytes;
  // A query sees a key iff its time - window < the key's time <= its time; data == NULL: it sees
  // all keys of its sequence. window == 0: no limit. Read by the CPU kernels alone.
  jk_ints times_q, times_k;
  int64_t window;
} jk_masked_attention_params;

// Both return NULL, or one sentence (static storage) saying what is wrong. Every element of out and
// lse (or of the three gradients) is written, rows outside every sequence included (out 0, lse
// -inf, gradients 0). A query that sees no key gets out 0, lse -inf and gradient 0.
JK_EXPORT const char* jk_masked_attention_cpu_fwd(const jk_masked_attention_params* p, int isa,
                                                  jk_parallel_for parallel_for);
JK_EXPORT const char* jk_masked_attention_cpu_bwd(const jk_masked_attention_params* p, int isa,
                                                  jk_parallel_for parallel_for);

JK_EXPORT int64_t jk_masked_attention_cuda_scratch(const jk_masked_attention_params* p,
                                                   int backward);
JK_EXPORT const char* jk_masked_attention_cuda_fwd(const jk_masked_attention_params* p,
                                                   void* stream);
JK_EXPORT const char* jk_masked_attention_cuda_bwd(const jk_masked_attention_params* p,
                                                   void* stream);
