// One block of CUDA threads after another on fibers: the hardware's side of thread_index, shuffles, barriers and shared
// memory. Not thread-safe: one grid at a time in a process.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gradclip {
namespace host {

struct Order {
  bool reversed_threads = false;
  bool reversed_blocks = false;
};

struct Grid {
  const char* kernel;                // for messages
  void (*thread)(const void* args);  // the kernel, called once by every thread
  const void* args;
  uint32_t blocks;
  uint32_t threads;  // of each block
  Order order;
};

// Runs all threads of all blocks to their end. Aborts with a message on what would hang or be undefined on a GPU: a
// shuffle that lanes of the warp do not reach, a barrier that threads of the block do not reach, a stack overflow.
void run_grid(const Grid& grid);

// What a running thread sees. Set at every switch.
struct Place {
  uint32_t thread;
  uint32_t block;
  uint32_t blocks;
  const char* kernel;
};
extern Place place;

void sync_threads();
uint32_t exchange(uint32_t value, uint32_t lane_mask);

// The block's array that belongs to `declaration`, filled with 0xFF when the first thread of the block gets there.
void* shared_array(const void* declaration, size_t bytes, size_t alignment);

[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace host
}  // namespace gradclip
