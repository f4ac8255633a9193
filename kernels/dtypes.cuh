// The four element types: raw bits, value, and the rounding back. A kernel body is written once, over one of these.
#pragma once

#include "device.cuh"

namespace gradclip {

constexpr u64 kNaN64 = 0x7ff8000000000000ull;  // the one NaN we write; payloads differ between processors
constexpr u64 kInf64 = 0x7ff0000000000000ull;

// Each dtype has: Bits, Real (the type its arithmetic is done in), kSize, kPackNumel, kInfBits, kNaNBits, kAbsMask,
// real(bits) exact, and round(double or Real) to nearest even.
struct F32 {
  using Bits = u32;
  using Real = float;
  static constexpr u32 kSize = 4, kPackNumel = 4;
  static constexpr Bits kAbsMask = 0x7fffffffu, kInfBits = 0x7f800000u, kNaNBits = 0x7fc00000u;
  __device__ static __forceinline__ float real(Bits b) { return f32_from_bits(b); }
  __device__ static __forceinline__ Bits round(float x) { return bits_of(x); }
};

struct F64 {
  using Bits = u64;
  using Real = double;
  static constexpr u32 kSize = 8, kPackNumel = 2;
  static constexpr Bits kAbsMask = 0x7fffffffffffffffull, kInfBits = kInf64, kNaNBits = kNaN64;
  __device__ static __forceinline__ double real(Bits b) { return f64_from_bits(b); }
  __device__ static __forceinline__ Bits round(double x) { return bits_of(x); }
};

struct F16 {
  using Bits = u16;
  using Real = float;
  static constexpr u32 kSize = 2, kPackNumel = 8;
  static constexpr Bits kAbsMask = 0x7fffu, kInfBits = 0x7c00u, kNaNBits = 0x7e00u;
  __device__ static __forceinline__ float real(Bits b) { return f32_from_f16(b); }
  __device__ static __forceinline__ Bits round(float x) { return f16_from_f32(x); }
};

struct BF16 {
  using Bits = u16;
  using Real = float;
  static constexpr u32 kSize = 2, kPackNumel = 8;
  static constexpr Bits kAbsMask = 0x7fffu, kInfBits = 0x7f80u, kNaNBits = 0x7fc0u;
  __device__ static __forceinline__ float real(Bits b) { return f32_from_bits(static_cast<u32>(b) << 16); }
  // Integer rounding: sm_75 has no cvt.rn.bf16, and this keeps subnormals. x is not a NaN.
  __device__ static __forceinline__ Bits round(float x) {
    const u32 b = bits_of(x);
    return static_cast<Bits>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
  }
};

template <class T>
constexpr u32 kTileNumel = kTileBytes / T::kSize;

template <class T>
__device__ __forceinline__ typename T::Bits element(const Pack& p, u32 j) {
  if constexpr (T::kSize == 8) {
    return static_cast<u64>(p.word[2 * j + 1]) << 32 | p.word[2 * j];
  } else if constexpr (T::kSize == 4) {
    return p.word[j];
  } else {
    return static_cast<u16>(p.word[j / 2] >> (16 * (j % 2)));
  }
}

// `p` must start as zeroes.
template <class T>
__device__ __forceinline__ void set_element(Pack& p, u32 j, typename T::Bits bits) {
  if constexpr (T::kSize == 8) {
    p.word[2 * j] = static_cast<u32>(bits);
    p.word[2 * j + 1] = static_cast<u32>(bits >> 32);
  } else if constexpr (T::kSize == 4) {
    p.word[j] = bits;
  } else {
    p.word[j / 2] |= static_cast<u32>(bits) << (16 * (j % 2));
  }
}

}  // namespace gradclip
