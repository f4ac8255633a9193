// Stage 3, norm clipping: x * multiplier, in place.
//
//   launch   any number of blocks of kTileThreads
//   reads    one ReportSlot a block; each gradient once, writes it once. Nothing at all when the action is kKeep
//   twin     src/cpu/scale.rs
#include "scale.cuh"

namespace gradclip {

template <bool kAny>
__device__ __forceinline__ void scale_tiles(const TensorTable& table, u32 num_tiles, const ReportSlot* report) {
  const ReportSlot decided = *report;
  if (decided.action == kKeep) return;
  for (u32 tile = block_index(); tile < num_tiles; tile += grid_blocks()) {
    scale_tile_of<kAny>(find_tensor(table, tile), tile, decided);
  }
}

}  // namespace gradclip

// After clip_coef, which has looked at every gradient.
extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, gradclip::kBlocksPerMultiprocessor)
    scale(const gradclip::TensorTable table, gradclip::u32 num_tiles, const gradclip::ReportSlot* report) {
  gradclip::scale_tiles<false>(table, num_tiles, report);
}

// After clip_coef_of_norm, which has not.
extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, gradclip::kBlocksPerMultiprocessor)
    scale_any(const gradclip::TensorTable table, gradclip::u32 num_tiles, const gradclip::ReportSlot* report) {
  gradclip::scale_tiles<true>(table, num_tiles, report);
}
