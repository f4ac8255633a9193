#include <cstring>

#include "../../../kernels/abi.cuh"
#include "../cuda_on_host.h"
#include "call.h"
#include "memory.h"

namespace gradclip {
namespace driver {

namespace {

struct LaunchShape {
  unsigned grid[3], block[3];
  unsigned shared_bytes;
};

// The parameters as the device sees them, kept as long as the launch may run again.
struct alignas(16) PackedParams {
  char bytes[host::kMaxParamBytes];
};

struct Launch {
  const host::HostKernel* kernel;
  std::shared_ptr<PackedParams> params;
  uint32_t blocks;
  int device;
};

CUresult run(const Launch& launch) {
  if (const CUresult crash = kernel_crash_due()) return crash;
  if (!driver().settings.kernels_run) return CUDA_SUCCESS;
  watch_kernel_accesses(launch.device);
  host::traffic = {};
  run_kernel(*launch.kernel, launch.params->bytes, launch.blocks, driver().settings.order);
  const host::Traffic& moved = host::traffic;
  record_run({launch.kernel->symbol, moved.read, moved.read_shared, moved.written});
  return finish_watching();
}

CUresult check_shape(const host::HostKernel& kernel, const LaunchShape& shape) {
  for (int i = 0; i < 3; ++i) {
    if (shape.grid[i] == 0 || shape.block[i] == 0) {
      complain("%s launched with an empty grid or block", kernel.symbol);
      return CUDA_ERROR_INVALID_VALUE;
    }
  }
  if (shape.grid[0] > 0x7fffffffu || shape.grid[1] > 1 || shape.grid[2] > 1 || shape.block[1] > 1 ||
      shape.block[2] > 1 || shape.shared_bytes != 0) {
    complain("%s launched with a second dimension or dynamic shared memory, which no kernel here uses", kernel.symbol);
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (shape.block[0] != kernel.threads) {
    complain("%s launched with blocks of %u threads, it is written for %u", kernel.symbol, shape.block[0],
             kernel.threads);
    return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

CUresult launch(CUfunction handle, const LaunchShape& shape, CUstream stream_handle, void** params, void** extra) {
  const auto function = find_handle(driver().functions, handle);
  if (!function) {
    complain("launch of %p, which is no function of a loaded module", static_cast<void*>(handle));
    return CUDA_ERROR_INVALID_HANDLE;
  }
  if (is_stale(function->context_id, *function->context)) return CUDA_ERROR_INVALID_HANDLE;
  std::shared_ptr<Stream> stream;
  if (const CUresult result = find_stream(stream_handle, stream)) return result;
  const host::HostKernel& kernel = *function->kernel;
  if (function->context != stream->context) {
    complain("%s of device %d launched on a stream of device %d", kernel.symbol, function->context->device,
             stream->context->device);
    return CUDA_ERROR_INVALID_HANDLE;
  }
  if (const CUresult result = check_shape(kernel, shape)) return result;
  if (extra || (kernel.num_params > 0 && !params)) return CUDA_ERROR_INVALID_VALUE;
  auto packed = std::make_shared<PackedParams>();
  for (uint32_t i = 0; i < kernel.num_params; ++i) {
    std::memcpy(packed->bytes + kernel.params[i].offset, params[i], kernel.params[i].size);
  }
  ++counters().launches;
  const Launch job = {&kernel, packed, shape.grid[0], stream->context->device};
  return issue(stream, kKernelNode, [job] { return run(job); });
}

// As cuda.h declares them.
struct LaunchAttribute {
  int id;
  char pad[4];
  alignas(8) int value[16];  // a union; of those below an int
};
enum : int { kCooperative = 2, kProgrammaticStreamSerialization = 6 };

struct LaunchConfig {
  unsigned grid[3], block[3];
  unsigned shared_bytes;
  CUstream stream;
  LaunchAttribute* attributes;
  unsigned num_attributes;
};

// A kernel that may start early does not, which is one of the orders that it allows. All blocks at once are one block.
CUresult check_attributes(const LaunchConfig& config) {
  for (unsigned i = 0; i < config.num_attributes; ++i) {
    const LaunchAttribute& attribute = config.attributes[i];
    if (attribute.id == kCooperative && attribute.value[0] && config.grid[0] > 1) {
      complain("a cooperative launch of %u blocks; one fits here", config.grid[0]);
      return CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE;
    }
    if (attribute.id != kCooperative && attribute.id != kProgrammaticStreamSerialization) {
      complain("launch attribute %d, which nothing here uses", attribute.id);
      return CUDA_ERROR_INVALID_VALUE;
    }
  }
  return CUDA_SUCCESS;
}

}  // namespace

}  // namespace driver
}  // namespace gradclip

using namespace gradclip::driver;

DRIVER_API CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                                   CUstream stream, void** params, void** extra) {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  return launch(function, {{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes}, stream, params, extra);
}

DRIVER_API CUresult cuLaunchKernelEx(const LaunchConfig* config, CUfunction function, void** params, void** extra) {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  if (const CUresult result = check_attributes(*config)) return result;
  LaunchShape shape;
  std::memcpy(shape.grid, config->grid, sizeof shape.grid);
  std::memcpy(shape.block, config->block, sizeof shape.block);
  shape.shared_bytes = config->shared_bytes;
  return launch(function, shape, config->stream, params, extra);
}
