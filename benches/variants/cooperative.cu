// All three stages in one cooperative launch: partials, a barrier of the whole grid, then each block folds all partials
// for itself and scales the tiles it has read. With no more blocks than fit the GPU at once.
//
//   arrivals   one u32, 0 before the first launch. Its highest bit turns over with every barrier
//   loads      of the first stage are read-only ones (.nc), of gradients that the last stage writes: all have arrived and
//              were added up before the barrier, and nothing reads them so after it
#include "instructions.cuh"
#include "fold_tiles.cuh"
#include "../../kernels/scale.cuh"
#include "../../kernels/tile.cuh"

namespace gradclip {
namespace variants {

// As cooperative groups do it: the first block adds what is missing to 2^31, so the last arrival turns the bit over.
__device__ __forceinline__ void wait_for_grid(u32* arrivals) {
  constexpr u32 kTurn = 1u << 31;
  wait_is_possible();
  sync_block();
  if (thread_index() == 0) {
    const u32 by = block_index() == 0 ? kTurn - (grid_blocks() - 1) : 1;
    const u32 before = count_arrival(arrivals, by);
    while (((before ^ arrivals_so_far(arrivals)) & kTurn) == 0) {
    }
  }
  sync_block();
}

}  // namespace variants
}  // namespace gradclip

// With 4 blocks a multiprocessor registers are spilled.
extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, 3)
    clip_cooperative(const gradclip::TensorTable table, gradclip::u32 num_tiles, double* sums, double* scales,
                     gradclip::u32* arrivals, gradclip::ClipParams params, gradclip::ReportSlot* report) {
  using namespace gradclip;
  GRADCLIP_SHARED_ARRAY(ReportSlot, decided, 1);
  norm_partials<kL2>(table, num_tiles, sums, scales);
  variants::wait_for_grid(arrivals);
  variants::fold_and_decide(sums, scales, num_tiles, params, decided);
  sync_block();
  if (thread_index() == 0 && block_index() == 0) *report = decided[0];
  const ReportSlot own = decided[0];
  if (own.action == kKeep) return;
  for (u32 tile = block_index(); tile < num_tiles; tile += grid_blocks()) {
    scale_tile_of<false>(find_tensor(table, tile), tile, own);
  }
}
