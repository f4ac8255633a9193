// From a total of partials to the norm, and from the norm to what is done with the gradients.
//
// `total_norm` of the gradients as they are, so with the loss scale in it; the report has it without.
#pragma once

#include "partial.cuh"

namespace gradclip {

// The threshold, by value or from device memory; -0 counts as 0.
__device__ __forceinline__ double threshold_of(const ClipParams& params) {
  return add(params.max_norm_at ? *params.max_norm_at : params.max_norm, 0.0);
}

// The loss scale, by value or from device memory. NaN, and with it everything that is unscaled, for what is none.
__device__ __forceinline__ double loss_scale_of(const ClipParams& params) {
  const double loss_scale = params.loss_scale_at ? static_cast<double>(*params.loss_scale_at) : params.loss_scale;
  return is_finite(loss_scale) && loss_scale > 0.0 ? loss_scale : f64_from_bits(kNaN64);
}

// Without a loss scale there is nothing to wait for: an f64 division is some hundred cycles.
__device__ __forceinline__ double unscaled(double x, double loss_scale) {
  if (loss_scale != 1.0) x = div(x, loss_scale);
  return is_nan(x) ? f64_from_bits(kNaN64) : x;
}

// Twin: src/clip_coef.rs, where the formula is explained.
__device__ __forceinline__ void decide(const ClipParams& params, double max_norm, double total_norm,
                                       ReportSlot* report) {
  const double loss_scale = loss_scale_of(params);
  // The host refuses a threshold that is NaN or negative; on the device it is none.
  const bool clips = is_finite(max_norm) && max_norm >= 0.0;
  total_norm = unscaled(total_norm, loss_scale);
  report->total_norm = total_norm;
  report->found_inf = is_finite(total_norm) ? 0.0f : 1.0f;
  double clip_coef = 1.0;
  double multiplier = 1.0;
  u32 action = kKeep;
  if (is_finite(total_norm)) {
    double denominator = add(total_norm, params.eps), numerator = max_norm;
    if (!is_finite(denominator)) {
      denominator = add(mul(total_norm, 0.5), mul(params.eps, 0.5));
      numerator = mul(max_norm, 0.5);
    }
    if (clips && denominator > numerator) clip_coef = div(numerator, denominator);
    multiplier = unscaled(clip_coef, loss_scale);
    if (multiplier != 1.0) action = kScale;
  } else if (!clips && loss_scale == 1.0) {
    // only measured
  } else if (params.nonfinite == kZero) {
    clip_coef = multiplier = f64_from_bits(0);
    action = kClear;
  } else if (params.nonfinite == kPropagate) {
    if (clips) clip_coef = is_nan(total_norm) ? f64_from_bits(kNaN64) : f64_from_bits(0);
    multiplier = unscaled(clip_coef, loss_scale);
    action = kPoison;
  }
  report->clip_coef = clip_coef;
  report->multiplier = multiplier;
  report->multiplier_f32 = static_cast<float>(multiplier);
  // Rounded down, so that coef_lo is not negative and a -0 keeps its sign in x * coef_hi + x * coef_lo.
  float coef_hi = static_cast<float>(multiplier);
  if (static_cast<double>(coef_hi) > multiplier) coef_hi = f32_from_bits(bits_of(coef_hi) - 1);
  report->coef_hi = coef_hi;
  report->coef_lo = static_cast<float>(add(multiplier, -static_cast<double>(coef_hi)));
  report->action = action;
}

__device__ __forceinline__ double norm_of(NormOrder order, Partial total) {
  if (is_nan(total.sum)) return f64_from_bits(kNaN64);
  if (order.type == kInf || total.sum == 0.0 || !is_finite(total.sum)) return total.sum;
  if (order.type == kP) return scaled_root(total.sum, total.scale, order.p);
  return mul(order.type == kL2 ? sqrt(total.sum) : total.sum, total.scale);
}

// A sum of squares to their mean, whose norm of order 2 is the root mean square: the norm itself may be beyond f64 where
// that is not. Never subnormal: the least sum is 2^-948, and `numel` is below 2^64.
__device__ __forceinline__ Partial mean_of(Partial total, u64 numel) {
  if (total.sum != 0.0) total.sum = div(total.sum, static_cast<double>(numel));
  return total;
}

}  // namespace gradclip
