// Stage 2 of a block of kTileThreads, to the bit what clip_coef.cu does with kFoldThreads.
#pragma once

#include "../../kernels/decide.cuh"
#include "../../kernels/fold.cuh"

namespace gradclip {
namespace variants {

// fold_block over value(0) to value(count - 1). A warp does the work of four, one after the other.
template <class Value, class Load, class Combine>
__device__ __forceinline__ Value fold_values(u32 count, Value zero, Value* slots, const Load& load, const Combine& combine) {
  const u32 lane = thread_index() % kWarpThreads;
#pragma unroll 1
  for (u32 warp = thread_index() / kWarpThreads; warp < kWarpThreads; warp += kTileThreads / kWarpThreads) {
    Value mine = zero;
    for (u32 i = warp * kWarpThreads + lane; i < count; i += kFoldThreads) mine = combine(mine, load(i));
#pragma unroll
    for (u32 mask = kWarpThreads / 2; mask > 0; mask /= 2) mine = combine(mine, shfl_xor(mine, mask));
    if (lane == 0) slots[warp] = mine;
  }
  sync_block();
  Value value = slots[lane];
#pragma unroll
  for (u32 mask = kWarpThreads / 2; mask > 0; mask /= 2) value = combine(value, shfl_xor(value, mask));
  return value;
}

// For thread 0 to write to `report`; the others help.
__device__ __forceinline__ void fold_and_decide(const double* sums, const double* scales, u32 num_tiles,
                                                const ClipParams& params, ReportSlot* report) {
  GRADCLIP_SHARED_ARRAY(Partial, partial_slots, kWarpThreads);
  GRADCLIP_SHARED_ARRAY(u64, tile_slots, kWarpThreads);
  const Partial total = fold_values(
      num_tiles, Partial{0.0, 1.0}, partial_slots,
      [&](u32 i) { return Partial{sums[i], scales ? scales[i] : 1.0}; },
      [](Partial a, Partial b) { return combine(kL2, a, b); });
  const u64 first_bad_tile = fold_values(
      num_tiles, u64{kNoTile}, tile_slots, [&](u32 i) { return is_finite(sums[i]) ? kNoTile : u64{i}; },
      [](u64 a, u64 b) { return a < b ? a : b; });
  if (thread_index() == 0) {
    report->first_bad_tile = first_bad_tile;
    report->clipped_elements = 0;
    report->nan_elements = 0;
    decide(params, threshold_of(params), norm_of(kL2, total), report);
  }
}

}  // namespace variants
}  // namespace gradclip
