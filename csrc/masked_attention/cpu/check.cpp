// Value checks of masked_attention on a CPU: everything that a direct caller could get wrong is
// refused before any work.
#include <stdarg.h>
#include <stdio.h>

#include "kernels.h"

namespace jk::attention {
namespace {

// The sentence stays valid until the next refusal on the same thread.
__attribute__((format(printf, 1, 2))) const char* refuse(const char* format, ...) {
  static thread_local char sentence[256];
  va_list arguments;
  va_start(arguments, format);
  const int prefix = snprintf(sentence, sizeof sentence, "masked_attention: ");
  vsnprintf(sentence + prefix, sizeof sentence - prefix, format, arguments);
  va_end(arguments);
  return sentence;
}

int64_t at(const jk_ints& list, int64_t seq, int64_t i) {
  const int64_t offset = seq * list.stride_seq + i * list.stride_token;
  return list.bytes == 4 ? ((const int32_t*)list.data)[offset]
                         : ((const int64_t*)list.data)[offset];
}

const char* check_sizes(const jk_masked_attention_params& p) {
  if (p.dtype != JK_FLOAT32 && p.dtype != JK_BFLOAT16) {
    return refuse("dtype must be float32 or bfloat16 on backend 'cpu', got code %lld.",
                  (long long)p.dtype);
  }
  if (p.head_dim < 8 || p.head_dim > 128 || p.head_dim % 8 != 0) {
    return refuse("head_dim must be a multiple of 8 between 8 and 128 on backend 'cpu', got %lld.",
                  (long long)p.head_dim);
  }
  const int64_t sizes[] = {p.num_seqs, p.heads, p.len_q, p.len_k};
  const char* names[] = {"the number of sequences", "the number of heads",
                         "the number of query tokens", "the number of key tokens"};
  for (int i = 0; i < 4; ++i) {
    if (sizes[i] < 0 || sizes[i] > (int64_t(1) << 40)) {
      return refuse("%s must lie in [0, 2^40], got %lld.", names[i], (long long)sizes[i]);
    }
  }
  if (!(p.scale - p.scale == 0)) return refuse("scale must be finite, got %f.", p.scale);
  return nullptr;
}

const char* check_offsets(const jk_masked_attention_params& p, const jk_ints& cu, const char* name,
                          int64_t rows) {
  if (cu.bytes != 4 && cu.bytes != 8)
    return refuse("%s must hold int32 or int64, got %lld bytes each.", name, (long long)cu.bytes);
  const jk_ints list = {cu.data, cu.bytes, 0, 1};
  int64_t last = at(list, 0, 0);
  if (last != 0) return refuse("%s must start at 0, got %lld.", name, (long long)last);
  for (int64_t s = 1; s <= p.num_seqs; ++s) {
    const int64_t next = at(list, 0, s);
    if (next < last) {
      return refuse("%s must not decrease, got %lld after %lld at index %lld.", name,
                    (long long)next, (long long)last, (long long)s);
    }
    if (next > rows) {
      return refuse("%s must not exceed the %lld rows of its tensor, got %lld at index %lld.", name,
                    (long long)rows, (long long)next, (long long)s);
    }
    last = next;
  }
  return nullptr;
}

const char* check_grid(const jk_masked_attention_params& p, int64_t& tokens) {
  const int64_t grid[] = {p.grid_t, p.grid_h, p.grid_w};
  tokens = 1;
  for (const int64_t size : grid) {
    if (size < 1 || size > (int64_t(1) << 31) || tokens > (int64_t(1) << 62) / size) {
      return refuse(
          "grid must hold three positive sizes with a product below 2^62, got (%lld, %lld, %lld).",
          (long long)grid[0], (long long)grid[1], (long long)grid[2]);
    }
    tokens *= size;
  }
  if (p.rope_dim < 0 || p.rope_dim % 2 != 0 || 3 * p.rope_dim > p.head_dim) {
    return refuse("rope_dim must be even and at most head_dim / 3, got %lld with head_dim %lld.",
                  (long long)p.rope_dim, (long long)p.head_dim);
  }
  return nullptr;
}

const char* check_ids(const jk_masked_attention_params& p, const jk_ints& ids, const jk_ints& cu,
                      const char* name, int64_t len, int64_t tokens) {
  if (ids.bytes != 4 && ids.bytes != 8)
    return refuse("%s must hold int32 or int64, got %lld bytes each.", name, (long long)ids.bytes);
  const bool packed = cu.data != nullptr;
  const int64_t seqs = packed ? 1 : (ids.stride_seq == 0 && p.num_seqs > 1 ? 1 : p.num_seqs);
  const int64_t count = packed ? at({cu.data, cu.bytes, 0, 1}, 0, p.num_seqs)
                               : len;  // rows outside every sequence are not read
  for (int64_t s = 0; s < seqs; ++s) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t id =
          at({ids.data, ids.bytes, packed ? 0 : ids.stride_seq, ids.stride_token}, s, i);
      if (id >= -1 && id < tokens) continue;
      return refuse("%s must lie in [-1, %lld), got %lld at sequence %lld, token %lld.", name,
                    (long long)tokens, (long long)id, (long long)s, (long long)i);
    }
  }
  return nullptr;
}

const char* check_pointers(const jk_masked_attention_params& p, bool backward) {
  const struct {
    const char* name;
    const void* data;
    int64_t rows;
    bool needed;
  } tensors[] = {
      {"query", p.q.data, p.len_q, true},
      {"key", p.k.data, p.len_k, true},
      {"value", p.v.data, p.len_k, true},
      {"out", p.out.data, p.len_q, true},
      {"lse", p.lse, p.len_q, true},
      {"grad_out", p.grad_out.data, p.len_q, backward},
      {"grad_q", p.grad_q.data, p.len_q, backward},
      {"grad_k", p.grad_k.data, p.len_k, backward},
      {"grad_v", p.grad_v.data, p.len_k, backward},
  };
  const bool packed = p.cu_q.data != nullptr;
  for (const auto& tensor : tensors) {
    const bool empty = tensor.rows == 0 || p.heads == 0 || (!packed && p.num_seqs == 0);
    if (tensor.needed && !empty && tensor.data == nullptr)
      return refuse("%s must point to memory, got NULL.", tensor.name);
  }
  return nullptr;
}

}  // namespace

const char* check(const jk_masked_attention_params& p, bool backward) {
  if (const char* wrong = check_sizes(p)) return wrong;
  if (const char* wrong = check_pointers(p, backward)) return wrong;
  const bool packed = p.cu_q.data != nullptr;
  if (packed != (p.cu_k.data != nullptr))
    return refuse("cu_seqlens_k must be given exactly when cu_seqlens_q is, got one of them.");
  if (packed) {
    if (const char* wrong = check_offsets(p, p.cu_q, "cu_seqlens_q", p.len_q)) return wrong;
    if (const char* wrong = check_offsets(p, p.cu_k, "cu_seqlens_k", p.len_k)) return wrong;
  }
  if (p.rope_table == nullptr) return nullptr;
  int64_t tokens;
  if (const char* wrong = check_grid(p, tokens)) return wrong;
  if (p.ids_q.data == nullptr || p.ids_k.data == nullptr)
    return refuse("query_ids and key_ids must be given with rope_table, got NULL.");
  if (const char* wrong = check_ids(p, p.ids_q, p.cu_q, "query_ids", p.len_q, tokens)) return wrong;
  return check_ids(p, p.ids_k, p.cu_k, "key_ids", p.len_k, tokens);
}

}  // namespace jk::attention
