// Stage 1 for norms of any order: every gradient is read twice, the second time from cache, and each tile leaves one
// partial, relative to its largest magnitude.
//
//   launch   any number of blocks of kTileThreads, as norm_partials.cu
//   reads    each segment for its largest magnitude, then once more for the sum of (|x| / largest)^p
//   writes   sums[tile] and scales[tile]
//   NaN/Inf  carry into the sum; an infinite or NaN sum means that the tile holds such a value
//   twin     src/cpu/norm_partials.rs, src/cpu/power.rs
//
// A module of its own, which is loaded when it is first needed: most programs never do.
#include "tile.cuh"

extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, gradclip::kBlocksPerMultiprocessor)
    norm_partials_p(const gradclip::TensorTable table, gradclip::u32 num_tiles, double* sums, double* scales,
                    double p) {
  gradclip::norm_partials<gradclip::kP>(table, num_tiles, sums, scales, p);
}
