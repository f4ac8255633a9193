// Walking a tile out of place, at any alignment of either side. Which element is in which unit does not matter here, so
// units follow the address of the output: every store is aligned, and those of a warp fill whole sectors. Where the
// gradient then lies across the borders of what can be loaded, a unit is put together from the two aligned ones around
// it, which neighbours share in L1: no more traffic with memory, twice the load instructions.
#pragma once

#include "dtypes.cuh"
#include "realign.cuh"
#include "tensor_table.cuh"

namespace gradclip {

// What a thread moves at a time: 16 bytes of the wider side, so 16 or 8 of each. (A pack of f16 that became two of f32
// would have a store fill every other 16 bytes: half of each sector of 32.)
template <class In, class Out>
struct Unit {
  static constexpr u32 kNumel = In::kPackNumel < Out::kPackNumel ? In::kPackNumel : Out::kPackNumel;
  static constexpr u32 kInBytes = kNumel * In::kSize, kOutBytes = kNumel * Out::kSize;
  static constexpr u32 kInFlight = 8 * kPackBytes / kInBytes;  // loads of a thread

  __device__ static __forceinline__ Pack load_before_stores(u64 address, bool active) {
    return kInBytes == kPackBytes ? gradclip::load_before_stores(address, active)
                                  : load_half_before_stores(address, active);
  }
  __device__ static __forceinline__ Pack load_shared_line(u64 address, bool active) {
    return kInBytes == kPackBytes ? gradclip::load_shared_line(address, active)
                                  : load_half_shared_line(address, active);
  }
  __device__ static __forceinline__ Pack realign(const Pack& a, const Pack& b, u32 shift) {
    return kInBytes == kPackBytes ? gradclip::realign(a, b, shift) : realign_half(a, b, shift);
  }
  template <class Map>
  __device__ static __forceinline__ void map(u64 output, const Pack& in, const Map& map) {
    Pack out = {{0, 0, 0, 0}};
#pragma unroll
    for (u32 j = 0; j < kNumel; ++j) set_element<Out>(out, j, map(element<In>(in, j)));
    if constexpr (kOutBytes == kPackBytes) {
      store(output, out);
    } else {
      store_half(output, out);
    }
  }
};

// The elements of one tile, and where they go: the addresses of the first one.
struct TileInto {
  u64 address, output;
  u32 numel;
};

template <class In, class Out>
__device__ __forceinline__ TileInto tile_into(const TensorDesc& desc, u32 tile, u64 output) {
  const u64 first = static_cast<u64>(tile - desc.first_tile) * kTileNumel<In>;
  const u64 left = desc.numel - first;
  const u32 numel = left < kTileNumel<In> ? static_cast<u32>(left) : kTileNumel<In>;
  return {desc.address + first * In::kSize, output + first * Out::kSize, numel};
}

// Elements [begin, end) of a tile one at a time: neighbouring lanes take neighbours.
template <class In, class Out, class Map>
__device__ __forceinline__ void map_singles(const TileInto& tile, u32 begin, u32 end, const Map& map) {
#pragma unroll 1
  for (u32 i = begin + thread_index(); i < end; i += kTileThreads) {
    const typename In::Bits bits = load_element<typename In::Bits>(tile.address + i * In::kSize);
    store_element<typename Out::Bits>(tile.output + i * Out::kSize, map(bits));
  }
}

template <class In, class Out, class Map>
__device__ __forceinline__ void map_aligned(u64 address, u64 output, u32 units, const Map& map) {
  using Unit = gradclip::Unit<In, Out>;
#pragma unroll 1
  for (u32 first = thread_index(); first < units; first += Unit::kInFlight * kTileThreads) {
    const u64 from = address + static_cast<u64>(first) * Unit::kInBytes;
    const u64 to = output + static_cast<u64>(first) * Unit::kOutBytes;
    const u32 left = units - first;
    Pack in[Unit::kInFlight];
#pragma unroll
    for (u32 i = 0; i < Unit::kInFlight; ++i) {
      in[i] = Unit::load_before_stores(from + i * (kTileThreads * Unit::kInBytes), i * kTileThreads < left);
    }
#pragma unroll
    for (u32 i = 0; i < Unit::kInFlight; ++i) {
      if (i * kTileThreads < left) Unit::map(to + i * (kTileThreads * Unit::kOutBytes), in[i], map);
    }
  }
}

// `address` is `shift` bytes after a border.
template <class In, class Out, class Map>
__device__ __forceinline__ void map_misaligned(u64 address, u64 output, u32 units, u32 shift, const Map& map) {
  using Unit = gradclip::Unit<In, Out>;
  constexpr u32 kBatch = Unit::kInFlight / 2;
#pragma unroll 1
  for (u32 first = thread_index(); first < units; first += kBatch * kTileThreads) {
    const u64 from = address - shift + static_cast<u64>(first) * Unit::kInBytes;
    const u64 to = output + static_cast<u64>(first) * Unit::kOutBytes;
    const u32 left = units - first;
    Pack below[kBatch], above[kBatch];
#pragma unroll
    for (u32 i = 0; i < kBatch; ++i) {
      const u64 border = from + i * (kTileThreads * Unit::kInBytes);
      below[i] = Unit::load_shared_line(border, i * kTileThreads < left);
      above[i] = Unit::load_shared_line(border + Unit::kInBytes, i * kTileThreads < left);
    }
#pragma unroll
    for (u32 i = 0; i < kBatch; ++i) {
      if (i * kTileThreads < left) {
        Unit::map(to + i * (kTileThreads * Unit::kOutBytes), Unit::realign(below[i], above[i], shift), map);
      }
    }
  }
}

// map(bits) gives the bits to write. `output` is where the first element of the tensor goes.
template <class In, class Out, class Map>
__device__ __forceinline__ void map_tile_into(const TensorDesc& desc, u32 tile_number, u64 output, const Map& map) {
  using Unit = gradclip::Unit<In, Out>;
  const TileInto tile = tile_into<In, Out>(desc, tile_number, output);
  const u64 end = desc.address + desc.numel * In::kSize;
  // Elements before the first border of the output.
  u32 head = static_cast<u32>((0 - tile.output) % Unit::kOutBytes) / Out::kSize;
  const u32 shift = static_cast<u32>((tile.address + head * In::kSize) % Unit::kInBytes);
  // What is loaded around a misaligned unit lies inside the tensor, if not inside the tile: else it is left to singles.
  if (shift != 0 && tile.address + head * In::kSize - shift < desc.address) head += Unit::kNumel;
  if (head > tile.numel) head = tile.numel;
  u32 units = (tile.numel - head) / Unit::kNumel;
  const u64 body = tile.address + head * In::kSize;
  if (shift != 0 && units > 0 && body - shift + (units + 1) * Unit::kInBytes > end) --units;

  const u64 body_output = tile.output + head * Out::kSize;
  map_singles<In, Out>(tile, 0, head, map);
  map_singles<In, Out>(tile, head + units * Unit::kNumel, tile.numel, map);
  if (shift == 0) {
    map_aligned<In, Out>(body, body_output, units, map);
  } else {
    map_misaligned<In, Out>(body, body_output, units, shift, map);
  }
}

// The same one element at a time, for rare cases: less code.
template <class In, class Out, class Map>
__device__ __forceinline__ void map_singles_into(const TensorDesc& desc, u32 tile_number, u64 output, const Map& map) {
  const TileInto tile = tile_into<In, Out>(desc, tile_number, output);
  map_singles<In, Out>(tile, 0, tile.numel, map);
}

}  // namespace gradclip
