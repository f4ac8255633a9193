// Stage 2: the partials to the norm, the norm to the coefficient, on the device.
//
//   launch   one block of kFoldThreads
//   reads    8 bytes a tile (12 in a list with f64); writes one ReportSlot
//   empty    no tiles: the norm is 0 and nothing is clipped
//   NaN/Inf  the norm is NaN if any element is, else Inf; what happens then is the caller's choice (NonFinite)
#include "fold.cuh"

namespace gradclip {

// Twin: src/clip_coef.rs, where the formula is explained.
__device__ __forceinline__ void decide(const ClipParams& params, double total_norm, ReportSlot* report) {
  const double max_norm = add(params.max_norm_at ? *params.max_norm_at : params.max_norm, 0.0);  // -0 counts as 0
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

__device__ __forceinline__ double norm_of(u32 norm_type, Partial total) {
  if (is_nan(total.sum)) return f64_from_bits(kNaN64);
  if (norm_type == kInf) return total.sum;
  double norm = norm_type == kL2 ? sqrt(total.sum) : total.sum;
  if (total.scale > 0) norm = mul(norm, kRangeFactor);
  if (total.scale < 0) norm = mul(norm, kRangeFactorInverse);
  return norm;
}

}  // namespace gradclip

extern "C" __global__ void __launch_bounds__(gradclip::kFoldThreads)
    clip_coef(const double* sums, const int* scales, gradclip::u32 num_tiles, gradclip::ClipParams params,
              gradclip::ReportSlot* report) {
  using namespace gradclip;
  GRADCLIP_SHARED_ARRAY(Partial, partial_slots, kWarpThreads);
  GRADCLIP_SHARED_ARRAY(u64, tile_slots, kWarpThreads);
  Partial mine = {0.0, 0};
  u64 first_bad_tile = kNoTile;
  for (u32 tile = thread_index(); tile < num_tiles; tile += kFoldThreads) {
    const Partial partial = {sums[tile], scales ? scales[tile] : 0};
    if (!is_finite(partial.sum) && first_bad_tile == kNoTile) first_bad_tile = tile;
    mine = combine(params.norm_type, mine, partial);
  }
  const u32 norm_type = params.norm_type;
  const Partial total =
      fold_block(mine, partial_slots, [norm_type](Partial a, Partial b) { return combine(norm_type, a, b); });
  first_bad_tile = fold_block(first_bad_tile, tile_slots, [](u64 a, u64 b) { return a < b ? a : b; });
  if (thread_index() == 0) {
    report->first_bad_tile = first_bad_tile;
    report->clipped_elements = 0;
    report->nan_elements = 0;
    decide(params, norm_of(norm_type, total), report);
  }
}
