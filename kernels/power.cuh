// |x|^p for any order p of a norm, in f64: logarithm, exponential and root to base 2, from IEEE operations and integers
// only. The mathematical functions of CUDA and of the C library differ in their last bits; these are the same everywhere.
// Twin: src/cpu/power.rs, bit for bit. Errors: docs/numerics.md, measured by the tests of the twin.
#pragma once

#include "dtypes.cuh"

namespace gradclip {

// log2(x) = whole + fraction: an integer, and at most 1/2 on either side. Kept apart, so that a difference of two
// logarithms has the absolute error of the fractions, not that of sums of up to 1074.
struct Log2 {
  double whole, fraction;
};

constexpr u64 kOneBits = 0x3ff0000000000000ull;
constexpr u64 kRootOfHalfBits = 0x3fe6a09e667f3bcdull;  // sqrt(1/2)
constexpr u64 kFractionMask = (1ull << 52) - 1;
constexpr u64 kTwoTo52Bits = 0x4330000000000000ull;

// Of a finite x > 0. (Of Inf it is 1024.) kSubnormals: whether x may be below 2^-1022.
//
// f is x by a power of two in [sqrt(1/2), sqrt(2)); log2(f) = 2/ln(2) * atanh(s) with s = (f - 1) / (f + 1). The
// quotient starts from a parabola, off by 1.3e-3 at most (Chebyshev); a cubic step makes that 2e-9, a correction of the
// quotient itself 5e-18. A division would cost as much on a GPU, and a branch. The polynomial is within 2.3e-18.
template <bool kSubnormals = true>
__device__ __forceinline__ Log2 log2_of(double x) {
  double whole_of_zero = 0x1p52 + 1023.0;
  if constexpr (kSubnormals) {
    if (x < 0x1p-1022) {
      x = mul(x, 0x1p54);
      whole_of_zero = 0x1p52 + 1023.0 + 54.0;
    }
  }
  const u64 bits = bits_of(x) + (kOneBits - kRootOfHalfBits);
  const double whole = add(f64_from_bits(bits >> 52 | kTwoTo52Bits), -whole_of_zero);
  const double f = f64_from_bits((bits & kFractionMask) + kRootOfHalfBits);
  const double numerator = add(f, -1.0), denominator = add(f, 1.0);
  double inverse = fma(fma(0.11686289071326848, denominator, -0.7224441133556709), denominator, 1.4777559147244488);
  const double miss = fma(-denominator, inverse, 1.0);
  inverse = fma(inverse, fma(miss, miss, miss), inverse);
  double s = mul(numerator, inverse);
  s = fma(fma(-s, denominator, numerator), inverse, s);
  const double w = mul(s, s);
  double tail = 0x1.afdd06f96939dp-3;
  tail = fma(tail, w, 0x1.c4ff418a4c6edp-3);
  tail = fma(tail, w, 0x1.0c9e9175ecd73p-2);
  tail = fma(tail, w, 0x1.484b091bb27dcp-2);
  tail = fma(tail, w, 0x1.a61762b532f39p-2);
  tail = fma(tail, w, 0x1.2776c50ef68fbp-1);
  tail = fma(tail, w, 0x1.ec709dc3a0401p-1);
  return {whole, fma(mul(s, w), tail, mul(s, 0x1.71547652b82fep+1))};
}

// 2^z = mantissa * 2^k, k being the nearest integer of z and in the low bits of `whole`.
struct Exp2 {
  double mantissa, whole;
};

constexpr double kRoundToInteger = 0x1.8p52;  // added, it leaves no bits after the point

// |z| < 2^51. The polynomial is within 6.3e-18.
__device__ __forceinline__ Exp2 exp2_of(double z) {
  const double whole = add(z, kRoundToInteger);
  const double f = add(z, -add(whole, -kRoundToInteger));
  double slope = 0x1.e9d3fe3952179p-32;
  slope = fma(slope, f, 0x1.e6063f7217bc6p-28);
  slope = fma(slope, f, 0x1.b524fae627834p-24);
  slope = fma(slope, f, 0x1.62bfd47773353p-20);
  slope = fma(slope, f, 0x1.ffcbfc670dcd4p-17);
  slope = fma(slope, f, 0x1.430913096fd9fp-13);
  slope = fma(slope, f, 0x1.5d87fe78a5276p-10);
  slope = fma(slope, f, 0x1.3b2ab6fba1ddap-7);
  slope = fma(slope, f, 0x1.c6b08d704a0c2p-5);
  slope = fma(slope, f, 0x1.ebfbdff82c598p-3);
  slope = fma(slope, f, 0x1.62e42fefa39efp-1);
  return {fma(slope, f, 1.0), whole};
}

// A power below this is 0: terms are added to at least 1.
constexpr double kSmallestExponent = -1000.0;

// (x / largest)^p for 0 <= x <= largest, both finite; exactly 1 where they are equal.
template <bool kSubnormals = true>
__device__ __forceinline__ double power_of_ratio(double x, Log2 largest, double p) {
  const Log2 mine = log2_of<kSubnormals>(x);
  double log2_ratio = add(add(mine.whole, -largest.whole), add(mine.fraction, -largest.fraction));
  // Were two neighbours ever to come out in the wrong order, an order of 1e300 would make Inf of it. (None of 60 million
  // that were tried does, but nothing proves it.)
  log2_ratio = log2_ratio < 0.0 ? log2_ratio : 0.0;
  const double z = mul(p, log2_ratio);
  const Exp2 power = exp2_of(z);
  const double value = f64_from_bits(bits_of(power.mantissa) + (bits_of(power.whole) << 52));
  return x > 0.0 && z >= kSmallestExponent ? value : 0.0;
}

// x * 2^k in two steps, as 2^k itself may be beyond f64; |k| <= 2000. Rounded at most once, if x is about 1 or the
// result is.
__device__ __forceinline__ double times_power_of_two(double x, int k) {
  const auto power_of_two = [](int exponent) { return f64_from_bits(static_cast<u64>(exponent + 1023) << 52); };
  return mul(mul(x, power_of_two(k / 2)), power_of_two(k - k / 2));
}

// unit * sum^(1/p) for a finite unit > 0 and a sum >= 1; Inf where it is beyond f64. Exactly `unit` if the sum is 1.
__device__ __forceinline__ double scaled_root(double sum, double unit, double p) {
  const Log2 of_sum = log2_of(sum), of_unit = log2_of(unit);
  const double z = div(add(of_sum.whole, of_sum.fraction), p);
  if (!(z < 2200.0)) return f64_from_bits(kInf64);  // a unit is at least 2^-1074
  const Exp2 root = exp2_of(z);
  // The unit by its power of two, so that a subnormal one keeps its bits until the end, and exact.
  const int unit_exponent = static_cast<int>(of_unit.whole);
  const int exponent = unit_exponent + static_cast<int>(add(root.whole, -kRoundToInteger));
  if (exponent > 1100) return f64_from_bits(kInf64);
  return times_power_of_two(mul(times_power_of_two(unit, -unit_exponent), root.mantissa), exponent);
}

}  // namespace gradclip
