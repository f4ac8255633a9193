// norm_partials_l2 with loads that need no registers: each thread has its 8 packs copied to shared memory, 32 KiB a block.
// With 6 blocks a multiprocessor 192 KiB are in flight, or wait to be added up.
#include "instructions.cuh"
#include "raw_segment.cuh"

namespace gradclip {
namespace variants {

template <class T>
__device__ __forceinline__ Partial partial_of_shared(const TensorDesc& desc, u32 tile, const Pack* pack) {
  FastChains<T> chains;
#pragma unroll
  for (u32 r = 0; r < kRowsPerSegment; ++r) chains.add_row(pack[r * kTileThreads]);
  return partial_of<T>(desc, tile, chains);
}

__device__ __forceinline__ Partial async_partial(const TensorDesc& desc, u32 tile, Pack* mine) {
  const RawSegment segment = raw_segment(desc, tile);
  if (!segment.whole) return segment_partial_of<kL2>(desc, tile);
#pragma unroll
  for (u32 r = 0; r < kRowsPerSegment; ++r) copy_to_shared(mine + r * kTileThreads, segment.address + r * kRowBytes);
  wait_for_copies();
  switch (desc.dtype) {
    case kF32: return partial_of_shared<F32>(desc, tile, mine);
    case kF64: return partial_of_shared<F64>(desc, tile, mine);
    case kF16: return partial_of_shared<F16>(desc, tile, mine);
    default: return partial_of_shared<BF16>(desc, tile, mine);
  }
}

struct alignas(kPackBytes) SharedPack {
  Pack pack;
};

__device__ __forceinline__ void norm_async(const TensorTable& table, u32 num_tiles, double* sums, double* scales) {
  GRADCLIP_SEGMENT_SLOTS(slots);
  GRADCLIP_SHARED_ARRAY(SharedPack, packs, kRowsPerSegment * kTileThreads);
  for (u32 tile = block_index(); tile < num_tiles; tile += grid_blocks()) {
    const Partial mine = async_partial(find_tensor(table, tile), tile, &packs[thread_index()].pack);
    leave_partial(fold_segments(kL2, mine, slots), tile, sums, scales);
  }
}

}  // namespace variants
}  // namespace gradclip

extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, 6)
    norm_async(const gradclip::TensorTable table, gradclip::u32 num_tiles, double* sums, double* scales) {
  gradclip::variants::norm_async(table, num_tiles, sums, scales);
}
