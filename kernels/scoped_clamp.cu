// Value clipping with counts of its own for each tensor, group or row.
//
//   launch   scoped_clamp: any number of blocks of kTileThreads; scoped_clamp_counts: one warp for each group, and for
//            groups of many tiles the block, as in scoped.cuh
//   reads    each gradient once; writes only packs in which an element changed
//   writes   the counts of each tile; one ReportSlot a group
//   NaN      kept bit for bit, and counted; Inf becomes the bound
//   twin     src/cpu/scoped.rs, src/cpu/clamp.rs
#include "clamp.cuh"
#include "fold.cuh"

namespace gradclip {

struct GroupCounts {
  u64 clipped, nans, first_bad_tile;
};

__device__ __forceinline__ GroupCounts combine(const GroupCounts& a, const GroupCounts& b) {
  return {a.clipped + b.clipped, a.nans + b.nans, a.first_bad_tile < b.first_bad_tile ? a.first_bad_tile : b.first_bad_tile};
}

__device__ __forceinline__ GroupCounts shfl_xor(const GroupCounts& c, u32 mask) {
  return {shfl_xor(c.clipped, mask), shfl_xor(c.nans, mask), shfl_xor(c.first_bad_tile, mask)};
}

__device__ __forceinline__ GroupCounts counts_of_tile(const u64* counts, u32 tile) {
  const u64 mine = counts[tile];
  return {clipped_in(mine), nans_in(mine), any_nonfinite(mine) ? u64{tile} : kNoTile};
}

__device__ __forceinline__ void report_group(ReportSlot* report, const GroupCounts& total) {
  report_clamped(report, total.clipped, total.nans, total.first_bad_tile);
}

}  // namespace gradclip

extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, gradclip::kBlocksPerMultiprocessor)
    scoped_clamp(gradclip::ScopedTable table, gradclip::u32 num_tiles, gradclip::ClampBounds bounds,
                 gradclip::u64* counts) {
  gradclip::clamp_tiles(table, num_tiles, bounds, counts);
}

// One block a multiprocessor: for two ptxas spills registers on sm_80.
extern "C" __global__ void __launch_bounds__(gradclip::kFoldThreads, 1)
    scoped_clamp_counts(const gradclip::ScopedGroup* groups, gradclip::u32 num_groups, const gradclip::u64* counts,
                        gradclip::ReportSlot* reports, gradclip::u64 call, gradclip::ScopedHeader* header) {
  using namespace gradclip;
  GRADCLIP_SHARED_ARRAY(GroupCounts, slots, kWarpThreads);
  const auto add = [](const GroupCounts& a, const GroupCounts& b) { return combine(a, b); };
  const GroupCounts none = {0, 0, kNoTile};
  const u32 first = block_index() * kWarpThreads;
  const u32 own = first + thread_index() / kWarpThreads;
  if (own < num_groups && groups[own].num_tiles <= kTilesOfWarpJob) {
    const ScopedGroup group = groups[own];
    const auto load = [&](u32 i) { return counts_of_tile(counts, group.first_tile + i); };
    const GroupCounts total = WarpFold{}(group.num_tiles, none, load, add);
    if (WarpFold{}.writes()) report_group(reports + own, total);
  }
#pragma unroll 1
  for (u32 index = first; index < first + kWarpThreads && index < num_groups; ++index) {
    const ScopedGroup group = groups[index];
    if (group.num_tiles <= kTilesOfWarpJob) continue;
    GroupCounts mine = none;
    for (u32 i = thread_index(); i < group.num_tiles; i += kFoldThreads) {
      mine = combine(mine, counts_of_tile(counts, group.first_tile + i));
    }
    sync_block();  // the slots have been read by the fold before
    mine = fold_block(mine, slots, add);
    if (thread_index() == 0) report_group(reports + index, mine);
  }
  if (block_index() == 0 && thread_index() == 0) header->call = call;
}
