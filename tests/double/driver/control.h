// How a test steers and reads the double: exported beside the cu* functions. tests/support/double.rs is the other half.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Calls are counted when they are made, also those that fail or are captured; a replayed graph counts as one
// graph_launches, and its kernels as kernels_run.
typedef struct {
  uint64_t calls;  // of any cu* function but cuGetErrorName and cuGetErrorString
  uint64_t launches, kernels_run, graph_launches;
  uint64_t htod_calls, htod_bytes;
  uint64_t dtoh_calls, dtoh_bytes;
  uint64_t dtod_calls, dtod_bytes;
  uint64_t memset_calls, memset_bytes;
  uint64_t allocs, frees, alloc_bytes;
  uint64_t pinned_allocs, pinned_frees;
  // Anything that makes the host wait: synchronise calls, synchronous copies, copies to pageable memory, cuMemFree.
  uint64_t syncs;
  uint64_t event_records, event_waits;
  uint64_t module_loads, graph_instantiations;
  uint64_t faults;  // accesses outside live allocations
} double_counters;

// Everything as in a new process: memory freed, handles invalid, counters and settings back to their defaults.
void double_reset(void);
void double_reset_counters(void);  // counters and log only
void double_get_counters(double_counters* out);

uint64_t double_log_size(void);
const char* double_log_name(uint64_t index);  // null past the end

// One kernel that has run, and the bytes of gradients that it moved (host::Traffic).
typedef struct {
  const char* symbol;
  uint64_t read, read_shared, written;
} double_kernel_run;

// Those since the last reset of the counters, in order; false past the end.
int double_get_run(uint64_t index, double_kernel_run* out);

// The call_index-th driver call from now (0: the next one) returns `code` and does nothing.
void double_fail(uint64_t call_index, int code);
void double_fail_from(uint64_t call_index, int code);                    // that one and all after it: a lost device
void double_fail_named(const char* name, uint64_t call_index, int code);  // counting only calls of that name
// From now on the driver says this of the pointer: `value` of the attribute, or, if `code` is not 0, that code, which in a
// question about several attributes leaves the default value.
void double_answer(uint64_t address, int attribute, int code, uint64_t value);
int double_failures_delivered(void);  // injected failures that have happened
void double_crash_kernel(uint64_t launch_index, int code);  // the n-th kernel run from now breaks its context

// Settings.
void double_set_device_count(int count);  // 0 to 2
void double_set_driver_version(int version);  // 12080 for 12.8
void double_set_compute_capability(int major, int minor);
void double_set_multiprocessors(int count);
void double_set_memory_pools(int supported);
void double_set_total_memory(uint64_t bytes);
void double_set_order(int reversed);    // threads and blocks in reversed order
void double_set_deferred(int deferred);  // asynchronous work waits until the host does
void double_set_kernels_run(int run);    // 0: launches are checked and counted, and do nothing

// Memory.
uint64_t double_check_guards(void);       // guard zones and freed blocks written to, since the reset
uint64_t double_live_allocations(void);   // device and pinned, not freed
uint64_t double_live_bytes(void);
uint64_t double_live_handles(void);       // streams, events, modules, graphs, contexts retained

// Work queued and not run; 0 unless deferred.
uint64_t double_pending_work(void);

// The kernels this library was built with: symbol, block size and parameter bytes; 0 past the end.
int double_kernel(uint64_t index, const char** symbol, uint32_t* threads, uint32_t* param_bytes);

#ifdef __cplusplus
}
#endif
