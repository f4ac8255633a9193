// The second pass, which scales or clamps, in other ways.
#include "../../kernels/clamp.cuh"
#include "../../kernels/scale.cuh"

namespace gradclip {
namespace variants {

// From the last tile to the first: what the first pass read last may still be in the L2 cache.
__device__ __forceinline__ void scale_reverse(const TensorTable& table, u32 num_tiles, const ReportSlot* report) {
  const ReportSlot decided = *report;
  if (decided.action == kKeep) return;
  for (u32 tile = block_index(); tile < num_tiles; tile += grid_blocks()) {
    const u32 from_end = num_tiles - 1 - tile;
    scale_tile_of<false>(find_tensor(table, from_end), from_end, decided);
  }
}

// A product that also says whether any element of a pack is another one than before.
template <class Product>
struct Compared : Product {
  bool any_changed = false;

  __device__ __forceinline__ Compared(const Product& product) : Product(product) {}
  __device__ __forceinline__ void reset() { any_changed = false; }
  __device__ __forceinline__ bool changed() const { return any_changed; }
  template <class Bits>
  __device__ __forceinline__ Bits operator()(Bits bits) {
    const Bits product = Product::operator()(bits);
    any_changed = any_changed || product != bits;
    return product;
  }
};

template <class T>
__device__ __forceinline__ void scale_changed_tile(const TensorDesc& desc, u32 tile, const ReportSlot& report) {
  if (takes_split_scale(report)) {
    Compared<SplitScale<T, T, false>> map = split_scale<T, T, false>(report);
    map_tile<kWholeTile, T>(desc, tile, map);
  } else {
    scale_tile<T, false>(desc, tile, report);
  }
}

// Packs of which no element changes are not written.
__device__ __forceinline__ void scale_changed(const TensorTable& table, u32 num_tiles, const ReportSlot* report) {
  const ReportSlot decided = *report;
  if (decided.action == kKeep) return;
  for (u32 tile = block_index(); tile < num_tiles; tile += grid_blocks()) {
    const TensorDesc desc = find_tensor(table, tile);
    switch (desc.dtype) {
      case kF32: scale_changed_tile<F32>(desc, tile, decided); break;
      case kF64: scale_changed_tile<F64>(desc, tile, decided); break;
      case kF16: scale_changed_tile<F16>(desc, tile, decided); break;
      default: scale_changed_tile<BF16>(desc, tile, decided); break;
    }
  }
}

// The other way round: every pack is written, as if that were cheaper than asking.
template <class T>
struct StoresAll : ClampMap<T> {
  __device__ __forceinline__ bool changed() const { return true; }
};

}  // namespace variants
}  // namespace gradclip

extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, gradclip::kBlocksPerMultiprocessor)
    scale_reverse(const gradclip::TensorTable table, gradclip::u32 num_tiles, const gradclip::ReportSlot* report) {
  gradclip::variants::scale_reverse(table, num_tiles, report);
}

extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, gradclip::kBlocksPerMultiprocessor)
    scale_changed(const gradclip::TensorTable table, gradclip::u32 num_tiles, const gradclip::ReportSlot* report) {
  gradclip::variants::scale_changed(table, num_tiles, report);
}

extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, gradclip::kBlocksPerMultiprocessor)
    clamp_stores_all(const gradclip::TensorTable table, gradclip::u32 num_tiles, gradclip::ClampBounds bounds,
                     gradclip::u64* counts) {
  gradclip::clamp_tiles<gradclip::variants::StoresAll>(table, num_tiles, bounds, counts);
}
