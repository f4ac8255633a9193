// Device and pinned memory: host memory between guard zones, poisoned when allocated and when freed.
#pragma once

#include "state.h"

namespace gradclip {
namespace driver {

enum class MemoryKind { kDevice, kManaged, kPinned, kRegistered };

struct Allocation {
  uint64_t base = 0;
  size_t bytes = 0;
  MemoryKind kind = MemoryKind::kDevice;
  Context* context = nullptr;
  int device = 0;
  bool stream_ordered = false;  // by cuMemAllocAsync
  bool free_pending = false;    // its cuMemFreeAsync is queued
  char* block = nullptr;        // with the guard zones
  size_t block_bytes = 0;
  uint64_t id = 0;

  bool on_host() const { return kind == MemoryKind::kPinned || kind == MemoryKind::kRegistered; }
};

// Null when the limit of the device is reached.
Allocation* allocate(Context* context, size_t bytes, MemoryKind kind);
Allocation* register_host(Context* context, void* address, size_t bytes);
void release(uint64_t base);

// The live allocation that holds `address`, or null.
Allocation* find_allocation(uint64_t address);
// Whether all the bytes lie in one live allocation on the device (or where the device reaches it).
bool is_device_range(uint64_t address, size_t bytes);
bool is_pinned_range(uint64_t address, size_t bytes);

void free_all();
uint64_t device_bytes(int device);

// Whether kernels on `device` may touch the bytes. For host::global_memory.
void watch_kernel_accesses(int device);
CUresult finish_watching();  // CUDA_ERROR_ILLEGAL_ADDRESS after a fault

}  // namespace driver
}  // namespace gradclip
