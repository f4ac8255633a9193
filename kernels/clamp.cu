// Value clipping: min(max(x, lo), hi), in place.
//
//   launch   clamp_*: any number of blocks of kTileThreads; clamp_counts: one block of kFoldThreads
//   reads    each gradient once; writes only packs in which an element changed
//   NaN      kept bit for bit, and counted; Inf becomes the bound
//   twin     src/cpu/clamp.rs
#include "elementwise.cuh"
#include "fold.cuh"

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

template <class T>
__device__ __forceinline__ u64 clamp_tile(const TensorDesc& desc, u32 tile, typename T::Real lo,
                                          typename T::Real hi) {
  ClampMap<T> map;
  map.lo = lo;
  map.hi = hi;
  map_tile<kWholeTile, T>(desc, tile, map);
  return pack_counts(map.clipped, map.nans, map.infs);
}

__device__ __forceinline__ void clamp_tiles(const TensorTable& table, u32 num_tiles, const ClampBounds& bounds, u64* counts) {
  GRADCLIP_SHARED_ARRAY(u64, warp_counts, 2 * kSegmentsPerTile);
  u32 slots = 0;
  for (u32 tile = block_index(); tile < num_tiles; tile += grid_blocks()) {
    const TensorDesc desc = find_tensor(table, tile);
    u64 mine;
    switch (desc.dtype) {
      case kF32: mine = clamp_tile<F32>(desc, tile, bounds.lo_f32, bounds.hi_f32); break;
      case kF64: mine = clamp_tile<F64>(desc, tile, bounds.lo_f64, bounds.hi_f64); break;
      case kF16: mine = clamp_tile<F16>(desc, tile, bounds.lo_f16, bounds.hi_f16); break;
      default: mine = clamp_tile<BF16>(desc, tile, bounds.lo_bf16, bounds.hi_bf16); break;
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

}  // namespace gradclip

extern "C" __global__ void __launch_bounds__(gradclip::kTileThreads, gradclip::kBlocksPerMultiprocessor)
    clamp(const gradclip::TensorTable table, gradclip::u32 num_tiles, gradclip::ClampBounds bounds,
          gradclip::u64* counts) {
  gradclip::clamp_tiles(table, num_tiles, bounds, counts);
}

extern "C" __global__ void __launch_bounds__(gradclip::kFoldThreads)
    clamp_counts(const gradclip::u64* counts, gradclip::u32 num_tiles, gradclip::ReportSlot* report) {
  using namespace gradclip;
  GRADCLIP_SHARED_ARRAY(u64, clipped_slots, kWarpThreads);
  GRADCLIP_SHARED_ARRAY(u64, nan_slots, kWarpThreads);
  GRADCLIP_SHARED_ARRAY(u64, tile_slots, kWarpThreads);
  u64 clipped = 0;
  u64 nans = 0;
  u64 first_bad_tile = kNoTile;
  for (u32 tile = thread_index(); tile < num_tiles; tile += kFoldThreads) {
    const u64 mine = counts[tile];
    clipped += clipped_in(mine);
    nans += nans_in(mine);
    if (any_nonfinite(mine) && first_bad_tile == kNoTile) first_bad_tile = tile;
  }
  const auto sum = [](u64 a, u64 b) { return a + b; };
  clipped = fold_block(clipped, clipped_slots, sum);
  nans = fold_block(nans, nan_slots, sum);
  first_bad_tile = fold_block(first_bad_tile, tile_slots, [](u64 a, u64 b) { return a < b ? a : b; });
  if (thread_index() == 0) {
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
}
