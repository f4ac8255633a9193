// Stage 3, norm clipping: x * clip_coef, in place.
//
//   launch   any number of blocks of kTileThreads
//   reads    one ReportSlot a block; each gradient once, writes it once. Nothing at all when the action is kKeep
//   rounding within one unit in the last place of x * clip_coef, for every finite x and every clip_coef
//   twin     src/cpu/scale.rs
#include "elementwise.cuh"
#include "product.cuh"

namespace gradclip {

template <class T>
__device__ __forceinline__ void scale_tile(const TensorDesc& desc, u32 tile, const ReportSlot& report) {
  if (takes_split_scale(report)) {
    SplitScale<T> map = split_scale<T>(report);
    map_tile<kWholeTile, T>(desc, tile, map);
  } else {
    WideScale<T> map = wide_scale<T>(report);
    map_tile<1, T>(desc, tile, map);
  }
}

}  // namespace gradclip

extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, gradclip::kBlocksPerMultiprocessor)
    scale(const gradclip::TensorTable table, gradclip::u32 num_tiles, const gradclip::ReportSlot* report) {
  using namespace gradclip;
  const ReportSlot decided = *report;
  if (decided.action == kKeep) return;
  for (u32 tile = block_index(); tile < num_tiles; tile += grid_blocks()) {
    const TensorDesc desc = find_tensor(table, tile);
    switch (desc.dtype) {
      case kF32: scale_tile<F32>(desc, tile, decided); break;
      case kF64: scale_tile<F64>(desc, tile, decided); break;
      case kF16: scale_tile<F16>(desc, tile, decided); break;
      default: scale_tile<BF16>(desc, tile, decided); break;
    }
  }
}
