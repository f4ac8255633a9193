// Value clipping: min(max(x, lo), hi), in place.
//
//   launch   clamp_*: any number of blocks of kTileThreads; clamp_counts: one block of kFoldThreads
//   reads    each gradient once; writes only packs in which an element changed
//   NaN      kept bit for bit, and counted; Inf becomes the bound
//   twin     src/cpu/clamp.rs
#include "clamp.cuh"
#include "fold.cuh"

extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, gradclip::kBlocksPerMultiprocessor)
    clamp(const gradclip::TensorTable table, gradclip::u32 num_tiles, gradclip::ClampBounds bounds,
          gradclip::u64* counts) {
  gradclip::clamp_tiles(table, num_tiles, bounds, counts);
}

extern "C" __global__ void __launch_bounds__(gradclip::kFoldThreads)
    clamp_counts(const gradclip::u64* counts, gradclip::u32 num_tiles, gradclip::ReportSlot* report) {
  using namespace gradclip;
  GRADCLIP_SHARED_ARRAY(u64, clipped_slots, kWarpThreads);
  GRADCLIP_SHARED_ARRAY(u64, nan_slots, kWarpThreads);
  GRADCLIP_SHARED_ARRAY(u64, tile_slots, kWarpThreads);
  u64 clipped = 0;
  u64 nans = 0;
  u64 first_bad_tile = kNoTile;
  for (u32 tile = thread_index(); tile < num_tiles; tile += kFoldThreads) {
    const u64 mine = counts[tile];
    clipped += clipped_in(mine);
    nans += nans_in(mine);
    if (any_nonfinite(mine) && first_bad_tile == kNoTile) first_bad_tile = tile;
  }
  const auto sum = [](u64 a, u64 b) { return a + b; };
  clipped = fold_block(clipped, clipped_slots, sum);
  nans = fold_block(nans, nan_slots, sum);
  first_bad_tile = fold_block(first_bad_tile, tile_slots, [](u64 a, u64 b) { return a < b ? a : b; });
  if (thread_index() == 0) report_clamped(report, clipped, nans, first_bad_tile);
}
