#include "host_kernels.h"

#include "../../kernels/abi.cuh"
#include "cuda_on_host.h"

namespace gradclip {
namespace host {

GlobalMemory global_memory = {};
Traffic traffic = {};

namespace {

const HostKernel* find_in(const HostKernel* kernels, const char* symbol) {
  for (; kernels->symbol; ++kernels) {
    if (!std::strcmp(kernels->symbol, symbol)) return kernels;
  }
  return nullptr;
}

}  // namespace

const HostKernel* find_kernel(const char* symbol) {
  for (const HostKernel* kernels : {project_kernels, example_kernels, bench_kernels, variant_kernels, toy_kernels}) {
    if (const HostKernel* kernel = find_in(kernels, symbol)) return kernel;
  }
  return nullptr;
}

}  // namespace host
}  // namespace gradclip
