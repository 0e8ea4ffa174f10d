// The SIMT executor: runs CUDA kernel source on a CPU, one fiber per CUDA thread, one block at a
// time per host thread. A fiber runs until it meets a barrier or a warp collective, then the
// scheduler resumes the next one, so every interleaving that the barriers allow can be tried by
// changing the order in which ready fibers are resumed. Rules are stricter than the hardware's: an
// exited thread never counts as arrived at a barrier, all threads must reach the same barrier in
// the source, and a warp collective must name only living lanes. A broken rule ends the launch, and
// jk::launch_error() returns the sentence.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "simt_sanitizers.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr size_t kLeastSharedLimit =
    99 * 1024;  // the smallest opt-in limit among the shipped architectures (sm_120)
constexpr size_t kDefaultSharedBytes = 48 * 1024;  // more needs jk::allow_dynamic_shared
constexpr size_t kPayloadBytes = 32;               // what a lane can hand to a warp collective
constexpr size_t kCanaryBytes = 256;
constexpr unsigned char kPoison = 0xff;  // a NaN in every floating-point format

enum Order { kForward = 0, kReverse = 1, kShuffled = 2 };

struct Settings {
  std::atomic<int> order{kForward};
  std::atomic<unsigned> seed{1};
  std::atomic<int> host_threads{0};  // 0: as many as the machine has
  std::atomic<size_t> shared_limit{kLeastSharedLimit};
};
inline Settings settings;

// What the launches since the last `simt_take_counts` did, in all blocks together.
struct Counts {
  std::atomic<uint64_t> launches{0}, most_shared_bytes{0}, barriers{0}, async_bytes{0};
};
inline Counts counts;

struct Site {
  const char* what;
  const char* file;
  int line;
  bool operator==(const Site& o) const {
    return line == o.line && same(file, o.file) && same(what, o.what);
  }
  // Equal literals usually share their address.
  static bool same(const char* a, const char* b) { return a == b || !std::strcmp(a, b); }
  std::string text() const {
    const char* base = std::strrchr(file, '/');
    return std::string(what) + " (" + (base ? base + 1 : file) + ":" + std::to_string(line) + ")";
  }
};

enum class State : uint8_t { kReady, kAtBarrier, kAtCollective, kDone };

struct AsyncCopy {
  void* to;
  const void* from;
  uint32_t bytes, valid_bytes;
  uint64_t group;
};

// What the lanes of `mask` exchange. It stays alive until the last lane has read the result.
struct Collective {
  uint32_t mask = 0, arrived = 0, readers = 0;
  bool done = false;
  Site site{};
  SyncKey key;
  alignas(16) unsigned char in[32][kPayloadBytes];
  alignas(16) float out[16][8];
};

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  dim3 thread;
  unsigned linear = 0;
  State state = State::kReady;
  unsigned barrier_epoch = 0;
  const Collective* waits_for = nullptr;
  Site site{};
  std::vector<AsyncCopy> copies;
  uint64_t copy_group = 0;
  FiberSanitizer sanitizer;
};

struct Warp {
  uint32_t alive = 0;
  std::vector<std::unique_ptr<Collective>> collectives;
};

struct Block {
  dim3 index, threads, grid;
  unsigned count = 0, epoch = 0, arrived = 0;
  int votes = 0, voted = 0;
  Site barrier_site{};
  SyncKey barrier_key[2];
  SyncKey end_key;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  const std::function<void()>* body = nullptr;
  Fiber scheduler;
  std::string error;
};

inline thread_local Block* block = nullptr;
inline thread_local Fiber* fiber = nullptr;

// Saves the callee-saved registers and the stack pointer at *save, then continues on the stack
// `to`.
__attribute__((naked, noinline, no_sanitize("address", "thread", "undefined"))) static void
switch_stack(void** save, void* to) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp\n\t"
      "ret");
}

__attribute__((no_sanitize("thread"))) inline void switch_fiber(Fiber& from, Fiber& to,
                                                                bool from_ends) {
  from.sanitizer.before_switch(to.sanitizer, from_ends);
  switch_stack(&from.stack_pointer, to.stack_pointer);
  from.sanitizer.after_switch();
}

inline void suspend() {
  Fiber* self = fiber;
  switch_fiber(*self, block->scheduler, false);
  fiber = self;
}

// Ends the launch with a sentence; never returns to the fiber that called it.
[[noreturn]] inline void fail(const std::string& sentence) {
  Quiet quiet;
  block->error = sentence;
  suspend();
  std::abort();
}

inline std::string where(unsigned linear) {
  const dim3& b = block->index;
  return "thread " + std::to_string(linear) + " of block (" + std::to_string(b.x) + ", " +
         std::to_string(b.y) + ", " + std::to_string(b.z) + ")";
}

// Returns the number of threads that voted true.
inline int block_barrier(int vote, Site site) {
  Quiet quiet;
  Block& b = *block;
  Fiber& self = *fiber;
  self.site = site;
  SyncKey& key = b.barrier_key[b.epoch & 1];
  if (b.arrived == 0) {
    b.barrier_site = site;
  } else if (!(b.barrier_site == site)) {
    fail("simt: divergent barrier: " + where(self.linear) + " is at " + site.text() +
         " while others are at " + b.barrier_site.text() + ".");
  }
  key.release();
  b.votes += vote != 0;
  if (++b.arrived == b.count) {
    counts.barriers++;
    b.voted = b.votes;
    b.votes = 0;
    b.arrived = 0;
    b.epoch++;
  } else {
    self.barrier_epoch = b.epoch;
    self.state = State::kAtBarrier;
    suspend();
    self.state = State::kReady;
  }
  key.acquire();
  return b.voted;
}

inline Collective& join_collective(Warp& warp, uint32_t mask, unsigned lane, Site site) {
  auto self = [] { return where(fiber->linear); };
  if (!(mask >> lane & 1))
    fail("simt: " + self() + " calls " + site.text() + " with a mask that leaves itself out.");
  if (mask & ~warp.alive)
    fail("simt: divergent warp: " + self() + " calls " + site.text() +
         " with a mask that names exited lanes.");
  Collective* unused = nullptr;
  for (auto& c : warp.collectives) {
    if (c->mask == 0) {
      unused = c.get();
    } else if (!c->done && (c->mask & mask)) {
      if (c->mask != mask || !(c->site == site))
        fail("simt: divergent warp: " + self() + " is at " + site.text() +
             " while its warp is at " + c->site.text() + ".");
      return *c;
    }
  }
  if (!unused) {
    warp.collectives.push_back(std::make_unique<Collective>());
    unused = warp.collectives.back().get();
  }
  unused->mask = mask;
  unused->arrived = unused->readers = 0;
  unused->done = false;
  unused->site = site;
  return *unused;
}

// Every lane of `mask` deposits `payload`; the last one to arrive runs combine(collective); then
// each lane gets read(collective). Only __syncwarp orders the lanes' memory accesses
// (orders_memory).
template <class Payload, class Combine, class Read>
inline auto warp_collective(uint32_t mask, const Payload& payload, Site site, bool orders_memory,
                            Combine combine, Read read) {
  static_assert(sizeof(Payload) <= kPayloadBytes,
                "a warp collective moves at most 32 bytes per lane");
  Quiet quiet;
  Fiber& self = *fiber;
  const unsigned lane = self.linear & 31;
  Warp& warp = block->warps[self.linear >> 5];
  self.site = site;
  Collective& c = join_collective(warp, mask, lane, site);
  std::memcpy(c.in[lane], &payload, sizeof payload);
  if (orders_memory) c.key.release();
  c.arrived |= 1u << lane;
  if (c.arrived == mask) {
    combine(c);
    c.done = true;
  } else {
    self.waits_for = &c;
    self.state = State::kAtCollective;
    suspend();
    self.state = State::kReady;
  }
  if (orders_memory) c.key.acquire();
  auto result = read(c);
  c.readers |= 1u << lane;
  if (c.readers == mask) c.mask = 0;
  return result;
}

template <class T>
inline T peek(const Collective& c, unsigned lane) {
  T value;
  std::memcpy(&value, c.in[lane & 31], sizeof value);
  return value;
}

inline void finish_fiber() {
  Fiber* self = fiber;
  Fiber* scheduler = nullptr;
  {
    Quiet quiet;
    self->state = State::kDone;
    block->warps[self->linear >> 5].alive &= ~(1u << (self->linear & 31));
    block->end_key.release();
    scheduler = &block->scheduler;
  }
  switch_fiber(*self, *scheduler, true);
  std::abort();
}

inline void fiber_entry() {
  fiber->sanitizer.on_entry();
  const std::function<void()>* body = nullptr;
  {
    Quiet quiet;
    body = block->body;
  }
  (*body)();
  finish_fiber();
}

// Stacks are mapped once per host thread; the page below each is unmapped memory, so an overflow
// traps.
class StackPool {
 public:
  ~StackPool() { unmap(); }
  char* stack(unsigned i) { return base_ + i * kSlot + kGuardBytes; }
  void reserve(unsigned n) {
    if (n <= count_) return;
    unmap();
    void* p = mmap(nullptr, n * kSlot, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
      std::perror("simt: cannot map fiber stacks");
      std::abort();
    }
    base_ = static_cast<char*>(p);
    count_ = n;
    for (unsigned i = 0; i < n; i++) mprotect(base_ + i * kSlot, kGuardBytes, PROT_NONE);
  }

 private:
  static constexpr size_t kSlot = kStackBytes + kGuardBytes;
  void unmap() {
    if (base_) munmap(base_, count_ * kSlot);
    base_ = nullptr;
  }
  char* base_ = nullptr;
  unsigned count_ = 0;
};

inline void prepare_fiber(Fiber& f, unsigned i, const Block& b, StackPool& stacks) {
  f.stack = stacks.stack(i);
  f.linear = i;
  f.thread = dim3(i % b.threads.x, i / b.threads.x % b.threads.y, i / (b.threads.x * b.threads.y));
  f.state = State::kReady;
  f.copies.clear();
  f.copy_group = 0;
  f.site = {"its start", "kernel", 0};
  f.sanitizer.create(f.stack, kStackBytes);
  void** top = reinterpret_cast<void**>(f.stack + kStackBytes - 64);
  *--top = nullptr;  // a return address for fiber_entry, which never returns
  *--top = reinterpret_cast<void*>(&fiber_entry);
  for (int r = 0; r < 6; r++) *--top = nullptr;
  f.stack_pointer = top;
}

inline std::string describe_deadlock(const Block& b) {
  unsigned exited = 0;
  std::string waiting;
  const Site* last = nullptr;
  for (const Fiber& f : b.fibers) {
    if (f.state == State::kDone) {
      exited++;
    } else if (!last || !(*last == f.site)) {
      last = &f.site;
      waiting += (waiting.empty() ? "thread " : "; thread ") + std::to_string(f.linear) +
                 " on at " + f.site.text();
      if (waiting.size() > 400) break;
    }
  }
  return "simt: divergent barrier: block (" + std::to_string(b.index.x) + ", " +
         std::to_string(b.index.y) + ", " + std::to_string(b.index.z) + ") cannot go on, " +
         std::to_string(exited) + " of " + std::to_string(b.count) +
         " threads have exited, and the others wait: " + waiting + ".";
}

inline bool is_ready(const Fiber& f, const Block& b) {
  switch (f.state) {
    case State::kReady:
      return true;
    case State::kAtBarrier:
      return f.barrier_epoch != b.epoch;
    case State::kAtCollective:
      return f.waits_for->done;
    case State::kDone:
      return false;
  }
  return false;
}

inline uint32_t next_random(uint32_t& state) {
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

inline void schedule(Block& b, uint32_t seed) {
  const int order = settings.order;
  std::vector<unsigned> turn(b.count);
  for (unsigned i = 0; i < b.count; i++) turn[i] = order == kReverse ? b.count - 1 - i : i;
  for (unsigned left = b.count; left;) {
    bool progress = false;
    if (order == kShuffled)
      for (unsigned i = b.count - 1; i > 0; i--)
        std::swap(turn[i], turn[next_random(seed) % (i + 1)]);
    for (unsigned i : turn) {
      Fiber& f = b.fibers[i];
      if (!is_ready(f, b)) continue;
      progress = true;
      fiber = &f;
      switch_fiber(b.scheduler, f, false);
      if (!b.error.empty()) return;
      if (f.state == State::kDone) left--;
    }
    if (!progress) {
      b.error = describe_deadlock(b);
      return;
    }
  }
}

inline void run_block(Block& b, StackPool& stacks, uint32_t seed) {
  block = &b;
  b.epoch = b.arrived = 0;
  b.votes = 0;
  // Exactly sized, so that AddressSanitizer sees an overrun at once; other builds check a canary
  // behind the end.
  const size_t canary = kHasAddressSanitizer ? 0 : kCanaryBytes;
  unsigned char* shared = static_cast<unsigned char*>(
      std::aligned_alloc(128, (b.shared_bytes + canary + 127) / 128 * 128));
  PoisonTail tail(shared, b.shared_bytes, (b.shared_bytes + canary + 127) / 128 * 128);
  std::memset(shared, kPoison, b.shared_bytes + canary);
  b.shared = shared;
  b.warps.clear();
  b.warps.resize((b.count + 31) / 32);
  b.scheduler.sanitizer.adopt_current();
  for (unsigned i = 0; i < b.count; i++) {
    prepare_fiber(b.fibers[i], i, b, stacks);
    b.warps[i / 32].alive |= 1u << (i % 32);
  }
  schedule(b, seed);
  for (Fiber& f : b.fibers) f.sanitizer.destroy();
  b.end_key.acquire();
  for (size_t i = b.shared_bytes; i < b.shared_bytes + canary; i++)
    if (shared[i] != kPoison && b.error.empty())
      b.error = "simt: shared-memory overrun: " + where(0).substr(12) + " wrote byte " +
                std::to_string(i) + " of " + std::to_string(b.shared_bytes) +
                " bytes of dynamic shared memory.";
  tail.lift();
  std::free(shared);
}

inline std::mutex error_mutex;
inline std::string pending_error;
inline void report(const std::string& sentence) {
  std::lock_guard<std::mutex> lock(error_mutex);
  if (pending_error.empty()) pending_error = sentence;
}

inline std::unordered_map<const void*, size_t> allowed_shared;

inline std::string launch_refusal(const void* kernel, dim3 grid, dim3 threads,
                                  size_t shared_bytes) {
  const uint64_t count = uint64_t(threads.x) * threads.y * threads.z;
  if (count == 0 || count > 1024 || threads.z > 64)
    return "simt: a block must have 1 to 1024 threads, got " + std::to_string(count) + ".";
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535)
    return "simt: a grid must have 1 to 2147483647 x 65535 x 65535 blocks, got " +
           std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
           std::to_string(grid.z) + ".";
  if (shared_bytes > settings.shared_limit)
    return "simt: dynamic shared memory must be at most " + std::to_string(settings.shared_limit) +
           " bytes, got " + std::to_string(shared_bytes) + ".";
  auto allowed = allowed_shared.find(kernel);
  if (shared_bytes > kDefaultSharedBytes &&
      (allowed == allowed_shared.end() || allowed->second < shared_bytes))
    return "simt: " + std::to_string(shared_bytes) +
           " bytes of dynamic shared memory need jk::allow_dynamic_shared first.";
  return "";
}

inline void launch(const void* kernel, dim3 grid, dim3 threads, size_t shared_bytes,
                   const std::function<void()>& body) {
  const std::string refusal = launch_refusal(kernel, grid, threads, shared_bytes);
  if (!refusal.empty()) return report(refusal);
  counts.launches++;
  counts.most_shared_bytes = std::max<uint64_t>(counts.most_shared_bytes, shared_bytes);
  const uint64_t total = uint64_t(grid.x) * grid.y * grid.z;
  const int order = settings.order;
  const uint32_t seed = settings.seed;
  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};
  auto work = [&] {
    Quiet quiet;
    static thread_local StackPool stacks;
    Block b;
    b.threads = threads;
    b.grid = grid;
    b.count = threads.x * threads.y * threads.z;
    b.shared_bytes = shared_bytes;
    b.body = &body;
    b.fibers.resize(b.count);
    stacks.reserve(b.count);
    for (uint64_t n; (n = next++) < total && !failed;) {
      // 2654435761 is odd and prime, so n -> n * prime mod total visits every block once unless it
      // divides total.
      uint64_t i = order == kForward ? n : total - 1 - n;
      if (order == kShuffled && total % 2654435761u) i = (n * 2654435761u + seed) % total;
      b.index =
          dim3(unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y));
      run_block(b, stacks, seed + uint32_t(i) * 7919u);
      if (!b.error.empty()) {
        failed = true;
        report(b.error);
      }
    }
    block = nullptr;
    fiber = nullptr;
  };
  int workers = settings.host_threads;
  if (kSingleHostThread) workers = 1;
  if (workers <= 0) workers = int(std::max(1u, std::thread::hardware_concurrency()));
  workers = int(std::min<uint64_t>(uint64_t(workers), total));
  if (workers == 1) return work();
  std::vector<std::thread> pool;
  for (int i = 0; i < workers; i++) pool.emplace_back(work);
  for (auto& t : pool) t.join();
}

// One sentence per thread lives on until the next call, as a C caller needs.
inline const char* take_error() {
  static thread_local std::string sentence;
  std::lock_guard<std::mutex> lock(error_mutex);
  if (pending_error.empty()) return nullptr;
  sentence.swap(pending_error);
  pending_error.clear();
  return sentence.c_str();
}

}  // namespace simt

extern "C" __attribute__((visibility("default"), used)) inline void simt_configure(
    int order, unsigned seed, int host_threads) {
  simt::settings.order = order;
  simt::settings.seed = seed;
  simt::settings.host_threads = host_threads;
}
extern "C" __attribute__((visibility("default"), used)) inline void simt_limit_shared(
    size_t bytes) {
  simt::settings.shared_limit = bytes ? bytes : simt::kLeastSharedLimit;
}
extern "C" __attribute__((visibility("default"), used)) inline void simt_take_counts(uint64_t* to) {
  std::atomic<uint64_t>* const from[] = {&simt::counts.launches, &simt::counts.most_shared_bytes,
                                         &simt::counts.barriers, &simt::counts.async_bytes};
  for (int i = 0; i < 4; i++) to[i] = from[i]->exchange(0);
}
