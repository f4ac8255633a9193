// The kernels of examples/, compiled as C++.
#include "host_kernels.h"

#include "../../kernels/device.cuh"

namespace {

// Indices as CUDA C++ writes them, by the names of kernels/device.cuh. Blocks of 32 threads.
struct ThreadIdx {
  struct {
    operator int() const { return static_cast<int>(gradclip::thread_index()); }
  } x;
} threadIdx;
struct BlockIdx {
  struct {
    operator int() const { return static_cast<int>(gradclip::block_index()); }
  } x;
} blockIdx;
struct BlockDim {
  int x = 32;
} blockDim;

}  // namespace

#include "../../examples/cuda_graph/linear.cu"
#include "../../examples/fused_adamw/fused_adamw.cu"

namespace gradclip {
namespace host {

const HostKernel example_kernels[] = {
    host_kernel<&::forward>("forward", 32),
    host_kernel<&::backward>("backward", 32),
    host_kernel<&::step>("step", 32),
    host_kernel<&::scale_residual>("scale_residual", 32),
    host_kernel<&::begin_step>("begin_step", 32),
    host_kernel<&::adamw_step>("adamw_step", 32),
    {},
};

}  // namespace host
}  // namespace gradclip
