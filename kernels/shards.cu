// Stage 2 of a norm over several ranks, each of which holds some of the gradients: the tiles' partials to one partial of
// this rank, and, after an engine has gathered those of all ranks, these to the norm and the coefficient. Twin:
// src/cpu/shards.rs and src/shards.rs.
//
//   launch   weigh_partials: a thread for each tile. The others: one block of kFoldThreads
//   reads    16 bytes a tile, then 32 a rank; writes one NormPartial, then one ReportSlot
//   NaN/Inf  counted whatever the copies, so that every rank sees them; a NaN in a NormPartial is the canonical one
//   ranks    all ranks read the same partials and make the same additions, so all of them decide the same
#include "decide.cuh"
#include "fold.cuh"
#include "tensor_table.cuh"

namespace gradclip {

// Folds `count` partials as clip_coef does. `slots` has kWarpThreads places. Thread 0 has the result.
template <class PartialAt>
__device__ __forceinline__ Partial fold_partials_at(NormOrder order, u32 count, Partial* slots,
                                                    const PartialAt& partial_at) {
  Partial mine = {0.0, 1.0};
  for (u32 i = thread_index(); i < count; i += kFoldThreads) mine = combine(order, mine, partial_at(i));
  return fold_block(mine, slots, [order](Partial a, Partial b) { return combine(order, a, b); });
}

__device__ __forceinline__ void fold_rank(const double* sums, const double* scales, u32 num_tiles, u64 tag,
                                          double order_number, NormOrder order, NormPartial* partial,
                                          ReportSlot* report) {
  GRADCLIP_SHARED_ARRAY(Partial, partial_slots, kWarpThreads);
  GRADCLIP_SHARED_ARRAY(u64, tile_slots, kWarpThreads);
  Partial total = fold_partials_at(order, num_tiles, partial_slots, [sums, scales](u32 tile) {
    return Partial{sums[tile], scales ? scales[tile] : 1.0};
  });
  u64 first_bad_tile = kNoTile;
  for (u32 tile = thread_index(); tile < num_tiles && first_bad_tile == kNoTile; tile += kFoldThreads) {
    if (!is_finite(sums[tile])) first_bad_tile = tile;
  }
  first_bad_tile = fold_block(first_bad_tile, tile_slots, [](u64 a, u64 b) { return a < b ? a : b; });
  if (thread_index() > 0) return;
  if (is_nan(total.sum)) total.sum = f64_from_bits(kNaN64);
  if (total.sum == 0.0) total.scale = 1.0;
  *partial = {total.sum, total.scale, order_number, tag};
  if (report) report->first_bad_tile = first_bad_tile;
}

// With copies that do not add up to whole gradients the sum may be below 1, as it is nowhere else; then a small order
// takes the root out of the range of scaled_root. 2^-900 of the largest magnitude counts as 0.
__device__ __forceinline__ double norm_over_ranks(NormOrder order, Partial total) {
  if (order.type == kP && total.sum > 0.0 && total.sum < 1.0) {
    const Log2 of_sum = log2_of(total.sum);
    if (!(div(add(of_sum.whole, of_sum.fraction), order.p) >= -900.0)) return 0.0;
  }
  return norm_of(order, total);
}

__device__ __forceinline__ void clip_coef_over_ranks(const NormPartial* partials, u32 num_ranks, ClipParams params,
                                                     NormOrder order, ReportSlot* report) {
  GRADCLIP_SHARED_ARRAY(Partial, partial_slots, kWarpThreads);
  GRADCLIP_SHARED_ARRAY(u64, failed_slots, kWarpThreads);
  GRADCLIP_SHARED_ARRAY(u64, bad_slots, kWarpThreads);
  const u64 first_order = bits_of(partials[0].order);
  const Partial total = fold_partials_at(order, num_ranks, partial_slots, [partials](u32 rank) {
    return Partial{partials[rank].sum, partials[rank].scale};
  });
  u64 first_failed = kNoTile, first_bad = kNoTile;
  for (u32 rank = thread_index(); rank < num_ranks; rank += kFoldThreads) {
    const NormPartial partial = partials[rank];
    u64 failed = kNoTile;
    if (partial.tag != kMeasured) {
      failed = 2 * u64(rank);
    } else if (bits_of(partial.order) != first_order) {
      failed = 2 * u64(rank) + 1;
    }
    first_failed = failed < first_failed ? failed : first_failed;
    if (!is_finite(partial.sum) && first_bad == kNoTile) first_bad = rank;
  }
  const auto smaller = [](u64 a, u64 b) { return a < b ? a : b; };
  first_failed = fold_block(first_failed, failed_slots, smaller);
  first_bad = fold_block(first_bad, bad_slots, smaller);
  if (thread_index() > 0) return;
  report->clipped_elements = 0;
  report->nan_elements = 0;
  double total_norm = norm_over_ranks(order, total);
  u32 rank = first_bad == kNoTile ? kNoRank : static_cast<u32>(first_bad);
  if (first_failed != kNoTile) {
    // Nothing is written anywhere, whatever the policy; found_inf keeps an optimizer from its step.
    total_norm = f64_from_bits(kNaN64);
    params.nonfinite = kSkip;
    rank = static_cast<u32>(first_failed / 2) | (first_failed % 2 ? kRankOfOtherOrder : kRankRefused);
  }
  report->rank = rank;
  decide(params, threshold_of(params), total_norm, report);
}

}  // namespace gradclip

// What several ranks hold is counted once: each of `copies` ranks counts its share. Of 0 copies nothing is counted here,
// but for what is not finite.
extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads)
    weigh_partials(const gradclip::TensorTable table, gradclip::u32 num_tiles, const gradclip::u32* copies,
                   gradclip::u32 norm_type, double* sums) {
  using namespace gradclip;
  const u64 tile = u64(block_index()) * kTileThreads + thread_index();
  if (tile >= num_tiles) return;
  const double sum = sums[tile];
  if (!is_finite(sum)) return;
  const u32 holders = copies[find_tensor_index(table, static_cast<u32>(tile))];
  if (holders == 0) {
    sums[tile] = 0.0;
  } else if (holders > 1 && norm_type != kInf) {
    sums[tile] = div(sum, static_cast<double>(holders));
  }
}

// L1, L2, Inf. `report` may be null.
extern "C" __global__ void __launch_bounds__(gradclip::kFoldThreads)
    fold_partials(const double* sums, const double* scales, gradclip::u32 num_tiles, gradclip::u32 norm_type,
                  double order, gradclip::u64 tag, gradclip::NormPartial* partial, gradclip::ReportSlot* report) {
  if (norm_type == gradclip::kP) return;  // never launched with it, as clip_coef
  gradclip::fold_rank(sums, scales, num_tiles, tag, order, norm_type, partial, report);
}

// Any order.
extern "C" __global__ void __launch_bounds__(gradclip::kFoldThreads)
    fold_partials_p(const double* sums, const double* scales, gradclip::u32 num_tiles, gradclip::u32 norm_type,
                    double order, gradclip::u64 tag, gradclip::NormPartial* partial, gradclip::ReportSlot* report) {
  gradclip::fold_rank(sums, scales, num_tiles, tag, order, {gradclip::kP, order}, partial, report);
}

// L1, L2, Inf.
extern "C" __global__ void __launch_bounds__(gradclip::kFoldThreads)
    clip_coef_of_ranks(const gradclip::NormPartial* partials, gradclip::u32 num_ranks, gradclip::ClipParams params,
                       gradclip::ReportSlot* report) {
  if (params.norm_type == gradclip::kP) return;
  gradclip::clip_coef_over_ranks(partials, num_ranks, params, params.norm_type, report);
}

// Any order.
extern "C" __global__ void __launch_bounds__(gradclip::kFoldThreads)
    clip_coef_of_ranks_p(const gradclip::NormPartial* partials, gradclip::u32 num_ranks, gradclip::ClipParams params,
                         gradclip::ReportSlot* report) {
  gradclip::clip_coef_over_ranks(partials, num_ranks, params, {gradclip::kP, params.p}, report);
}
