// 256 bits a load and store, which only sm_100 and later have: as many bytes in flight, half as many instructions for
// them. Tensors that are not aligned to 32 bytes, and their ends, go to the library's own code. (The PTX beside this file is
// for what the library's is, which does not have these instructions; variants.json says for what it really is.)
#include "instructions.cuh"
#include "raw_segment.cuh"
#include "../../kernels/scale.cuh"

namespace gradclip {
namespace variants {

constexpr u32 kWideBytes = 2 * kPackBytes;
constexpr u32 kWideThreads = kTileThreads / 2;  // half a warp takes a segment, and a lane stands for two of the library's
constexpr u32 kHalfWarp = kWarpThreads / 2;

__device__ __forceinline__ u32 lane_index() { return thread_index() % kWarpThreads; }
// Of the first of this warp's two segments, counted from the tile's start.
__device__ __forceinline__ u32 first_segment() { return thread_index() / kWarpThreads * 2; }

template <class T>
__device__ __forceinline__ u64 first_element(const TensorDesc& desc, u32 tile, u32 segment) {
  return static_cast<u64>(tile - desc.first_tile) * kTileNumel<T> + segment * (kSegmentBytes / T::kSize);
}

// The sum of this half warp's segment, in each of its lanes. The library's tree over lanes 2 * i and 2 * i + 1: 16, 8, 4
// and 2 between lanes i, then 1 in the lane.
template <class T>
__device__ __forceinline__ double wide_sum(u64 address) {
  FastChains<T> chains[2];
  WidePack pack[kRowsPerSegment];
#pragma unroll
  for (u32 r = 0; r < kRowsPerSegment; ++r) pack[r] = load_wide_once(address + r * kRowBytes);
#pragma unroll
  for (u32 r = 0; r < kRowsPerSegment; ++r) {
    chains[0].add_row(pack[r].half[0]);
    chains[1].add_row(pack[r].half[1]);
  }
  double even = lane_sum<T>(chains[0].chain), odd = lane_sum<T>(chains[1].chain);
#pragma unroll
  for (u32 mask = kHalfWarp / 2; mask > 0; mask /= 2) {
    even = add(even, shfl_xor(even, mask));
    odd = add(odd, shfl_xor(odd, mask));
  }
  return add(even, odd);
}

// The partials of this warp's two segments, in each lane.
template <class T>
__device__ __forceinline__ void wide_partials(const TensorDesc& desc, u32 tile, Partial (&partial)[2]) {
  const TensorView<T> tensor = {desc.address, desc.numel};
  const u64 begin = first_element<T>(desc, tile, first_segment());
  constexpr u64 kSegmentNumel = kSegmentBytes / T::kSize;
  const bool whole = desc.address % kWideBytes == 0 && begin + 2 * kSegmentNumel <= desc.numel;
  double sum[2] = {};
  if (whole) {
    const u64 own = tensor.address_of(begin) + lane_index() / kHalfWarp * kSegmentBytes + lane_index() % kHalfWarp * kWideBytes;
    const double mine = wide_sum<T>(own), other = shfl_xor(mine, kHalfWarp);
    sum[0] = lane_index() < kHalfWarp ? mine : other;
    sum[1] = lane_index() < kHalfWarp ? other : mine;
  }
#pragma unroll 1
  for (u32 s = 0; s < 2; ++s) {
    const u64 first = begin + s * kSegmentNumel;
    Partial one;
    if (!whole) {
      NoObserver nobody;
      one = segment_partial<kL2>(tensor, first, nobody, 0.0);
    } else {
      const double found = s == 0 ? sum[0] : sum[1];
      one = in_safe_range<L2, T>(found) ? Partial{found, 1.0} : rescued_sum<L2, T>(tensor, first, found);
    }
    if (s == 0) {
      partial[0] = one;
    } else {
      partial[1] = one;
    }
  }
}

__device__ __forceinline__ void wide_partials_of(const TensorDesc& desc, u32 tile, Partial (&partial)[2]) {
  switch (desc.dtype) {
    case kF32: wide_partials<F32>(desc, tile, partial); break;
    case kF64: wide_partials<F64>(desc, tile, partial); break;
    case kF16: wide_partials<F16>(desc, tile, partial); break;
    default: wide_partials<BF16>(desc, tile, partial); break;
  }
}

// fold_segments of kernels/tile.cuh, of two segments a warp.
__device__ __forceinline__ Partial fold_pairs(const Partial (&mine)[2], SegmentSlots& slots) {
  if (lane_index() == 0) {
#pragma unroll
    for (u32 s = 0; s < 2; ++s) {
      slots.sums[slots.first + first_segment() + s] = mine[s].sum;
      slots.scales[slots.first + first_segment() + s] = mine[s].scale;
    }
  }
  sync_block();
  Partial fold[kSegmentsPerTile] = {};
  if (thread_index() == 0) {
#pragma unroll
    for (u32 s = 0; s < kSegmentsPerTile; ++s) fold[s] = {slots.sums[slots.first + s], slots.scales[slots.first + s]};
#pragma unroll
    for (u32 step = 1; step < kSegmentsPerTile; step *= 2) {
#pragma unroll
      for (u32 s = 0; s < kSegmentsPerTile; s += 2 * step) fold[s] = combine(kL2, fold[s], fold[s + step]);
    }
  }
  slots.first = kSegmentsPerTile - slots.first;
  return fold[0];
}

template <class T>
__device__ __forceinline__ void scale_wide_tile(const TensorDesc& desc, u32 tile, const ReportSlot& report) {
  const u64 offset = static_cast<u64>(tile - desc.first_tile) * kTileBytes;
  const u64 begin = desc.address + offset;
  if (!takes_split_scale(report) || begin % kWideBytes != 0 || offset + kTileBytes > desc.numel * T::kSize) {
    scale_tile<T, false>(desc, tile, report);
    return;
  }
  const auto map = split_scale<T, T, false>(report);
  constexpr u32 kBatch = kTileBytes / kWideBytes / kTileThreads;
  WidePack pack[kBatch];
#pragma unroll
  for (u32 i = 0; i < kBatch; ++i) pack[i] = load_wide_for_update(begin + (thread_index() + i * kTileThreads) * kWideBytes);
#pragma unroll
  for (u32 i = 0; i < kBatch; ++i) {
    WidePack out = {};
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
#pragma unroll
      for (u32 j = 0; j < T::kPackNumel; ++j) set_element<T>(out.half[h], j, map(element<T>(pack[i].half[h], j)));
    }
    store_wide(begin + (thread_index() + i * kTileThreads) * kWideBytes, out);
  }
}

__device__ __forceinline__ void scale_wide(const TensorTable& table, u32 num_tiles, const ReportSlot* report) {
  const ReportSlot decided = *report;
  if (decided.action == kKeep) return;
  for (u32 tile = block_index(); tile < num_tiles; tile += grid_blocks()) {
    const TensorDesc desc = find_tensor(table, tile);
    switch (desc.dtype) {
      case kF32: scale_wide_tile<F32>(desc, tile, decided); break;
      case kF64: scale_wide_tile<F64>(desc, tile, decided); break;
      case kF16: scale_wide_tile<F16>(desc, tile, decided); break;
      default: scale_wide_tile<BF16>(desc, tile, decided); break;
    }
  }
}

}  // namespace variants
}  // namespace gradclip

extern "C" __global__ void __launch_bounds__(gradclip::variants::kWideThreads, gradclip::kBlocksPerMultiprocessor)
    norm_wide(const gradclip::TensorTable table, gradclip::u32 num_tiles, double* sums, double* scales) {
  using namespace gradclip;
  GRADCLIP_SEGMENT_SLOTS(slots);
  for (u32 tile = block_index(); tile < num_tiles; tile += grid_blocks()) {
    Partial mine[2];
    variants::wide_partials_of(find_tensor(table, tile), tile, mine);
    variants::leave_partial(variants::fold_pairs(mine, slots), tile, sums, scales);
  }
}

// With more blocks a multiprocessor registers are spilled.
extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, 2)
    scale_wide(const gradclip::TensorTable table, gradclip::u32 num_tiles, const gradclip::ReportSlot* report) {
  gradclip::variants::scale_wide(table, num_tiles, report);
}
