// One tile to one partial, by one block: a segment for each warp, then the tree over the segments.
#pragma once

#include "segment.cuh"

namespace gradclip {

template <u32 kNorm, class T>
__device__ __forceinline__ Partial segment_partial(const TensorDesc& desc, u32 tile) {
  const TensorView<T> tensor = {desc.address, desc.numel};
  NoObserver nobody;
  return segment_partial<kNorm>(tensor, segment_begin<T>(desc, tile), nobody);
}

template <u32 kNorm>
__device__ __forceinline__ Partial segment_partial_of(const TensorDesc& desc, u32 tile) {
  switch (desc.dtype) {
    case kF32: return segment_partial<kNorm, F32>(desc, tile);
    case kF64: return segment_partial<kNorm, F64>(desc, tile);
    case kF16: return segment_partial<kNorm, F16>(desc, tile);
    default: return segment_partial<kNorm, BF16>(desc, tile);
  }
}

// Two sets of slots in shared memory: while thread 0 reads one, the other warps may already fill the next. One barrier
// a tile.
struct SegmentSlots {
  double* sums;
  int* scales;
  u32 first;
};
#define GRADCLIP_SEGMENT_SLOTS(name)                                      \
  GRADCLIP_SHARED_ARRAY(double, name##_sums, 2 * kSegmentsPerTile);       \
  GRADCLIP_SHARED_ARRAY(int, name##_scales, 2 * kSegmentsPerTile);        \
  SegmentSlots name = {name##_sums, name##_scales, 0}

// ((0+1)+(2+3))+((4+5)+(6+7)), in thread 0.
__device__ __forceinline__ Partial fold_segments(u32 norm_type, Partial mine, SegmentSlots& slots) {
  if (thread_index() % kWarpThreads == 0) {
    slots.sums[slots.first + thread_index() / kWarpThreads] = mine.sum;
    slots.scales[slots.first + thread_index() / kWarpThreads] = mine.scale;
  }
  sync_block();
  Partial fold[kSegmentsPerTile] = {};
  if (thread_index() == 0) {
#pragma unroll
    for (u32 s = 0; s < kSegmentsPerTile; ++s) fold[s] = {slots.sums[slots.first + s], slots.scales[slots.first + s]};
#pragma unroll
    for (u32 step = 1; step < kSegmentsPerTile; step *= 2) {
#pragma unroll
      for (u32 s = 0; s < kSegmentsPerTile; s += 2 * step) fold[s] = combine(norm_type, fold[s], fold[s + step]);
    }
  }
  slots.first = kSegmentsPerTile - slots.first;
  return fold[0];
}

}  // namespace gradclip
