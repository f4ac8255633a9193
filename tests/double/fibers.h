// A fiber: a stack and a place to go on from. Switching is a handful of instructions, because a block of 256 threads
// switches thousands of times per tile.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#define GRADCLIP_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define GRADCLIP_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define GRADCLIP_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define GRADCLIP_TSAN 1
#endif
#endif

// For the code that plays the hardware: what it reads and writes is no access of a CUDA thread, so the thread sanitizer
// must not see it, and its frames never return, so the address sanitizer must not put red zones into them.
#define GRADCLIP_UNSEEN __attribute__((no_sanitize("thread"), no_sanitize("address")))
#define GRADCLIP_HARDWARE __attribute__((noinline)) GRADCLIP_UNSEEN

namespace gradclip {
namespace host {

struct Fiber {
  void* stack_pointer = nullptr;  // where it goes on; meaningless while it runs
  void* context = nullptr;        // ucontext_t, on processors we have no assembly for
  char* stack = nullptr;          // lowest byte; null for the fiber that is the operating system's thread
  size_t stack_size = 0;
  void* fake_stack = nullptr;     // of the address sanitizer
  void* tsan = nullptr;           // handle of the thread sanitizer
};

// Makes `fiber` start in entry() at the next switch to it. entry never returns.
void prepare_fiber(Fiber& fiber, char* stack, size_t stack_size, void (*entry)());

// `from` is the fiber that runs now. With `for_good` it is never switched to again.
void switch_fiber(Fiber& from, Fiber& to, bool for_good);

// The first thing a fiber does: completes the switch that started it. `from` is who switched.
void arrive_in_new_fiber(Fiber& from);

// The thread of the operating system as a fiber.
void adopt_this_thread(Fiber& fiber);

// Room for `count` stacks. A new room is memory that no sanitizer has seen an access to.
class StackRoom {
 public:
  StackRoom(size_t count, size_t stack_size);
  ~StackRoom();
  StackRoom(const StackRoom&) = delete;
  StackRoom& operator=(const StackRoom&) = delete;

  GRADCLIP_UNSEEN size_t count() const { return count_; }
  GRADCLIP_UNSEEN size_t stack_size() const { return stack_size_; }
  char* stack(size_t index) const;
  bool overflowed(size_t index) const;

 private:
  size_t stride() const;
  size_t count_, stack_size_, bytes_;
  char* memory_;
};

}  // namespace host
}  // namespace gradclip
