// Stages 1 and 2 in one launch: the block that is last to leave its partials folds those of all. Which one that is depends
// on timing, and what it does depends on the slots only.
//
//   arrivals   one u32, 0 before and after
#include "instructions.cuh"
#include "fold_tiles.cuh"
#include "../../kernels/tile.cuh"

namespace gradclip {
namespace variants {

// Thread 0 alone has written partials, so its arrival is enough.
__device__ __forceinline__ bool is_last_block(u32* arrivals) {
  GRADCLIP_SHARED_ARRAY(u32, last, 1);
  if (thread_index() == 0) {
    last[0] = count_arrival(arrivals, 1) == grid_blocks() - 1;
    if (last[0]) *arrivals = 0;
  }
  sync_block();
  return last[0] != 0;
}

}  // namespace variants
}  // namespace gradclip

extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, gradclip::kBlocksPerMultiprocessor)
    norm_last_block(const gradclip::TensorTable table, gradclip::u32 num_tiles, double* sums, double* scales,
                    gradclip::u32* arrivals, gradclip::ClipParams params, gradclip::ReportSlot* report) {
  using namespace gradclip;
  norm_partials<kL2>(table, num_tiles, sums, scales);
  if (variants::is_last_block(arrivals)) variants::fold_and_decide(sums, scales, num_tiles, params, report);
}
