// Stage 3, norm clipping out of place: x * multiplier, to an output of the gradient's own type or of f32.
//
//   launch   any number of blocks of kTileThreads
//   reads    one ReportSlot a block; each gradient once. Writes each output once: also where nothing is clipped, x then.
//            Nothing at all when the norm is not finite and the policy is to skip
//   rounding once, to the type of the output: within one unit in its last place of x * multiplier, for every finite x
//   twin     src/cpu/scale_into.rs
#include "elementwise_into.cuh"
#include "product.cuh"

namespace gradclip {

// What keeps the gradients in place writes them, times 1, out of place. Twin: out_of_place in src/clip_coef.rs.
__device__ __forceinline__ u32 out_of_place(const ReportSlot& report, bool skip_nonfinite) {
  if (report.action != kKeep) return report.action;
  if (is_finite(report.total_norm)) return kScale;
  return skip_nonfinite ? kKeep : kPoison;
}

template <class In, class Out>
__device__ __forceinline__ void scale_tile_into(const TensorDesc& desc, u32 tile, u64 output,
                                                const ReportSlot& report) {
  if (takes_split_scale(report)) {
    map_tile_into<In, Out>(desc, tile, output, split_scale<In, Out, false>(report));
  } else {
    map_singles_into<In, Out>(desc, tile, output, wide_scale<In, Out>(report));
  }
}

// The host lets no other pair of types through.
template <class In>
__device__ __forceinline__ void scale_tile_into(const TensorDesc& desc, u32 tile, const OutputDesc& output,
                                                const ReportSlot& report) {
  if (output.dtype == kF32) {
    scale_tile_into<In, F32>(desc, tile, output.address, report);
  } else {
    scale_tile_into<In, In>(desc, tile, output.address, report);
  }
}

}  // namespace gradclip

extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, gradclip::kBlocksPerMultiprocessor)
    scale_into(const gradclip::TensorTable table, gradclip::u32 num_tiles, const gradclip::OutputDesc* outputs,
               gradclip::u32 skip_nonfinite, const gradclip::ReportSlot* report) {
  using namespace gradclip;
  ReportSlot decided = *report;
  decided.action = out_of_place(decided, skip_nonfinite != 0);
  if (decided.action == kKeep) return;
  for (u32 tile = block_index(); tile < num_tiles; tile += grid_blocks()) {
    const u32 tensor = find_tensor_index(table, tile);
    const TensorDesc desc = tensor_at(table, tensor);
    const OutputDesc output = outputs[tensor];
    switch (desc.dtype) {
      case kF32: scale_tile_into<F32, F32>(desc, tile, output.address, decided); break;
      case kF64: scale_tile_into<F64>(desc, tile, output, decided); break;
      case kF16: scale_tile_into<F16>(desc, tile, output, decided); break;
      default: scale_tile_into<BF16>(desc, tile, output, decided); break;
    }
  }
}
