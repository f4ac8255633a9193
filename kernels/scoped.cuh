// Calls with more than one norm, the bodies of scoped.cu, scoped_stats.cu and scoped_p.cu: tiles to partials, and a job for each group and
// each tensor, from its partials to its report. Twin: src/cpu/scoped.rs.
#pragma once

#include "decide.cuh"
#include "fold.cuh"
#include "scale.cuh"
#include "scoped_table.cuh"
#include "stats.cuh"
#include "tile.cuh"

namespace gradclip {

template <u32 kNorm>
__device__ __forceinline__ void scoped_partials(const ScopedTable& table, u32 num_tiles, double* sums, double* scales,
                                                double p = 0.0) {
  GRADCLIP_SEGMENT_SLOTS(slots);
  for (u32 tile = block_index(); tile < num_tiles; tile += grid_blocks()) {
    const Partial partial = fold_segments({kNorm, p}, segment_partial_of<kNorm>(find_row(table, tile).desc, tile, p), slots);
    if (thread_index() == 0) {
      sums[tile] = partial.sum;
      if (scales) scales[tile] = partial.scale;
    }
  }
}

// Folding the `count` values of a job: by one warp (WarpFold in fold.cuh), or by the whole block.
struct BlockFold {
  Partial* partial_slots;
  Stats* stats_slots;
  u64* tile_slots;

  __device__ __forceinline__ Partial* slots(Partial*) const { return partial_slots; }
  __device__ __forceinline__ Stats* slots(Stats*) const { return stats_slots; }
  __device__ __forceinline__ u64* slots(u64*) const { return tile_slots; }

  template <class Value, class Load, class Combine>
  __device__ __forceinline__ Value operator()(u32 count, Value zero, const Load& load, const Combine& combine) const {
    Value mine = zero;
    for (u32 i = thread_index(); i < count; i += kFoldThreads) mine = combine(mine, load(i));
    sync_block();  // the slots have been read by the fold before
    return fold_block(mine, slots(static_cast<Value*>(nullptr)), combine);
  }
  __device__ __forceinline__ bool writes() const { return thread_index() == 0; }
};

__device__ __forceinline__ Partial partial_of(const ScopedJobs& jobs, u32 tile) {
  return {jobs.sums[tile], jobs.scales ? jobs.scales[tile] : 1.0};
}

template <class Fold>
__device__ __forceinline__ Partial fold_partials(const Fold& fold, const ScopedJobs& jobs, NormOrder order, u32 first_tile,
                                                 u32 num_tiles) {
  return fold(num_tiles, Partial{0.0, 1.0}, [&](u32 i) { return partial_of(jobs, first_tile + i); },
              [order](Partial a, Partial b) { return combine(order, a, b); });
}

__device__ __forceinline__ double norm_of(const ClipParams& params, NormOrder order, Partial total, u64 numel) {
  if (order.type == kL2 && params.norm_type == kRms) total = mean_of(total, numel);
  return norm_of(order, total);
}

template <class Fold>
__device__ __forceinline__ void group_job(const Fold& fold, const ScopedJobs& jobs, const ClipParams& params, NormOrder order,
                                          u32 index) {
  const ScopedGroup group = jobs.groups[index];
  const Partial total = fold_partials(fold, jobs, order, group.first_tile, group.num_tiles);
  const u64 first_bad_tile = fold(
      group.num_tiles, u64{kNoTile},
      [&](u32 i) { return is_finite(jobs.sums[group.first_tile + i]) ? kNoTile : u64{group.first_tile} + i; },
      [](u64 a, u64 b) { return a < b ? a : b; });
  if (fold.writes()) {
    ReportSlot* report = jobs.reports + index;
    report->first_bad_tile = first_bad_tile;
    report->clipped_elements = 0;
    report->nan_elements = 0;
    const double max_norm = bits_of(group.max_norm) == kSameThreshold ? threshold_of(params) : group.max_norm;
    decide(params, max_norm, norm_of(params, order, total, group.numel), report);
  }
}

template <class Fold>
__device__ __forceinline__ void stats_job(const Fold& fold, const ScopedJobs& jobs, const ClipParams& params,
                                          NormOrder order, const ScopedTensor& tensor) {
  const Partial total = fold_partials(fold, jobs, order, tensor.first_tile, tensor.num_tiles);
  const Stats stats = fold(
      tensor.num_tiles, kNoStats,
      [&](u32 i) {
        Stats of_tile = jobs.tile_stats[tensor.first_tile + i];
        if (of_tile.first_nonfinite != kNoElement) {
          of_tile.first_nonfinite += row_of(tensor, tensor.first_tile + i) * tensor.row_numel;
        }
        return of_tile;
      },
      [](const Stats& a, const Stats& b) { return combine(a, b); });
  if (fold.writes()) {
    const u64 numel = rows_of(tensor) * tensor.row_numel;
    jobs.tensor_stats[tensor.index] = {norm_of(params, order, total, numel), stats};
  }
}

template <bool kTelemetry>
__device__ __forceinline__ u32 tiles_of_job(const ScopedJobs& jobs, const ScopedTable& table, u32 job) {
  if (job < jobs.num_groups) return jobs.groups[job].num_tiles;
  return kTelemetry && job - jobs.num_groups < jobs.num_stats ? table.tensors[job - jobs.num_groups].num_tiles : 0;
}

template <bool kTelemetry, class Fold>
__device__ __forceinline__ void do_job(const Fold& fold, const ScopedJobs& jobs, const ScopedTable& table,
                                       const ClipParams& params, NormOrder order, u32 job) {
  if (job < jobs.num_groups) {
    group_job(fold, jobs, params, order, job);
  } else if (kTelemetry && job - jobs.num_groups < jobs.num_stats) {
    stats_job(fold, jobs, params, order, table.tensors[job - jobs.num_groups]);
  }
}

// Without kTelemetry there are no jobs but those of groups, and half the code.
template <bool kTelemetry>
__device__ __forceinline__ void scoped_coefs_any(const ScopedTable& table, const ScopedJobs& jobs,
                                                 const ClipParams& params, NormOrder order, u64 call,
                                                 ScopedHeader* header) {
  GRADCLIP_SHARED_ARRAY(Partial, partial_slots, kWarpThreads);
  GRADCLIP_SHARED_ARRAY(Stats, stats_slots, kWarpThreads);
  GRADCLIP_SHARED_ARRAY(u64, tile_slots, kWarpThreads);
  const u32 first_job = block_index() * kWarpThreads;
  const u32 own_job = first_job + thread_index() / kWarpThreads;
  if (tiles_of_job<kTelemetry>(jobs, table, own_job) <= kTilesOfWarpJob) {
    do_job<kTelemetry>(WarpFold{}, jobs, table, params, order, own_job);
  }
#pragma unroll 1
  for (u32 job = first_job; job < first_job + kWarpThreads; ++job) {
    if (tiles_of_job<kTelemetry>(jobs, table, job) > kTilesOfWarpJob) {
      do_job<kTelemetry>(BlockFold{partial_slots, stats_slots, tile_slots}, jobs, table, params, order, job);
    }
  }
  if (first_job == 0 && thread_index() == 0) header->call = call;
}

// L1, L2, Inf, and the root mean square.
template <bool kTelemetry>
__device__ __forceinline__ void scoped_coefs(const ScopedTable& table, const ScopedJobs& jobs, const ClipParams& params,
                                             u64 call, ScopedHeader* header) {
  if (params.norm_type == kP) return;  // never launched with it; so the compiler leaves the powers out
  const u32 order = params.norm_type == kRms ? kL2 : params.norm_type;
  scoped_coefs_any<kTelemetry>(table, jobs, params, order, call, header);
}

}  // namespace gradclip
