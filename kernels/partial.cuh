// A partial result of a reduction, and how two of them combine.
#pragma once

#include "power.cuh"
#include "summation.cuh"

namespace gradclip {

// Which norm. Of kP, its order besides.
struct NormOrder {
  u32 type;
  double p;
  __device__ __forceinline__ NormOrder(u32 norm_type, double order = 0.0) : type(norm_type), p(order) {}
};

// Stands for sum * scale^p, p being 1 for L1 and 2 for L2.
//   L1, L2   the scale is 1, 2^600 or 2^-600: Blue's three ranges (ACM TOMS 4, 1978), so that squares of any finite f64
//            neither overflow nor vanish. Only f64 tensors ever leave scale 1
//   any p    the scale is the largest magnitude, so that no term is above 1 and one is 1, whatever p is; Inf where an
//            element is not finite
//   Inf      the sum is a maximum, and the scale 1
struct Partial {
  double sum;
  double scale;
};

constexpr double kRangeFactor = 0x1p600;
constexpr double kRangeFactorInverse = 0x1p-600;

// Sums between these are taken as they are; outside, the segment is added up again, in f64 and in its own range.
// f32 and bf16: 2^-92 keeps what underflows below 2^-45 of the sum (docs/numerics.md). f64: leaves room for 2^123
// partials of the largest size.
constexpr double kSmallestSafeF32Squares = 0x1p-92;
constexpr double kSmallestSafeF64Squares = 0x1p-900;
constexpr double kLargestSafeF64 = 0x1p900;

template <class Norm, class T>
__device__ __forceinline__ bool in_safe_range(double sum) {
  if constexpr (T::kSize == 8) {
    if constexpr (Norm::kType == kL2) {
      return sum >= kSmallestSafeF64Squares && sum <= kLargestSafeF64;
    } else {
      return sum <= kLargestSafeF64;
    }
  } else if constexpr (Norm::kType == kL2) {
    return sum >= kSmallestSafeF32Squares && sum < f64_from_bits(kInf64);
  } else {
    return sum < f64_from_bits(kInf64);
  }
}

__device__ __forceinline__ bool is_finite(double x) { return (bits_of(x) & ~(1ull << 63)) < kInf64; }
__device__ __forceinline__ bool is_nan(double x) { return (bits_of(x) & ~(1ull << 63)) > kInf64; }

// For norm_type kInf a partial is a maximum, NaN above everything; else a sum. Commutative to the last bit.
__device__ __forceinline__ Partial combine(NormOrder order, Partial a, Partial b) {
  if (order.type == kInf) {
    return is_nan(a.sum) || a.sum > b.sum ? a : b;
  }
  if (a.scale != b.scale) {
    if (a.sum == 0.0) return b;  // a zero has no range of its own
    if (b.sum == 0.0) return a;
    const Partial high = a.scale > b.scale ? a : b;
    Partial low = a.scale > b.scale ? b : a;
    if (order.type == kP) {
      low.sum = mul(low.sum, power_of_ratio(low.scale, log2_of(high.scale), order.p));
    } else {
      // low.scale / high.scale, which is 2^-600, or 2^-1200: that is 0 as an f64, and would be beside the high sum.
      const double ratio = high.scale > 1.0 ? mul(low.scale, kRangeFactorInverse) : low.scale;
      low.sum = mul(low.sum, ratio);
      if (order.type == kL2) low.sum = mul(low.sum, ratio);
    }
    return {add(high.sum, low.sum), high.scale};
  }
  return {add(a.sum, b.sum), a.scale};
}

__device__ __forceinline__ Partial shfl_xor(Partial p, u32 mask) {
  return {shfl_xor(p.sum, mask), shfl_xor(p.scale, mask)};
}

}  // namespace gradclip
