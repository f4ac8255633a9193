// Kernels as data: by symbol, with the sizes of their parameters, callable with a packed copy of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "block.h"

namespace gradclip {
namespace host {

constexpr size_t kMaxParamBytes = 4096;  // what every driver takes
constexpr uint32_t kMaxParams = 16;

struct Param {
  uint32_t offset, size;  // offset as the device compilers lay them out: each naturally aligned
};

struct HostKernel {
  const char* symbol;
  uint32_t threads;  // the block size it is written for
  uint32_t num_params;
  uint32_t param_bytes;
  Param params[kMaxParams];
  void (*thread)(const void* packed_params);  // one CUDA thread
};

template <auto Function>
struct Callable;

template <class... Args, void (*Function)(Args...)>
struct Callable<Function> {
  static_assert(sizeof...(Args) <= kMaxParams, "too many parameters");

  static constexpr HostKernel describe(const char* symbol, uint32_t threads) {
    HostKernel kernel = {symbol, threads, static_cast<uint32_t>(sizeof...(Args)), 0, {}, &thread};
    const uint32_t sizes[] = {static_cast<uint32_t>(sizeof(Args))..., 0};
    const uint32_t alignments[] = {static_cast<uint32_t>(alignof(Args))..., 1};
    uint32_t offset = 0;
    for (uint32_t i = 0; i < sizeof...(Args); ++i) {
      offset = (offset + alignments[i] - 1) / alignments[i] * alignments[i];
      kernel.params[i] = {offset, sizes[i]};
      offset += sizes[i];
    }
    kernel.param_bytes = offset;
    return kernel;
  }

  static constexpr HostKernel description = describe("", 0);

  template <class Arg, size_t Index>
  static const Arg& param(const void* packed) {
    return *reinterpret_cast<const Arg*>(static_cast<const char*>(packed) + description.params[Index].offset);
  }

  template <size_t... Indices>
  static void call([[maybe_unused]] const void* packed, std::index_sequence<Indices...>) {
    Function(param<Args, Indices>(packed)...);
  }

  static void thread(const void* packed) { call(packed, std::index_sequence_for<Args...>()); }
};

template <auto Function>
constexpr HostKernel host_kernel(const char* symbol, uint32_t threads) {
  static_assert(Callable<Function>::description.param_bytes <= kMaxParamBytes, "more parameters than drivers take");
  return Callable<Function>::describe(symbol, threads);
}

// Null when nothing of that name was compiled in.
const HostKernel* find_kernel(const char* symbol);

// The kernels of kernels/*.cu, of examples/, of benches/measure and benches/variants, and of toy_kernels.cpp; each list ends
// with a null symbol.
extern const HostKernel project_kernels[];
extern const HostKernel example_kernels[];
extern const HostKernel bench_kernels[];
extern const HostKernel variant_kernels[];
extern const HostKernel toy_kernels[];

// `packed_params` aligned to 16 bytes.
inline void run_kernel(const HostKernel& kernel, const void* packed_params, uint32_t blocks, Order order) {
  run_grid({kernel.symbol, kernel.thread, packed_params, blocks, kernel.threads, order});
}

}  // namespace host
}  // namespace gradclip
