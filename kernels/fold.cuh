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

}  // namespace gradclip
