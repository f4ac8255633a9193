// Tiles to partials, and on the same pass to what stats.cuh sees: the bodies of scoped_stats.cu and scoped_p.cu.
#pragma once

#include "scoped_table.cuh"
#include "stats.cuh"
#include "tile.cuh"

namespace gradclip {

template <u32 kNorm, class T>
__device__ __forceinline__ Partial watched_segment(const TensorDesc& desc, u32 tile, Stats& stats, double p) {
  const TensorView<T> tensor = {desc.address, desc.numel};
  const u64 first = segment_begin<T>(desc, tile);
  LaneStats<T> lane;
  const Partial partial = segment_partial<kNorm>(tensor, first, lane, p);
  stats = lane.of_warp(tensor, first);
  return partial;
}

template <u32 kNorm>
__device__ __forceinline__ Partial watched_segment_of(const TensorDesc& desc, u32 tile, Stats& stats, double p) {
  switch (desc.dtype) {
    case kF32: return watched_segment<kNorm, F32>(desc, tile, stats, p);
    case kF64: return watched_segment<kNorm, F64>(desc, tile, stats, p);
    case kF16: return watched_segment<kNorm, F16>(desc, tile, stats, p);
    default: return watched_segment<kNorm, BF16>(desc, tile, stats, p);
  }
}

template <u32 kNorm>
__device__ __forceinline__ void scoped_stats(const ScopedTable& table, u32 num_tiles, double* sums, double* scales,
                                             Stats* tile_stats, double p = 0.0) {
  GRADCLIP_SEGMENT_SLOTS(slots);
  GRADCLIP_SHARED_ARRAY(Stats, segment_stats, 2 * kSegmentsPerTile);
  for (u32 tile = block_index(); tile < num_tiles; tile += grid_blocks()) {
    const TensorDesc desc = find_row(table, tile).desc;
    Stats stats;
    Partial partial = watched_segment_of<kNorm>(desc, tile, stats, p);
    Stats* const own_stats = segment_stats + slots.first;
    if (thread_index() % kWarpThreads == 0) own_stats[thread_index() / kWarpThreads] = stats;
    partial = fold_segments({kNorm, p}, partial, slots);
    if (thread_index() == 0) {
      stats = own_stats[0];
#pragma unroll
      for (u32 s = 1; s < kSegmentsPerTile; ++s) stats = combine(stats, own_stats[s]);
      sums[tile] = partial.sum;
      if (scales) scales[tile] = partial.scale;
      tile_stats[tile] = stats;
    }
  }
}

// Fewer than without stats: with 4, registers are spilled on some targets. With 3 ptxas spreads part of the loads among
// the arithmetic, which it does with 2 as well. Not yet tuned on a GPU.
constexpr u32 kStatsBlocksPerMultiprocessor = 3;

}  // namespace gradclip
