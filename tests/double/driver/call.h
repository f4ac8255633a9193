// The first line of every cu* function: takes the lock, counts and logs the call, and delivers an injected failure.
#pragma once

#include "state.h"

namespace gradclip {
namespace driver {

class Call {
 public:
  // `needs_init`: CUDA_ERROR_NOT_INITIALIZED before cuInit.
  explicit Call(const char* name, bool needs_init = true);

  CUresult refused = CUDA_SUCCESS;  // what to return instead of doing anything

 private:
  std::lock_guard<std::recursive_mutex> lock_;
};

// A call that works in the current context: refused without one, and in a broken one.
class ContextCall : public Call {
 public:
  explicit ContextCall(const char* name);

  Context* context = nullptr;
};

double_counters& counters();
// Prints what the caller did wrong. The return code says it to the program, this to the one who debugs it.
void complain(const char* format, ...) __attribute__((format(printf, 1, 2)));
void record_run(const double_kernel_run& run);

// What a test has the driver say about a pointer (double_answer).
struct PlayedAnswer {
  CUresult code = CUDA_SUCCESS;
  uint64_t value = 0;
};
const PlayedAnswer* played_answer(uint64_t address, int attribute);  // null: none

CUresult kernel_crash_due();  // the code of an injected crash, when this kernel is the one

}  // namespace driver
}  // namespace gradclip
