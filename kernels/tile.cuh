// One tile to one partial, by one block: a segment for each warp, then the tree over the segments.
#pragma once

#include "segment.cuh"

namespace gradclip {

template <u32 kNorm, class T>
__device__ __forceinline__ Partial segment_partial(const TensorDesc& desc, u32 tile, double p) {
  const TensorView<T> tensor = {desc.address, desc.numel};
  NoObserver nobody;
  return segment_partial<kNorm>(tensor, segment_begin<T>(desc, tile), nobody, p);
}

template <u32 kNorm>
__device__ __forceinline__ Partial segment_partial_of(const TensorDesc& desc, u32 tile, double p = 0.0) {
  switch (desc.dtype) {
    case kF32: return segment_partial<kNorm, F32>(desc, tile, p);
    case kF64: return segment_partial<kNorm, F64>(desc, tile, p);
    case kF16: return segment_partial<kNorm, F16>(desc, tile, p);
    default: return segment_partial<kNorm, BF16>(desc, tile, p);
  }
}

// Two sets of slots in shared memory: while thread 0 reads one, the other warps may already fill the next. One barrier
// a tile.
struct SegmentSlots {
  double* sums;
  double* scales;
  u32 first;
};
#define GRADCLIP_SEGMENT_SLOTS(name)                                      \
  GRADCLIP_SHARED_ARRAY(double, name##_sums, 2 * kSegmentsPerTile);       \
  GRADCLIP_SHARED_ARRAY(double, name##_scales, 2 * kSegmentsPerTile);     \
  SegmentSlots name = {name##_sums, name##_scales, 0}

// ((0+1)+(2+3))+((4+5)+(6+7)), in thread 0.
__device__ __forceinline__ Partial fold_segments(NormOrder order, Partial mine, SegmentSlots& slots) {
  if (thread_index() % kWarpThreads == 0) {
    slots.sums[slots.first + thread_index() / kWarpThreads] = mine.sum;
    slots.scales[slots.first + thread_index() / kWarpThreads] = mine.scale;
  }
  sync_block();
  if (order.type == kP) {
    // A combination costs a power: the first warp takes those of a level at once. The same tree, in its lane 0.
    if (thread_index() < kWarpThreads) {
      const u32 s = slots.first + thread_index() % kSegmentsPerTile;
      mine = {slots.sums[s], slots.scales[s]};
#pragma unroll 1
      for (u32 mask = 1; mask < kSegmentsPerTile; mask *= 2) mine = combine(order, mine, shfl_xor(mine, mask));
    }
    slots.first = kSegmentsPerTile - slots.first;
    return mine;
  }
  Partial fold[kSegmentsPerTile] = {};
  if (thread_index() == 0) {
#pragma unroll
    for (u32 s = 0; s < kSegmentsPerTile; ++s) fold[s] = {slots.sums[slots.first + s], slots.scales[slots.first + s]};
#pragma unroll
    for (u32 step = 1; step < kSegmentsPerTile; step *= 2) {
#pragma unroll
      for (u32 s = 0; s < kSegmentsPerTile; s += 2 * step) fold[s] = combine(order, fold[s], fold[s + step]);
    }
  }
  slots.first = kSegmentsPerTile - slots.first;
  return fold[0];
}

// The partials of tiles b, b + blocks, ... for block b.
template <u32 kNorm>
__device__ __forceinline__ void norm_partials(const TensorTable& table, u32 num_tiles, double* sums, double* scales,
                                              double p = 0.0) {
  GRADCLIP_SEGMENT_SLOTS(slots);
  for (u32 tile = block_index(); tile < num_tiles; tile += grid_blocks()) {
    const TensorDesc desc = find_tensor(table, tile);
    const Partial partial = fold_segments({kNorm, p}, segment_partial_of<kNorm>(desc, tile, p), slots);
    if (thread_index() == 0) {
      sums[tile] = partial.sum;
      if (scales) scales[tile] = partial.scale;
    }
  }
}

}  // namespace gradclip
