// Stage 1: every gradient is read once, and each tile leaves one partial.
//
//   launch   any number of blocks of kTileThreads; block b takes tiles b, b + blocks, ... : slots, not atomics, so the
//            bits do not depend on the launch
//   reads    each gradient once (a segment outside the safe range up to twice more, from cache)
//   writes   sums[tile], and scales[tile] unless it is null (a list without f64 needs none)
//   NaN/Inf  carry into the sum; an infinite or NaN sum means that the tile holds such a value
#include "tile.cuh"

#define GRADCLIP_NORM_PARTIALS(symbol, norm)                                                                  \
  extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, gradclip::kBlocksPerMultiprocessor)                                        \
      symbol(const gradclip::TensorTable table, gradclip::u32 num_tiles, double* sums, double* scales) {         \
    gradclip::norm_partials<gradclip::norm>(table, num_tiles, sums, scales);                                  \
  }

GRADCLIP_NORM_PARTIALS(norm_partials_l1, kL1)
GRADCLIP_NORM_PARTIALS(norm_partials_l2, kL2)
GRADCLIP_NORM_PARTIALS(norm_partials_inf, kInf)
