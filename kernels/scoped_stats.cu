// Stages 1 and 2 of a scoped call with telemetry: scoped_partials_*, and on the same pass what stats.cuh sees; then
// scoped_coefs, and what was seen of each tensor.
//
//   launch   scoped_stats_*: any number of blocks of kTileThreads; scoped_coefs_stats: one warp for each group and each
//            tensor
//   reads    as norm_partials.cu; one more element of a pack that holds a value that is not finite; as clip_coef.cu
//   writes   one partial and one Stats a tile; one ReportSlot a group, one StatsSlot a tensor
//   twin     src/cpu/scoped.rs
#include "scoped.cuh"
#include "scoped_stats.cuh"

#define GRADCLIP_SCOPED_STATS(symbol, norm)                                                                       \
  extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, gradclip::kStatsBlocksPerMultiprocessor)   \
      symbol(gradclip::ScopedTable table, gradclip::u32 num_tiles, double* sums, double* scales,                  \
             gradclip::Stats* tile_stats) {                                                                       \
    gradclip::scoped_stats<gradclip::norm>(table, num_tiles, sums, scales, tile_stats);                           \
  }

GRADCLIP_SCOPED_STATS(scoped_stats_l1, kL1)
GRADCLIP_SCOPED_STATS(scoped_stats_l2, kL2)
GRADCLIP_SCOPED_STATS(scoped_stats_inf, kInf)

extern "C" __global__ void __launch_bounds__(gradclip::kFoldThreads)
    scoped_coefs_stats(gradclip::ScopedTable table, gradclip::ScopedJobs jobs, gradclip::ClipParams params,
                       gradclip::u64 call, gradclip::ScopedHeader* header) {
  gradclip::scoped_coefs<true>(table, jobs, params, call, header);
}
