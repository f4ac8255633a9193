// Stage 1 of a scoped call with telemetry: scoped_partials_*, and on the same pass what stats.cuh sees.
//
//   launch   any number of blocks of kTileThreads
//   reads    as norm_partials.cu; one more element of a pack that holds a value that is not finite
//   writes   one partial and one Stats a tile
//   twin     src/cpu/scoped.rs
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
