// Stage 1 of a scoped call with telemetry: scoped_partials_*, and on the same pass what stats.cuh sees.
//
//   launch   any number of blocks of kTileThreads
//   reads    as norm_partials.cu; one more element of a pack that holds a value that is not finite
//   writes   one partial and one Stats a tile
//   twin     src/cpu/scoped.rs
#include "scoped_table.cuh"
#include "stats.cuh"
#include "tile.cuh"

namespace gradclip {

template <u32 kNorm, class T>
__device__ __forceinline__ Partial watched_segment(const TensorDesc& desc, u32 tile, Stats& stats) {
  const TensorView<T> tensor = {desc.address, desc.numel};
  const u64 first = segment_begin<T>(desc, tile);
  LaneStats<T> lane;
  const Partial partial = segment_partial<kNorm>(tensor, first, lane);
  stats = lane.of_warp(tensor, first);
  return partial;
}

template <u32 kNorm>
__device__ __forceinline__ Partial watched_segment_of(const TensorDesc& desc, u32 tile, Stats& stats) {
  switch (desc.dtype) {
    case kF32: return watched_segment<kNorm, F32>(desc, tile, stats);
    case kF64: return watched_segment<kNorm, F64>(desc, tile, stats);
    case kF16: return watched_segment<kNorm, F16>(desc, tile, stats);
    default: return watched_segment<kNorm, BF16>(desc, tile, stats);
  }
}

template <u32 kNorm>
__device__ __forceinline__ void scoped_stats(const ScopedTable& table, u32 num_tiles, double* sums, int* scales,
                                             Stats* tile_stats) {
  GRADCLIP_SEGMENT_SLOTS(slots);
  GRADCLIP_SHARED_ARRAY(Stats, segment_stats, 2 * kSegmentsPerTile);
  for (u32 tile = block_index(); tile < num_tiles; tile += grid_blocks()) {
    const TensorDesc desc = find_row(table, tile).desc;
    Stats stats;
    Partial partial = watched_segment_of<kNorm>(desc, tile, stats);
    Stats* const own_stats = segment_stats + slots.first;
    if (thread_index() % kWarpThreads == 0) own_stats[thread_index() / kWarpThreads] = stats;
    partial = fold_segments(kNorm, partial, slots);
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

#define GRADCLIP_SCOPED_STATS(symbol, norm)                                                                       \
  extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, gradclip::kStatsBlocksPerMultiprocessor)   \
      symbol(gradclip::ScopedTable table, gradclip::u32 num_tiles, double* sums, int* scales,                     \
             gradclip::Stats* tile_stats) {                                                                       \
    gradclip::scoped_stats<gradclip::norm>(table, num_tiles, sums, scales, tile_stats);                           \
  }

GRADCLIP_SCOPED_STATS(scoped_stats_l1, kL1)
GRADCLIP_SCOPED_STATS(scoped_stats_l2, kL2)
GRADCLIP_SCOPED_STATS(scoped_stats_inf, kInf)
