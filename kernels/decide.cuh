// From a total of partials to the norm, and from the norm to what is done with the gradients.
#pragma once

#include "partial.cuh"

namespace gradclip {

// The threshold, by value or from device memory; -0 counts as 0.
__device__ __forceinline__ double threshold_of(const ClipParams& params) {
  return add(params.max_norm_at ? *params.max_norm_at : params.max_norm, 0.0);
}

// Twin: src/clip_coef.rs, where the formula is explained.
__device__ __forceinline__ void decide(const ClipParams& params, double max_norm, double total_norm,
                                       ReportSlot* report) {
  double clip_coef = 1.0;
  u32 action = kKeep;
  if (!is_finite(max_norm) || max_norm < 0.0) {
    // only measured; the host refuses NaN and what is negative, but not on the device
  } else if (is_finite(total_norm)) {
    double denominator = add(total_norm, params.eps), numerator = max_norm;
    if (!is_finite(denominator)) {
      denominator = add(mul(total_norm, 0.5), mul(params.eps, 0.5));
      numerator = mul(max_norm, 0.5);
    }
    if (denominator > numerator) {
      clip_coef = div(numerator, denominator);
      action = kScale;
    }
  } else if (params.nonfinite == kZero) {
    clip_coef = f64_from_bits(0);
    action = kClear;
  } else if (params.nonfinite == kPropagate) {
    clip_coef = is_nan(total_norm) ? f64_from_bits(kNaN64) : f64_from_bits(0);
    action = kPoison;
  }
  report->total_norm = total_norm;
  report->clip_coef = clip_coef;
  // Rounded down, so that coef_lo is not negative and a -0 keeps its sign in x * coef_hi + x * coef_lo.
  float coef_hi = static_cast<float>(clip_coef);
  if (static_cast<double>(coef_hi) > clip_coef) coef_hi = f32_from_bits(bits_of(coef_hi) - 1);
  report->coef_hi = coef_hi;
  report->coef_lo = static_cast<float>(add(clip_coef, -static_cast<double>(coef_hi)));
  report->action = action;
}

__device__ __forceinline__ double norm_of(NormOrder order, Partial total) {
  if (is_nan(total.sum)) return f64_from_bits(kNaN64);
  if (order.type == kInf || total.sum == 0.0 || !is_finite(total.sum)) return total.sum;
  if (order.type == kP) return scaled_root(total.sum, total.scale, order.p);
  return mul(order.type == kL2 ? sqrt(total.sum) : total.sum, total.scale);
}

}  // namespace gradclip
