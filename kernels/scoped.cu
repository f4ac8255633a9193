// Calls with more than one norm: of each tensor, of named groups of tensors, of each row.
//
//   launch   scoped_partials_*: any number of blocks of kTileThreads; scoped_coefs: one warp for each group;
//            scoped_scale: any number of blocks of kTileThreads
//   reads    as norm_partials.cu, clip_coef.cu, scale.cu
//   writes   one partial a tile; one ReportSlot a group; gradients of the groups that clip
//   bits     a group's norm is that of a list of its tensors alone
//   twin     src/cpu/scoped.rs
#include "scoped.cuh"

#define GRADCLIP_SCOPED_PARTIALS(symbol, norm)                                                             \
  extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, gradclip::kBlocksPerMultiprocessor) \
      symbol(gradclip::ScopedTable table, gradclip::u32 num_tiles, double* sums, double* scales) {         \
    gradclip::scoped_partials<gradclip::norm>(table, num_tiles, sums, scales);                             \
  }

GRADCLIP_SCOPED_PARTIALS(scoped_partials_l1, kL1)
GRADCLIP_SCOPED_PARTIALS(scoped_partials_l2, kL2)
GRADCLIP_SCOPED_PARTIALS(scoped_partials_inf, kInf)

extern "C" __global__ void __launch_bounds__(gradclip::kFoldThreads)
    scoped_coefs(gradclip::ScopedTable table, gradclip::ScopedJobs jobs, gradclip::ClipParams params, gradclip::u64 call,
                 gradclip::ScopedHeader* header) {
  gradclip::scoped_coefs<false>(table, jobs, params, call, header);
}

extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, gradclip::kBlocksPerMultiprocessor)
    scoped_scale(gradclip::ScopedTable table, gradclip::u32 num_tiles, const gradclip::ReportSlot* reports) {
  using namespace gradclip;
  for (u32 tile = block_index(); tile < num_tiles; tile += grid_blocks()) {
    const Row row = find_row(table, tile);
    const ReportSlot decided = reports[row.group];
    if (decided.action != kKeep) scale_tile_of<false>(row.desc, tile, decided);
  }
}
