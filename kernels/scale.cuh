// One tile times a coefficient, in place. Rounding: within one unit in the last place of x * clip_coef, for every finite
// x and every clip_coef. Twin: src/cpu/scale.rs.
#pragma once

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

__device__ __forceinline__ void scale_tile_of(const TensorDesc& desc, u32 tile, const ReportSlot& report) {
  switch (desc.dtype) {
    case kF32: scale_tile<F32>(desc, tile, report); break;
    case kF64: scale_tile<F64>(desc, tile, report); break;
    case kF16: scale_tile<F16>(desc, tile, report); break;
    default: scale_tile<BF16>(desc, tile, report); break;
  }
}

}  // namespace gradclip
