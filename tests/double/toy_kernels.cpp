// Small kernels to test the double itself with: one that is right, and the mistakes it has to notice.
#include "../../kernels/device.cuh"
#include "host_kernels.h"

using gradclip::u32;
using gradclip::u64;

namespace {

constexpr u32 kToyThreads = 256;

// Sums of `values` per block of 256, through a shuffle tree and shared memory. Everything a tile kernel does, in small.
void block_sums(const double* values, u32 count, double* sums, bool with_barrier) {
  using namespace gradclip;
  GRADCLIP_SHARED_ARRAY(double, warp_sums, kToyThreads / kWarpThreads);
  const u32 index = block_index() * kToyThreads + thread_index();
  double x = index < count ? values[index] : 0.0;
  for (u32 mask = kWarpThreads / 2; mask > 0; mask /= 2) x = add(x, shfl_xor(x, mask));
  if (thread_index() % kWarpThreads == 0) warp_sums[thread_index() / kWarpThreads] = x;
  if (with_barrier) sync_block();
  if (thread_index() == 0) {
    double sum = 0.0;
    for (u32 w = 0; w < kToyThreads / kWarpThreads; ++w) sum = add(sum, warp_sums[w]);
    sums[block_index()] = sum;
  }
}

}  // namespace

// out[i] += factor * in[i]
extern "C" __global__ void toy_axpy(u64 out, u64 in, float factor, u32 count) {
  using namespace gradclip;
  for (u32 i = block_index() * kToyThreads + thread_index(); i < count; i += grid_blocks() * kToyThreads) {
    const float x = f32_from_bits(load_element<u32>(in + i * 4ull));
    const float y = f32_from_bits(load_element<u32>(out + i * 4ull));
    store_element<u32>(out + i * 4ull, bits_of(add(y, mul(factor, x))));
  }
}

extern "C" __global__ void toy_block_sums(const double* values, u32 count, double* sums) {
  block_sums(values, count, sums, true);
}

extern "C" __global__ void toy_missing_barrier(const double* values, u32 count, double* sums) {
  block_sums(values, count, sums, false);
}

// Every thread writes where the others do, in any block.
extern "C" __global__ void toy_same_slot(u32* out) { *out = gradclip::thread_index(); }

// One thread of each block, and all blocks write the same place.
extern "C" __global__ void toy_block_race(u32* out) {
  if (gradclip::thread_index() == 0) *out = gradclip::block_index();
}

extern "C" __global__ void toy_divergent_shuffle(u32* out) {
  if (gradclip::thread_index() % 2 == 0) out[0] = gradclip::shfl_xor(1u, 1u);
}

extern "C" __global__ void toy_divergent_barrier() {
  if (gradclip::thread_index() < 100) gradclip::sync_block();
}

// Reads `count` packs and writes them back: out of bounds when count says so, a fault when `address` is misaligned.
extern "C" __global__ void toy_copy_packs(u64 to, u64 from, u32 count) {
  using namespace gradclip;
  for (u32 i = thread_index(); i < count; i += kToyThreads) store(to + i * 16ull, load_once(from + i * 16ull));
}

// What an unwritten element of shared memory holds.
extern "C" __global__ void toy_unwritten_shared(u32* out) {
  GRADCLIP_SHARED_ARRAY(u32, words, 4);
  if (gradclip::thread_index() < 4) out[gradclip::thread_index()] = words[gradclip::thread_index()];
}

// One element past an array in shared memory, with another array after it.
extern "C" __global__ void toy_shared_past_end(u32* out) {
  GRADCLIP_SHARED_ARRAY(u32, words, 4);
  GRADCLIP_SHARED_ARRAY(u32, others, 4);
  if (gradclip::thread_index() == 0) others[0] = 1;
  volatile u32 past_end = 4;
  if (gradclip::thread_index() == 0) *out = static_cast<const u32*>(words)[past_end];
}

#define TOY_KERNEL(symbol) host_kernel<&::symbol>(#symbol, kToyThreads)

namespace gradclip {
namespace host {

const HostKernel toy_kernels[] = {
    TOY_KERNEL(toy_axpy),
    TOY_KERNEL(toy_block_sums),
    TOY_KERNEL(toy_missing_barrier),
    TOY_KERNEL(toy_same_slot),
    TOY_KERNEL(toy_block_race),
    TOY_KERNEL(toy_divergent_shuffle),
    TOY_KERNEL(toy_divergent_barrier),
    TOY_KERNEL(toy_copy_packs),
    TOY_KERNEL(toy_unwritten_shared),
    TOY_KERNEL(toy_shared_past_end),
    {},
};

}  // namespace host
}  // namespace gradclip
