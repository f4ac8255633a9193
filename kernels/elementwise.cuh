// Walking a tile in place: elements up to the first 16-byte border, whole packs, the rest. Which element is in which
// pack does not matter here, so packs follow the address, and any alignment is read and written 16 bytes at a time.
#pragma once

#include "dtypes.cuh"
#include "tensor_table.cuh"

namespace gradclip {

// map(bits) gives the new bits of one element; map.changed() says whether any element since the last reset() changed
// (where it never does, nothing is written).
template <class T, class Map>
__device__ __forceinline__ void map_pack(u64 address, const Pack& in, Map& map) {
  Pack out = {{0, 0, 0, 0}};
  map.reset();
#pragma unroll
  for (u32 j = 0; j < T::kPackNumel; ++j) set_element<T>(out, j, map(element<T>(in, j)));
  if (map.changed()) store(address, out);
}

template <class T, class Map>
__device__ __forceinline__ void map_single(u64 address, u64 end, Map& map) {
  if (address < end) {
    map.reset();
    const typename T::Bits bits = map(load_element<typename T::Bits>(address));
    if (map.changed()) store_element<typename T::Bits>(address, bits);
  }
}

// kBatch packs of a thread are read before the first is written: a whole tile where speed counts, 1 for rare cases.
template <u32 kBatch, class T, class Map>
__device__ __forceinline__ void map_tile(const TensorDesc& desc, u32 tile, Map& map) {
  const u64 offset = static_cast<u64>(tile - desc.first_tile) * kTileBytes;
  const u64 size = desc.numel * T::kSize;
  const u64 begin = desc.address + offset;
  const u64 end = desc.address + (offset + kTileBytes < size ? offset + kTileBytes : size);
  const u64 body_end = end / kPackBytes * kPackBytes;
  u64 body = (begin + kPackBytes - 1) / kPackBytes * kPackBytes;
  if (body > body_end) body = end;  // all inside one pack: no body, and the head ends where the tile does
  const u32 packs = body < body_end ? static_cast<u32>((body_end - body) / kPackBytes) : 0;

  // Fewer than 16 bytes on either side: the first lanes take the head, and the same lanes the tail.
  map_single<T>(begin + thread_index() * T::kSize, body, map);
  if (body < end) map_single<T>(body_end + thread_index() * T::kSize, end, map);

#pragma unroll 1
  for (u32 first = thread_index(); first < packs; first += kBatch * kTileThreads) {
    Pack in[kBatch];
#pragma unroll
    for (u32 i = 0; i < kBatch; ++i) {
      const u32 pack = first + i * kTileThreads;
      if (pack < packs) in[i] = load_for_update(body + static_cast<u64>(pack) * kPackBytes);
    }
#pragma unroll
    for (u32 i = 0; i < kBatch; ++i) {
      const u32 pack = first + i * kTileThreads;
      if (pack < packs) map_pack<T>(body + static_cast<u64>(pack) * kPackBytes, in[i], map);
    }
  }
}

constexpr u32 kWholeTile = kTileBytes / kPackBytes / kTileThreads;

}  // namespace gradclip
