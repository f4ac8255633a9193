// Folding many values to one in a block of kFoldThreads: thread t takes values t, t + 1024, ... in order, then the xor
// tree inside each warp, then the same tree over the 32 warps. src/cpu/clip_coef.rs folds in the same order.
#pragma once

#include "partial.cuh"

namespace gradclip {

static_assert(kFoldThreads == kWarpThreads * kWarpThreads, "the second level of the tree is one warp");

// `slots` has kWarpThreads places in shared memory. All threads get the result of warp 0; thread 0's is the fold.
template <class Value, class Combine>
__device__ __forceinline__ Value fold_block(Value value, Value* slots, const Combine& combine) {
  const u32 lane = thread_index() % kWarpThreads;
  const u32 warp = thread_index() / kWarpThreads;
#pragma unroll
  for (u32 mask = kWarpThreads / 2; mask > 0; mask /= 2) value = combine(value, shfl_xor(value, mask));
  if (lane == 0) slots[warp] = value;
  sync_block();
  value = slots[lane];
#pragma unroll
  for (u32 mask = kWarpThreads / 2; mask > 0; mask /= 2) value = combine(value, shfl_xor(value, mask));
  return value;
}

// The same fold of `count` values, load(0) to load(count - 1), by one warp, which goes through the 32 warps of that block
// one after the other.
struct WarpFold {
  template <class Value, class Load, class Combine>
  __device__ __forceinline__ Value operator()(u32 count, Value zero, const Load& load, const Combine& combine) const {
    const u32 lane = thread_index() % kWarpThreads;
    Value of_warp = zero;
    for (u32 warp = 0; warp < kWarpThreads && warp * kWarpThreads < count; ++warp) {
      Value mine = zero;
      for (u32 i = warp * kWarpThreads + lane; i < count; i += kFoldThreads) mine = combine(mine, load(i));
#pragma unroll
      for (u32 mask = kWarpThreads / 2; mask > 0; mask /= 2) mine = combine(mine, shfl_xor(mine, mask));
      if (lane == warp) of_warp = mine;
    }
#pragma unroll
    for (u32 mask = kWarpThreads / 2; mask > 0; mask /= 2) of_warp = combine(of_warp, shfl_xor(of_warp, mask));
    return of_warp;
  }
  __device__ __forceinline__ bool writes() const { return thread_index() % kWarpThreads == 0; }
};

// Jobs with more tiles than this are done by the whole block, one after the other: a warp would take longer to fold them
// than all blocks take to read them. Not tuned on a GPU yet.
constexpr u32 kTilesOfWarpJob = 256;

}  // namespace gradclip
