// The loop over the rows of a segment, which kernels/segment.cuh has in one form, taken apart: a segment's packs as raw
// bytes, whatever the dtype, and their sum. Ends of tensors and misaligned ones go to the library's own code.
#pragma once

#include "../../kernels/scoped_table.cuh"
#include "../../kernels/tile.cuh"

namespace gradclip {
namespace variants {

// This lane's packs of this warp's segment: row r at address + r * kRowBytes.
struct RawSegment {
  u64 address;
  bool whole;  // inside the tensor, and aligned to packs; else `address` is not to be used
};

__device__ __forceinline__ RawSegment raw_segment(const TensorDesc& desc, u32 tile) {
  const u64 offset = static_cast<u64>(tile - desc.first_tile) * kTileBytes +
                     thread_index() / kWarpThreads * kSegmentBytes;
  const bool whole = desc.address % kPackBytes == 0 && offset + kSegmentBytes <= desc.numel * size_of(desc.dtype);
  return {desc.address + offset + thread_index() % kWarpThreads * kPackBytes, whole};
}

// What the library makes of a chain's sum: the sum, or a second look.
template <class T, class Sums>
__device__ __forceinline__ Partial partial_of(const TensorDesc& desc, u32 tile, Sums& chains) {
  const double sum = chains.of_warp();
  if (in_safe_range<L2, T>(sum)) return {sum, 1.0};
  const TensorView<T> tensor = {desc.address, desc.numel};
  return rescued_sum<L2, T>(tensor, segment_begin<T>(desc, tile), sum);
}

template <class T>
using FastChains = Chains<T, typename FastChain<L2, T>::Type>;

// Of packs that are there already.
template <class T>
__device__ __forceinline__ Partial partial_of_packs(const TensorDesc& desc, u32 tile, const Pack (&pack)[kRowsPerSegment]) {
  FastChains<T> chains;
#pragma unroll
  for (u32 r = 0; r < kRowsPerSegment; ++r) chains.add_row(pack[r]);
  return partial_of<T>(desc, tile, chains);
}

// kBatch loads in flight, then their sums, then the next batch.
template <u32 kBatch, class T, class Load>
__device__ __forceinline__ Partial partial_in_batches(const TensorDesc& desc, u32 tile, const RawSegment& segment,
                                                      const Load& load) {
  FastChains<T> chains;
#pragma unroll 1
  for (u32 r = 0; r < kRowsPerSegment; r += kBatch) {
    Pack pack[kBatch];
#pragma unroll
    for (u32 i = 0; i < kBatch; ++i) pack[i] = load(segment.address + (r + i) * kRowBytes);
#pragma unroll
    for (u32 i = 0; i < kBatch; ++i) chains.add_row(pack[i]);
  }
  return partial_of<T>(desc, tile, chains);
}

template <u32 kBatch, class Load>
__device__ __forceinline__ Partial partial_in_batches_of(const TensorDesc& desc, u32 tile, const Load& load) {
  const RawSegment segment = raw_segment(desc, tile);
  if (!segment.whole) return segment_partial_of<kL2>(desc, tile);
  switch (desc.dtype) {
    case kF32: return partial_in_batches<kBatch, F32>(desc, tile, segment, load);
    case kF64: return partial_in_batches<kBatch, F64>(desc, tile, segment, load);
    case kF16: return partial_in_batches<kBatch, F16>(desc, tile, segment, load);
    default: return partial_in_batches<kBatch, BF16>(desc, tile, segment, load);
  }
}

__device__ __forceinline__ void leave_partial(const Partial& partial, u32 tile, double* sums, double* scales) {
  if (thread_index() == 0) {
    sums[tile] = partial.sum;
    if (scales) scales[tile] = partial.scale;
  }
}

}  // namespace variants
}  // namespace gradclip
