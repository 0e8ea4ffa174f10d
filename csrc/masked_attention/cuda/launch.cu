// Host side of masked_attention on CUDA: checks, scratch layout, the table of tile shapes and the
// launches. Launches only: no allocation, no synchronisation, so a call can be captured in a CUDA
// graph.
#include <algorithm>

#include "backward.cuh"
#include "float.cuh"
#include "forward.cuh"
#include "prepare.cuh"

namespace jk::attention {
namespace {

constexpr int64_t kAlign = 256;
constexpr int64_t kMaxLength =
    INT32_MAX - 4096;  // row numbers within a sequence are 32 bits wide, plus a tile

const char* check(const jk_masked_attention_params& p) {
  if (p.dtype != JK_FLOAT32 && p.dtype != JK_BFLOAT16 && p.dtype != JK_FLOAT16)
    return "masked_attention: query must have dtype float32, bfloat16 or float16 on CUDA.";
  if (p.head_dim < 8 || p.head_dim > 128 || p.head_dim % 8)
    return "masked_attention: head_dim must be a multiple of 8 from 8 to 128 on CUDA.";
  if (p.heads < 0 || p.heads > 65535)
    return "masked_attention: query must have at most 65535 heads on CUDA.";
  if (p.num_seqs < 0 || p.len_q < 0 || p.len_k < 0)
    return "masked_attention: query and key must have sizes of at least 0.";
  if (p.len_q > kMaxLength || p.len_k > kMaxLength)
    return "masked_attention: query and key must have fewer than 2147479551 rows on CUDA.";
  if (reinterpret_cast<uintptr_t>(p.rope_table) % 8)
    return "masked_attention: rope_table must be 8-byte aligned on CUDA.";
  return nullptr;
}

int64_t element_bytes(const jk_masked_attention_params& p) { return p.dtype == JK_FLOAT32 ? 4 : 2; }
int64_t rows_of(const jk_masked_attention_params& p, const jk_ints& cu, int64_t length) {
  return cu.data ? length : p.num_seqs * length;
}
int64_t round_up(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Whether every row of every head starts at a multiple of 16 bytes.
bool is_aligned(const jk_masked_attention_params& p, const jk_rows& rows, const jk_ints& cu) {
  const int64_t bytes = element_bytes(p);
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride_token * bytes % 16 == 0 &&
         rows.stride_head * bytes % 16 == 0 && (cu.data || rows.stride_seq * bytes % 16 == 0);
}

// The tensors that kernels stream through shared memory. The forward kernel rotates its queries
// itself.
struct Stream {
  jk_rows jk_masked_attention_params::* rows;
  jk_ints jk_masked_attention_params::* cu;
  jk_ints jk_masked_attention_params::* ids;
  int64_t jk_masked_attention_params::* length;
  bool rotated, backward_only;
};
using P = jk_masked_attention_params;
const Stream kStreams[] = {
    {&P::k, &P::cu_k, &P::ids_k, &P::len_k, true, false},
    {&P::v, &P::cu_k, &P::ids_k, &P::len_k, false, false},
    {&P::q, &P::cu_q, &P::ids_q, &P::len_q, true, true},
    {&P::grad_out, &P::cu_q, &P::ids_q, &P::len_q, false, true},
};

// The most packed sequences that are ranked: each is compared with all, by one thread.
constexpr int64_t kMostRanked = 256;

// How the scratch space is laid out: copies of the streams that need one, then the row statistics,
// then the ranks.
struct Plan {
  Args args{};
  Preparation made{};
  int64_t blocks = 0;  // that the longest part of the preparation takes
  int64_t bytes = 0;
};

Plan make_plan(const jk_masked_attention_params& p, bool backward) {
  Plan plan;
  Args& a = plan.args;
  a.p = p;
  a.rows_q = rows_of(p, p.cu_q, p.len_q);
  a.rows_k = rows_of(p, p.cu_k, p.len_k);
  a.vector_q = is_aligned(p, p.q, p.cu_q);
  a.vector_out = is_aligned(p, p.out, p.cu_q);
  a.vector_grad_q = is_aligned(p, p.grad_q, p.cu_q);
  a.vector_grad_k = is_aligned(p, p.grad_k, p.cu_k);
  a.vector_grad_v = is_aligned(p, p.grad_v, p.cu_k);
  char* const scratch = static_cast<char*>(p.scratch);
  auto take = [&](int64_t size) {
    void* const at = scratch + plan.bytes;
    plan.bytes += round_up(size);
    return at;
  };
  for (const Stream& stream : kStreams) {
    if (stream.backward_only && !backward) continue;
    const jk_rows from = p.*stream.rows;
    const jk_ints cu = p.*stream.cu;
    const bool rotate = stream.rotated && (p.*stream.ids).data != nullptr && p.rope_dim > 0,
               aligned = is_aligned(p, from, cu);
    const int64_t length = p.*stream.length, rows = rows_of(p, cu, length);
    if (rows == 0 || (!rotate && aligned)) continue;
    void* const to = take(p.heads * rows * p.head_dim * element_bytes(p));
    plan.made.copy[plan.made.copies++] = {
        from, rotate ? p.*stream.ids : jk_ints{}, cu, to, rows, length, aligned};
    a.p.*stream.rows = {to, length * p.head_dim, p.head_dim, rows * p.head_dim};
    plan.blocks = std::max(plan.blocks, (rows * (p.head_dim / 8) + kThreads - 1) / kThreads);
  }
  if (backward) {
    plan.made.stats = a.rows_q > 0;
    plan.made.grad_out = p.grad_out;
    plan.made.vector_grad_out = is_aligned(p, p.grad_out, p.cu_q);
    plan.blocks = std::max(plan.blocks, (a.rows_q + kRowsOfStats - 1) / kRowsOfStats);
    a.stats = static_cast<float2*>(take(p.heads * a.rows_q * int64_t(sizeof(float2))));
  }
  // A launch for the ranks alone would cost what they save.
  plan.made.ranks = p.cu_q.data && p.num_seqs > 1 && p.num_seqs <= kMostRanked &&
                    (plan.made.copies > 0 || plan.made.stats);
  if (plan.made.ranks) {
    const int64_t count = p.num_seqs + 2;
    auto ranks = [&] {
      return Ranks{static_cast<int32_t*>(take(count * int64_t(sizeof(int32_t)))),
                   static_cast<int64_t*>(take(count * int64_t(sizeof(int64_t))))};
    };
    a.ranks_q = ranks();
    if (backward) a.ranks_k = ranks();
    plan.blocks = std::max(plan.blocks, (count + kThreads - 1) / kThreads);
  }
  return plan;
}

template <class Kernel>
const char* launch(Kernel kernel, size_t bytes, int64_t tiles, int passes, const Args& a,
                   void* stream) {
  if (tiles == 0) return nullptr;
  const bool ranked = a.ranks_q.sequence != nullptr;
  const int64_t across = ranked ? tiles * a.p.heads : tiles;
  if (across > INT32_MAX)
    return "masked_attention: query and key must have fewer than 2147483647 tiles of rows on CUDA.";
  if (bytes > 48 * 1024)
    if (const char* error = allow_dynamic_shared(kernel, bytes)) return error;
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(ranked ? 1 : a.p.heads),
                  static_cast<unsigned>(passes));
  JK_LAUNCH(kernel, grid, dim3(kThreads), bytes, stream, a);
  return launch_error();
}

// Tiles of `rows` rows of one side, and of one sequence of a dense batch. How packed rows fall into
// tiles is only known on the device: this is the upper bound that find_sequence assumes.
int64_t count_tiles(const Args& a, const jk_ints& cu, int64_t length, int rows,
                    int64_t& of_sequence) {
  of_sequence = (length + rows - 1) / rows;
  return cu.data ? length / rows + a.p.num_seqs + 2 : of_sequence * a.p.num_seqs;
}

template <class Kernel>
const char* launch_forward(Kernel kernel, size_t bytes, Args a, int rows, void* stream) {
  const int64_t tiles = count_tiles(a, a.p.cu_q, a.p.len_q, rows, a.tiles_q);
  return launch(kernel, bytes, tiles, 1, a, stream);
}

// Blocks that own keys and blocks that own queries.
template <class Kernel>
const char* launch_backward(Kernel kernel, size_t bytes, Args a, int rows_k, int rows_q,
                            void* stream) {
  const int64_t tiles_k = count_tiles(a, a.p.cu_k, a.p.len_k, rows_k, a.tiles_k),
                tiles_q = count_tiles(a, a.p.cu_q, a.p.len_q, rows_q, a.tiles_q);
  return launch(kernel, bytes, std::max(tiles_k, tiles_q), 2, a, stream);
}

template <class T>
const char* prepare(const Plan& plan, void* stream) {
  const Args a = plan.args;
  const Preparation made = plan.made;
  const int parts = made.copies + (made.stats ? 1 : 0) + (made.ranks ? 1 : 0);
  if (parts == 0) return nullptr;
  if (plan.blocks > INT32_MAX)
    return "masked_attention: query and key must have fewer than 2147483647 tiles of rows on CUDA.";
  const int64_t groups = (a.p.heads + kHeadsAtOnce - 1) / kHeadsAtOnce;
  const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(groups),
                  static_cast<unsigned>(parts));
  JK_LAUNCH((masked_attention_prepare_kernel<T>), grid, dim3(kThreads), 0, stream, a, made);
  return launch_error();
}

// JK_ONLY_CLASS=64, say, builds one head_dim class only: for sanitizer builds and quick
// experiments.
#ifndef JK_ONLY_CLASS
#define JK_ONLY_CLASS 0
#endif
template <class Tile>
constexpr bool kBuilt = JK_ONLY_CLASS == 0 || JK_ONLY_CLASS == Tile::kDim;
constexpr const char* kNotBuilt =
    "masked_attention: head_dim must belong to the class that this library was built for.";

template <class T, class Tile>
const char* forward_tile(const Args& a, void* stream) {
  if constexpr (kBuilt<Tile>)
    return launch_forward(masked_attention_fwd_kernel<T, Tile>, Tile::template bytes<T>(), a,
                          Tile::kQueries, stream);
  else
    return kNotBuilt;
}

template <class T, class Keys, class Queries>
const char* backward_tiles(const Args& a, void* stream) {
  if constexpr (kBuilt<Keys>)
    return launch_backward(
        masked_attention_bwd_kernel<T, Keys, Queries>,
        std::max(Keys::template bytes<T>(true), Queries::template bytes<T>(false)), a, Keys::kOwn,
        Queries::kOwn, stream);
  else
    return kNotBuilt;
}

template <class Tile>
const char* forward_float(const Args& a, void* stream) {
  if constexpr (kBuilt<Tile>)
    return launch_forward(masked_attention_fwd_float_kernel<Tile>, Tile::kForwardBytes, a,
                          Tile::kRows, stream);
  else
    return kNotBuilt;
}

template <class Tile>
const char* backward_float(const Args& a, void* stream) {
  if constexpr (kBuilt<Tile>)
    return launch_backward(masked_attention_bwd_float_kernel<Tile>, Tile::kBackwardBytes, a,
                           Tile::kRows, Tile::kRows, stream);
  else
    return kNotBuilt;
}

// The table of tile shapes, by head_dim class: 16-row bands per warp, rows of the other side per
// step, left operands in registers. Two bands read a right operand once for both, which is what
// shared memory allows; of wide heads, keys with two bands spill (96: 52 bytes, 128: 976), and
// queries of 128 channels leave an A100 one block for two.
template <class T>
const char* forward(const Args& a, void* stream) {
  const int64_t d = a.p.head_dim;
  if constexpr (sizeof(T) == 4) {
    if (d <= 32) return forward_float<FloatTile<32, 4>>(a, stream);
    if (d <= 64) return forward_float<FloatTile<64, 4>>(a, stream);
    return forward_float<FloatTile<128, 4>>(a, stream);
  } else {
    if (d <= 16) return forward_tile<T, ForwardTile<16, 2, 64, true>>(a, stream);
    if (d <= 32) return forward_tile<T, ForwardTile<32, 2, 64, true>>(a, stream);
    if (d <= 64) return forward_tile<T, ForwardTile<64, 2, 64, true>>(a, stream);
    if (d <= 96) return forward_tile<T, ForwardTile<96, 2, 64, false>>(a, stream);
    return forward_tile<T, ForwardTile<128, 2, 32, false>>(a, stream);
  }
}

template <class T>
const char* backward(const Args& a, void* stream) {
  const int64_t d = a.p.head_dim;
  if constexpr (sizeof(T) == 4) {
    if (d <= 32) return backward_float<FloatTile<32, 4>>(a, stream);
    if (d <= 64) return backward_float<FloatTile<64, 4>>(a, stream);
    return backward_float<FloatTile<128, 2>>(a, stream);
  } else {
    if (d <= 16)
      return backward_tiles<T, BackwardTile<16, 2, 64, true>, BackwardTile<16, 2, 64, true>>(
          a, stream);
    if (d <= 32)
      return backward_tiles<T, BackwardTile<32, 2, 64, true, 32>, BackwardTile<32, 2, 64, true>>(
          a, stream);
    if (d <= 64)
      return backward_tiles<T, BackwardTile<64, 2, 32, false>, BackwardTile<64, 2, 32, true>>(
          a, stream);
    if (d <= 96)
      return backward_tiles<T, BackwardTile<96, 1, 32, false>, BackwardTile<96, 2, 32, false>>(
          a, stream);
    return backward_tiles<T, BackwardTile<128, 1, 32, false>, BackwardTile<128, 1, 32, false>>(
        a, stream);
  }
}

template <class T>
const char* run(const jk_masked_attention_params& p, bool is_backward, void* stream) {
  const Plan plan = make_plan(p, is_backward);
  if (plan.bytes > p.scratch_bytes)
    return "masked_attention: scratch must have the size that jk_masked_attention_cuda_scratch "
           "names.";
  const Args& a = plan.args;
  if (p.heads == 0 || (a.rows_q == 0 && (!is_backward || a.rows_k == 0))) return nullptr;
  if (const char* error = prepare<T>(plan, stream)) return error;
  return is_backward ? backward<T>(a, stream) : forward<T>(a, stream);
}

const char* run_any(const jk_masked_attention_params* p, bool is_backward, void* stream) {
  if (const char* error = check(*p)) return error;
  if (p->dtype == JK_FLOAT32) return run<float>(*p, is_backward, stream);
  return p->dtype == JK_BFLOAT16 ? run<bfloat16>(*p, is_backward, stream)
                                 : run<float16>(*p, is_backward, stream);
}

}  // namespace
}  // namespace jk::attention

JK_EXPORT int64_t jk_masked_attention_cuda_scratch(const jk_masked_attention_params* p,
                                                   int backward) {
  // What the kernels refuse needs no space; they say why.
  return jk::attention::check(*p) ? 0 : jk::attention::make_plan(*p, backward != 0).bytes;
}

JK_EXPORT const char* jk_masked_attention_cuda_fwd(const jk_masked_attention_params* p,
                                                   void* stream) {
  return jk::attention::run_any(p, false, stream);
}

JK_EXPORT const char* jk_masked_attention_cuda_bwd(const jk_masked_attention_params* p,
                                                   void* stream) {
  return jk::attention::run_any(p, true, stream);
}
