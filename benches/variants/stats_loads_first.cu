// scoped_stats_l2 whose packs are all there before the first is looked at, then go through the sums, then through the
// statistics: the library shows each pack to both at once.
#include "raw_segment.cuh"
#include "../../kernels/scoped_stats.cuh"

namespace gradclip {
namespace variants {

template <class T>
__device__ __forceinline__ Partial watched_packs(const TensorDesc& desc, u32 tile, const Pack (&pack)[kRowsPerSegment],
                                                 Stats& stats) {
  const Partial partial = partial_of_packs<T>(desc, tile, pack);
  LaneStats<T> lane;
#pragma unroll
  for (u32 r = 0; r < kRowsPerSegment; ++r) lane.add_row(pack[r]);
  stats = lane.of_warp({desc.address, desc.numel}, segment_begin<T>(desc, tile));
  return partial;
}

__device__ __forceinline__ Partial watched_partial(const TensorDesc& desc, u32 tile, Stats& stats) {
  const RawSegment segment = raw_segment(desc, tile);
  if (!segment.whole) return watched_segment_of<kL2>(desc, tile, stats, 0.0);
  Pack pack[kRowsPerSegment];
#pragma unroll
  for (u32 r = 0; r < kRowsPerSegment; ++r) pack[r] = gradclip::load_once(segment.address + r * kRowBytes);
  switch (desc.dtype) {
    case kF32: return watched_packs<F32>(desc, tile, pack, stats);
    case kF64: return watched_packs<F64>(desc, tile, pack, stats);
    case kF16: return watched_packs<F16>(desc, tile, pack, stats);
    default: return watched_packs<BF16>(desc, tile, pack, stats);
  }
}

}  // namespace variants
}  // namespace gradclip

// With 3 blocks a multiprocessor registers are spilled.
extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, 2)
    stats_loads_first(gradclip::ScopedTable table, gradclip::u32 num_tiles, double* sums, double* scales,
                      gradclip::Stats* tile_stats) {
  using namespace gradclip;
  GRADCLIP_SEGMENT_SLOTS(slots);
  GRADCLIP_SHARED_ARRAY(Stats, segment_stats, 2 * kSegmentsPerTile);
  for (u32 tile = block_index(); tile < num_tiles; tile += grid_blocks()) {
    Stats stats;
    Partial partial = variants::watched_partial(find_row(table, tile).desc, tile, stats);
    Stats* const own_stats = segment_stats + slots.first;
    if (thread_index() % kWarpThreads == 0) own_stats[thread_index() / kWarpThreads] = stats;
    partial = fold_segments(kL2, partial, slots);
    variants::leave_partial(partial, tile, sums, scales);
    if (thread_index() == 0) {
      stats = own_stats[0];
#pragma unroll
      for (u32 s = 1; s < kSegmentsPerTile; ++s) stats = combine(stats, own_stats[s]);
      tile_stats[tile] = stats;
    }
  }
}
