// What a pass sees besides the norm: largest magnitude, zeros, values that are not finite. Twin: src/cpu/stats.rs.
#pragma once

#include "segment.cuh"

namespace gradclip {

constexpr Stats kNoStats = {0.0, 0, 0, kNoElement};

__device__ __forceinline__ Stats combine(const Stats& a, const Stats& b) {
  return {a.max_abs > b.max_abs ? a.max_abs : b.max_abs, a.zeros + b.zeros, a.nonfinite + b.nonfinite,
          a.first_nonfinite < b.first_nonfinite ? a.first_nonfinite : b.first_nonfinite};
}

__device__ __forceinline__ Stats shfl_xor(const Stats& s, u32 mask) {
  return {shfl_xor(s.max_abs, mask), shfl_xor(s.zeros, mask), shfl_xor(s.nonfinite, mask),
          shfl_xor(s.first_nonfinite, mask)};
}

constexpr u32 kNoPack = ~0u;

// An observer of one segment, for one lane. Which element of a pack is not finite is looked up afterwards, so that the
// pass itself stays a few integer instructions an element.
template <class T>
struct LaneStats {
  typename T::Bits largest = 0;
  u32 zeros = 0;
  u32 nonfinite = 0;
  u32 first_pack = kNoPack;  // that has a value that is not finite, counted from the segment's first
  u32 row = 0;

  __device__ __forceinline__ void add_row(const Pack& pack) {
    const u32 before = nonfinite;
#pragma unroll
    for (u32 j = 0; j < T::kPackNumel; ++j) {
      const typename T::Bits magnitude = element<T>(pack, j) & T::kAbsMask;
      const bool finite = magnitude < T::kInfBits;
      zeros += magnitude == 0;
      nonfinite += !finite;
      largest = finite && magnitude > largest ? magnitude : largest;
    }
    const u32 pack_if_bad = nonfinite != before ? row * kWarpThreads + thread_index() % kWarpThreads : kNoPack;
    first_pack = pack_if_bad < first_pack ? pack_if_bad : first_pack;
    ++row;
  }

  // Of the warp, in every lane. `first` is the segment's first element. Past the end of the tensor zeroes were seen.
  __device__ __forceinline__ Stats of_warp(const TensorView<T>& tensor, u64 first) const {
    if (first >= tensor.numel) return kNoStats;
    Stats stats = {magnitude_value<T>(largest), zeros, nonfinite, kNoElement};
    if (first_pack != kNoPack) stats.first_nonfinite = first_in_pack(tensor, first + first_pack * T::kPackNumel);
#pragma unroll
    for (u32 mask = kWarpThreads / 2; mask > 0; mask /= 2) stats = combine(stats, shfl_xor(stats, mask));
    constexpr u32 kSegmentNumel = kSegmentBytes / T::kSize;
    const u64 left = tensor.numel - first;
    stats.zeros -= left < kSegmentNumel ? kSegmentNumel - left : 0;
    return stats;
  }

  __device__ __forceinline__ static u64 first_in_pack(const TensorView<T>& tensor, u64 element) {
    while ((load_element<typename T::Bits>(tensor.address_of(element)) & T::kAbsMask) < T::kInfBits) ++element;
    return element;
  }
};

}  // namespace gradclip
