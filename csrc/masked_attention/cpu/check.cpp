// What masked_attention refuses on a CPU before any work: what its kernels do not support, and
// values that lead out of memory. The caller's shapes are taken as they are (binding.cpp).
#include "check.h"

#include <algorithm>

#include "../../cpu/refuse.h"
#include "kernels.h"

namespace jk::attention {
namespace {

using Long = long long;  // what printf knows

const char* check_offsets(const jk_ints& offsets, int64_t sequences, int64_t rows,
                          const char* name) {
  Long before = 0;
  for (int64_t s = 0; s <= sequences; ++s) {
    const Long offset = number_at(offsets, s);
    if (s == 0 && offset != 0)
      return refuse("masked_attention: %s must start at 0, got %lld.", name, offset);
    if (offset < before)
      return refuse("masked_attention: %s must never decrease, got %lld after %lld.", name, offset,
                    before);
    before = offset;
  }
  if (before > rows)
    return refuse("masked_attention: %s must end at or before %lld rows, got %lld.", name,
                  (Long)rows, before);
  return nullptr;
}

template <class T>
void widen_range(const T* ids, int64_t count, int64_t stride, int64_t& low, int64_t& high) {
  for (int64_t i = 0; i < count; ++i) {
    low = std::min<int64_t>(low, ids[i * stride]);
    high = std::max<int64_t>(high, ids[i * stride]);
  }
}

// Widens low and high to every number of the list, those of rows outside every sequence included.
void widen_to_all(const jk_masked_attention_params& p, const jk_ints& ids, int64_t len,
                  int64_t& low, int64_t& high) {
  const int64_t lists = lists_of(p, ids);
  for (int64_t s = 0; s < lists; ++s) {
    if (ids.bytes == 4) {
      widen_range((const int32_t*)ids.data + s * ids.stride_seq, len, ids.stride_token, low, high);
    } else {
      widen_range((const int64_t*)ids.data + s * ids.stride_seq, len, ids.stride_token, low, high);
    }
  }
}

const char* check_ids(const jk_masked_attention_params& p, const jk_ints& ids, int64_t len,
                      const char* name) {
  const Long tokens = p.grid_t * p.grid_h * p.grid_w;
  int64_t low = -1, high = -1;
  widen_to_all(p, ids, len, low, high);
  if (low >= -1 && high < tokens) return nullptr;
  return refuse("masked_attention: %s must hold ids from -1 to %lld, got %lld.", name, tokens - 1,
                (Long)(low < -1 ? low : high));
}

const char* check_times(const jk_masked_attention_params& p, const jk_ints& times, int64_t len,
                        const char* name) {
  if (times.bytes == 4) return nullptr;
  int64_t low = 0, high = 0;
  widen_to_all(p, times, len, low, high);
  if (low >= INT32_MIN && high <= INT32_MAX) return nullptr;
  return refuse("masked_attention: %s must hold times from %lld to %lld, got %lld.", name,
                (Long)INT32_MIN, (Long)INT32_MAX, (Long)(low < INT32_MIN ? low : high));
}

}  // namespace

const char* check(const jk_masked_attention_params& p) {
  if (p.dtype != JK_FLOAT32 && p.dtype != JK_BFLOAT16)
    return "masked_attention: dtype must be float32 or bfloat16 on backend 'cpu', got float16.";
  if (p.head_dim < 8 || p.head_dim > kMaxHeadDim || p.head_dim % 8 != 0)
    return refuse(
        "masked_attention: head_dim must be a multiple of 8 from 8 to %lld on backend 'cpu', got "
        "%lld.",
        (Long)kMaxHeadDim, (Long)p.head_dim);
  if (p.cu_q.data != nullptr) {
    if (const char* wrong = check_offsets(p.cu_q, p.num_seqs, p.len_q, "cu_seqlens_q"))
      return wrong;
    if (const char* wrong = check_offsets(p.cu_k, p.num_seqs, p.len_k, "cu_seqlens_k"))
      return wrong;
  }
  if (p.times_q.data != nullptr) {
    if (const char* wrong = check_times(p, p.times_q, p.len_q, "query_times")) return wrong;
    if (const char* wrong = check_times(p, p.times_k, p.len_k, "key_times")) return wrong;
  }
  if (p.rope_table == nullptr) return nullptr;
  if (const char* wrong = check_ids(p, p.ids_q, p.len_q, "query_ids")) return wrong;
  const bool shared = p.ids_k.data == p.ids_q.data && p.ids_k.stride_seq == p.ids_q.stride_seq &&
                      p.ids_k.stride_token == p.ids_q.stride_token &&
                      p.ids_k.bytes == p.ids_q.bytes && p.len_k == p.len_q;
  return shared ? nullptr : check_ids(p, p.ids_k, p.len_k, "key_ids");
}

}  // namespace jk::attention
