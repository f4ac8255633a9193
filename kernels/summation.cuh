// How terms are added up. The order is fixed by the index of the element inside its tensor, by nothing else:
//   chain    the 8 elements that one lane meets at one place of its packs, in row order
//   lane     its chains, merged two and two: at most 64 elements in f32, f64 above
//   segment  32 lanes, by the xor tree 16, 8, 4, 2, 1
//   tile     8 segments, as ((0+1)+(2+3))+((4+5)+(6+7))
// src/cpu/norm_partials.rs adds in the same order; docs/numerics.md has the error bounds.
#pragma once

#include "dtypes.cuh"

namespace gradclip {

struct L1 {
  static constexpr NormType kType = kL1;
};
struct L2 {
  static constexpr NormType kType = kL2;
};
template <u32 kNorm>
struct NormOf;
template <>
struct NormOf<kL1> {
  using Type = L1;
};
template <>
struct NormOf<kL2> {
  using Type = L2;
};

template <class Norm, class Real>
__device__ __forceinline__ Real term(Real x) {
  if constexpr (Norm::kType == kL2) {
    return mul(x, x);
  } else {
    return x < Real(0) ? -x : x;  // -0 counts as 0 either way; a NaN stays one
  }
}

// A sum in f64.
template <class Norm>
struct WideChain {
  double sum = 0.0;
  __device__ __forceinline__ void step(double x) { sum = add(sum, term<Norm>(x)); }
  __device__ __forceinline__ void merge(const WideChain& other) { sum = add(sum, other.sum); }
  __device__ __forceinline__ double value() const { return sum; }
};

// Knuth's TwoSum: a + b == sum + error, exactly.
__device__ __forceinline__ float two_sum(float a, float b, float& error) {
  const float sum = add(a, b);
  const float b_in_sum = sub(sum, a);
  error = add(sub(a, sub(sum, b_in_sum)), sub(b, b_in_sum));
  return sum;
}

// Dot2 of Ogita, Rump and Oishi (Accurate sum and dot product, SIAM J. Sci. Comput. 26, 2005): a sum in f32 with all
// its rounding errors, and those of the squares, carried beside it: as good as f64, and no f64 unit touched, which many
// GPUs have 1/64 of. Without it the norm of a handful of f32 would be off by 3e-8.
template <class Norm>
struct CompensatedChain {
  float sum = 0.0f;
  float error = 0.0f;
  __device__ __forceinline__ void step(float x) {
    const float t = term<Norm>(x);
    float sum_error;
    sum = two_sum(sum, t, sum_error);
    if constexpr (Norm::kType == kL2) {
      sum_error = add(sum_error, fma(x, x, -t));
    }
    error = add(error, sum_error);
  }
  __device__ __forceinline__ void merge(const CompensatedChain& other) {
    float sum_error;
    sum = two_sum(sum, other.sum, sum_error);
    error = add(add(error, other.error), sum_error);
  }
  __device__ __forceinline__ double value() const {
    return add(static_cast<double>(sum), static_cast<double>(error));
  }
};

// f16 and bf16. Their terms are exact in f32 (bf16: while they are in range), and so is a chain of one; only the merges
// are compensated, or a handful of elements would be off by 6e-8. In longer chains many roundings average out.
template <class Norm>
struct HalfChain : CompensatedChain<Norm> {
  __device__ __forceinline__ void step(float x) { this->sum = add(this->sum, term<Norm>(x)); }
};

template <class Norm, class T>
struct FastChain {
  using Type = HalfChain<Norm>;
};
template <class Norm>
struct FastChain<Norm, F32> {
  using Type = CompensatedChain<Norm>;
};
template <class Norm>
struct FastChain<Norm, F64> {
  using Type = WideChain<Norm>;
};

// One lane's chains to one f64: neighbours first.
template <class T, class Chain>
__device__ __forceinline__ double lane_sum(Chain (&chain)[T::kPackNumel]) {
#pragma unroll
  for (u32 step = 1; step < T::kPackNumel; step *= 2) {
#pragma unroll
    for (u32 j = 0; j < T::kPackNumel; j += 2 * step) chain[j].merge(chain[j + step]);
  }
  return chain[0].value();
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (u32 mask = kWarpThreads / 2; mask > 0; mask /= 2) x = add(x, shfl_xor(x, mask));
  return x;
}
__device__ __forceinline__ u64 warp_max(u64 x) {
#pragma unroll
  for (u32 mask = kWarpThreads / 2; mask > 0; mask /= 2) {
    const u64 other = shfl_xor(x, mask);
    x = other > x ? other : x;
  }
  return x;
}

}  // namespace gradclip
