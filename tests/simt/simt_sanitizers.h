// What AddressSanitizer and ThreadSanitizer must be told about fibers. In a plain build everything
// here is empty.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace simt {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSingleHostThread = true;
#else
constexpr bool kSingleHostThread = false;
#endif
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kHasAddressSanitizer = true;
#else
constexpr bool kHasAddressSanitizer = false;
#endif

// The executor's own bookkeeping is shared by all fibers on purpose: hide it from the race
// detector.
class Quiet {
 public:
#if defined(__SANITIZE_THREAD__)
  Quiet() {
    AnnotateIgnoreReadsBegin("simt", 0);
    AnnotateIgnoreWritesBegin("simt", 0);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd("simt", 0);
    AnnotateIgnoreReadsEnd("simt", 0);
  }
#else
  Quiet() {}
  ~Quiet() {}
#endif
  Quiet(const Quiet&) = delete;
};

// An edge "everything before release happens before everything after acquire" for the race
// detector.
struct SyncKey {
  char unused = 0;
  void release() {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(this);
#endif
  }
  void acquire() {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(this);
#endif
  }
};

class FiberSanitizer {
 public:
  void create(char* stack, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, bytes);
    stack_ = stack;
    bytes_ = bytes;
    fake_ = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
    handle_ = __tsan_create_fiber(0);
#endif
    (void)stack;
    (void)bytes;
  }
  void destroy() {
#if defined(__SANITIZE_THREAD__)
    __tsan_destroy_fiber(handle_);
    handle_ = nullptr;
#endif
  }
  void adopt_current() {
#if defined(__SANITIZE_THREAD__)
    handle_ = __tsan_get_current_fiber();
#endif
  }
  void on_entry() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &came_from_->stack_, &came_from_->bytes_);
#endif
  }
  // Not instrumented: a fiber that ends reads the scheduler's handle after its release, from a
  // stack that the launching thread uses again.
  __attribute__((no_sanitize("thread"))) void before_switch(FiberSanitizer& to, bool ends) {
#if defined(__SANITIZE_ADDRESS__)
    to.came_from_ = this;
    __sanitizer_start_switch_fiber(ends ? nullptr : &fake_, to.stack_, to.bytes_);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(to.handle_, __tsan_switch_to_fiber_no_sync);
#endif
    (void)to;
    (void)ends;
  }
  void after_switch() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_, &came_from_->stack_, &came_from_->bytes_);
#endif
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  const void* stack_ = nullptr;
  size_t bytes_ = 0;
  void* fake_ = nullptr;
  FiberSanitizer* came_from_ = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  void* handle_ = nullptr;
#endif
};

// Makes the bytes between the end of dynamic shared memory and the end of its allocation
// untouchable under ASan.
class PoisonTail {
 public:
  PoisonTail(unsigned char* base, size_t used, size_t allocated)
      : tail_(base + used), bytes_(allocated - used) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(tail_, bytes_);
#endif
  }
  void lift() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(tail_, bytes_);
#endif
  }

 private:
  unsigned char* tail_;
  size_t bytes_;
};

}  // namespace simt
