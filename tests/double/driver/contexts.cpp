// Devices and contexts. Two devices, each with a primary context that lives while somebody retains it; every thread has
// a stack of current contexts.
#include <cstdio>
#include <cstring>
#include <iterator>

#include "call.h"
#include "memory.h"

namespace gradclip {
namespace driver {

Driver& driver() {
  static Driver* instance = [] {
    Driver* d = new Driver;  // never destroyed: static destructors of the test may still call
    for (int device = 0; device < kDevices; ++device) init_context(d->primary[device], device, true);
    return d;
  }();
  return *instance;
}

namespace {

struct CurrentContexts {
  uint64_t generation = 0;
  std::vector<Context*> stack;
};

std::vector<Context*>& context_stack() {
  // Never destroyed: destructors of what else the thread keeps may still call.
  thread_local CurrentContexts* const mine = new CurrentContexts;
  if (mine->generation != driver().generation) {
    mine->stack.clear();
    mine->generation = driver().generation;
  }
  return mine->stack;
}

// Ids are never used again in a process, also not after a reset of the double: a program may remember them.
uint64_t next_context_id() {
  static uint64_t last = 0;
  return ++last;
}

bool is_device(CUdevice device) { return device >= 0 && device < driver().settings.devices; }

CUresult create_context(CUcontext* out, unsigned flags, CUdevice device) {
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  auto context = std::make_shared<Context>();
  init_context(*context, device, false);
  context->flags = flags;
  context->retained = 1;
  context->id = next_context_id();
  *out = add_handle<Context, CUcontext>(driver().contexts, context);
  context_stack().push_back(context.get());
  return CUDA_SUCCESS;
}

int device_attribute(int attribute) {
  const Settings& settings = driver().settings;
  switch (attribute) {
    case 1: return 1024;          // MAX_THREADS_PER_BLOCK
    case 2: case 3: return 1024;  // MAX_BLOCK_DIM_X, _Y
    case 4: return 64;            // MAX_BLOCK_DIM_Z
    case 5: return 0x7fffffff;    // MAX_GRID_DIM_X
    case 6: case 7: return 65535;
    case 8: return 48 * 1024;     // MAX_SHARED_MEMORY_PER_BLOCK
    case 9: return 64 * 1024;     // TOTAL_CONSTANT_MEMORY
    case 10: return 32;           // WARP_SIZE
    case 12: return 65536;        // MAX_REGISTERS_PER_BLOCK
    case 13: return 1980000;      // CLOCK_RATE
    case 16: return settings.multiprocessors;
    case 19: return 1;            // CAN_MAP_HOST_MEMORY
    case 31: return 1;            // CONCURRENT_KERNELS
    case 36: return 2619000;      // MEMORY_CLOCK_RATE
    case 37: return 5120;         // GLOBAL_MEMORY_BUS_WIDTH
    case 38: return 50 << 20;     // L2_CACHE_SIZE
    case 39: return 2048;         // MAX_THREADS_PER_MULTIPROCESSOR
    case 40: return 3;            // ASYNC_ENGINE_COUNT
    case 41: return 1;            // UNIFIED_ADDRESSING
    case 75: return settings.capability_major;
    case 76: return settings.capability_minor;
    case 78: return 1;            // STREAM_PRIORITIES_SUPPORTED
    case 81: return 228 * 1024;   // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
    case 82: return 65536;        // MAX_REGISTERS_PER_MULTIPROCESSOR
    case 83: return 1;            // MANAGED_MEMORY
    case 95: return 1;            // COOPERATIVE_LAUNCH: of one block, as blocks run one after the other
    case 97: return 227 * 1024;   // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    case 106: return 32;          // MAX_BLOCKS_PER_MULTIPROCESSOR
    case 115: return settings.memory_pools;
    default: return 0;
  }
}

}  // namespace

Context* current_context() {
  auto& stack = context_stack();
  return stack.empty() ? nullptr : stack.back();
}

Context* context_from(CUcontext handle) {
  for (Context& context : driver().primary) {
    if (to_handle(&context) == handle) return &context;
  }
  return find_handle(driver().contexts, handle).get();
}

bool is_stale(uint64_t context_id, const Context& context) {
  const bool stale = context_id != context.id;
  if (stale) complain("a module or function of a context that was destroyed");
  return stale;
}

}  // namespace driver
}  // namespace gradclip

using namespace gradclip::driver;

DRIVER_API CUresult cuInit(unsigned flags) {
  Call call(__func__, false);
  if (call.refused) return call.refused;
  if (flags) return CUDA_ERROR_INVALID_VALUE;
  if (driver().settings.devices == 0) return CUDA_ERROR_NO_DEVICE;
  driver().initialized = true;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDriverGetVersion(int* version) {
  Call call(__func__, false);
  if (call.refused) return call.refused;
  *version = driver().settings.driver_version;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDeviceGetCount(int* count) {
  Call call(__func__);
  if (call.refused) return call.refused;
  *count = driver().settings.devices;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  Call call(__func__);
  if (call.refused) return call.refused;
  if (!is_device(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
  Call call(__func__);
  if (call.refused) return call.refused;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  std::snprintf(name, static_cast<size_t>(length), "driver double %d", device);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDeviceGetUuid_v2(void* uuid, CUdevice device) {
  Call call(__func__);
  if (call.refused) return call.refused;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  std::memset(uuid, 0x40 + device, 16);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
  Call call(__func__);
  if (call.refused) return call.refused;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  *bytes = driver().settings.total_memory;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice device) {
  Call call(__func__);
  if (call.refused) return call.refused;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  *value = device_attribute(attribute);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  Call call(__func__);
  if (call.refused) return call.refused;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  Context& primary = driver().primary[device];
  if (primary.retained == 0) {
    primary.broken = CUDA_SUCCESS;
    primary.id = next_context_id();
  }
  ++primary.retained;
  *context = to_handle(&primary);
  return CUDA_SUCCESS;
}

// Memory and modules of a context that goes away stay counted as live: whoever forgot them should hear of it. Its modules
// cannot be used any more.
DRIVER_API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  Call call(__func__);
  if (call.refused) return call.refused;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  Context& primary = driver().primary[device];
  if (primary.retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
  if (--primary.retained == 0) drain_context(primary);
  return CUDA_SUCCESS;
}

// Of what a real reset takes away, the modules go.
DRIVER_API CUresult cuDevicePrimaryCtxReset_v2(CUdevice device) {
  Call call(__func__);
  if (call.refused) return call.refused;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  Context& primary = driver().primary[device];
  drain_context(primary);
  primary.broken = CUDA_SUCCESS;
  primary.id = next_context_id();
  auto& functions = driver().functions;
  for (auto it = functions.begin(); it != functions.end();) {
    it = it->second->context == &primary ? functions.erase(it) : std::next(it);
  }
  auto& modules = driver().modules;
  for (auto it = modules.begin(); it != modules.end();) {
    it = it->second->context == &primary ? modules.erase(it) : std::next(it);
  }
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  Call call(__func__);
  if (call.refused) return call.refused;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  *flags = driver().primary[device].flags;
  *active = driver().primary[device].retained > 0;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxCreate_v2(CUcontext* context, unsigned flags, CUdevice device) {
  Call call(__func__);
  return call.refused ? call.refused : create_context(context, flags, device);
}

DRIVER_API CUresult cuCtxCreate_v3(CUcontext* context, void*, int, unsigned flags, CUdevice device) {
  Call call(__func__);
  return call.refused ? call.refused : create_context(context, flags, device);
}

DRIVER_API CUresult cuCtxCreate_v4(CUcontext* context, void*, unsigned flags, CUdevice device) {
  Call call(__func__);
  return call.refused ? call.refused : create_context(context, flags, device);
}

DRIVER_API CUresult cuCtxDestroy_v2(CUcontext handle) {
  Call call(__func__);
  if (call.refused) return call.refused;
  const auto context = find_handle(driver().contexts, handle);
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  drain_context(*context);
  context->retained = 0;
  auto& stack = context_stack();
  if (!stack.empty() && stack.back() == context.get()) stack.pop_back();
  // The object stays while streams or memory point to it: other threads may still have it current.
  static auto* graveyard = new std::vector<std::shared_ptr<Context>>;
  graveyard->push_back(context);
  driver().contexts.erase(context.get());
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxGetCurrent(CUcontext* context) {
  Call call(__func__);
  if (call.refused) return call.refused;
  *context = to_handle(current_context());
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxGetId(CUcontext handle, unsigned long long* id) {
  Call call(__func__);
  if (call.refused) return call.refused;
  const Context* context = handle ? context_from(handle) : current_context();
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  if (context->retained == 0) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  *id = context->id;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxSetCurrent(CUcontext handle) {
  Call call(__func__);
  if (call.refused) return call.refused;
  auto& stack = context_stack();
  Context* context = nullptr;
  if (handle && !(context = context_from(handle))) return CUDA_ERROR_INVALID_CONTEXT;
  if (context && context->retained == 0) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  if (!stack.empty()) stack.pop_back();
  if (context) stack.push_back(context);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxPushCurrent_v2(CUcontext handle) {
  Call call(__func__);
  if (call.refused) return call.refused;
  Context* context = context_from(handle);
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  if (context->retained == 0) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  context_stack().push_back(context);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxPopCurrent_v2(CUcontext* handle) {
  Call call(__func__);
  if (call.refused) return call.refused;
  auto& stack = context_stack();
  if (stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  if (handle) *handle = to_handle(stack.back());
  stack.pop_back();
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxGetDevice(CUdevice* device) {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  *device = call.context->device;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxGetFlags(unsigned* flags) {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  *flags = call.context->flags;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxSetFlags(unsigned flags) {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  call.context->flags = flags;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxGetApiVersion(CUcontext, unsigned* version) {
  Call call(__func__);
  if (call.refused) return call.refused;
  *version = 3020;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  *least = 0;
  *greatest = -5;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxSynchronize() {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  if (const CUresult refused = refuse_during_capture()) return refused;
  ++counters().syncs;
  drain_context(*call.context);
  return call.context->broken;
}
