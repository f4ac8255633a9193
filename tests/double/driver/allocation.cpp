// The calls that allocate, free and describe memory.
#include <cstring>

#include "call.h"
#include "memory.h"

namespace gradclip {
namespace driver {

namespace {

CUresult allocate_device(CUdeviceptr* out, size_t bytes, Context* context, MemoryKind kind, bool stream_ordered) {
  if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  Allocation* a = allocate(context, bytes, kind);
  if (!a) return CUDA_ERROR_OUT_OF_MEMORY;
  a->stream_ordered = stream_ordered;
  ++counters().allocs;
  counters().alloc_bytes += bytes;
  *out = a->base;
  return CUDA_SUCCESS;
}

// The allocation that begins at `address` and may still be freed.
Allocation* freeable(uint64_t address, bool on_host) {
  Allocation* a = find_allocation(address);
  if (a && a->base == address && !a->free_pending && a->on_host() == on_host) return a;
  complain("free of %#llx, which %s", static_cast<unsigned long long>(address),
           a && a->free_pending ? "was freed before" : "is no live allocation of that kind");
  return nullptr;
}

CUresult allocate_async(CUdeviceptr* out, size_t bytes, CUstream handle) {
  std::shared_ptr<Stream> stream;
  if (const CUresult result = find_stream(handle, stream)) return result;
  if (!driver().settings.memory_pools) return CUDA_ERROR_NOT_SUPPORTED;
  if (stream->capture) {
    complain("allocations inside a capture are not simulated");
    stream->capture->invalidated = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  return allocate_device(out, bytes, stream->context, MemoryKind::kDevice, true);
}

// Sizes of the attributes the double knows, by the numbers of CUpointer_attribute; 0 for the others.
size_t attribute_bytes(int attribute) {
  switch (attribute) {
    case 2: case 6: case 8: case 9: case 13: return 4;
    case 1: case 3: case 4: case 7: case 11: case 12: case 17: return 8;
    default: return 0;
  }
}

// What is known of a pointer. False: nothing, of this kind of pointer.
bool pointer_attribute(uint64_t& value, int attribute, const Allocation& a, uint64_t address) {
  const auto handle = [](Context* context) { return reinterpret_cast<uint64_t>(to_handle(context)); };
  switch (attribute) {
    case 1:  // CONTEXT: memory of a pool belongs to none
      value = a.stream_ordered ? 0 : handle(a.context);
      return true;
    case 2:  // MEMORY_TYPE
      value = a.on_host() ? 1 : 2;
      return true;
    case 3:  // DEVICE_POINTER
    case 4:  // HOST_POINTER
      value = address;
      return attribute == 3 || a.kind != MemoryKind::kDevice;
    case 6:  // SYNC_MEMOPS
      value = 0;
      return true;
    case 7:  // BUFFER_ID
      value = a.id;
      return true;
    case 8:  // IS_MANAGED
      value = a.kind == MemoryKind::kManaged;
      return true;
    case 9:  // DEVICE_ORDINAL
      value = static_cast<unsigned>(a.device);
      return true;
    case 11:  // RANGE_START_ADDR
      value = a.base;
      return true;
    case 12:  // RANGE_SIZE
      value = a.bytes;
      return true;
    case 13:  // MAPPED
      value = 1;
      return true;
    case 17:  // MEMPOOL_HANDLE: each device has one pool
      value = a.stream_ordered ? handle(&driver().primary[a.device]) : 0;
      return true;
    default:
      return false;
  }
}

// Writes the answer, played or known; false, and nothing written, where there is none.
bool answer(void* data, int attribute, uint64_t address) {
  uint64_t value = 0;
  if (const PlayedAnswer* played = played_answer(address, attribute)) {
    if (played->code) return false;
    value = played->value;
  } else {
    const Allocation* a = find_allocation(address);
    if (!a || !pointer_attribute(value, attribute, *a, address)) return false;
  }
  std::memcpy(data, &value, attribute_bytes(attribute));  // the low bytes
  return true;
}

}  // namespace

}  // namespace driver
}  // namespace gradclip

using namespace gradclip::driver;

DRIVER_API CUresult cuMemAlloc_v2(CUdeviceptr* out, size_t bytes) {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  if (const CUresult refused = refuse_during_capture()) return refused;
  return allocate_device(out, bytes, call.context, MemoryKind::kDevice, false);
}

DRIVER_API CUresult cuMemAllocManaged(CUdeviceptr* out, size_t bytes, unsigned) {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  if (const CUresult refused = refuse_during_capture()) return refused;
  return allocate_device(out, bytes, call.context, MemoryKind::kManaged, false);
}

DRIVER_API CUresult cuMemAllocAsync(CUdeviceptr* out, size_t bytes, CUstream stream) {
  Call call(__func__);
  return call.refused ? call.refused : allocate_async(out, bytes, stream);
}

// Waits for the device, as the driver's does.
DRIVER_API CUresult cuMemFree_v2(CUdeviceptr address) {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  if (address == 0) return CUDA_SUCCESS;
  if (const CUresult refused = refuse_during_capture()) return refused;
  const Allocation* a = freeable(address, false);
  if (!a) return CUDA_ERROR_INVALID_VALUE;
  ++counters().frees;
  ++counters().syncs;
  drain_context(*a->context);
  release(address);
  return call.context->broken;
}

DRIVER_API CUresult cuMemFreeAsync(CUdeviceptr address, CUstream handle) {
  Call call(__func__);
  if (call.refused) return call.refused;
  std::shared_ptr<Stream> stream;
  if (const CUresult result = find_stream(handle, stream)) return result;
  if (stream->capture) {
    stream->capture->invalidated = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  if (address == 0) return CUDA_SUCCESS;
  Allocation* a = freeable(address, false);
  if (!a) return CUDA_ERROR_INVALID_VALUE;
  ++counters().frees;
  a->free_pending = true;
  return issue(stream, kMemFreeNode, [address] {
    release(address);
    return CUDA_SUCCESS;
  });
}

DRIVER_API CUresult cuMemHostAlloc(void** out, size_t bytes, unsigned) {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  if (const CUresult refused = refuse_during_capture()) return refused;
  if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  const Allocation* a = allocate(call.context, bytes, MemoryKind::kPinned);
  if (!a) return CUDA_ERROR_OUT_OF_MEMORY;
  ++counters().pinned_allocs;
  *out = reinterpret_cast<void*>(a->base);
  return CUDA_SUCCESS;
}

// Does not wait: a copy that is still queued finds its memory gone, and says so.
DRIVER_API CUresult cuMemFreeHost(void* pointer) {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  if (const CUresult refused = refuse_during_capture()) return refused;
  const uint64_t address = reinterpret_cast<uint64_t>(pointer);
  const Allocation* a = freeable(address, true);
  if (!a || a->kind != MemoryKind::kPinned) return CUDA_ERROR_INVALID_VALUE;
  ++counters().pinned_frees;
  release(address);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuMemHostRegister_v2(void* pointer, size_t bytes, unsigned) {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  if (find_allocation(reinterpret_cast<uint64_t>(pointer))) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
  register_host(call.context, pointer, bytes);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuMemHostUnregister(void* pointer) {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  const uint64_t address = reinterpret_cast<uint64_t>(pointer);
  const Allocation* a = find_allocation(address);
  if (!a || a->base != address || a->kind != MemoryKind::kRegistered) return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
  release(address);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* out, void* pointer, unsigned) {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  const uint64_t address = reinterpret_cast<uint64_t>(pointer);
  if (!is_pinned_range(address, 1)) return CUDA_ERROR_INVALID_VALUE;
  *out = address;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  *total = driver().settings.total_memory;
  *free = *total - device_bytes(call.context->device);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* bytes, CUdeviceptr address) {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  const Allocation* a = find_allocation(address);
  if (!a) return CUDA_ERROR_NOT_FOUND;
  if (base) *base = a->base;
  if (bytes) *bytes = a->bytes;
  return CUDA_SUCCESS;
}

// A pointer the driver never saw is an invalid value here, and all zeroes in the plural form below.
DRIVER_API CUresult cuPointerGetAttribute(void* data, int attribute, CUdeviceptr address) {
  Call call(__func__);
  if (call.refused) return call.refused;
  if (!data || attribute_bytes(attribute) == 0) return CUDA_ERROR_INVALID_VALUE;
  if (answer(data, attribute, address)) return CUDA_SUCCESS;
  const PlayedAnswer* played = played_answer(address, attribute);
  return played ? played->code : CUDA_ERROR_INVALID_VALUE;
}

DRIVER_API CUresult cuPointerGetAttributes(unsigned count, const int* attributes, void** data, CUdeviceptr address) {
  Call call(__func__);
  if (call.refused) return call.refused;
  if (!attributes || !data) return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < count; ++i) {
    const size_t bytes = attribute_bytes(attributes[i]);
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    if (answer(data[i], attributes[i], address)) continue;
    std::memset(data[i], 0, bytes);
    if (attributes[i] == 9) *static_cast<int*>(data[i]) = -2;
  }
  return CUDA_SUCCESS;
}
