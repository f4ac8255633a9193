// Stage 3, norm clipping: x * clip_coef, in place.
//
//   launch   any number of blocks of kTileThreads
//   reads    one ReportSlot a block; each gradient once, writes it once. Nothing at all when the action is kKeep
//   twin     src/cpu/scale.rs
#include "scale.cuh"

extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, gradclip::kBlocksPerMultiprocessor)
    scale(const gradclip::TensorTable table, gradclip::u32 num_tiles, const gradclip::ReportSlot* report) {
  using namespace gradclip;
  const ReportSlot decided = *report;
  if (decided.action == kKeep) return;
  for (u32 tile = block_index(); tile < num_tiles; tile += grid_blocks()) {
    scale_tile_of(find_tensor(table, tile), tile, decided);
  }
}
