// Arithmetic and conversions of device.cuh on the host: IEEE, round to nearest even, nothing contracted. The build must
// say -ffp-contract=off.
#pragma once

#include <cmath>
#include <cstring>

#if defined(__FAST_MATH__)
#error "-ffast-math would change the results"
#endif

namespace gradclip {

inline float add(float a, float b) { return a + b; }
inline float sub(float a, float b) { return a - b; }
inline float mul(float a, float b) { return a * b; }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline double add(double a, double b) { return a + b; }
inline double mul(double a, double b) { return a * b; }
inline double fma(double a, double b, double c) { return std::fma(a, b, c); }
inline double div(double a, double b) { return a / b; }
inline double sqrt(double a) { return std::sqrt(a); }

inline u32 bits_of(float x) {
  u32 r;
  std::memcpy(&r, &x, sizeof r);
  return r;
}
inline u64 bits_of(double x) {
  u64 r;
  std::memcpy(&r, &x, sizeof r);
  return r;
}
inline float f32_from_bits(u32 x) {
  float r;
  std::memcpy(&r, &x, sizeof r);
  return r;
}
inline double f64_from_bits(u64 x) {
  double r;
  std::memcpy(&r, &x, sizeof r);
  return r;
}

inline float f32_from_f16(u16 x) {
  const u32 sign = static_cast<u32>(x & 0x8000u) << 16;
  const u32 exponent = x >> 10 & 0x1fu;
  const u32 fraction = x & 0x3ffu;
  if (exponent == 0x1f) return f32_from_bits(fraction ? 0x7fffffffu : sign | 0x7f800000u);
  if (exponent != 0) return f32_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = static_cast<float>(fraction) * 0x1p-24f;  // exact
  return f32_from_bits(sign | bits_of(magnitude));
}

inline u16 f16_from_f32(float x) {
  const u32 bits = bits_of(x);
  const u32 sign = bits >> 16 & 0x8000u;
  const u32 magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;                               // what the GPU's cvt makes of every NaN
  if (magnitude >= 0x477ff000u) return static_cast<u16>(sign | 0x7c00u);    // 65520 and more round to Inf
  if (magnitude >= 0x38800000u) {                                           // 2^-14: normal in f16
    const u32 rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    return static_cast<u16>(sign | ((rounded >> 13) - (112u << 10)));
  }
  if (magnitude <= 0x33000000u) return static_cast<u16>(sign);              // 2^-25 and less round to 0
  // Subnormal: the significand in units of 2^-24, the bits shifted out deciding.
  const u32 significand = (magnitude & 0x7fffffu) | 0x800000u;
  const u32 shift = 126 - (magnitude >> 23);
  const u32 kept = significand >> shift;
  const u32 lost = significand & ((1u << shift) - 1);
  const u32 half = 1u << (shift - 1);
  return static_cast<u16>(sign | (kept + (lost > half || (lost == half && (kept & 1)) ? 1 : 0)));
}

}  // namespace gradclip
