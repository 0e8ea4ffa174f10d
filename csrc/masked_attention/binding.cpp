// Registers masked_attention's native ops: checks what a direct caller of torch.ops could get
// wrong, fills the C ABI's struct, calls the CPU kernel or the CUDA library. No arithmetic.
#include "../binding.h"
#include "params.h"

namespace jk::attention {
namespace {

constexpr const char* kOp = "masked_attention";
using Ids = std::optional<Tensor>;
using Grid = std::vector<int64_t>;

// Who sees whom: times of queries and keys, and the window (0: none).
struct Times {
  Ids query, key;
  int64_t window = 0;
};

void check(bool ok, const char* argument, const char* requirement) {
  STD_TORCH_CHECK(ok, kOp, ": ", argument, " must ", requirement, ".");
}

jk_rows rows(const Tensor& t, bool packed) {
  const int64_t first = packed ? 0 : 1;
  return {const_cast<void*>(t.const_data_ptr()), packed ? 0 : t.stride(0), t.stride(first),
          t.stride(first + 1)};
}

void check_rows(const Tensor& t, const char* name, const Tensor& like, bool packed,
                bool same_tokens) {
  check(t.dim() == (packed ? 3 : 4), name,
        packed ? "have dimensions [tokens, heads, head_dim]"
               : "have dimensions [B, N, heads, head_dim]");
  check(t.scalar_type() == like.scalar_type(), name, "have the dtype of query");
  check(t.device() == like.device(), name, "be on the device of query");
  const int64_t d = t.dim();
  check(t.size(d - 1) == like.size(d - 1) && t.size(d - 2) == like.size(d - 2), name,
        "have the heads and head_dim of query");
  check(packed || t.size(0) == like.size(0), name, "have the batch size of query");
  check(!same_tokens || t.size(d - 3) == like.size(d - 3), name,
        "have as many tokens as its counterpart");
  check(t.size(d - 1) == 1 || t.stride(d - 1) == 1 || t.numel() == 0, name,
        "have channel stride 1");
}

jk_ints ints(const Ids& t, const char* name, const Tensor& like) {
  if (!t) return {nullptr, 0, 0, 0};
  const ScalarType type = t->scalar_type();
  check(type == ScalarType::Int || type == ScalarType::Long, name, "have dtype int32 or int64");
  check(t->device() == like.device(), name, "be on the device of query");
  const bool per_seq = t->dim() == 2;
  const int64_t bytes = type == ScalarType::Int ? 4 : 8;
  // An empty tensor may have no storage; the kernels take a null pointer for "absent".
  static const int64_t nothing = 0;
  const void* data = t->numel() == 0 ? &nothing : t->const_data_ptr();
  return {data, bytes, per_seq ? t->stride(0) : 0, t->stride(per_seq ? 1 : 0)};
}

// One number of each token: [N] or [B, N] dense, [tokens] packed.
void check_per_token(const Tensor& numbers, const char* name, const Tensor& like, int64_t rows,
                     bool packed) {
  const int64_t rank = numbers.dim();
  check(rank == 1 || (rank == 2 && !packed && numbers.size(0) == like.size(0)), name,
        "have shape [N] or [B, N]");
  check(numbers.size(rank - 1) == rows, name, "have one number per token");
}

// The part of the struct that forward and backward share.
jk_masked_attention_params describe(const Tensor& query, const Tensor& key, const Tensor& value,
                                    const Ids& query_ids, const Ids& key_ids, const Ids& cu_q,
                                    const Ids& cu_k, const Ids& table, const Times& times,
                                    const Grid& grid, double scale) {
  const bool packed = cu_q.has_value();
  check_rows(query, "query", query, packed, true);
  check_rows(key, "key", query, packed, false);
  check_rows(value, "value", query, packed, false);
  check_rows(value, "value", key, packed, true);
  check(packed == cu_k.has_value(), "cu_seqlens_k", "be given with cu_seqlens_q");
  check(table.has_value() == query_ids.has_value() && table.has_value() == key_ids.has_value(),
        "query_ids and key_ids", "be given exactly with rope_table");
  check(grid.size() == 3, "grid", "have three sizes");

  jk_masked_attention_params p{};
  p.dtype = dtype_code(kOp, query);
  const int64_t d = query.dim();
  p.heads = query.size(d - 2);
  p.head_dim = query.size(d - 1);
  p.len_q = query.size(d - 3);
  p.len_k = key.size(d - 3);
  p.num_seqs = packed ? cu_q->size(0) - 1 : query.size(0);
  if (packed) {
    for (const auto& [cu, name] :
         {std::pair{&cu_q, "cu_seqlens_q"}, std::pair{&cu_k, "cu_seqlens_k"}}) {
      check((*cu)->dim() == 1 && (*cu)->size(0) >= 1 && (*cu)->size(0) == cu_q->size(0), name,
            "hold sequences + 1 offsets");
      check((*cu)->is_contiguous(), name, "be contiguous");
    }
    p.cu_q = ints(cu_q, "cu_seqlens_q", query);
    p.cu_k = ints(cu_k, "cu_seqlens_k", query);
  }
  if (table) {
    for (const auto& [ids, rows, name] :
         {std::tuple{&query_ids, p.len_q, "query_ids"}, std::tuple{&key_ids, p.len_k, "key_ids"}}) {
      check_per_token(**ids, name, query, rows, packed);
    }
    p.ids_q = ints(query_ids, "query_ids", query);
    p.ids_k = ints(key_ids, "key_ids", query);
    p.grid_t = grid[0];
    p.grid_h = grid[1];
    p.grid_w = grid[2];
    check(p.grid_t >= 1 && p.grid_h >= 1 && p.grid_w >= 1, "grid", "have sizes of at least 1");
    check(p.grid_t <= INT32_MAX && p.grid_h <= INT32_MAX && p.grid_w <= INT32_MAX &&
              p.grid_h * p.grid_w <= INT32_MAX && p.grid_t * (p.grid_h * p.grid_w) <= INT32_MAX,
          "grid", "have at most 2147483647 tokens");
    p.rope_dim = 2 * ((p.head_dim / 3) / 2);
    check(table->scalar_type() == ScalarType::Float && table->is_contiguous() &&
              table->device() == query.device(),
          "rope_table", "be contiguous float32 on the device of query");
    check(table->dim() == 3 && table->size(0) == 2 &&
              table->size(1) == p.grid_t + p.grid_h + p.grid_w && table->size(2) == p.rope_dim,
          "rope_table", "have shape [2, T + H + W, rope channels per axis]");
    p.rope_table = table->const_data_ptr<float>();
  }
  check(times.query.has_value() == times.key.has_value(), "key_times",
        "be given exactly with query_times");
  check(times.query ? times.window >= 0 && times.window <= UINT32_MAX : times.window == 0, "window",
        "be from 0 to 4294967295, and 0 without query_times");
  if (times.query) {
    check_per_token(*times.query, "query_times", query, p.len_q, packed);
    check_per_token(*times.key, "key_times", query, p.len_k, packed);
    p.times_q = ints(times.query, "query_times", query);
    p.times_k = ints(times.key, "key_times", query);
    p.window = times.window;
  }
  p.scale = static_cast<float>(scale);
  p.q = rows(query, packed);
  p.k = rows(key, packed);
  p.v = rows(value, packed);
  return p;
}

Tensor like(const Tensor& t) { return fresh_tensor(t, t.sizes()); }

void set_out(jk_masked_attention_params& p, const Tensor& out, const Tensor& lse, bool packed) {
  p.out = rows(out, packed);
  p.lse = const_cast<float*>(lse.const_data_ptr<float>());
  p.lse_stride_seq = packed ? 0 : lse.stride(0);
  p.lse_stride_head = packed ? lse.stride(0) : lse.stride(1);
}

using Sentence = const char*;

struct Cpu {
  int64_t isa;
  Sentence fwd(jk_masked_attention_params& p, const Tensor&) const {
    return jk_masked_attention_cpu_fwd(&p, isa_code(isa), parallel_for);
  }
  Sentence bwd(jk_masked_attention_params& p, const Tensor&) const {
    return jk_masked_attention_cpu_bwd(&p, isa_code(isa), parallel_for);
  }
};

struct Cuda {
  using kernel = Sentence (*)(const jk_masked_attention_params*, void*);
  static Sentence launch(jk_masked_attention_params& p, const Tensor& query, const char* name,
                         int backward) {
    const auto size = reinterpret_cast<int64_t (*)(const jk_masked_attention_params*, int)>(
        cuda_symbol("jk_masked_attention_cuda_scratch"));
    const auto run = reinterpret_cast<kernel>(cuda_symbol(name));
    torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
    const std::vector<int64_t> bytes{size(&p, backward)};
    Tensor scratch = fresh_tensor(query, bytes, ScalarType::Byte);
    p.scratch = scratch.mutable_data_ptr();
    p.scratch_bytes = bytes[0];
    return run(&p, cuda_stream(query.get_device_index()));
  }
  Sentence fwd(jk_masked_attention_params& p, const Tensor& q) const {
    return launch(p, q, "jk_masked_attention_cuda_fwd", 0);
  }
  Sentence bwd(jk_masked_attention_params& p, const Tensor& q) const {
    return launch(p, q, "jk_masked_attention_cuda_bwd", 1);
  }
};

template <class Device>
std::tuple<Tensor, Tensor> forward(const Device& device, const Tensor& query, const Tensor& key,
                                   const Tensor& value, const Ids& query_ids, const Ids& key_ids,
                                   const Ids& cu_q, const Ids& cu_k, const Ids& table,
                                   const Times& times, const Grid& grid, double scale) {
  auto p = describe(query, key, value, query_ids, key_ids, cu_q, cu_k, table, times, grid, scale);
  const bool packed = cu_q.has_value();
  Tensor out = like(query);
  const std::vector<int64_t> shape =
      packed ? std::vector<int64_t>{query.size(1), query.size(0)}
             : std::vector<int64_t>{query.size(0), query.size(2), query.size(1)};
  Tensor lse = fresh_tensor(query, shape, ScalarType::Float);
  set_out(p, out, lse, packed);
  check_sentence(device.fwd(p, query));
  return {out, lse};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> backward(const Device& device, const Tensor& grad_out,
                                            const Tensor& query, const Tensor& key,
                                            const Tensor& value, const Ids& query_ids,
                                            const Ids& key_ids, const Ids& cu_q, const Ids& cu_k,
                                            const Ids& table, const Times& times, const Tensor& out,
                                            const Tensor& lse, const Grid& grid, double scale) {
  auto p = describe(query, key, value, query_ids, key_ids, cu_q, cu_k, table, times, grid, scale);
  const bool packed = cu_q.has_value();
  check_rows(grad_out, "grad_out", query, packed, true);
  check_rows(out, "out", query, packed, true);
  check(lse.scalar_type() == ScalarType::Float && lse.is_contiguous() &&
            lse.device() == query.device(),
        "lse", "be contiguous float32 on the device of query");
  check(packed ? (lse.dim() == 2 && lse.size(0) == p.heads && lse.size(1) == p.len_q)
               : (lse.dim() == 3 && lse.size(0) == p.num_seqs && lse.size(1) == p.heads &&
                  lse.size(2) == p.len_q),
        "lse", "have one value per head and query");
  Tensor grad_query = like(query), grad_key = like(key), grad_value = like(value);
  set_out(p, out, lse, packed);
  p.grad_out = rows(grad_out, packed);
  p.grad_q = rows(grad_query, packed);
  p.grad_k = rows(grad_key, packed);
  p.grad_v = rows(grad_value, packed);
  check_sentence(device.bwd(p, query));
  return {grad_query, grad_key, grad_value};
}

std::tuple<Tensor, Tensor> cpu_fwd(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const Ids& query_ids, const Ids& key_ids, const Ids& cu_q,
                                   const Ids& cu_k, const Ids& table, const Ids& query_times,
                                   const Ids& key_times, const Grid& grid, double scale,
                                   int64_t window, int64_t isa) {
  return forward(Cpu{isa}, query, key, value, query_ids, key_ids, cu_q, cu_k, table,
                 {query_times, key_times, window}, grid, scale);
}

std::tuple<Tensor, Tensor, Tensor> cpu_bwd(const Tensor& grad_out, const Tensor& query,
                                           const Tensor& key, const Tensor& value,
                                           const Ids& query_ids, const Ids& key_ids,
                                           const Ids& cu_q, const Ids& cu_k, const Ids& table,
                                           const Ids& query_times, const Ids& key_times,
                                           const Tensor& out, const Tensor& lse, const Grid& grid,
                                           double scale, int64_t window, int64_t isa) {
  return backward(Cpu{isa}, grad_out, query, key, value, query_ids, key_ids, cu_q, cu_k, table,
                  {query_times, key_times, window}, out, lse, grid, scale);
}

std::tuple<Tensor, Tensor> cuda_fwd(const Tensor& query, const Tensor& key, const Tensor& value,
                                    const Ids& query_ids, const Ids& key_ids, const Ids& cu_q,
                                    const Ids& cu_k, const Ids& table, const Grid& grid,
                                    double scale) {
  return forward(Cuda{}, query, key, value, query_ids, key_ids, cu_q, cu_k, table, {}, grid, scale);
}

std::tuple<Tensor, Tensor, Tensor> cuda_bwd(const Tensor& grad_out, const Tensor& query,
                                            const Tensor& key, const Tensor& value,
                                            const Ids& query_ids, const Ids& key_ids,
                                            const Ids& cu_q, const Ids& cu_k, const Ids& table,
                                            const Tensor& out, const Tensor& lse, const Grid& grid,
                                            double scale) {
  return backward(Cuda{}, grad_out, query, key, value, query_ids, key_ids, cu_q, cu_k, table, {},
                  out, lse, grid, scale);
}

}  // namespace
}  // namespace jk::attention

JK_LIBRARY_FRAGMENT(m) {
  m.def(
      "masked_attention_cpu_fwd(Tensor query, Tensor key, Tensor value, Tensor? query_ids, Tensor? "
      "key_ids, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, Tensor? rope_table, Tensor? query_times, Tensor? key_times, int[] "
      "grid, float scale, int window, int isa) -> (Tensor, Tensor)");
  m.def(
      "masked_attention_cpu_bwd(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? "
      "query_ids, Tensor? key_ids, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? rope_table, Tensor? query_times, "
      "Tensor? key_times, Tensor out, Tensor lse, int[] grid, float scale, int window, int isa) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "masked_attention_cuda_fwd(Tensor query, Tensor key, Tensor value, Tensor? query_ids, "
      "Tensor? key_ids, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, Tensor? rope_table, int[] grid, float scale) -> (Tensor, Tensor)");
  m.def(
      "masked_attention_cuda_bwd(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? "
      "query_ids, Tensor? key_ids, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? rope_table, Tensor out, Tensor lse, "
      "int[] grid, float scale) "
      "-> (Tensor, Tensor, Tensor)");
}

JK_LIBRARY_IMPL(CPU, m) {
  m.impl("masked_attention_cpu_fwd", TORCH_BOX(&jk::attention::cpu_fwd));
  m.impl("masked_attention_cpu_bwd", TORCH_BOX(&jk::attention::cpu_bwd));
}

JK_LIBRARY_IMPL(CUDA, m) {
  m.impl("masked_attention_cuda_fwd", TORCH_BOX(&jk::attention::cuda_fwd));
  m.impl("masked_attention_cuda_bwd", TORCH_BOX(&jk::attention::cuda_bwd));
}
