#include "control.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>

#include "call.h"
#include "memory.h"

namespace gradclip {
namespace driver {

namespace {

struct Injection {
  bool armed = false;
  bool lasting = false;
  uint64_t countdown = 0;
  std::string name;  // empty: any call
  int code = 0;
};

struct Control {
  double_counters counters = {};
  std::vector<const char*> log;  // names are string literals
  std::vector<double_kernel_run> runs;
  Injection failure;
  Injection crash;
  std::map<std::pair<uint64_t, int>, PlayedAnswer> answers;
  int delivered = 0;
};

constexpr size_t kLongestLog = 1 << 20;

Control& control() {
  static Control* control = new Control;  // never destroyed: static destructors of the test may still call
  return *control;
}

bool due(Injection& injection) {
  if (!injection.armed) return false;
  if (injection.countdown > 0) {
    --injection.countdown;
    return false;
  }
  injection.armed = injection.lasting;
  return true;
}

void arm(Injection& injection, uint64_t countdown, int code, bool lasting, const char* name) {
  std::lock_guard<std::recursive_mutex> lock(driver().mutex);
  injection.armed = true;
  injection.lasting = lasting;
  injection.countdown = countdown;
  injection.code = code;
  injection.name = name;
}

}  // namespace

double_counters& counters() { return control().counters; }

Call::Call(const char* name, bool needs_init) : lock_(driver().mutex) {
  Control& state = control();
  ++state.counters.calls;
  if (state.log.size() < kLongestLog) state.log.push_back(name);
  if ((state.failure.name.empty() || state.failure.name == name) && due(state.failure)) {
    ++state.delivered;
    refused = state.failure.code;
  } else if (needs_init && !driver().initialized) {
    refused = CUDA_ERROR_NOT_INITIALIZED;
  }
}

ContextCall::ContextCall(const char* name) : Call(name) {
  if (refused) return;
  context = current_context();
  if (!context) {
    refused = CUDA_ERROR_INVALID_CONTEXT;
  } else if (context->retained == 0) {
    refused = CUDA_ERROR_CONTEXT_IS_DESTROYED;
  } else {
    refused = context->broken;
  }
}

CUresult kernel_crash_due() {
  ++counters().kernels_run;
  if (!due(control().crash)) return CUDA_SUCCESS;
  ++control().delivered;
  return control().crash.code;
}

const PlayedAnswer* played_answer(uint64_t address, int attribute) {
  const auto found = control().answers.find({address, attribute});
  return found == control().answers.end() ? nullptr : &found->second;
}

void record_run(const double_kernel_run& run) {
  if (control().runs.size() < kLongestLog) control().runs.push_back(run);
}

void complain(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::fprintf(stderr, "driver double: ");
  std::vfprintf(stderr, format, args);
  std::fputc('\n', stderr);
  va_end(args);
}

}  // namespace driver
}  // namespace gradclip

using namespace gradclip::driver;

#define CONTROL_API DRIVER_API
#define LOCKED std::lock_guard<std::recursive_mutex> lock(driver().mutex)

CONTROL_API void double_reset() {
  LOCKED;
  Driver& d = driver();
  d.initialized = false;
  ++d.generation;
  d.settings = Settings();
  forget_streams();
  d.events.clear();
  d.modules.clear();
  d.functions.clear();
  d.graphs.clear();
  d.graph_execs.clear();
  d.captures.clear();
  d.contexts.clear();
  for (int device = 0; device < kDevices; ++device) init_context(d.primary[device], device, true);
  free_all();
  control() = Control();
}

CONTROL_API void double_reset_counters() {
  LOCKED;
  control().counters = {};
  control().log.clear();
  control().runs.clear();
}

CONTROL_API void double_get_counters(double_counters* out) {
  LOCKED;
  *out = control().counters;
}

CONTROL_API uint64_t double_log_size() {
  LOCKED;
  return control().log.size();
}

CONTROL_API const char* double_log_name(uint64_t index) {
  LOCKED;
  return index < control().log.size() ? control().log[index] : nullptr;
}

CONTROL_API int double_get_run(uint64_t index, double_kernel_run* out) {
  LOCKED;
  if (index >= control().runs.size()) return 0;
  *out = control().runs[index];
  return 1;
}

CONTROL_API void double_fail(uint64_t index, int code) { arm(control().failure, index, code, false, ""); }
CONTROL_API void double_fail_from(uint64_t index, int code) { arm(control().failure, index, code, true, ""); }
CONTROL_API void double_fail_named(const char* name, uint64_t index, int code) {
  arm(control().failure, index, code, false, name);
}
CONTROL_API void double_crash_kernel(uint64_t index, int code) { arm(control().crash, index, code, false, ""); }

CONTROL_API void double_answer(uint64_t address, int attribute, int code, uint64_t value) {
  LOCKED;
  control().answers[{address, attribute}] = {code, value};
}

CONTROL_API int double_failures_delivered() {
  LOCKED;
  return control().delivered;
}

CONTROL_API void double_set_device_count(int count) {
  LOCKED;
  driver().settings.devices = count < 0 ? 0 : count > kDevices ? kDevices : count;
}
CONTROL_API void double_set_driver_version(int version) {
  LOCKED;
  driver().settings.driver_version = version;
}
CONTROL_API void double_set_compute_capability(int major, int minor) {
  LOCKED;
  driver().settings.capability_major = major;
  driver().settings.capability_minor = minor;
}
CONTROL_API void double_set_multiprocessors(int count) {
  LOCKED;
  driver().settings.multiprocessors = count;
}
CONTROL_API void double_set_memory_pools(int supported) {
  LOCKED;
  driver().settings.memory_pools = supported != 0;
}
CONTROL_API void double_set_total_memory(uint64_t bytes) {
  LOCKED;
  driver().settings.total_memory = bytes;
}
CONTROL_API void double_set_order(int reversed) {
  LOCKED;
  driver().settings.order.reversed_threads = driver().settings.order.reversed_blocks = reversed != 0;
}
CONTROL_API void double_set_deferred(int deferred) {
  LOCKED;
  driver().settings.deferred = deferred != 0;
  if (!deferred) drain_everything();
}

CONTROL_API void double_set_kernels_run(int run) {
  LOCKED;
  driver().settings.kernels_run = run != 0;
}

CONTROL_API uint64_t double_live_handles() {
  LOCKED;
  const Driver& d = driver();
  uint64_t live = d.streams.size() + d.events.size() + d.modules.size() + d.graphs.size() + d.graph_execs.size() +
                  d.contexts.size();
  for (const Context& context : d.primary) live += context.retained;
  return live;
}

CONTROL_API uint64_t double_pending_work() {
  LOCKED;
  return pending_work();
}

CONTROL_API int double_kernel(uint64_t index, const char** symbol, uint32_t* threads, uint32_t* param_bytes) {
  for (const auto* kernels : {gradclip::host::project_kernels, gradclip::host::example_kernels,
                              gradclip::host::bench_kernels, gradclip::host::variant_kernels,
                              gradclip::host::toy_kernels}) {
    for (; kernels->symbol; ++kernels) {
      if (index-- == 0) {
        *symbol = kernels->symbol;
        *threads = kernels->threads;
        *param_bytes = kernels->param_bytes;
        return 1;
      }
    }
  }
  return 0;
}
