// Stage 2: the partials to the norm, the norm to the coefficient, on the device. Or a norm that the caller has to the
// coefficient (clip_coef_of_norm).
//
//   launch   one block of kFoldThreads; clip_coef_of_norm: one warp
//   reads    8 bytes a tile (12 in a list with f64), or one norm; writes one ReportSlot
//   empty    no tiles: the norm is 0 and nothing is clipped
//   NaN/Inf  the norm is NaN if any element is, else Inf; what happens then is the caller's choice (NonFinite)
#include "decide.cuh"
#include "fold.cuh"

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
    decide(params, threshold_of(params), norm_of(norm_type, total), report);
  }
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
