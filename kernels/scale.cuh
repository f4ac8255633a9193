// One tile times a multiplier, in place.
//   rounding within one unit in the last place of x * multiplier, for every finite x and every multiplier
//   NaN/Inf  none in the list, or the action says so; with kAny anywhere, as in IEEE 754, but NaNs canonical
//   twin     src/cpu/scale.rs
#pragma once

#include "elementwise.cuh"
#include "product.cuh"

namespace gradclip {

template <class T, bool kAny>
__device__ __forceinline__ void scale_tile(const TensorDesc& desc, u32 tile, const ReportSlot& report) {
  if (takes_split_scale(report)) {
    auto map = split_scale<T, T, kAny>(report);
    map_tile<kWholeTile, T>(desc, tile, map);
  } else {
    auto map = wide_scale<T, T>(report);
    map_tile<1, T>(desc, tile, map);
  }
}

template <bool kAny>
__device__ __forceinline__ void scale_tile_of(const TensorDesc& desc, u32 tile, const ReportSlot& report) {
  switch (desc.dtype) {
    case kF32: scale_tile<F32, kAny>(desc, tile, report); break;
    case kF64: scale_tile<F64, kAny>(desc, tile, report); break;
    case kF16: scale_tile<F16, kAny>(desc, tile, report); break;
    default: scale_tile<BF16, kAny>(desc, tile, report); break;
  }
}

}  // namespace gradclip
