// The few things the kernels need from a compiler, by one name each, so that no toolkit header is included:
// nvcc and NVRTC take them from the language, clang (without an SDK) from its builtins, and a host C++ compiler
// from cuda_on_host.h, which gives every CUDA thread a fiber (the tests run the kernels that way).
#pragma once

#include "abi.cuh"

#if defined(GRADCLIP_HOST)

#include "cuda_on_host.h"

#elif defined(__CUDACC__) || defined(__CUDA__)

#if defined(__clang__)
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __shared__ __attribute__((shared))
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __launch_bounds__(...) __attribute__((launch_bounds(__VA_ARGS__)))
#pragma clang fp contract(off)
#endif

#define GRADCLIP_SHARED_ARRAY(type, name, count) __shared__ type name[count]

namespace gradclip {

#if defined(__clang__)

__device__ __forceinline__ u32 thread_index() { return __nvvm_read_ptx_sreg_tid_x(); }
__device__ __forceinline__ u32 block_index() { return __nvvm_read_ptx_sreg_ctaid_x(); }
__device__ __forceinline__ u32 grid_blocks() { return __nvvm_read_ptx_sreg_nctaid_x(); }
__device__ __forceinline__ void sync_block() { __nvvm_bar_sync(0); }
__device__ __forceinline__ u32 shfl_xor(u32 x, u32 mask) {
  return static_cast<u32>(__nvvm_shfl_sync_bfly_i32(0xffffffffu, static_cast<int>(x), static_cast<int>(mask), 31));
}
__device__ __forceinline__ float add(float a, float b) { return __nvvm_add_rn_f(a, b); }
__device__ __forceinline__ float sub(float a, float b) { return __nvvm_add_rn_f(a, -b); }
__device__ __forceinline__ float mul(float a, float b) { return __nvvm_mul_rn_f(a, b); }
__device__ __forceinline__ float fma(float a, float b, float c) { return __nvvm_fma_rn_f(a, b, c); }
__device__ __forceinline__ double add(double a, double b) { return __nvvm_add_rn_d(a, b); }
__device__ __forceinline__ double mul(double a, double b) { return __nvvm_mul_rn_d(a, b); }
__device__ __forceinline__ double div(double a, double b) { return __nvvm_div_rn_d(a, b); }
__device__ __forceinline__ double sqrt(double a) { return __nvvm_sqrt_rn_d(a); }

#else

__device__ __forceinline__ u32 thread_index() { return threadIdx.x; }
__device__ __forceinline__ u32 block_index() { return blockIdx.x; }
__device__ __forceinline__ u32 grid_blocks() { return gridDim.x; }
__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ u32 shfl_xor(u32 x, u32 mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
// The _rn intrinsics are never contracted into an fma, whatever the flags of the build.
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double mul(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ double div(double a, double b) { return __ddiv_rn(a, b); }
__device__ __forceinline__ double sqrt(double a) { return __dsqrt_rn(a); }

#endif

// Bit casts and conversions in PTX: the same text for every device compiler.
__device__ __forceinline__ u32 bits_of(float x) { u32 r; asm("mov.b32 %0, %1;" : "=r"(r) : "f"(x)); return r; }
__device__ __forceinline__ u64 bits_of(double x) { u64 r; asm("mov.b64 %0, %1;" : "=l"(r) : "d"(x)); return r; }
__device__ __forceinline__ float f32_from_bits(u32 x) { float r; asm("mov.b32 %0, %1;" : "=f"(r) : "r"(x)); return r; }
__device__ __forceinline__ double f64_from_bits(u64 x) { double r; asm("mov.b64 %0, %1;" : "=d"(r) : "l"(x)); return r; }
__device__ __forceinline__ float f32_from_f16(u16 x) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x)); return r; }
__device__ __forceinline__ u16 f16_from_f32(float x) { u16 r; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x)); return r; }

struct Pack {
  u32 word[4];
};

// Read-only for the whole launch, and read once: past L1, so that the descriptor table stays in it.
__device__ __forceinline__ Pack load_once(u64 address) {
  Pack p;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(p.word[0]), "=r"(p.word[1]), "=r"(p.word[2]), "=r"(p.word[3]) : "l"(address));
  return p;
}
// Read-only, and a neighbour reads the same 16 bytes soon: through L1.
__device__ __forceinline__ Pack load_shared_line(u64 address) {
  Pack p;
  asm("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(p.word[0]), "=r"(p.word[1]), "=r"(p.word[2]), "=r"(p.word[3]) : "l"(address));
  return p;
}
// About to be overwritten in place by the same thread.
__device__ __forceinline__ Pack load_for_update(u64 address) {
  Pack p;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(p.word[0]), "=r"(p.word[1]), "=r"(p.word[2]), "=r"(p.word[3]) : "l"(address) : "memory");
  return p;
}
// Guarded by a predicate inside: an `if` around a load becomes a branch, or keeps registers of an earlier round alive.
// Zeroes where `active` is false. A half is 8 bytes, as the first half of a pack.
#define GRADCLIP_GUARDED_LOAD(name, load)                                                                           \
  __device__ __forceinline__ Pack name(u64 address, bool active) {                                                  \
    Pack p;                                                                                                         \
    asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;" \
                 "@p " load ".v4.u32 {%0,%1,%2,%3}, [%4];}"                                                         \
                 : "=r"(p.word[0]), "=r"(p.word[1]), "=r"(p.word[2]), "=r"(p.word[3])                           \
                 : "l"(address), "r"(static_cast<u32>(active)) : "memory");                                         \
    return p;                                                                                                       \
  }
#define GRADCLIP_GUARDED_LOAD_HALF(name, load)                                          \
  __device__ __forceinline__ Pack name(u64 address, bool active) {                      \
    Pack p = {{0, 0, 0, 0}};                                                            \
    asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; mov.u32 %0, 0; mov.u32 %1, 0;"   \
                 "@p " load ".v2.u32 {%0,%1}, [%2];}"                                   \
                 : "=r"(p.word[0]), "=r"(p.word[1])                                   \
                 : "l"(address), "r"(static_cast<u32>(active)) : "memory");             \
    return p;                                                                           \
  }
// Stays before the stores that follow, so that a whole batch is in flight: past them the assembler moves a load that is
// read-only (.nc).
GRADCLIP_GUARDED_LOAD(load_before_stores, "ld.global.L1::no_allocate")
GRADCLIP_GUARDED_LOAD_HALF(load_half_before_stores, "ld.global.L1::no_allocate")
GRADCLIP_GUARDED_LOAD(load_shared_line, "ld.global")
GRADCLIP_GUARDED_LOAD_HALF(load_half_shared_line, "ld.global")

__device__ __forceinline__ void store(u64 address, const Pack& p) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};"
               : : "l"(address), "r"(p.word[0]), "r"(p.word[1]), "r"(p.word[2]), "r"(p.word[3]) : "memory");
}
__device__ __forceinline__ void store_half(u64 address, const Pack& p) {
  asm volatile("st.global.v2.u32 [%0], {%1,%2};" : : "l"(address), "r"(p.word[0]), "r"(p.word[1]) : "memory");
}
template <class Bits>
__device__ __forceinline__ Bits load_element(u64 address) {
  return *reinterpret_cast<const Bits*>(address);
}
template <class Bits>
__device__ __forceinline__ void store_element(u64 address, Bits bits) {
  *reinterpret_cast<Bits*>(address) = bits;
}

}  // namespace gradclip

#else
#error "compile with nvcc, NVRTC, clang -x cuda, or a host C++ compiler with -DGRADCLIP_HOST"
#endif

// What is the same everywhere, built on the names above.
namespace gradclip {

__device__ __forceinline__ u64 shfl_xor(u64 x, u32 mask) {
  const u32 lo = shfl_xor(static_cast<u32>(x), mask);
  const u32 hi = shfl_xor(static_cast<u32>(x >> 32), mask);
  return static_cast<u64>(hi) << 32 | lo;
}
__device__ __forceinline__ double shfl_xor(double x, u32 mask) { return f64_from_bits(shfl_xor(bits_of(x), mask)); }

}  // namespace gradclip
