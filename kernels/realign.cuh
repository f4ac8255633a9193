// A misaligned pack, or half of one, out of the two aligned ones around it.
#pragma once

#include "device.cuh"

namespace gradclip {

// The 16 bytes that start `shift` bytes into a | b. shift is even and the same for a whole tensor.
__device__ __forceinline__ Pack realign(const Pack& a, const Pack& b, u32 shift) {
  u32 w[8] = {a.word[0], a.word[1], a.word[2], a.word[3], b.word[0], b.word[1], b.word[2], b.word[3]};
  if (shift & 8) {
#pragma unroll
    for (u32 i = 0; i < 6; ++i) w[i] = w[i + 2];
  }
  if (shift & 4) {
#pragma unroll
    for (u32 i = 0; i < 5; ++i) w[i] = w[i + 1];
  }
  const u32 bits = (shift & 3) * 8;
  Pack out;
#pragma unroll
  for (u32 i = 0; i < 4; ++i) {
    out.word[i] = static_cast<u32>((static_cast<u64>(w[i + 1]) << 32 | w[i]) >> bits);
  }
  return out;
}

// The 8 bytes that start `shift` bytes, 2, 4 or 6, into a | b: the first halves of packs.
__device__ __forceinline__ Pack realign_half(const Pack& a, const Pack& b, u32 shift) {
  const u64 low = static_cast<u64>(a.word[1]) << 32 | a.word[0], high = static_cast<u64>(b.word[1]) << 32 | b.word[0];
  const u64 bits = low >> (8 * shift) | high << (64 - 8 * shift);
  return {{static_cast<u32>(bits), static_cast<u32>(bits >> 32), 0, 0}};
}

}  // namespace gradclip
