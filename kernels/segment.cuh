// One segment of a tensor to one partial, by one warp: the 16-byte loads, what to do where packs are misaligned or the
// tensor ends, and the second look at what the fast sum cannot hold. Twin: src/cpu/norm_partials.rs.
#pragma once

#include "partial.cuh"
#include "realign.cuh"
#include "tensor_table.cuh"

namespace gradclip {

template <class T>
struct TensorView {
  u64 address;
  u64 numel;

  __device__ __forceinline__ u32 shift() const { return static_cast<u32>(address % kPackBytes); }
  __device__ __forceinline__ u64 address_of(u64 element) const { return address + element * T::kSize; }

  // Elements [first, first + kPackNumel), zeroes past the end; never reads a byte outside the tensor.
  __device__ __forceinline__ Pack load_guarded(u64 first) const {
    if (shift() == 0 && first + T::kPackNumel <= numel) return load_once(address_of(first));
    Pack pack = {{0, 0, 0, 0}};
#pragma unroll
    for (u32 j = 0; j < T::kPackNumel; ++j) {
      if (first + j < numel) set_element<T>(pack, j, load_element<typename T::Bits>(address_of(first + j)));
    }
    return pack;
  }
};

// One pack at a time, each with its own guard: the ends of a tensor, and the rare second look.
template <class T, class Rows>
__device__ __forceinline__ void walk_segment_guarded(const TensorView<T>& tensor, u64 first, Rows& rows) {
  constexpr u64 kRowNumel = kRowBytes / T::kSize;
  const u64 mine = first + thread_index() % kWarpThreads * T::kPackNumel;
#pragma unroll 1
  for (u32 r = 0; r < kRowsPerSegment; ++r) rows.add_row(tensor.load_guarded(mine + r * kRowNumel));
}

// Feeds this lane's pack of each row of a segment to `rows`, in order. Three ways to the same elements, chosen for a
// whole segment at a time; only the first has to be fast, and it puts all its loads in flight before it adds.
template <class T, class Rows>
__device__ __forceinline__ void walk_segment(const TensorView<T>& tensor, u64 first, Rows& rows) {
  constexpr u64 kSegmentNumel = kSegmentBytes / T::kSize;
  constexpr u64 kRowNumel = kRowBytes / T::kSize;
  const u64 mine = first + thread_index() % kWarpThreads * T::kPackNumel;
  const u32 shift = tensor.shift();
  const bool whole = first + kSegmentNumel <= tensor.numel;
  if (whole && shift == 0) {
    Pack pack[kRowsPerSegment];
#pragma unroll
    for (u32 r = 0; r < kRowsPerSegment; ++r) pack[r] = load_once(tensor.address_of(mine + r * kRowNumel));
#pragma unroll
    for (u32 r = 0; r < kRowsPerSegment; ++r) rows.add_row(pack[r]);
  } else if (whole && first > 0 && first + kSegmentNumel + T::kPackNumel <= tensor.numel) {
    // Misaligned: the two aligned packs around each of ours lie inside the tensor, and neighbours share them in L1.
    constexpr u32 kBatch = 4;
#pragma unroll 1
    for (u32 r = 0; r < kRowsPerSegment; r += kBatch) {
      Pack pack[kBatch];
#pragma unroll
      for (u32 i = 0; i < kBatch; ++i) {
        const u64 below = tensor.address_of(mine + (r + i) * kRowNumel) - shift;
        pack[i] = realign(load_shared_line(below), load_shared_line(below + kPackBytes), shift);
      }
#pragma unroll
      for (u32 i = 0; i < kBatch; ++i) rows.add_row(pack[i]);
    }
  } else {
    walk_segment_guarded(tensor, first, rows);
  }
}

// The largest |x| as raw bits, which order as NaN > Inf > finite.
template <class T>
struct LargestMagnitude {
  typename T::Bits bits = 0;

  __device__ __forceinline__ void add_row(const Pack& pack) {
#pragma unroll
    for (u32 j = 0; j < T::kPackNumel; ++j) {
      const typename T::Bits magnitude = element<T>(pack, j) & T::kAbsMask;
      bits = magnitude > bits ? magnitude : bits;
    }
  }
  __device__ __forceinline__ u64 of_warp() const { return warp_max(bits); }
};

template <class T>
__device__ __forceinline__ double magnitude_value(u64 bits) {
  return bits > T::kInfBits ? f64_from_bits(kNaN64)
                            : static_cast<double>(T::real(static_cast<typename T::Bits>(bits)));
}

// A lane's chains over its packs.
template <class T, class Chain>
struct Chains {
  Chain chain[T::kPackNumel];

  __device__ __forceinline__ void add_row(const Pack& pack) {
#pragma unroll
    for (u32 j = 0; j < T::kPackNumel; ++j) chain[j].step(T::real(element<T>(pack, j)));
  }
  __device__ __forceinline__ double of_warp() { return warp_sum(lane_sum<T>(chain)); }
};

// The same in f64, every element multiplied by a power of two first.
template <class T, class Norm>
struct WideChains {
  double factor;
  WideChain<Norm> chain[T::kPackNumel];

  __device__ __forceinline__ void add_row(const Pack& pack) {
#pragma unroll
    for (u32 j = 0; j < T::kPackNumel; ++j) {
      chain[j].step(mul(static_cast<double>(T::real(element<T>(pack, j))), factor));
    }
  }
  __device__ __forceinline__ double of_warp() { return warp_sum(lane_sum<T>(chain)); }
};

// A segment whose fast sum is not safe: all zero, not finite, or out of range. Read again (from cache), and added up in
// f64 in the same order.
template <class Norm, class T>
__device__ __forceinline__ Partial rescued_sum(const TensorView<T>& tensor, u64 first, double fast_sum) {
  LargestMagnitude<T> largest;
  walk_segment_guarded(tensor, first, largest);
  const u64 bits = largest.of_warp();
  if (bits == 0 || bits >= T::kInfBits) return {magnitude_value<T>(bits), 0};
  WideChains<T, Norm> chains;
  chains.factor = 1.0;
  int scale = 0;
  if constexpr (T::kSize == 8) {
    scale = fast_sum < kSmallestSafeF64Squares ? -1 : 1;
    chains.factor = scale < 0 ? kRangeFactor : kRangeFactorInverse;
  }
  walk_segment_guarded(tensor, first, chains);
  return {chains.of_warp(), scale};
}

// Shows each pack to `observer` as well, on the one pass that every element makes.
template <class Rows, class Observer>
struct Watched {
  Rows& rows;
  Observer& observer;

  __device__ __forceinline__ void add_row(const Pack& pack) {
    rows.add_row(pack);
    observer.add_row(pack);
  }
};

struct NoObserver {
  __device__ __forceinline__ void add_row(const Pack&) {}
};

template <u32 kNorm, class T, class Observer>
__device__ __forceinline__ Partial segment_partial(const TensorView<T>& tensor, u64 first, Observer& observer) {
  if (first >= tensor.numel) return {0.0, 0};
  if constexpr (kNorm == kInf) {
    LargestMagnitude<T> largest;
    Watched<LargestMagnitude<T>, Observer> watched = {largest, observer};
    walk_segment(tensor, first, watched);
    return {magnitude_value<T>(largest.of_warp()), 0};
  } else {
    using Norm = typename NormOf<kNorm>::Type;
    using Sums = Chains<T, typename FastChain<Norm, T>::Type>;
    Sums chains;
    Watched<Sums, Observer> watched = {chains, observer};
    walk_segment(tensor, first, watched);
    const double sum = chains.of_warp();
    return in_safe_range<Norm, T>(sum) ? Partial{sum, 0} : rescued_sum<Norm, T>(tensor, first, sum);
  }
}

// The first element of this warp's segment.
template <class T>
__device__ __forceinline__ u64 segment_begin(const TensorDesc& desc, u32 tile) {
  const u64 segment = static_cast<u64>(tile - desc.first_tile) * kSegmentsPerTile + thread_index() / kWarpThreads;
  return segment * (kSegmentBytes / T::kSize);
}

}  // namespace gradclip
