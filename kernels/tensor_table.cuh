// From a tile of the whole list to the tensor that holds it.
#pragma once

#include "device.cuh"

namespace gradclip {

// The last tensor whose first tile is not after `tile`. Empty tensors own no tile: the next one starts where they do,
// and being later in the table it is the one found.
template <class Tensors>
__device__ __forceinline__ u32 find_index_in(const Tensors& tensors, u32 num_tensors, u32 tile) {
  u32 lo = 0;
  u32 hi = num_tensors;
  while (hi - lo > 1) {
    const u32 middle = lo + (hi - lo) / 2;
    if (tensors[middle].first_tile <= tile) {
      lo = middle;
    } else {
      hi = middle;
    }
  }
  return lo;
}

__device__ __forceinline__ u32 find_tensor_index(const TensorTable& table, u32 tile) {
  const u32 num_tensors = static_cast<u32>(table.num_tensors);
  return table.in_memory ? find_index_in(table.in_memory, num_tensors, tile)
                         : find_index_in(table.inline_tensors, num_tensors, tile);
}

__device__ __forceinline__ TensorDesc tensor_at(const TensorTable& table, u32 index) {
  return table.in_memory ? table.in_memory[index] : table.inline_tensors[index];
}

template <class Tensors>
__device__ __forceinline__ auto find_in(const Tensors& tensors, u32 num_tensors, u32 tile) {
  return tensors[find_index_in(tensors, num_tensors, tile)];
}

__device__ __forceinline__ TensorDesc find_tensor(const TensorTable& table, u32 tile) {
  const u32 num_tensors = static_cast<u32>(table.num_tensors);
  return table.in_memory ? find_in(table.in_memory, num_tensors, tile)
                         : find_in(table.inline_tensors, num_tensors, tile);
}

}  // namespace gradclip
