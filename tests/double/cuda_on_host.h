// The host branch of kernels/device.cuh: the same names, for g++ or clang++ in C++17 with -DGRADCLIP_HOST.
// Every CUDA thread is a fiber (block.h); the sanitizers see them as threads.
#pragma once

#include "block.h"
#include "host_float.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

// One array for the block. 0xFF is a NaN in every float type, and no sum, count or index anybody expects.
#define GRADCLIP_SHARED_ARRAY(type, name, count)                 \
  static const char name##_declaration = 0;                      \
  type(&name)[count] = *static_cast<type(*)[count]>(             \
      ::gradclip::host::shared_array(&name##_declaration, sizeof(type) * (count), alignof(type)))

namespace gradclip {

inline u32 thread_index() { return host::place.thread; }
inline u32 block_index() { return host::place.block; }
inline u32 grid_blocks() { return host::place.blocks; }
inline void sync_block() { host::sync_threads(); }
inline u32 shfl_xor(u32 x, u32 mask) { return host::exchange(x, mask); }

namespace host {

// Which addresses a kernel may touch. The driver double knows its allocations and sets `find`; without it all are
// allowed, and a sanitizer watches instead.
struct GlobalMemory {
  u64 begin, end;                                // the allocation found last
  bool (*find)(u64 address, u32 bytes, bool write);  // sets begin and end, or reports the fault
};
extern GlobalMemory global_memory;

inline bool may_access(u64 address, u32 bytes, bool write) {
  const GlobalMemory& memory = global_memory;
  if (!memory.find || (address >= memory.begin && address + bytes <= memory.end)) return true;
  return memory.find(address, bytes, write);
}

// Bytes that kernels have moved by the functions below, since somebody set it back: those of gradients. (Partials,
// descriptors and reports go through plain pointers.)
struct Traffic {
  u64 read;         // once, past L1
  u64 read_shared;  // by packs that a neighbour reads too: asked of L1, of which memory gives each byte once
  u64 written;
};
extern Traffic traffic;

// One thread runs all fibers, so this need not be one instruction; atomic for the thread sanitizer, to which fibers are
// threads.
inline void count(u64& counter, u32 bytes) {
  __atomic_store_n(&counter, __atomic_load_n(&counter, __ATOMIC_RELAXED) + bytes, __ATOMIC_RELAXED);
}

inline void check_alignment(u64 address, u32 bytes, const char* what) {
  if (address % bytes != 0) die("%s of %u bytes at the misaligned address %#llx", what, bytes, address);
}

// Device memory has no type: any of these may alias any other.
using AliasingWord __attribute__((may_alias)) = u32;
template <class Bits>
struct AliasingType {
  typedef Bits Type __attribute__((may_alias));
};

}  // namespace host

struct Pack {
  u32 word[4];
};

inline Pack load_pack(u64 address) {
  host::check_alignment(address, sizeof(Pack), "a load");
  if (!host::may_access(address, sizeof(Pack), false)) return {{~0u, ~0u, ~0u, ~0u}};
  const host::AliasingWord* words = reinterpret_cast<const host::AliasingWord*>(address);
  return {{words[0], words[1], words[2], words[3]}};
}
inline Pack load_once(u64 address) {
  host::count(host::traffic.read, sizeof(Pack));
  return load_pack(address);
}
inline Pack load_shared_line(u64 address) {
  host::count(host::traffic.read_shared, sizeof(Pack));
  return load_pack(address);
}
inline Pack load_for_update(u64 address) {
  host::count(host::traffic.read, sizeof(Pack));
  return load_pack(address);
}

inline void store(u64 address, const Pack& p) {
  host::check_alignment(address, sizeof(Pack), "a store");
  host::count(host::traffic.written, sizeof(Pack));
  if (!host::may_access(address, sizeof(Pack), true)) return;
  host::AliasingWord* words = reinterpret_cast<host::AliasingWord*>(address);
  for (u32 i = 0; i < 4; ++i) words[i] = p.word[i];
}

template <class Bits>
inline Bits load_element(u64 address) {
  host::check_alignment(address, sizeof(Bits), "a load");
  host::count(host::traffic.read, sizeof(Bits));
  if (!host::may_access(address, sizeof(Bits), false)) return static_cast<Bits>(~0ull);
  return *reinterpret_cast<const typename host::AliasingType<Bits>::Type*>(address);
}
template <class Bits>
inline void store_element(u64 address, Bits bits) {
  host::check_alignment(address, sizeof(Bits), "a store");
  host::count(host::traffic.written, sizeof(Bits));
  if (!host::may_access(address, sizeof(Bits), true)) return;
  *reinterpret_cast<typename host::AliasingType<Bits>::Type*>(address) = bits;
}

inline Pack load_half(u64 address) {
  host::check_alignment(address, sizeof(u64), "a load");
  if (!host::may_access(address, sizeof(u64), false)) return {{~0u, ~0u, 0, 0}};
  const host::AliasingWord* words = reinterpret_cast<const host::AliasingWord*>(address);
  return {{words[0], words[1], 0, 0}};
}
inline Pack load_before_stores(u64 address, bool active) { return active ? load_for_update(address) : Pack{}; }
inline Pack load_half_before_stores(u64 address, bool active) {
  if (active) host::count(host::traffic.read, sizeof(u64));
  return active ? load_half(address) : Pack{};
}
inline Pack load_shared_line(u64 address, bool active) { return active ? load_shared_line(address) : Pack{}; }
inline Pack load_half_shared_line(u64 address, bool active) {
  if (active) host::count(host::traffic.read_shared, sizeof(u64));
  return active ? load_half(address) : Pack{};
}
inline void store_half(u64 address, const Pack& p) {
  store_element<u64>(address, static_cast<u64>(p.word[1]) << 32 | p.word[0]);
}

}  // namespace gradclip
