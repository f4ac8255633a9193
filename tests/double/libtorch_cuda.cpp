// A libtorch_cuda.so that makes itself known to libtorch, as the real one does when it is loaded, and has no GPU.
// tests/tch_suite/loading.rs finds out with it when libtorch has to know.
#include <ATen/detail/CUDAHooksInterface.h>

namespace at {
namespace {

// libtorch asks its registry for hooks of this name.
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDART() const override { return true; }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace
}  // namespace at
