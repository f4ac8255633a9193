#include "block.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fibers.h"

#if defined(GRADCLIP_ASAN)
#include <sanitizer/asan_interface.h>
#endif
#if defined(GRADCLIP_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace gradclip {
namespace host {

Place place = {};

namespace {

constexpr uint32_t kWarp = 32;
constexpr uint32_t kMaxThreads = 1024;
constexpr uint32_t kMaxWarps = kMaxThreads / kWarp;
constexpr size_t kSharedBytes = 48 * 1024;  // what every GPU has without opting in
constexpr size_t kSharedRoom = 2 * kSharedBytes;
constexpr uint32_t kMaxSharedArrays = 32;
constexpr size_t kRedZone = 64;
#if defined(GRADCLIP_ASAN) || defined(GRADCLIP_TSAN)
constexpr size_t kStackBytes = 128 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

// Lanes of a warp, one bit each.
struct Warp {
  uint32_t ready, in_shuffle, at_barrier, done;
  uint32_t round;          // shuffles completed
  uint32_t lane_mask;      // of the shuffle in progress
  uint32_t values[2][kWarp];  // two sets: a lane may enter the next shuffle while another has yet to read this one
};

// The fibers of a block. Making one is expensive under the thread sanitizer, so they are kept; neighbouring blocks have
// different crews there, because what one fiber does is always in order and two blocks are not.
struct Crew {
  Fiber fibers[kMaxThreads];
  StackRoom* stacks = nullptr;
};
#if defined(GRADCLIP_TSAN)
constexpr uint32_t kCrews = 2;
#else
constexpr uint32_t kCrews = 1;
#endif

struct SharedArray {
  const void* declaration;
  char* memory;
  size_t bytes;
};

struct Block {
  Fiber scheduler;
  Crew crews[kCrews];
  Crew* crew;
  Fiber* fibers;  // of the crew
  Warp warps[kMaxWarps];
  uint32_t threads, num_warps, at_barrier, done;
  uint32_t barriers;  // completed
  char barrier_clock[2], begin_clock, end_clock;  // addresses the thread sanitizer hangs happens-before on
  const Grid* grid;
  char* shared = nullptr;
  size_t shared_used, shared_bytes;
  SharedArray shared_arrays[kMaxSharedArrays];
  uint32_t num_shared_arrays;
};

Block block;

GRADCLIP_UNSEEN void release(void* clock) {
#if defined(GRADCLIP_TSAN)
  __tsan_release(clock);
#else
  (void)clock;
#endif
}

GRADCLIP_UNSEEN void acquire(void* clock) {
#if defined(GRADCLIP_TSAN)
  __tsan_acquire(clock);
#else
  (void)clock;
#endif
}

GRADCLIP_UNSEEN uint32_t all_lanes(uint32_t warp) {
  const uint32_t lanes = block.threads - warp * kWarp;
  return lanes >= kWarp ? ~0u : (1u << lanes) - 1;
}

GRADCLIP_HARDWARE void list_lanes(char* out, size_t size, uint32_t lanes) {
  size_t used = 0;
  out[0] = 0;
  for (uint32_t lane = 0; lane < kWarp; ++lane) {
    if (!(lanes >> lane & 1) || used >= size) continue;
    uint32_t last = lane;
    while (last + 1 < kWarp && (lanes >> (last + 1) & 1)) ++last;
    used += std::snprintf(out + used, size - used, last > lane ? "%s%u-%u" : "%s%u", used ? "," : "", lane, last);
    lane = last;
  }
  if (!lanes) std::snprintf(out, size, "none");
}

[[noreturn]] GRADCLIP_HARDWARE void die_of_divergence(uint32_t index) {
  const Warp& warp = block.warps[index];
  char shuffle[128], barrier[128], done[128];
  list_lanes(shuffle, sizeof shuffle, warp.in_shuffle);
  list_lanes(barrier, sizeof barrier, warp.at_barrier);
  list_lanes(done, sizeof done, warp.done);
  die("warp %u diverged at a shuffle of all 32 lanes: lanes %s are in the shuffle, %s at a barrier, %s have returned",
      index, shuffle, barrier, done);
}

// The lane after `lane` in the order of this grid that can run, or kWarp.
GRADCLIP_UNSEEN uint32_t next_ready(const Warp& warp, uint32_t lane) {
  if (!warp.ready) return kWarp;
  if (block.grid->order.reversed_threads) {
    const uint32_t before = warp.ready & ((1u << lane) - 1);
    return 31 - __builtin_clz(before ? before : warp.ready);
  }
  const uint32_t after = lane == 31 ? 0 : warp.ready & (~0u << (lane + 1));
  return __builtin_ctz(after ? after : warp.ready);
}

GRADCLIP_UNSEEN uint32_t first_ready(const Warp& warp) {
  return next_ready(warp, block.grid->order.reversed_threads ? 0 : 31);
}

// Leaves the running thread; comes back when somebody has made it ready again and its turn has come.
GRADCLIP_HARDWARE void leave(uint32_t thread, bool for_good) {
  const uint32_t index = thread / kWarp;
  const uint32_t lane = next_ready(block.warps[index], thread % kWarp);
  if (lane == kWarp) {
    switch_fiber(block.fibers[thread], block.scheduler, for_good);
  } else {
    place.thread = index * kWarp + lane;
    switch_fiber(block.fibers[thread], block.fibers[place.thread], for_good);
  }
}

GRADCLIP_HARDWARE void thread_begins() {
  arrive_in_new_fiber(block.scheduler);
  acquire(&block.begin_clock);
}

[[noreturn]] GRADCLIP_HARDWARE void thread_ends() {
  const uint32_t thread = place.thread;
  release(&block.end_clock);
  if (block.crew->stacks->overflowed(thread)) die("the stack of %zu bytes overflowed", kStackBytes);
  Warp& warp = block.warps[thread / kWarp];
  warp.ready &= ~(1u << thread % kWarp);
  warp.done |= 1u << thread % kWarp;
  ++block.done;
  leave(thread, true);
  __builtin_unreachable();
}

GRADCLIP_HARDWARE void thread_entry() {
  thread_begins();
  block.grid->thread(block.grid->args);
  thread_ends();
}

GRADCLIP_HARDWARE void choose_crew(uint32_t index) {
  Crew& crew = block.crews[index % kCrews];
  if (!crew.stacks || crew.stacks->count() < block.threads) {
    delete crew.stacks;
    crew.stacks = new StackRoom(block.threads, kStackBytes);
  }
  block.crew = &crew;
  block.fibers = crew.fibers;
  for (uint32_t t = 0; t < block.threads; ++t) {
    prepare_fiber(crew.fibers[t], crew.stacks->stack(t), kStackBytes, thread_entry);
#if defined(GRADCLIP_TSAN)
    if (!crew.fibers[t].tsan) crew.fibers[t].tsan = __tsan_create_fiber(0);
#endif
  }
}

// The thread sanitizer remembers accesses by address. Memory that one block after the other uses must look new to each,
// or two blocks would seem to race for it: so it is mapped anew.
GRADCLIP_HARDWARE void renew_shared_memory() {
#if defined(GRADCLIP_TSAN)
  if (block.shared) munmap(block.shared, kSharedRoom);
  block.shared = nullptr;
#endif
  if (!block.shared) {
    void* memory = mmap(nullptr, kSharedRoom, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) die("no memory for shared arrays");
    block.shared = static_cast<char*>(memory);
  }
  block.shared_used = block.shared_bytes = block.num_shared_arrays = 0;
#if defined(GRADCLIP_ASAN)
  __asan_poison_memory_region(block.shared, kSharedRoom);
#endif
}

GRADCLIP_HARDWARE void run_block(uint32_t index) {
  const Grid& grid = *block.grid;
  place.block = index;
  renew_shared_memory();
  choose_crew(index);
  release(&block.begin_clock);  // the scheduler has acquired nothing of other blocks: this orders no two of them
  block.at_barrier = block.done = block.barriers = 0;
  for (uint32_t w = 0; w < block.num_warps; ++w) {
    Warp& warp = block.warps[w];
    warp.ready = all_lanes(w);
    warp.in_shuffle = warp.at_barrier = warp.done = warp.round = 0;
  }
  while (block.done < block.threads) {
    bool any_ran = false;
    for (uint32_t i = 0; i < block.num_warps; ++i) {
      const uint32_t w = grid.order.reversed_threads ? block.num_warps - 1 - i : i;
      Warp& warp = block.warps[w];
      while (warp.ready) {
        any_ran = true;
        place.thread = w * kWarp + first_ready(warp);
        switch_fiber(block.scheduler, block.fibers[place.thread], false);
      }
      if (warp.in_shuffle) die_of_divergence(w);
    }
    if (!any_ran) {
      place.thread = 0;
      die("%u threads of %u wait at a barrier that the others never reach: %u have returned", block.at_barrier,
          block.threads, block.done);
    }
  }
}

}  // namespace

GRADCLIP_HARDWARE void run_grid(const Grid& grid) {
  place = {0, 0, grid.blocks, grid.kernel};
  if (grid.threads == 0 || grid.threads > kMaxThreads) die("a block of %u threads", grid.threads);
  block.grid = &grid;
  block.threads = grid.threads;
  block.num_warps = (grid.threads + kWarp - 1) / kWarp;
  adopt_this_thread(block.scheduler);
  for (uint32_t b = 0; b < grid.blocks; ++b) run_block(grid.order.reversed_blocks ? grid.blocks - 1 - b : b);
  acquire(&block.end_clock);
  block.grid = nullptr;
}

GRADCLIP_HARDWARE void sync_threads() {
  const uint32_t thread = place.thread;
  char* clock = &block.barrier_clock[block.barriers & 1];
  release(clock);
  if (++block.at_barrier < block.threads) {
    Warp& warp = block.warps[thread / kWarp];
    warp.ready &= ~(1u << thread % kWarp);
    warp.at_barrier |= 1u << thread % kWarp;
    leave(thread, false);
  } else {
    block.at_barrier = 0;
    ++block.barriers;
    for (uint32_t w = 0; w < block.num_warps; ++w) {
      block.warps[w].at_barrier = 0;
      block.warps[w].ready = all_lanes(w);
    }
    // Back to the first warp, so that what runs first after a barrier depends on the order alone.
    switch_fiber(block.fibers[thread], block.scheduler, false);
  }
  acquire(clock);
}

// No happens-before here: a shuffle hands over one register and orders no memory.
GRADCLIP_HARDWARE uint32_t exchange(uint32_t value, uint32_t lane_mask) {
  const uint32_t thread = place.thread;
  const uint32_t lane = thread % kWarp;
  Warp& warp = block.warps[thread / kWarp];
  uint32_t* values = warp.values[warp.round & 1];
  values[lane] = value;
  if (lane_mask == 0 || lane_mask >= kWarp) die("a shuffle with lane mask %u", lane_mask);
  if (!warp.in_shuffle) {
    warp.lane_mask = lane_mask;
  } else if (warp.lane_mask != lane_mask) {
    die("lanes of one warp are in different shuffles: lane masks %u and %u", warp.lane_mask, lane_mask);
  }
  warp.in_shuffle |= 1u << lane;
  if (warp.in_shuffle == ~0u) {
    warp.in_shuffle = 0;
    warp.ready = ~0u;
    ++warp.round;
  } else {
    warp.ready &= ~(1u << lane);
    leave(thread, false);
  }
  return values[lane ^ lane_mask];
}

GRADCLIP_HARDWARE void* shared_array(const void* declaration, size_t bytes, size_t alignment) {
  for (uint32_t i = 0; i < block.num_shared_arrays; ++i) {
    if (block.shared_arrays[i].declaration == declaration) return block.shared_arrays[i].memory;
  }
  const size_t start = (block.shared_used + kRedZone + alignment - 1) / alignment * alignment;
  block.shared_bytes += bytes;
  if (block.shared_bytes > kSharedBytes || start + bytes > kSharedRoom || block.num_shared_arrays == kMaxSharedArrays) {
    die("%zu bytes of shared memory in %u arrays", block.shared_bytes, block.num_shared_arrays + 1);
  }
  char* memory = block.shared + start;
  block.shared_used = start + bytes;
  block.shared_arrays[block.num_shared_arrays++] = {declaration, memory, bytes};
#if defined(GRADCLIP_ASAN)
  __asan_unpoison_memory_region(memory, bytes);
#endif
  for (size_t i = 0; i < bytes; ++i) static_cast<volatile char*>(memory)[i] = static_cast<char>(0xff);
  return memory;
}

void die(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::fprintf(stderr, "cuda_on_host: %s, block %u of %u, thread %u: ", place.kernel ? place.kernel : "no kernel",
               place.block, place.blocks, place.thread);
  std::vfprintf(stderr, format, args);
  std::fputc('\n', stderr);
  std::fflush(stderr);
  va_end(args);
  std::abort();
}

}  // namespace host
}  // namespace gradclip
