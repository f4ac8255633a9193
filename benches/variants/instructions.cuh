// What the variants need of a compiler besides kernels/device.cuh: for the device and, with fibers, for the host.
#pragma once

#include "../../kernels/device.cuh"

namespace gradclip {
namespace variants {

#if defined(GRADCLIP_HOST)

// Blocks run one after the other there, each fiber until it meets a barrier.
__device__ __forceinline__ u32 count_arrival(u32* arrivals, u32 by) {
  return __atomic_fetch_add(arrivals, by, __ATOMIC_ACQ_REL);
}
__device__ __forceinline__ u32 arrivals_so_far(const u32* arrivals) { return __atomic_load_n(arrivals, __ATOMIC_ACQUIRE); }
__device__ __forceinline__ void wait_is_possible() {
  if (grid_blocks() > 1) host::die("a grid-wide barrier: blocks run one after the other here");
}

using CachePolicy = u64;
__device__ __forceinline__ CachePolicy evict_first() { return 0; }
__device__ __forceinline__ CachePolicy evict_last() { return 1; }
__device__ __forceinline__ Pack load_once(u64 address, CachePolicy) { return gradclip::load_once(address); }

struct WidePack {
  Pack half[2];
};
__device__ __forceinline__ void check_wide(u64 address) { host::check_alignment(address, sizeof(WidePack), "a wide access"); }
__device__ __forceinline__ WidePack load_wide_once(u64 address) {
  check_wide(address);
  return {{gradclip::load_once(address), gradclip::load_once(address + kPackBytes)}};
}
__device__ __forceinline__ WidePack load_wide_for_update(u64 address) {
  check_wide(address);
  return {{load_for_update(address), load_for_update(address + kPackBytes)}};
}
__device__ __forceinline__ void store_wide(u64 address, const WidePack& p) {
  check_wide(address);
  store(address, p.half[0]);
  store(address + kPackBytes, p.half[1]);
}

// The packs that one thread asked for come at once.
__device__ __forceinline__ void copy_to_shared(Pack* to, u64 address) { *to = gradclip::load_once(address); }
__device__ __forceinline__ void wait_for_copies() {}

#else

// What this thread wrote before is seen by whoever sees the arrival, and what others wrote before theirs by this thread.
__device__ __forceinline__ u32 count_arrival(u32* arrivals, u32 by) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(arrivals), "r"(by) : "memory");
  return before;
}
__device__ __forceinline__ u32 arrivals_so_far(const u32* arrivals) {
  u32 now;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrivals) : "memory");
  return now;
}
__device__ __forceinline__ void wait_is_possible() {}

// sm_80 and later.
using CachePolicy = u64;
__device__ __forceinline__ CachePolicy evict_first() {
  CachePolicy policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ CachePolicy evict_last() {
  CachePolicy policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ Pack load_once(u64 address, CachePolicy policy) {
  Pack p;
  asm("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
      : "=r"(p.word[0]), "=r"(p.word[1]), "=r"(p.word[2]), "=r"(p.word[3]) : "l"(address), "l"(policy));
  return p;
}

// sm_100 and later.
struct WidePack {
  Pack half[2];
};
__device__ __forceinline__ WidePack load_wide_once(u64 address) {
  WidePack p;
  asm("ld.global.nc.L1::no_allocate.v8.b32 {%0,%1,%2,%3,%4,%5,%6,%7}, [%8];"
      : "=r"(p.half[0].word[0]), "=r"(p.half[0].word[1]), "=r"(p.half[0].word[2]), "=r"(p.half[0].word[3]),
        "=r"(p.half[1].word[0]), "=r"(p.half[1].word[1]), "=r"(p.half[1].word[2]), "=r"(p.half[1].word[3])
      : "l"(address));
  return p;
}
__device__ __forceinline__ WidePack load_wide_for_update(u64 address) {
  WidePack p;
  asm volatile("ld.global.L1::no_allocate.v8.b32 {%0,%1,%2,%3,%4,%5,%6,%7}, [%8];"
               : "=r"(p.half[0].word[0]), "=r"(p.half[0].word[1]), "=r"(p.half[0].word[2]), "=r"(p.half[0].word[3]),
                 "=r"(p.half[1].word[0]), "=r"(p.half[1].word[1]), "=r"(p.half[1].word[2]), "=r"(p.half[1].word[3])
               : "l"(address) : "memory");
  return p;
}
__device__ __forceinline__ void store_wide(u64 address, const WidePack& p) {
  asm volatile("st.global.v8.b32 [%0], {%1,%2,%3,%4,%5,%6,%7,%8};"
               : : "l"(address), "r"(p.half[0].word[0]), "r"(p.half[0].word[1]), "r"(p.half[0].word[2]),
                 "r"(p.half[0].word[3]), "r"(p.half[1].word[0]), "r"(p.half[1].word[1]), "r"(p.half[1].word[2]),
                 "r"(p.half[1].word[3]) : "memory");
}

// sm_80 and later. The thread that asked waits, and reads what it asked for itself: no barrier.
__device__ __forceinline__ void copy_to_shared(Pack* to, u64 address) {
  asm volatile("{.reg .u64 s; cvta.to.shared.u64 s, %0; cp.async.cg.shared.global [s], [%1], 16;}"
               : : "l"(to), "l"(address) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" : : : "memory"); }

#endif

}  // namespace variants
}  // namespace gradclip
