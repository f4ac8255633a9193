#include "memory.h"

#include <cinttypes>
#include <cstdlib>
#include <cstring>

#include "../../../kernels/abi.cuh"
#include "../cuda_on_host.h"
#include "call.h"

namespace gradclip {
namespace driver {

namespace {

constexpr unsigned char kPoison = 0xff;  // a NaN in every float type
constexpr unsigned char kGuard = 0xa5;
constexpr size_t kGuardBytes = 4096;
constexpr size_t kAlignment = 256;          // what cuMemAlloc promises, and not more: bases are never multiples of 512
constexpr size_t kPoisonedWhole = 256u << 20;  // larger blocks are poisoned at both ends only
constexpr size_t kPoisonedEnds = 16u << 20;
constexpr size_t kQuarantineBytes = 64u << 20;

struct Memory {
  std::map<uint64_t, Allocation> live;
  std::deque<Allocation> quarantine;  // freed, and kept to catch late writes
  size_t quarantined_bytes = 0;
  uint64_t violations = 0;  // found so far, in blocks that are gone
  uint64_t next_id = 1;
  uint64_t device_bytes[kDevices] = {};
  int watched_device = 0;
  bool faulted = false;
};

Memory& memory() {
  static Memory* memory = new Memory;
  return *memory;
}

char* data(const Allocation& a) { return reinterpret_cast<char*>(a.base); }

void poison(const Allocation& a) {
  if (a.bytes <= kPoisonedWhole) {
    std::memset(data(a), kPoison, a.bytes);
  } else {
    std::memset(data(a), kPoison, kPoisonedEnds);
    std::memset(data(a) + a.bytes - kPoisonedEnds, kPoison, kPoisonedEnds);
  }
}

bool all_equal(const char* bytes, size_t count, unsigned char value) {
  for (size_t i = 0; i < count; ++i) {
    if (static_cast<unsigned char>(bytes[i]) != value) return false;
  }
  return true;
}

uint64_t violated_guards(const Allocation& a) {
  if (!a.block) return 0;
  const char* end = data(a) + a.bytes;
  const size_t before = static_cast<size_t>(data(a) - a.block);
  const size_t after = static_cast<size_t>(a.block + a.block_bytes - end);
  const bool low = !all_equal(a.block, before, kGuard);
  const bool high = !all_equal(end, after, kGuard);
  if (low || high) {
    complain("allocation %" PRIu64 " of %zu bytes at %#" PRIx64 ": written %s", a.id, a.bytes, a.base,
             low && high ? "before its begin and past its end" : low ? "before its begin" : "past its end");
  }
  return low + high;
}

// The guards are known to be intact, or counted, when a block gets here.
uint64_t late_writes(const Allocation& a) {
  const bool written = a.bytes <= kPoisonedWhole && !all_equal(data(a), a.bytes, kPoison);
  if (written) {
    complain("allocation %" PRIu64 " of %zu bytes at %#" PRIx64 ": written after it was freed", a.id, a.bytes, a.base);
  }
  return written;
}

void trim_quarantine(size_t limit) {
  Memory& m = memory();
  while (m.quarantined_bytes > limit) {
    const Allocation oldest = m.quarantine.front();
    m.quarantine.pop_front();
    m.quarantined_bytes -= oldest.block_bytes;
    m.violations += late_writes(oldest);
    std::free(oldest.block);
  }
}

}  // namespace

Allocation* allocate(Context* context, size_t bytes, MemoryKind kind) {
  Memory& m = memory();
  const bool on_device = kind == MemoryKind::kDevice || kind == MemoryKind::kManaged;
  if (on_device && m.device_bytes[context->device] + bytes > driver().settings.total_memory) return nullptr;
  Allocation a;
  a.bytes = bytes;
  a.kind = kind;
  a.context = context;
  a.device = context->device;
  a.block_bytes = bytes + 2 * kGuardBytes + 2 * kAlignment;
  a.block = static_cast<char*>(std::malloc(a.block_bytes));
  if (!a.block) return nullptr;
  const uint64_t first = reinterpret_cast<uint64_t>(a.block) + kGuardBytes;
  a.base = (first + 2 * kAlignment - 1) / (2 * kAlignment) * (2 * kAlignment) + kAlignment;
  if (a.base - kAlignment >= first + kAlignment) a.base -= 2 * kAlignment;
  a.id = m.next_id++;
  std::memset(a.block, kGuard, static_cast<size_t>(data(a) - a.block));
  std::memset(data(a) + bytes, kGuard, static_cast<size_t>(a.block + a.block_bytes - data(a)) - bytes);
  poison(a);
  if (on_device) m.device_bytes[a.device] += bytes;
  return &(m.live[a.base] = a);
}

Allocation* register_host(Context* context, void* address, size_t bytes) {
  Allocation a;
  a.base = reinterpret_cast<uint64_t>(address);
  a.bytes = bytes;
  a.kind = MemoryKind::kRegistered;
  a.context = context;
  a.device = context->device;
  a.id = memory().next_id++;
  return &(memory().live[a.base] = a);
}

void release(uint64_t base) {
  Memory& m = memory();
  const auto found = m.live.find(base);
  if (found == m.live.end()) return;
  const Allocation a = found->second;
  m.live.erase(found);
  if (!a.on_host()) m.device_bytes[a.device] -= a.bytes;
  if (!a.block) return;
  m.violations += violated_guards(a);
  poison(a);
  m.quarantine.push_back(a);
  m.quarantined_bytes += a.block_bytes;
  trim_quarantine(kQuarantineBytes);
}

Allocation* find_allocation(uint64_t address) {
  auto& live = memory().live;
  auto after = live.upper_bound(address);
  if (after == live.begin()) return nullptr;
  Allocation& a = (--after)->second;
  return address - a.base < a.bytes ? &a : nullptr;
}

bool is_device_range(uint64_t address, size_t bytes) {
  const Allocation* a = find_allocation(address);
  return a && bytes <= a->bytes - (address - a->base);
}

bool is_pinned_range(uint64_t address, size_t bytes) {
  const Allocation* a = find_allocation(address);
  return a && a->on_host() && bytes <= a->bytes - (address - a->base);
}

uint64_t device_bytes(int device) { return memory().device_bytes[device]; }

void free_all() {
  Memory& m = memory();
  trim_quarantine(0);
  for (const auto& entry : m.live) std::free(entry.second.block);
  const uint64_t next_id = m.next_id;
  m = Memory();
  m.next_id = next_id;
}

namespace {

bool find_for_kernel(u64 address, u32 bytes, bool write) {
  Memory& m = memory();
  const Allocation* a = find_allocation(address);
  if (a && bytes <= a->bytes - (address - a->base) && (a->device == m.watched_device || a->on_host())) {
    host::global_memory.begin = a->base;
    host::global_memory.end = a->base + a->bytes;
    return true;
  }
  if (!m.faulted) {
    ++counters().faults;
    complain("kernel %s, block %u, thread %u: %s of %u bytes at %#llx, %s", host::place.kernel, host::place.block,
             host::place.thread, write ? "write" : "read", bytes, address,
             !a ? "which is in no live allocation"
                : a->device != m.watched_device ? "which is on another device" : "which runs past an allocation");
  }
  m.faulted = true;
  return false;
}

}  // namespace

void watch_kernel_accesses(int device) {
  memory().watched_device = device;
  memory().faulted = false;
  host::global_memory = {0, 0, find_for_kernel};
}

CUresult finish_watching() {
  host::global_memory = {};
  return memory().faulted ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_SUCCESS;
}

}  // namespace driver
}  // namespace gradclip

using namespace gradclip::driver;

DRIVER_API uint64_t double_check_guards() {
  std::lock_guard<std::recursive_mutex> lock(driver().mutex);
  Memory& m = memory();
  uint64_t violations = m.violations;
  for (const auto& entry : m.live) violations += violated_guards(entry.second);
  for (const Allocation& freed : m.quarantine) violations += late_writes(freed);
  return violations;
}

DRIVER_API uint64_t double_live_allocations() {
  std::lock_guard<std::recursive_mutex> lock(driver().mutex);
  uint64_t live = 0;
  for (const auto& entry : memory().live) live += !entry.second.free_pending;
  return live;
}

DRIVER_API uint64_t double_live_bytes() {
  std::lock_guard<std::recursive_mutex> lock(driver().mutex);
  uint64_t bytes = 0;
  for (const auto& entry : memory().live) bytes += entry.second.free_pending ? 0 : entry.second.bytes;
  return bytes;
}
