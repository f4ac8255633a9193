// Value clipping of tiles: min(max(x, lo), hi), in place, and how many elements that changed. Twin: src/cpu/clamp.rs.
#pragma once

#include "elementwise.cuh"
#include "scoped_table.cuh"

namespace gradclip {

// The counts of one tile, side by side in 64 bits: a tile has at most 2^14 elements.
constexpr u32 kCountBits = 20;
static_assert(kTileNumel<F16> < (1u << kCountBits), "a count must hold a whole tile");
constexpr u64 kCountMask = (1ull << kCountBits) - 1;
__device__ __forceinline__ u64 pack_counts(u32 clipped, u32 nans, u32 infs) {
  return static_cast<u64>(infs) << (2 * kCountBits) | static_cast<u64>(nans) << kCountBits | clipped;
}
__device__ __forceinline__ u64 clipped_in(u64 counts) { return counts & kCountMask; }
__device__ __forceinline__ u64 nans_in(u64 counts) { return counts >> kCountBits & kCountMask; }
__device__ __forceinline__ bool any_nonfinite(u64 counts) { return counts >> kCountBits != 0; }

template <class T>
struct ClampMap {
  typename T::Real lo, hi;
  u32 clipped = 0, nans = 0, infs = 0;
  bool any_changed = false;

  __device__ __forceinline__ void reset() { any_changed = false; }
  __device__ __forceinline__ bool changed() const { return any_changed; }

  __device__ __forceinline__ typename T::Bits operator()(typename T::Bits bits) {
    const typename T::Real x = T::real(bits);
    const typename T::Bits magnitude = bits & T::kAbsMask;
    nans += magnitude > T::kInfBits;
    infs += magnitude == T::kInfBits;
    if (x < lo || x > hi) {
      any_changed = true;
      ++clipped;
      return T::round(x < lo ? lo : hi);
    }
    return bits;
  }
};

template <template <class> class Map, class T>
__device__ __forceinline__ u64 clamp_tile(const TensorDesc& desc, u32 tile, typename T::Real lo,
                                          typename T::Real hi) {
  Map<T> map;
  map.lo = lo;
  map.hi = hi;
  map_tile<kWholeTile, T>(desc, tile, map);
  return pack_counts(map.clipped, map.nans, map.infs);
}

__device__ __forceinline__ TensorDesc tensor_of_tile(const TensorTable& table, u32 tile) { return find_tensor(table, tile); }
__device__ __forceinline__ TensorDesc tensor_of_tile(const ScopedTable& table, u32 tile) { return find_row(table, tile).desc; }

template <template <class> class Map = ClampMap, class Table>
__device__ __forceinline__ void clamp_tiles(const Table& table, u32 num_tiles, const ClampBounds& bounds, u64* counts) {
  GRADCLIP_SHARED_ARRAY(u64, warp_counts, 2 * kSegmentsPerTile);
  u32 slots = 0;
  for (u32 tile = block_index(); tile < num_tiles; tile += grid_blocks()) {
    const TensorDesc desc = tensor_of_tile(table, tile);
    u64 mine;
    switch (desc.dtype) {
      case kF32: mine = clamp_tile<Map, F32>(desc, tile, bounds.lo_f32, bounds.hi_f32); break;
      case kF64: mine = clamp_tile<Map, F64>(desc, tile, bounds.lo_f64, bounds.hi_f64); break;
      case kF16: mine = clamp_tile<Map, F16>(desc, tile, bounds.lo_f16, bounds.hi_f16); break;
      default: mine = clamp_tile<Map, BF16>(desc, tile, bounds.lo_bf16, bounds.hi_bf16); break;
    }
#pragma unroll
    for (u32 mask = kWarpThreads / 2; mask > 0; mask /= 2) mine += shfl_xor(mine, mask);
    if (thread_index() % kWarpThreads == 0) warp_counts[slots + thread_index() / kWarpThreads] = mine;
    sync_block();
    if (thread_index() == 0) {
      u64 total = 0;
#pragma unroll
      for (u32 w = 0; w < kSegmentsPerTile; ++w) total += warp_counts[slots + w];
      counts[tile] = total;
    }
    slots = kSegmentsPerTile - slots;
  }
}

// What one list, or one group, comes to.
__device__ __forceinline__ void report_clamped(ReportSlot* report, u64 clipped, u64 nans, u64 first_bad_tile) {
  report->total_norm = 0.0;
  report->clip_coef = 1.0;
  report->multiplier = 1.0;
  report->multiplier_f32 = 1.0f;
  report->found_inf = first_bad_tile == kNoTile ? 0.0f : 1.0f;
  report->coef_hi = 1.0f;
  report->coef_lo = 0.0f;
  report->first_bad_tile = first_bad_tile;
  report->clipped_elements = clipped;
  report->nan_elements = nans;
  report->action = clipped > 0 ? kScale : kKeep;
}

}  // namespace gradclip
