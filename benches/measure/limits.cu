// What the memory of a GPU gives to the plainest kernels: the limits that the bench holds the crate's kernels against.
// `packs` is the number of 16-byte packs. A thread goes through them by the size of the grid, with several loads in
// flight before it uses the first: the bench tries several of these numbers and several grids, and keeps the fastest.

typedef unsigned long long u64;

struct __align__(16) Pack {
  unsigned x, y, z, w;
};

template <int kInFlight>
__device__ __forceinline__ void read_packs(const Pack* __restrict__ from, u64 packs, unsigned* out) {
  const u64 stride = static_cast<u64>(gridDim.x) * blockDim.x;
  u64 i = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
  unsigned all = 0;
  for (; i + (kInFlight - 1) * stride < packs; i += kInFlight * stride) {
    Pack pack[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) pack[j] = from[i + j * stride];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) all ^= pack[j].x ^ pack[j].y ^ pack[j].z ^ pack[j].w;
  }
  for (; i < packs; i += stride) all ^= from[i].x ^ from[i].y ^ from[i].z ^ from[i].w;
  // So that the loads are needed. What is written means nothing, and it is written next to never.
  if (all == 0x9e3779b9u) *out = all;
}

extern "C" __global__ void plain_read_4(const Pack* from, u64 packs, unsigned* out) {
  read_packs<4>(from, packs, out);
}
extern "C" __global__ void plain_read_8(const Pack* from, u64 packs, unsigned* out) {
  read_packs<8>(from, packs, out);
}
extern "C" __global__ void plain_read_16(const Pack* from, u64 packs, unsigned* out) {
  read_packs<16>(from, packs, out);
}

// Reads and writes everything in place. `zero` is 0, which only the caller knows.
template <int kInFlight>
__device__ __forceinline__ void update_packs(Pack* packs_at, u64 packs, u64 zero) {
  const unsigned mask = static_cast<unsigned>(zero);
  const u64 stride = static_cast<u64>(gridDim.x) * blockDim.x;
  u64 i = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + (kInFlight - 1) * stride < packs; i += kInFlight * stride) {
    Pack pack[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) pack[j] = packs_at[i + j * stride];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      packs_at[i + j * stride] = {pack[j].x ^ mask, pack[j].y ^ mask, pack[j].z ^ mask, pack[j].w ^ mask};
    }
  }
  for (; i < packs; i += stride) {
    const Pack pack = packs_at[i];
    packs_at[i] = {pack.x ^ mask, pack.y ^ mask, pack.z ^ mask, pack.w ^ mask};
  }
}

extern "C" __global__ void plain_update_4(Pack* packs_at, u64 packs, u64 zero) {
  update_packs<4>(packs_at, packs, zero);
}
extern "C" __global__ void plain_update_8(Pack* packs_at, u64 packs, u64 zero) {
  update_packs<8>(packs_at, packs, zero);
}
