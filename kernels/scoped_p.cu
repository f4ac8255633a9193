// scoped.cu and scoped_stats.cu for norms of any order; see norm_partials_p.cu.
//
//   launch   scoped_partials_p, scoped_stats_p: any number of blocks of kTileThreads; scoped_coefs_p: one warp a group;
//            scoped_coefs_stats_p: one warp for each group and each tensor
//   twin     src/cpu/scoped.rs
#include "scoped.cuh"
#include "scoped_stats.cuh"

// A block less a multiprocessor than for the other orders, or registers are spilled on some targets.
extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, gradclip::kBlocksPerMultiprocessor - 1)
    scoped_partials_p(gradclip::ScopedTable table, gradclip::u32 num_tiles, double* sums, double* scales, double p) {
  gradclip::scoped_partials<gradclip::kP>(table, num_tiles, sums, scales, p);
}

extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, gradclip::kStatsBlocksPerMultiprocessor - 1)
    scoped_stats_p(gradclip::ScopedTable table, gradclip::u32 num_tiles, double* sums, double* scales,
                   gradclip::Stats* tile_stats, double p) {
  gradclip::scoped_stats<gradclip::kP>(table, num_tiles, sums, scales, tile_stats, p);
}

// Without the 1, ptxas 13.0 makes room for two blocks a multiprocessor on sm_80, and spills registers.
extern "C" __global__ void __launch_bounds__(gradclip::kFoldThreads, 1)
    scoped_coefs_p(gradclip::ScopedTable table, gradclip::ScopedJobs jobs, gradclip::ClipParams params,
                   gradclip::u64 call, gradclip::ScopedHeader* header) {
  gradclip::scoped_coefs_any<false>(table, jobs, params, {gradclip::kP, params.p}, call, header);
}

extern "C" __global__ void __launch_bounds__(gradclip::kFoldThreads)
    scoped_coefs_stats_p(gradclip::ScopedTable table, gradclip::ScopedJobs jobs, gradclip::ClipParams params,
                         gradclip::u64 call, gradclip::ScopedHeader* header) {
  gradclip::scoped_coefs_any<true>(table, jobs, params, {gradclip::kP, params.p}, call, header);
}
