// masked_attention on a CPU: refuses bad calls, chooses the instruction set, cuts the call into
// tasks and hands them to the caller's threads. A task writes memory of its own and computes the
// same bits wherever and whenever it runs.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "../../cpu/dispatch.h"
#include "../../cpu/tiles.h"
#include "check.h"
#include "kernels.h"

namespace jk::attention {
namespace {

// Scratch of one thread; kept between calls, since fresh pages would cost as much as a short call.
class Arena {
 public:
  ~Arena() { free(data_); }
  float* at_least(int64_t floats) {
    if (floats <= size_) return data_;
    free(data_);
    const size_t bytes = ((size_t)floats * sizeof(float) + 4095) / 4096 * 4096;
    data_ = (float*)aligned_alloc(4096, bytes);
    size_ = data_ == nullptr ? 0 : floats;
    if (data_ != nullptr) memset(data_, 0, bytes);
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

constexpr KernelsOf<Kernels> kKernels[] = {
    kernels<JK_ISA_PORTABLE>,
    JK_X86(kernels<JK_ISA_AVX2>, kernels<JK_ISA_AVX512>, kernels<JK_ISA_AVX512_BF16>)};

struct Task {
  int64_t seq, head;
  Range tiles, blocks;
  bool want_q, want_kv;
  int64_t cost;
};

class Call {
 public:
  Call(const jk_masked_attention_params& p, const Kernels& kernels, jk_parallel_for parallel_for)
      : p_(p), kernels_(kernels), parallel_for_(parallel_for), packed_(p.cu_q.data != nullptr) {
    if (p.rope_table != nullptr) spread_table();
    if (p.times_q.data != nullptr) read_times();
  }

  const char* forward();
  const char* backward();

 private:
  void spread_table();
  void read_times();
  const int32_t* times_of(const std::vector<int32_t>& times, const jk_ints& from, const jk_ints& cu,
                          int64_t len, int64_t seq) const;
  Head head_of(int64_t seq, int64_t head) const;
  int64_t element_bytes() const { return p_.dtype == JK_BFLOAT16 ? 2 : 4; }
  int64_t first_row(const jk_ints& cu, int64_t seq) const {
    return packed_ ? number_at(cu, seq) : 0;
  }
  int64_t length(const jk_ints& cu, int64_t len, int64_t seq) const {
    return packed_ ? number_at(cu, seq + 1) - number_at(cu, seq) : len;
  }
  Rows rows_of(const jk_rows& rows, const jk_ints& cu, int64_t seq, int64_t head) const;
  Ids ids_of(const jk_ints& ids, const jk_ints& cu, int64_t seq) const;
  void zero(const jk_rows& rows, int64_t seq, int64_t first, int64_t count) const;
  void no_keys(int64_t seq, int64_t first, int64_t count) const;
  void fill_rest(const jk_ints& cu, int64_t len, bool queries, bool backward) const;

  void measure();
  bool small() const {
    return total_cost_ * p_.head_dim < (int64_t(1) << 18);
  }  // waking a thread would take longer
  int64_t pieces(int64_t cost, int64_t most) const;
  bool too_few_heads() const;
  const char* run(std::vector<Task>& tasks, bool backward);
  bool forward_task(const Task& task, Arena& arena, const Task*& packed) const;
  bool backward_task(const Task& task, Arena& arena) const;

  const jk_masked_attention_params& p_;
  const Kernels& kernels_;
  const jk_parallel_for parallel_for_;
  const bool packed_;
  std::vector<float> table_;
  std::vector<int32_t> first_time_, last_time_, key_time_;
  RopeRows rope_ = {};
  int64_t total_cost_ = 0, workers_ = 1;
};

void Call::spread_table() {
  const int64_t padded = (p_.head_dim + kRopePad - 1) / kRopePad * kRopePad, m = p_.rope_dim;
  const int64_t sizes[] = {p_.grid_t, p_.grid_h, p_.grid_w},
                rows = p_.grid_t + p_.grid_h + p_.grid_w;
  table_.assign((size_t)((rows + 3) * 2 * padded), 0.f);
  rope_ = {table_.data(), padded, p_.grid_t, p_.grid_h, p_.grid_w, {}, {}};
  int64_t r = 0;
  for (int64_t axis = 0; axis < 3; ++axis) {
    const int64_t begin = axis * m, end = begin + m, last = axis == 2 ? p_.head_dim : end;
    float* unit = &table_[(size_t)((rows + axis) * 2 * padded)];
    std::fill(unit + begin, unit + last, 1.f);
    for (const int64_t stop = r + sizes[axis]; r < stop; ++r) {
      float *cosines = &table_[(size_t)(r * 2 * padded)], *sines = cosines + padded;
      std::copy_n(p_.rope_table + r * m, m, cosines + begin);
      std::fill(cosines + end, cosines + last, 1.f);
      for (int64_t c = 0; c < m; ++c)
        sines[begin + c] = p_.rope_table[(rows + r) * m + c] * (c % 2 == 0 ? -1.f : 1.f);
    }
  }
  const auto axis_of = [&](int64_t channel) {
    return (uint8_t)(channel < m ? 0 : channel < 2 * m ? 1 : 2);
  };
  for (int64_t run = 0; run < 16; ++run) {
    rope_.first_axis[run] = axis_of(8 * run);
    rope_.last_axis[run] = axis_of(8 * run + 7);
  }
}

// Times side by side in 32 bits, whatever the caller's lists are like.
void Call::read_times() {
  const auto read = [&](const jk_ints& from, int64_t len, auto put) {
    const int64_t lists = lists_of(p_, from);
    for (int64_t s = 0; s < lists; ++s) {
      const int64_t start = packed_ ? 0 : s * from.stride_seq;
      for (int64_t i = 0; i < len; ++i)
        put(s * len + i, number_at(from, start + i * from.stride_token));
    }
  };
  const int64_t queries = lists_of(p_, p_.times_q) * p_.len_q,
                keys = lists_of(p_, p_.times_k) * p_.len_k;
  // One more than there are, so that a list without tokens is there, too.
  first_time_.assign((size_t)queries + 1, INT32_MIN);
  last_time_.assign((size_t)queries + 1, 0);
  key_time_.assign((size_t)keys + 1, 0);
  read(p_.times_q, p_.len_q, [&](int64_t i, int64_t time) {
    last_time_[(size_t)i] = (int32_t)time;
    if (p_.window > 0)
      first_time_[(size_t)i] = (int32_t)std::max<int64_t>(INT32_MIN, time - p_.window + 1);
  });
  read(p_.times_k, p_.len_k,
       [&](int64_t i, int64_t time) { key_time_[(size_t)i] = (int32_t)time; });
}

const int32_t* Call::times_of(const std::vector<int32_t>& times, const jk_ints& from,
                              const jk_ints& cu, int64_t len, int64_t seq) const {
  if (from.data == nullptr) return nullptr;
  return times.data() + (packed_ ? first_row(cu, seq) : lists_of(p_, from) == 1 ? 0 : seq * len);
}

Rows Call::rows_of(const jk_rows& rows, const jk_ints& cu, int64_t seq, int64_t head) const {
  const int64_t start = packed_ ? first_row(cu, seq) * rows.stride_token : seq * rows.stride_seq;
  return {(char*)rows.data + (start + head * rows.stride_head) * element_bytes(),
          rows.stride_token};
}

Ids Call::ids_of(const jk_ints& ids, const jk_ints& cu, int64_t seq) const {
  if (ids.data == nullptr) return {nullptr, 0, 0};
  // One id of -1 for every token, as for keys that are rotated already: nothing to rotate.
  const bool unrotated = ids.stride_token == 0 && ids.stride_seq == 0 && number_at(ids, 0) == -1;
  if (unrotated) return {nullptr, 0, 0};
  const int64_t start = packed_ ? first_row(cu, seq) * ids.stride_token : seq * ids.stride_seq;
  return {(const char*)ids.data + start * ids.bytes, ids.bytes, ids.stride_token};
}

Head Call::head_of(int64_t seq, int64_t head) const {
  Head h;
  h.len_q = length(p_.cu_q, p_.len_q, seq);
  h.len_k = length(p_.cu_k, p_.len_k, seq);
  h.head_dim = p_.head_dim;
  h.scale = p_.scale;
  h.q = rows_of(p_.q, p_.cu_q, seq, head);
  h.k = rows_of(p_.k, p_.cu_k, seq, head);
  h.v = rows_of(p_.v, p_.cu_k, seq, head);
  h.out = rows_of(p_.out, p_.cu_q, seq, head);
  h.grad_out = rows_of(p_.grad_out, p_.cu_q, seq, head);
  h.grad_q = rows_of(p_.grad_q, p_.cu_q, seq, head);
  h.grad_k = rows_of(p_.grad_k, p_.cu_k, seq, head);
  h.grad_v = rows_of(p_.grad_v, p_.cu_k, seq, head);
  h.ids_q = ids_of(p_.ids_q, p_.cu_q, seq);
  h.ids_k = ids_of(p_.ids_k, p_.cu_k, seq);
  h.rope = p_.rope_table == nullptr ? nullptr : &rope_;
  h.lse = p_.lse + head * p_.lse_stride_head +
          (packed_ ? first_row(p_.cu_q, seq) : seq * p_.lse_stride_seq);
  h.first_time = times_of(first_time_, p_.times_q, p_.cu_q, p_.len_q, seq);
  h.last_time = times_of(last_time_, p_.times_q, p_.cu_q, p_.len_q, seq);
  h.key_time = times_of(key_time_, p_.times_k, p_.cu_k, p_.len_k, seq);
  return h;
}

// Zeros in `count` rows of every head from row `first` of a sequence (of the whole tensor where it
// is packed).
void Call::zero(const jk_rows& rows, int64_t seq, int64_t first, int64_t count) const {
  const int64_t start = packed_ ? 0 : seq * rows.stride_seq;
  for (int64_t i = first; i < first + count; ++i) {
    for (int64_t h = 0; h < p_.heads; ++h) {
      char* row = (char*)rows.data +
                  (start + i * rows.stride_token + h * rows.stride_head) * element_bytes();
      memset(row, 0, (size_t)(p_.head_dim * element_bytes()));
    }
  }
}

// The result of queries that have no keys.
void Call::no_keys(int64_t seq, int64_t first, int64_t count) const {
  zero(p_.out, seq, first, count);
  for (int64_t h = 0; h < p_.heads; ++h) {
    float* lse = p_.lse + h * p_.lse_stride_head + (packed_ ? 0 : seq * p_.lse_stride_seq) + first;
    std::fill(lse, lse + count, -INFINITY);
  }
}

// Sums up the work and finds out how many tasks can run side by side: the number of pieces that the
// caller's threads cut a long loop into.
void Call::measure() {
  for (int64_t s = 0; s < p_.num_seqs; ++s) {
    total_cost_ += p_.heads * length(p_.cu_q, p_.len_q, s) * length(p_.cu_k, p_.len_k, s);
  }
  if (small()) return;
  std::atomic<int64_t> count{0};
  parallel_for_(
      4096, 1, [](int64_t, int64_t, void* counter) { ++*(std::atomic<int64_t>*)counter; }, &count);
  workers_ = std::max<int64_t>(1, count);
}

// Into how many pieces to cut a (sequence, head): enough for every worker to get about four pieces
// of the whole call.
int64_t Call::pieces(int64_t cost, int64_t most) const {
  const int64_t share = std::max<int64_t>(1, total_cost_ / (4 * workers_));
  return std::clamp<int64_t>((cost + share - 1) / share, 1, std::max<int64_t>(1, most));
}

const char* Call::run(std::vector<Task>& tasks, bool backward) {
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.cost > b.cost; });
  struct Queue {
    const Call& call;
    const std::vector<Task>& tasks;
    const bool backward;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
  } queue{*this, tasks, backward};
  const auto work = [](int64_t, int64_t, void* context) {
    static thread_local Arena arena;
    Queue& q = *(Queue*)context;
    const Task* packed = nullptr;
    for (int64_t i = q.next++; i < (int64_t)q.tasks.size(); i = q.next++) {
      const Task& task = q.tasks[(size_t)i];
      if (!(q.backward ? q.call.backward_task(task, arena)
                       : q.call.forward_task(task, arena, packed)))
        q.failed = true;
    }
  };
  const int64_t count = (int64_t)tasks.size();
  if (count > 0) parallel_for_(count, small() ? count : 1, work, &queue);
  return queue.failed ? "masked_attention: scratch memory must be available for one head per "
                        "thread, got none."
                      : nullptr;
}

bool Call::forward_task(const Task& task, Arena& arena, const Task*& packed) const {
  const Head head = head_of(task.seq, task.head);
  float* scratch = arena.at_least(kernels_.forward_scratch(head.head_dim, head.len_k));
  if (scratch == nullptr) return false;
  if (packed == nullptr || packed->seq != task.seq || packed->head != task.head)
    kernels_.forward_keys(head, scratch);
  packed = &task;
  kernels_.forward_queries(head, scratch, task.tiles);
  return true;
}

const char* Call::forward() {
  measure();
  std::vector<Task> tasks;
  for (int64_t s = 0; s < p_.num_seqs; ++s) {
    const int64_t len_q = length(p_.cu_q, p_.len_q, s), len_k = length(p_.cu_k, p_.len_k, s);
    if (len_k == 0) no_keys(s, first_row(p_.cu_q, s), len_q);
    if (len_q == 0 || len_k == 0) continue;
    const int64_t tiles = kernels_.tiles(len_q), cost = len_q * len_k,
                  count = pieces(cost, tiles / 4);
    for (int64_t h = 0; h < p_.heads; ++h) {
      for (int64_t i = 0; i < count; ++i) {
        tasks.push_back({s,
                         h,
                         {tiles * i / count, tiles * (i + 1) / count},
                         {0, 0},
                         true,
                         false,
                         cost / count});
      }
    }
  }
  if (packed_) {
    const int64_t used = number_at(p_.cu_q, p_.num_seqs);
    no_keys(0, used, p_.len_q - used);
  }
  return run(tasks, false);
}

bool Call::backward_task(const Task& task, Arena& arena) const {
  const Head head = head_of(task.seq, task.head);
  float* scratch = arena.at_least(kernels_.backward_scratch(head.head_dim, head.len_q));
  if (scratch == nullptr) return false;
  kernels_.backward(head, scratch, task.tiles, task.blocks, task.want_q, task.want_kv);
  return true;
}

// Whether whole heads would leave workers idle for longer than separate passes for dQ and for dK,
// dV cost (seven products instead of five). Only the time depends on the answer, not the result.
bool Call::too_few_heads() const {
  int64_t heads = 0;
  std::vector<int64_t> costs;
  for (int64_t s = 0; s < p_.num_seqs; ++s) {
    costs.push_back(length(p_.cu_q, p_.len_q, s) * length(p_.cu_k, p_.len_k, s));
    heads += costs.back() > 0 ? p_.heads : 0;
  }
  if (workers_ == 1 || heads >= 8 * workers_) return false;
  std::sort(costs.rbegin(), costs.rend());
  std::vector<int64_t> load((size_t)workers_, 0);
  for (const int64_t cost : costs) {
    for (int64_t h = 0; h < p_.heads && cost > 0; ++h)
      *std::min_element(load.begin(), load.end()) += cost;
  }
  const double longest = (double)*std::max_element(load.begin(), load.end());
  return longest > 1.45 * (double)total_cost_ / (double)workers_;
}

const char* Call::backward() {
  measure();
  const bool split = too_few_heads();
  std::vector<Task> tasks;
  for (int64_t s = 0; s < p_.num_seqs; ++s) {
    const int64_t len_q = length(p_.cu_q, p_.len_q, s), len_k = length(p_.cu_k, p_.len_k, s);
    if (len_k == 0) zero(p_.grad_q, s, first_row(p_.cu_q, s), len_q);
    if (len_q == 0) {
      zero(p_.grad_k, s, first_row(p_.cu_k, s), len_k);
      zero(p_.grad_v, s, first_row(p_.cu_k, s), len_k);
    }
    if (len_q == 0 || len_k == 0) continue;
    const Range tiles = {0, kernels_.tiles(len_q)}, blocks = {0, kernels_.blocks(len_k)};
    const int64_t cost = len_q * len_k, by_q = split ? pieces(cost, tiles.end / 4) : 1,
                  by_k = split ? pieces(cost, blocks.end) : 1;
    for (int64_t h = 0; h < p_.heads; ++h) {
      if (by_q == 1 && by_k == 1) {
        tasks.push_back({s, h, tiles, blocks, true, true, 5 * cost});
        continue;
      }
      for (int64_t i = 0; i < by_k; ++i) {
        tasks.push_back({s,
                         h,
                         tiles,
                         {blocks.end * i / by_k, blocks.end * (i + 1) / by_k},
                         false,
                         true,
                         4 * cost / by_k});
      }
      for (int64_t i = 0; i < by_q; ++i) {
        tasks.push_back({s,
                         h,
                         {tiles.end * i / by_q, tiles.end * (i + 1) / by_q},
                         blocks,
                         true,
                         false,
                         3 * cost / by_q});
      }
    }
  }
  if (packed_) {
    const int64_t used_q = number_at(p_.cu_q, p_.num_seqs),
                  used_k = number_at(p_.cu_k, p_.num_seqs);
    zero(p_.grad_q, 0, used_q, p_.len_q - used_q);
    zero(p_.grad_k, 0, used_k, p_.len_k - used_k);
    zero(p_.grad_v, 0, used_k, p_.len_k - used_k);
  }
  return run(tasks, true);
}

const char* start(const jk_masked_attention_params* p, int isa, jk_parallel_for parallel_for,
                  bool backward) {
  if (const char* wrong = check(*p)) return wrong;
  if (const char* wrong = choose_isa("masked_attention", isa)) return wrong;
  try {
    Call call(*p, *best_kernels(kKernels, isa, p->dtype), parallel_for);
    return backward ? call.backward() : call.forward();
  } catch (const std::bad_alloc&) {  // must not cross the C ABI
    return "masked_attention: the rotation table and the list of tasks must fit into memory, got "
           "none.";
  }
}

}  // namespace
}  // namespace jk::attention

const char* jk_masked_attention_cpu_fwd(const jk_masked_attention_params* p, int isa,
                                        jk_parallel_for parallel_for) {
  return jk::attention::start(p, isa, parallel_for, false);
}

const char* jk_masked_attention_cpu_bwd(const jk_masked_attention_params* p, int isa,
                                        jk_parallel_for parallel_for) {
  return jk::attention::start(p, isa, parallel_for, true);
}
