// norm_partials_l2 with other numbers of loads in flight. The library has 8 a thread, 4 blocks of 256 threads a
// multiprocessor: up to 128 KiB, but none while a block adds up.
#include "instructions.cuh"
#include "raw_segment.cuh"

namespace gradclip {
namespace variants {

__device__ __forceinline__ void norm_batch_4(const TensorTable& table, u32 num_tiles, double* sums, double* scales) {
  GRADCLIP_SEGMENT_SLOTS(slots);
  for (u32 tile = block_index(); tile < num_tiles; tile += grid_blocks()) {
    const auto load = [](u64 address) { return gradclip::load_once(address); };
    const Partial mine = partial_in_batches_of<4>(find_tensor(table, tile), tile, load);
    leave_partial(fold_segments(kL2, mine, slots), tile, sums, scales);
  }
}

// A tile whose packs are on their way.
struct Ahead {
  TensorDesc desc;
  bool whole;
  Pack pack[kRowsPerSegment];
};

__device__ __forceinline__ void fetch(const TensorTable& table, u32 tile, u32 num_tiles, Ahead& ahead) {
  ahead.whole = false;
  if (tile >= num_tiles) return;
  ahead.desc = find_tensor(table, tile);
  const RawSegment segment = raw_segment(ahead.desc, tile);
  ahead.whole = segment.whole;
  if (!segment.whole) return;
#pragma unroll
  for (u32 r = 0; r < kRowsPerSegment; ++r) ahead.pack[r] = gradclip::load_once(segment.address + r * kRowBytes);
}

__device__ __forceinline__ Partial partial_of_ahead(const Ahead& now, u32 tile) {
  if (!now.whole) return segment_partial_of<kL2>(now.desc, tile);
  switch (now.desc.dtype) {
    case kF32: return partial_of_packs<F32>(now.desc, tile, now.pack);
    case kF64: return partial_of_packs<F64>(now.desc, tile, now.pack);
    case kF16: return partial_of_packs<F16>(now.desc, tile, now.pack);
    default: return partial_of_packs<BF16>(now.desc, tile, now.pack);
  }
}

// The next tile's loads are issued before this tile is added up, so that there is no pause between the two.
__device__ __forceinline__ void norm_next_tile(const TensorTable& table, u32 num_tiles, double* sums, double* scales) {
  GRADCLIP_SEGMENT_SLOTS(slots);
  Ahead ahead;
  fetch(table, block_index(), num_tiles, ahead);
#pragma unroll 1
  for (u32 tile = block_index(); tile < num_tiles; tile += grid_blocks()) {
    const Ahead now = ahead;
    fetch(table, tile + grid_blocks(), num_tiles, ahead);
    leave_partial(fold_segments(kL2, partial_of_ahead(now, tile), slots), tile, sums, scales);
  }
}

}  // namespace variants
}  // namespace gradclip

// 4 loads, and 6 blocks a multiprocessor: 96 KiB, in more and smaller turns. (With 8 blocks registers are spilled.)
extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, 6)
    norm_batch_4(const gradclip::TensorTable table, gradclip::u32 num_tiles, double* sums, double* scales) {
  gradclip::variants::norm_batch_4(table, num_tiles, sums, scales);
}

// 8 loads all the time, and 8 more at times: at 2 blocks a multiprocessor, 64 to 128 KiB.
extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, 2)
    norm_next_tile(const gradclip::TensorTable table, gradclip::u32 num_tiles, double* sums, double* scales) {
  gradclip::variants::norm_next_tile(table, num_tiles, sums, scales);
}
