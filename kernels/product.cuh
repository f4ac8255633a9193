// The product of the apply stage: x * multiplier, rounded to the type that is written. The same for scale.cuh, in place,
// and for scale_into.cu, where that type may be another one than the gradient's.
#pragma once

#include "partial.cuh"

namespace gradclip {

// Outside of these the f32 split of the multiplier may lose bits to underflow, or overflow: multiply in f64 instead.
// (It would do up to 2^128; a loss scale below 2^-60 is none that training uses.)
constexpr double kSmallestSplitCoef = 0x1p-60;
constexpr double kLargestSplitCoef = 0x1p60;

// kAny: x may be NaN or infinite. The others may make anything of such an x.
template <class T, class Out, bool kAny>
struct SplitScale {
  double coef;
  float coef_hi, coef_lo;

  __device__ __forceinline__ void reset() {}
  __device__ __forceinline__ bool changed() const { return true; }

  // To f32: the multiplier to 47 bits in two f32 costs two instructions, and no f64 unit. To f16 and bf16: coef_hi is off
  // by less than 2^-23, beyond what their rounding can show. From f64: it is the multiplier.
  __device__ __forceinline__ typename Out::Bits operator()(typename T::Bits bits) const {
    if constexpr (kAny) {
      static_assert(T::kInfBits == Out::kInfBits, "an element that is not finite keeps its bits");
      const typename T::Bits magnitude = bits & T::kAbsMask;
      if (magnitude >= T::kInfBits) return magnitude == T::kInfBits ? bits : T::kNaNBits;
    }
    const typename T::Real x = T::real(bits);
    if constexpr (T::kSize == 8) {
      return Out::round(static_cast<typename Out::Real>(mul(x, coef)));
    } else if constexpr (Out::kSize == 4) {
      return Out::round(fma(x, coef_hi, mul(x, coef_lo)));
    } else {
      return Out::round(mul(x, coef_hi));
    }
  }
};

// Everything that is not the usual case: multipliers tiny or huge, clearing, NaN and Inf.
template <class T, class Out>
struct WideScale {
  double coef;
  bool clear;

  __device__ __forceinline__ void reset() {}
  __device__ __forceinline__ bool changed() const { return true; }

  __device__ __forceinline__ typename Out::Bits operator()(typename T::Bits bits) const {
    if (clear) return 0;
    const double product = mul(static_cast<double>(T::real(bits)), coef);
    return is_nan(product) ? Out::kNaNBits : Out::round(static_cast<typename Out::Real>(product));
  }
};

// Which of the two a report asks for. Its action is not kKeep.
__device__ __forceinline__ bool takes_split_scale(const ReportSlot& report) {
  return report.action == kScale && report.multiplier >= kSmallestSplitCoef && report.multiplier <= kLargestSplitCoef;
}

template <class T, class Out, bool kAny>
__device__ __forceinline__ SplitScale<T, Out, kAny> split_scale(const ReportSlot& report) {
  return {report.multiplier, report.coef_hi, report.coef_lo};
}

template <class T, class Out>
__device__ __forceinline__ WideScale<T, Out> wide_scale(const ReportSlot& report) {
  return {report.multiplier, report.action == kClear};
}

}  // namespace gradclip
