#include "fibers.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(GRADCLIP_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(GRADCLIP_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

#if (defined(__x86_64__) || defined(__aarch64__)) && !defined(GRADCLIP_FIBERS_BY_UCONTEXT)
#define GRADCLIP_FIBERS_BY_ASSEMBLY 1
// Stores the callee-saved registers on the old stack and takes them from the new one. The jump instead of a return
// keeps the processor's return predictor out of it.
extern "C" void gradclip_switch_stack(void** old_stack_pointer, void* new_stack_pointer);
#else
#include <ucontext.h>
#endif

#if !defined(GRADCLIP_FIBERS_BY_ASSEMBLY)
#elif defined(__x86_64__)
__asm__(
    ".text\n"
    ".p2align 4\n"
    ".globl gradclip_switch_stack\n"
    ".hidden gradclip_switch_stack\n"
    ".type gradclip_switch_stack,@function\n"
    "gradclip_switch_stack:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  popq %rcx\n"
    "  jmpq *%rcx\n"
    ".size gradclip_switch_stack,.-gradclip_switch_stack\n");
#elif defined(__aarch64__)
__asm__(
    ".text\n"
    ".p2align 4\n"
    ".globl gradclip_switch_stack\n"
    ".hidden gradclip_switch_stack\n"
    ".type gradclip_switch_stack,%function\n"
    "gradclip_switch_stack:\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n"
    "  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n"
    "  mov sp, x1\n"
    "  ldp x19, x20, [sp]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n"
    "  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  br x30\n"
    ".size gradclip_switch_stack,.-gradclip_switch_stack\n");
#endif

namespace gradclip {
namespace host {

GRADCLIP_HARDWARE void prepare_fiber(Fiber& fiber, char* stack, size_t stack_size, void (*entry)()) {
  fiber.stack = stack;
  fiber.stack_size = stack_size;
  fiber.fake_stack = nullptr;
#if !defined(GRADCLIP_FIBERS_BY_ASSEMBLY)
  if (!fiber.context) fiber.context = new ucontext_t;
  ucontext_t* context = static_cast<ucontext_t*>(fiber.context);
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = stack_size;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
#elif defined(__x86_64__)
  // Six registers, the address to jump to, and a return address that nobody uses: on entry the stack pointer is 8 bytes
  // off a multiple of 16, as after a call.
  void** top = reinterpret_cast<void**>(stack + stack_size) - 8;
  for (int i = 0; i < 8; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = top;
#elif defined(__aarch64__)
  void** top = reinterpret_cast<void**>(stack + stack_size) - 20;
  for (int i = 0; i < 20; ++i) top[i] = nullptr;
  top[11] = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = top;
#endif
}

GRADCLIP_HARDWARE void switch_fiber(Fiber& from, Fiber& to, bool for_good) {
#if defined(GRADCLIP_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.stack_size);
#endif
#if defined(GRADCLIP_TSAN)
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  (void)for_good;
#if defined(GRADCLIP_FIBERS_BY_ASSEMBLY)
  gradclip_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(static_cast<ucontext_t*>(from.context), static_cast<ucontext_t*>(to.context));
#endif
#if defined(GRADCLIP_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

GRADCLIP_HARDWARE void arrive_in_new_fiber(Fiber& from) {
#if defined(GRADCLIP_ASAN)
  const void* stack = nullptr;
  size_t stack_size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &stack_size);
  if (!from.stack) {  // the bounds of the thread's own stack are learnt from the first switch away from it
    from.stack = static_cast<char*>(const_cast<void*>(stack));
    from.stack_size = stack_size;
  }
#else
  (void)from;
#endif
}

GRADCLIP_HARDWARE void adopt_this_thread(Fiber& fiber) {
  fiber.stack = nullptr;
  fiber.stack_size = 0;
#if defined(GRADCLIP_TSAN)
  fiber.tsan = __tsan_get_current_fiber();
#endif
#if !defined(GRADCLIP_FIBERS_BY_ASSEMBLY)
  if (!fiber.context) fiber.context = new ucontext_t;
#endif
}

namespace {
constexpr size_t kCanaryBytes = 64;
constexpr unsigned char kCanary = 0xc5;
}  // namespace

// Not a power of two: the same local of all threads would land in the same few cache sets.
GRADCLIP_UNSEEN size_t StackRoom::stride() const { return stack_size_ + kCanaryBytes + 17 * 64; }

StackRoom::StackRoom(size_t count, size_t stack_size) : count_(count), stack_size_(stack_size) {
  bytes_ = (count * stride() + 4095) / 4096 * 4096;
  void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::fprintf(stderr, "cuda_on_host: no memory for %zu stacks of %zu bytes\n", count, stack_size);
    std::abort();
  }
  memory_ = static_cast<char*>(memory);
  for (size_t i = 0; i < count; ++i) std::memset(stack(i) - kCanaryBytes, kCanary, kCanaryBytes);
}

StackRoom::~StackRoom() { munmap(memory_, bytes_); }

GRADCLIP_UNSEEN char* StackRoom::stack(size_t index) const { return memory_ + index * stride() + kCanaryBytes; }

GRADCLIP_UNSEEN bool StackRoom::overflowed(size_t index) const {
  const char* canary = stack(index) - kCanaryBytes;
  for (size_t i = 0; i < kCanaryBytes; ++i) {
    if (static_cast<unsigned char>(canary[i]) != kCanary) return true;
  }
  return false;
}

}  // namespace host
}  // namespace gradclip
