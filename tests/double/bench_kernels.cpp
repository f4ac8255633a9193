// The kernels of benches/, compiled as C++.
#include "host_kernels.h"

#include "../../kernels/device.cuh"

namespace {

constexpr unsigned kThreads = 256;  // THREADS in benches/measure/limits.rs

// Indices as CUDA C++ writes them, by the names of kernels/device.cuh.
struct ThreadIdx {
  struct {
    operator unsigned() const { return gradclip::thread_index(); }
  } x;
} threadIdx;
struct BlockIdx {
  struct {
    operator unsigned() const { return gradclip::block_index(); }
  } x;
} blockIdx;
struct GridDim {
  struct {
    operator unsigned() const { return gradclip::grid_blocks(); }
  } x;
} gridDim;
struct BlockDim {
  unsigned x = kThreads;
} blockDim;

}  // namespace

#define __align__(bytes) alignas(bytes)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wunknown-pragmas"  // #pragma unroll
#endif
#include "../../benches/measure/limits.cu"

#define LIMIT_KERNEL(symbol) host_kernel<&::symbol>(#symbol, kThreads)

namespace gradclip {
namespace host {

const HostKernel bench_kernels[] = {
    LIMIT_KERNEL(read_tiles_4),
    LIMIT_KERNEL(read_tiles_8),
    LIMIT_KERNEL(read_tiles_16),
    LIMIT_KERNEL(read_strided_8),
    LIMIT_KERNEL(update_tiles_4),
    LIMIT_KERNEL(update_tiles_8),
    {},
};

}  // namespace host
}  // namespace gradclip
