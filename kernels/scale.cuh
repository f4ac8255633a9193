// One tile times a multiplier, in place.
//   rounding within one unit in the last place of x * multiplier, for every finite x and every multiplier
//   NaN/Inf  none in the list, or the action says so; with kAny anywhere, as in IEEE 754, but NaNs canonical
//   twin     src/cpu/scale.rs
#pragma once

#include "elementwise.cuh"
#include "partial.cuh"

namespace gradclip {

// Outside of these the f32 split of the multiplier may lose bits to underflow, or overflow: multiply in f64 instead.
// (It would do up to 2^128; a loss scale below 2^-60 is none that training uses.)
constexpr double kSmallestSplitCoef = 0x1p-60;
constexpr double kLargestSplitCoef = 0x1p60;

// kAny: x may be NaN or infinite. The others may make anything of such an x.
template <class T, bool kAny>
struct SplitScale {
  double coef;
  float coef_hi, coef_lo;

  __device__ __forceinline__ void reset() {}
  __device__ __forceinline__ bool changed() const { return true; }

  // f32: the multiplier to 47 bits in two f32 costs two instructions, and no f64 unit. f16 and bf16: coef_hi is off by
  // less than 2^-23, beyond what their rounding can show. f64: it is the multiplier.
  __device__ __forceinline__ typename T::Bits operator()(typename T::Bits bits) const {
    if constexpr (kAny) {
      const typename T::Bits magnitude = bits & T::kAbsMask;
      if (magnitude >= T::kInfBits) return magnitude == T::kInfBits ? bits : T::kNaNBits;
    }
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

// Everything that is not the usual case: multipliers tiny or huge, clearing, NaN and Inf.
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

template <class T, bool kAny>
__device__ __forceinline__ void scale_tile(const TensorDesc& desc, u32 tile, const ReportSlot& report) {
  if (report.action == kScale && report.multiplier >= kSmallestSplitCoef && report.multiplier <= kLargestSplitCoef) {
    SplitScale<T, kAny> map = {report.multiplier, report.coef_hi, report.coef_lo};
    map_tile<kWholeTile, T>(desc, tile, map);
  } else {
    WideScale<T> map = {report.multiplier, report.action == kClear};
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
