// norm_partials_l2 that asks the L2 cache to keep the tiles from `keep_from` on, and to drop those before them first: for
// a second pass in reverse order.
#include "instructions.cuh"
#include "raw_segment.cuh"

extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, gradclip::kBlocksPerMultiprocessor)
    norm_keep_end(const gradclip::TensorTable table, gradclip::u32 num_tiles, double* sums, double* scales,
                  gradclip::u32 keep_from) {
  using namespace gradclip;
  GRADCLIP_SEGMENT_SLOTS(slots);
  for (u32 tile = block_index(); tile < num_tiles; tile += grid_blocks()) {
    const variants::CachePolicy policy = tile < keep_from ? variants::evict_first() : variants::evict_last();
    const auto load = [policy](u64 address) { return variants::load_once(address, policy); };
    const Partial mine = variants::partial_in_batches_of<kRowsPerSegment>(find_tensor(table, tile), tile, load);
    variants::leave_partial(fold_segments(kL2, mine, slots), tile, sums, scales);
  }
}
