// From a tile to its row, where rows or groups of tensors have norms of their own.
#pragma once

#include "tensor_table.cuh"

namespace gradclip {

// One row of one tensor: to the stages that walk tiles it is a tensor of its own.
struct Row {
  TensorDesc desc;
  u32 group;
};

__device__ __forceinline__ u32 row_of(const ScopedTensor& tensor, u32 tile) {
  return (tile - tensor.first_tile) / tensor.tiles_per_row;
}

__device__ __forceinline__ u32 rows_of(const ScopedTensor& tensor) {
  return tensor.num_tiles == 0 ? 0 : tensor.num_tiles / tensor.tiles_per_row;
}

__device__ __forceinline__ u64 size_of(u32 dtype) { return dtype == kF64 ? 8 : dtype == kF32 ? 4 : 2; }

__device__ __forceinline__ Row find_row(const ScopedTable& table, u32 tile) {
  const ScopedTensor tensor = find_in(table.tensors, table.num_tensors, tile);
  const u32 row = row_of(tensor, tile);
  const u64 address = tensor.address + row * tensor.row_numel * size_of(tensor.dtype);
  return {{address, tensor.row_numel, tensor.first_tile + row * tensor.tiles_per_row, tensor.dtype},
          tensor.first_group + row};
}

}  // namespace gradclip
