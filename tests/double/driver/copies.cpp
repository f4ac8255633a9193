// Copies and fills. The host side of a copy is read or written when the device gets to it: at once for pageable memory
// (the driver stages it), later for pinned memory, at every replay for a captured copy.
#include <cinttypes>
#include <cstring>

#include "call.h"
#include "memory.h"

namespace gradclip {
namespace driver {

namespace {

enum class Direction { kHostToDevice, kDeviceToHost, kDeviceToDevice };

struct Copy {
  Direction direction;
  uint64_t to, from;
  size_t bytes;
};

bool device_side_ok(uint64_t address, size_t bytes, const char* what) {
  if (is_device_range(address, bytes)) return true;
  ++counters().faults;
  complain("%s of %zu bytes at %#" PRIx64 ", which is in no live allocation, or runs past one", what, bytes, address);
  return false;
}

CUresult run_copy(const Copy& copy, bool pinned) {
  const bool to_device = copy.direction != Direction::kDeviceToHost;
  const bool from_device = copy.direction != Direction::kHostToDevice;
  if (to_device && !device_side_ok(copy.to, copy.bytes, "copy to device memory")) return CUDA_ERROR_ILLEGAL_ADDRESS;
  if (from_device && !device_side_ok(copy.from, copy.bytes, "copy from device memory")) {
    return CUDA_ERROR_ILLEGAL_ADDRESS;
  }
  const uint64_t host = to_device ? copy.from : copy.to;
  if (pinned && !is_pinned_range(host, copy.bytes)) {
    complain("the pinned memory at %#" PRIx64 " was freed before the copy of %zu bytes ran", host, copy.bytes);
    return CUDA_ERROR_ILLEGAL_ADDRESS;
  }
  std::memmove(reinterpret_cast<void*>(copy.to), reinterpret_cast<const void*>(copy.from), copy.bytes);
  return CUDA_SUCCESS;
}

void count(const Copy& copy) {
  double_counters& c = counters();
  switch (copy.direction) {
    case Direction::kHostToDevice: ++c.htod_calls; c.htod_bytes += copy.bytes; break;
    case Direction::kDeviceToHost: ++c.dtoh_calls; c.dtoh_bytes += copy.bytes; break;
    case Direction::kDeviceToDevice: ++c.dtod_calls; c.dtod_bytes += copy.bytes; break;
  }
}

CUresult issue_copy(const Copy& copy, CUstream handle) {
  std::shared_ptr<Stream> stream;
  if (const CUresult result = find_stream(handle, stream)) return result;
  count(copy);
  if (copy.bytes == 0) return CUDA_SUCCESS;
  if (copy.direction == Direction::kDeviceToDevice) {
    return issue(stream, kMemcpyNode, [copy] { return run_copy(copy, false); });
  }
  const bool upload = copy.direction == Direction::kHostToDevice;
  const uint64_t host = upload ? copy.from : copy.to;
  const bool pinned = is_pinned_range(host, copy.bytes);
  if (!pinned && find_allocation(host)) {
    complain("%#" PRIx64 " is not host memory, or the copy of %zu bytes runs past it", host, copy.bytes);
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (pinned || stream->capture) return issue(stream, kMemcpyNode, [copy, pinned] { return run_copy(copy, pinned); });
  if (upload) {
    const char* source = reinterpret_cast<const char*>(copy.from);
    const auto staged = std::make_shared<std::vector<char>>(source, source + copy.bytes);
    return issue(stream, kMemcpyNode, [copy, staged] {
      Copy from_stage = copy;
      from_stage.from = reinterpret_cast<uint64_t>(staged->data());
      return run_copy(from_stage, false);
    });
  }
  // To pageable memory the driver returns when the bytes are there, whatever the call is named.
  if (const CUresult result = issue(stream, kMemcpyNode, [copy] { return run_copy(copy, false); })) return result;
  return wait_for(stream);
}

// On the legacy stream, and the host waits.
CUresult copy_and_wait(const Copy& copy, Context* context) {
  if (const CUresult refused = refuse_during_capture()) return refused;
  count(copy);
  if (copy.bytes == 0) return CUDA_SUCCESS;
  const CUresult result = issue(context->legacy, kMemcpyNode, [copy] { return run_copy(copy, false); });
  return result ? result : wait_for(context->legacy);
}

Direction direction_of(uint64_t to, uint64_t from) {
  const Allocation* target = find_allocation(to);
  const Allocation* source = find_allocation(from);
  if (target && !target->on_host()) {
    return source && !source->on_host() ? Direction::kDeviceToDevice : Direction::kHostToDevice;
  }
  return Direction::kDeviceToHost;
}

struct Fill {
  uint64_t to;
  size_t count;
  uint32_t value;
  unsigned width;  // bytes of one element
};

CUresult run_fill(const Fill& fill) {
  if (!device_side_ok(fill.to, fill.count * fill.width, "fill")) return CUDA_ERROR_ILLEGAL_ADDRESS;
  char* to = reinterpret_cast<char*>(fill.to);
  for (size_t i = 0; i < fill.count; ++i) std::memcpy(to + i * fill.width, &fill.value, fill.width);
  return CUDA_SUCCESS;
}

CUresult issue_fill(const Fill& fill, const std::shared_ptr<Stream>& stream) {
  ++counters().memset_calls;
  counters().memset_bytes += fill.count * fill.width;
  if (fill.to % fill.width) return CUDA_ERROR_INVALID_VALUE;
  if (fill.count == 0) return CUDA_SUCCESS;
  return issue(stream, kMemsetNode, [fill] { return run_fill(fill); });
}

CUresult fill_async(const Fill& fill, CUstream handle) {
  std::shared_ptr<Stream> stream;
  if (const CUresult result = find_stream(handle, stream)) return result;
  return issue_fill(fill, stream);
}

// Asynchronous to the host for device memory, as the driver's cuMemset is.
CUresult fill_on_legacy(const Fill& fill, Context* context) {
  if (const CUresult refused = refuse_during_capture()) return refused;
  return issue_fill(fill, context->legacy);
}

uint64_t address_of(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

}  // namespace

}  // namespace driver
}  // namespace gradclip

using namespace gradclip::driver;

DRIVER_API CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
  ContextCall call(__func__);
  return call.refused ? call.refused
                      : copy_and_wait({Direction::kHostToDevice, to, address_of(from), bytes}, call.context);
}
DRIVER_API CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
  ContextCall call(__func__);
  return call.refused ? call.refused
                      : copy_and_wait({Direction::kDeviceToHost, address_of(to), from, bytes}, call.context);
}
DRIVER_API CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
  ContextCall call(__func__);
  return call.refused ? call.refused : copy_and_wait({Direction::kDeviceToDevice, to, from, bytes}, call.context);
}
DRIVER_API CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
  ContextCall call(__func__);
  return call.refused ? call.refused : copy_and_wait({direction_of(to, from), to, from, bytes}, call.context);
}
DRIVER_API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
  Call call(__func__);
  return call.refused ? call.refused : issue_copy({Direction::kHostToDevice, to, address_of(from), bytes}, stream);
}
DRIVER_API CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
  Call call(__func__);
  return call.refused ? call.refused : issue_copy({Direction::kDeviceToHost, address_of(to), from, bytes}, stream);
}
DRIVER_API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  Call call(__func__);
  return call.refused ? call.refused : issue_copy({Direction::kDeviceToDevice, to, from, bytes}, stream);
}
DRIVER_API CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  Call call(__func__);
  return call.refused ? call.refused : issue_copy({direction_of(to, from), to, from, bytes}, stream);
}
DRIVER_API CUresult cuMemcpyPeerAsync(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t bytes,
                                      CUstream stream) {
  Call call(__func__);
  return call.refused ? call.refused : issue_copy({Direction::kDeviceToDevice, to, from, bytes}, stream);
}

DRIVER_API CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t count) {
  ContextCall call(__func__);
  return call.refused ? call.refused : fill_on_legacy({to, count, value, 1}, call.context);
}
DRIVER_API CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned value, size_t count) {
  ContextCall call(__func__);
  return call.refused ? call.refused : fill_on_legacy({to, count, value, 4}, call.context);
}
DRIVER_API CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
  Call call(__func__);
  return call.refused ? call.refused : fill_async({to, count, value, 1}, stream);
}
DRIVER_API CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
  Call call(__func__);
  return call.refused ? call.refused : fill_async({to, count, value, 4}, stream);
}
