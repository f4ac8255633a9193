// One tile times a coefficient, in place. Rounding: within one unit in the last place of x * clip_coef, for every finite
// x and every clip_coef. Twin: src/cpu/scale.rs.
#pragma once

#include "elementwise.cuh"
#include "partial.cuh"

namespace gradclip {

// Below this the f32 split of the coefficient may lose bits to underflow: multiply in f64 instead.
constexpr double kSmallestSplitCoef = 0x1p-60;

template <class T>
struct SplitScale {
  double coef;
  float coef_hi, coef_lo;

  __device__ __forceinline__ void reset() {}
  __device__ __forceinline__ bool changed() const { return true; }

  // f32: the coefficient to 47 bits in two f32 costs two instructions, and no f64 unit. f16 and bf16: coef_hi is off by
  // less than 2^-23, beyond what their rounding can show. f64: it is the coefficient.
  __device__ __forceinline__ typename T::Bits operator()(typename T::Bits bits) const {
    const typename T::Real x = T::real(bits);
    if constexpr (T::kSize == 8) {
      return T::round(mul(x, coef));
    } else if constexpr (T::kSize == 4) {
      return T::round(fma(x, coef_hi, mul(x, coef_lo)));
    } else {
      return T::round(mul(x, coef_hi));
    }
  }
};

// Everything that is not the usual case: tiny coefficients, clearing, NaN and Inf.
template <class T>
struct WideScale {
  double coef;
  bool clear;

  __device__ __forceinline__ void reset() {}
  __device__ __forceinline__ bool changed() const { return true; }

  __device__ __forceinline__ typename T::Bits operator()(typename T::Bits bits) const {
    if (clear) return 0;
    const double product = mul(static_cast<double>(T::real(bits)), coef);
    return is_nan(product) ? T::kNaNBits : T::round(static_cast<typename T::Real>(product));
  }
};

template <class T>
__device__ __forceinline__ void scale_tile(const TensorDesc& desc, u32 tile, const ReportSlot& report) {
  if (report.action == kScale && report.clip_coef >= kSmallestSplitCoef) {
    SplitScale<T> map = {report.clip_coef, report.coef_hi, report.coef_lo};
    map_tile<kWholeTile, T>(desc, tile, map);
  } else {
    WideScale<T> map = {report.clip_coef, report.action == kClear};
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
