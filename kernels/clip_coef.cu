// Stage 2: the partials to the norm, the norm to the coefficient, on the device. Or a norm that the caller has to the
// coefficient (clip_coef_of_norm).
//
//   launch   one block of kFoldThreads; clip_coef_of_norm: one warp
//   reads    8 bytes a tile (16 where there are scales), or one norm; writes one ReportSlot
//   empty    no tiles: the norm is 0 and nothing is clipped
//   NaN/Inf  the norm is NaN if any element is, else Inf; what happens then is the caller's choice (NonFinite)
#include "decide.cuh"
#include "fold.cuh"

namespace gradclip {

template <class ToNorm>
__device__ __forceinline__ void clip_coef(const double* sums, const double* scales, u32 num_tiles,
                                          const ClipParams& params, NormOrder order, ReportSlot* report,
                                          const ToNorm& to_norm) {
  GRADCLIP_SHARED_ARRAY(Partial, partial_slots, kWarpThreads);
  GRADCLIP_SHARED_ARRAY(u64, tile_slots, kWarpThreads);
  Partial mine = {0.0, 1.0};
  u64 first_bad_tile = kNoTile;
  for (u32 tile = thread_index(); tile < num_tiles; tile += kFoldThreads) {
    const Partial partial = {sums[tile], scales ? scales[tile] : 1.0};
    if (!is_finite(partial.sum) && first_bad_tile == kNoTile) first_bad_tile = tile;
    mine = combine(order, mine, partial);
  }
  const Partial total = fold_block(mine, partial_slots, [order](Partial a, Partial b) { return combine(order, a, b); });
  first_bad_tile = fold_block(first_bad_tile, tile_slots, [](u64 a, u64 b) { return a < b ? a : b; });
  if (thread_index() == 0) {
    report->first_bad_tile = first_bad_tile;
    report->clipped_elements = 0;
    report->nan_elements = 0;
    decide(params, threshold_of(params), to_norm(total), report);
  }
}

__device__ __forceinline__ void clip_coef(const double* sums, const double* scales, u32 num_tiles,
                                          const ClipParams& params, NormOrder order, ReportSlot* report) {
  clip_coef(sums, scales, num_tiles, params, order, report, [order](Partial total) { return norm_of(order, total); });
}

}  // namespace gradclip

// L1, L2, Inf.
extern "C" __global__ void __launch_bounds__(gradclip::kFoldThreads)
    clip_coef(const double* sums, const double* scales, gradclip::u32 num_tiles, gradclip::ClipParams params,
              gradclip::ReportSlot* report) {
  if (params.norm_type == gradclip::kP) return;  // never launched with it; so the compiler leaves the powers out
  gradclip::clip_coef(sums, scales, num_tiles, params, params.norm_type, report);
}

// Any order. A kernel of its own, so that the usual one stays as short as it is.
extern "C" __global__ void __launch_bounds__(gradclip::kFoldThreads)
    clip_coef_p(const double* sums, const double* scales, gradclip::u32 num_tiles, gradclip::ClipParams params,
                gradclip::ReportSlot* report) {
  gradclip::clip_coef(sums, scales, num_tiles, params, {gradclip::kP, params.p}, report);
}

// The root mean square of all `numel` elements.
extern "C" __global__ void __launch_bounds__(gradclip::kFoldThreads)
    clip_coef_rms(const double* sums, const double* scales, gradclip::u32 num_tiles, gradclip::u64 numel,
                  gradclip::ClipParams params, gradclip::ReportSlot* report) {
  using namespace gradclip;
  const auto to_norm = [numel](Partial total) { return norm_of(kL2, mean_of(total, numel)); };
  clip_coef(sums, scales, num_tiles, params, kL2, report, to_norm);
}

extern "C" __global__ void __launch_bounds__(gradclip::kWarpThreads)
    clip_coef_of_norm(double total_norm, const double* total_norm_at, gradclip::ClipParams params,
                      gradclip::ReportSlot* report) {
  using namespace gradclip;
  if (thread_index() > 0) return;
  if (total_norm_at) total_norm = *total_norm_at;
  // The host refuses a negative norm; on the device it is NaN. -0 counts as 0.
  total_norm = total_norm < 0.0 ? f64_from_bits(kNaN64) : add(total_norm, 0.0);
  report->first_bad_tile = kNoTile;
  report->clipped_elements = 0;
  report->nan_elements = 0;
  decide(params, threshold_of(params), total_norm, report);
}
