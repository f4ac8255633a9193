// What the host and the kernels agree on: sizes, tags and the structs that cross the border.
// src/abi.rs is the other half; tests/abi.rs compiles this file and compares every size, offset and value.
#pragma once

namespace gradclip {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// The shape of a reduction, in bytes of one tensor, the same for every dtype (docs/numerics.md draws it):
// a tile is 8 segments, a segment 8 rows, a row 32 packs, a pack 16 bytes. A block takes a tile, a warp a segment,
// a lane one pack of each row: eight independent 16-byte loads a thread, 4 KiB of one page a warp.
constexpr u32 kPackBytes = 16;
constexpr u32 kWarpThreads = 32;
constexpr u32 kRowsPerSegment = 8;
constexpr u32 kSegmentsPerTile = 8;
constexpr u32 kRowBytes = kWarpThreads * kPackBytes;
constexpr u32 kSegmentBytes = kRowsPerSegment * kRowBytes;
constexpr u32 kTileBytes = kSegmentsPerTile * kSegmentBytes;

constexpr u32 kTileThreads = kSegmentsPerTile * kWarpThreads;  // block size of the kernels that walk tiles
constexpr u32 kFoldThreads = 1024;                             // block size of the kernels that fold partials

// Resident blocks that the compiler leaves registers for: 4 x 256 threads with 8 packs each are 128 KiB in flight. Left
// to itself ptxas saves registers instead and spreads the loads among the additions (scripts/ptxas.py checks that it
// does not). Not yet tuned on a GPU.
constexpr u32 kBlocksPerMultiprocessor = 4;

enum Dtype : u32 { kF32 = 0, kF64 = 1, kF16 = 2, kBF16 = 3 };
enum NormType : u32 { kL1 = 0, kL2 = 1, kInf = 2, kP = 3, kRms = 4 };  // the partials of kRms are those of kL2
enum NonFinite : u32 { kSkip = 0, kZero = 1, kPropagate = 2 };

// What the apply stage has to do with the gradients.
enum Action : u32 {
  kKeep = 0,    // nothing is written
  kScale = 1,   // x * multiplier, which is finite
  kClear = 2,   // +0 everywhere
  kPoison = 3,  // x * multiplier with a multiplier or an x that is not finite: NaNs come out canonical
};

struct TensorDesc {
  u64 address;     // of element 0, aligned to its dtype
  u64 numel;       // elements; 0 is allowed
  u32 first_tile;  // tiles of all tensors before this one
  u32 dtype;
};

// The descriptor table. A short list travels in the parameters of the kernel: no copy to the device, nothing that a
// captured graph would have to keep alive. A longer one lies in device memory. 160 tensors keep every parameter list
// below the 4 KiB that all drivers take (GPT-2 has 148).
constexpr u32 kInlineTensors = 160;
struct TensorTable {
  u64 num_tensors;
  const TensorDesc* in_memory;  // null: inline_tensors holds them
  TensorDesc inline_tensors[kInlineTensors];
};

// Where the elements of a gradient go, out of place. One for each tensor of the list, always in device memory: beside a
// TensorTable the parameters have room for 13 of them.
struct OutputDesc {
  u64 address;  // of element 0, aligned to its dtype
  u32 dtype;
  u32 reserved;
};

struct ClipParams {
  double max_norm;
  const double* max_norm_at;  // if not null, where the threshold is instead: a captured graph can be given another one
  double eps;
  double p;  // order of the norm if norm_type is kP, and not 1, 2 or infinite
  double loss_scale;           // what the gradients are multiplied by as they come; 1 for none
  const float* loss_scale_at;  // if not null, where it is instead
  u32 norm_type;
  u32 nonfinite;
};

// Bounds rounded to each dtype; those of f16 and bf16 are held as the f32 of the same value.
struct ClampBounds {
  double lo_f64, hi_f64;
  float lo_f32, hi_f32;
  float lo_f16, hi_f16;
  float lo_bf16, hi_bf16;
};

constexpr u64 kNoTile = ~0ull;

// One call's result. It stays on the device until somebody asks.
struct ReportSlot {
  double total_norm;     // before clipping, without the loss scale
  double clip_coef;      // what clipping asks for; 1 when that is nothing
  double multiplier;     // what the gradients were multiplied by: clip_coef / loss_scale; 1 when they were left alone
  u64 first_bad_tile;    // lowest tile that holds a NaN or an Inf, or kNoTile
  u64 clipped_elements;  // value clipping
  u64 nan_elements;      // value clipping
  float multiplier_f32;  // multiplier rounded to nearest
  float found_inf;       // 1 if total_norm is NaN or infinite, else 0: what fused optimizers take
  float coef_hi;         // multiplier rounded down to f32 ...
  float coef_lo;         // ... and what that left over
  u32 action;
  u32 rank;  // of a call over several ranks only: the first that holds a NaN or an Inf, kNoRank, or one that failed
};

// `rank` of a report: none; or that of the first rank that took no part, and so nothing was written anywhere.
constexpr u32 kNoRank = ~0u;
constexpr u32 kRankRefused = 1u << 31;       // it had an error, or its bytes are no partial
constexpr u32 kRankOfOtherOrder = 1u << 30;  // it measured a norm of another order than rank 0

// The partial result that ranks exchange: sum * scale^order over the gradients of one rank, as Partial (partial.cuh).
struct NormPartial {
  double sum;    // not negative; NaN or Inf if a gradient of the rank holds one. Of the infinity norm a maximum
  double scale;  // 1 wherever the sum is 0
  double order;  // 1, 2, infinity or p
  u64 tag;       // kMeasured, or kRefused for a rank that cannot take part. Anything else is no partial
};
constexpr u64 kMeasured = 0x315f4d70696c6367ull;  // the bytes "gclipM_1"; the last is the version of the layout
constexpr u64 kRefused = 0x315f5270696c6367ull;   // "gclipR_1"

// A call with more than one norm. A group is what shares a norm: a tensor, several, or one row of one (rows being the
// slices along the leading dimension). The table is in the order of the groups, so that each owns tiles in a row.
struct ScopedTensor {
  u64 address;     // of element 0, aligned to its dtype
  u64 row_numel;   // elements of a row; of the tensor, where rows do not count
  u32 first_tile;  // tiles of all tensors before this one in the table
  u32 num_tiles;
  u32 tiles_per_row;
  u32 first_group;  // that of row 0; each row that counts has the next one
  u32 dtype;
  u32 index;  // of the tensor in the caller's list
};

constexpr u64 kSameThreshold = 0x7ff8000000000001ull;  // as the bits of a max_norm: the one of the call

struct ScopedGroup {
  double max_norm;  // or kSameThreshold
  u64 numel;
  u32 first_tile;
  u32 num_tiles;
};

// What a pass sees besides the norm. Of a tile, of a tensor.
struct Stats {
  double max_abs;       // of the finite elements
  u64 zeros;            // elements that are 0 or -0
  u64 nonfinite;        // elements that are NaN or infinite
  u64 first_nonfinite;  // the first of them, as an index into the row or the tensor; or kNoElement
};
constexpr u64 kNoElement = ~0ull;

// One tensor, in the order of the caller's list.
struct StatsSlot {
  double norm;
  Stats stats;
};

struct ScopedTable {
  const ScopedTensor* tensors;
  u32 num_tensors;
};

// What the jobs of the second stage are made of, and where they leave their results.
struct ScopedJobs {
  const ScopedGroup* groups;
  u32 num_groups;
  u32 num_stats;  // jobs after those of the groups: one for each tensor, or none
  const double* sums;
  const double* scales;
  const Stats* tile_stats;
  ReportSlot* reports;
  StatsSlot* tensor_stats;
};

// Where the results of a scoped call go. They belong to call number `call` once header->call says so.
struct ScopedHeader {
  u64 call;
  u64 reserved[7];
};

}  // namespace gradclip
