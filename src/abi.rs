//! The Rust half of `kernels/abi.cuh`: sizes, tags and structs that cross the border to the kernels.
//! `tests/abi.rs` compiles the other half and compares every size, offset and value.

use bytemuck::{Pod, Zeroable};

/// Bytes of one pack: a vector load of one lane.
pub const PACK_BYTES: usize = 16;
/// Lanes of a warp.
pub const WARP_THREADS: usize = 32;
/// Rows of a segment.
pub const ROWS_PER_SEGMENT: usize = 8;
/// Segments of a tile.
pub const SEGMENTS_PER_TILE: usize = 8;
/// Bytes of one row: a pack for each lane.
pub const ROW_BYTES: usize = WARP_THREADS * PACK_BYTES;
/// Bytes of one segment: what a warp adds up.
pub const SEGMENT_BYTES: usize = ROWS_PER_SEGMENT * ROW_BYTES;
/// Bytes of one tile: what a block adds up, and what one partial stands for.
pub const TILE_BYTES: usize = SEGMENTS_PER_TILE * SEGMENT_BYTES;
/// Block size of the kernels that walk tiles.
pub const TILE_THREADS: usize = SEGMENTS_PER_TILE * WARP_THREADS;
/// Block size of the kernels that fold partials.
pub const FOLD_THREADS: usize = 1024;
/// Tensors that fit into the parameters of a kernel.
pub const INLINE_TENSORS: usize = 160;
/// `first_bad_tile` when there is none.
pub const NO_TILE: u64 = u64::MAX;

/// What the apply stage has to do.
pub mod action {
    /// Nothing is written.
    pub const KEEP: u32 = 0;
    /// `x * multiplier`, which is finite.
    pub const SCALE: u32 = 1;
    /// +0 everywhere.
    pub const CLEAR: u32 = 2;
    /// `x * multiplier` where one of them is not finite.
    pub const POISON: u32 = 3;
}

/// [`NormType`](crate::NormType) as the device knows it.
pub mod norm_type {
    /// Sum of magnitudes.
    pub const L1: u32 = 0;
    /// Root of the sum of squares.
    pub const L2: u32 = 1;
    /// Largest magnitude.
    pub const INF: u32 = 2;
    /// Any other order.
    pub const P: u32 = 3;
    /// Root of the mean of squares; its partials are those of `L2`.
    pub const RMS: u32 = 4;
}

/// [`NonFinite`](crate::NonFinite) as the device knows it; there, `Error` is `SKIP`.
pub mod nonfinite {
    /// Leave the gradients alone.
    pub const SKIP: u32 = 0;
    /// Zero them.
    pub const ZERO: u32 = 1;
    /// Multiply all the same.
    pub const PROPAGATE: u32 = 2;
}

/// One tensor of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct TensorDesc {
    /// Address of element 0.
    pub address: u64,
    /// Number of elements.
    pub numel: u64,
    /// Tiles of all tensors before this one.
    pub first_tile: u32,
    /// A [`Dtype`](crate::Dtype).
    pub dtype: u32,
}

/// The list, as a kernel parameter.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct TensorTable {
    /// Number of tensors.
    pub num_tensors: u64,
    /// Device address of the descriptors, or 0 when they are inline.
    pub in_memory: u64,
    /// The descriptors, when there are few.
    pub inline_tensors: [TensorDesc; INLINE_TENSORS],
}

/// Where the elements of one gradient go, out of place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct OutputDesc {
    /// Address of element 0.
    pub address: u64,
    /// A [`Dtype`](crate::Dtype).
    pub dtype: u32,
    /// Room.
    pub reserved: u32,
}

/// Threshold and policy.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct ClipParams {
    /// Threshold.
    pub max_norm: f64,
    /// If not 0, the device address of the threshold to take instead.
    pub max_norm_at: u64,
    /// Added to the norm in the quotient.
    pub eps: f64,
    /// Order of the norm, if `norm_type` is [`norm_type::P`].
    pub p: f64,
    /// What the gradients are multiplied by as they come.
    pub loss_scale: f64,
    /// If not 0, the device address of the loss scale, an f32, to take instead.
    pub loss_scale_at: u64,
    /// One of [`norm_type`].
    pub norm_type: u32,
    /// One of [`nonfinite`].
    pub nonfinite: u32,
}

/// Value bounds, rounded to each dtype.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
#[allow(missing_docs)]
pub struct ClampBounds {
    pub lo_f64: f64,
    pub hi_f64: f64,
    pub lo_f32: f32,
    pub hi_f32: f32,
    pub lo_f16: f32,
    pub hi_f16: f32,
    pub lo_bf16: f32,
    pub hi_bf16: f32,
}

/// One call's result on the device.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct ReportSlot {
    /// Norm before clipping, without the loss scale.
    pub total_norm: f64,
    /// What clipping asks for.
    pub clip_coef: f64,
    /// What the gradients were multiplied by.
    pub multiplier: f64,
    /// Lowest tile with a NaN or an Inf, or [`NO_TILE`].
    pub first_bad_tile: u64,
    /// Value clipping: elements that were outside.
    pub clipped_elements: u64,
    /// Value clipping: NaNs.
    pub nan_elements: u64,
    /// `multiplier` in f32, rounded to nearest.
    pub multiplier_f32: f32,
    /// 1 if `total_norm` is NaN or infinite, else 0.
    pub found_inf: f32,
    /// `multiplier` in f32, rounded down.
    pub coef_hi: f32,
    /// What that left over.
    pub coef_lo: f32,
    /// One of [`action`].
    pub action: u32,
    /// Of a call over several ranks only: the first rank that holds a NaN or an Inf, [`NO_RANK`], or, with
    /// [`RANK_REFUSED`] or [`RANK_OF_OTHER_ORDER`], the first that took no part.
    pub rank: u32,
}

/// `rank` of a report when there is none.
pub const NO_RANK: u32 = u32::MAX;
/// Set in `rank`: it had an error, or its bytes are no partial.
pub const RANK_REFUSED: u32 = 1 << 31;
/// Set in `rank`: it measured a norm of another order than rank 0.
pub const RANK_OF_OTHER_ORDER: u32 = 1 << 30;

/// What ranks exchange: `sum * scale^order` over the gradients of one rank.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct NormPartial {
    /// Not negative; NaN or infinite if a gradient of the rank is. Of the infinity norm a maximum.
    pub sum: f64,
    /// 1 wherever the sum is 0.
    pub scale: f64,
    /// 1, 2, infinity or p.
    pub order: f64,
    /// [`MEASURED`] or [`REFUSED`]; anything else is no partial.
    pub tag: u64,
}

/// Tag of a rank that took part. The last byte is the version of the layout.
pub const MEASURED: u64 = u64::from_le_bytes(*b"gclipM_1");
/// The tag of a rank that cannot take part.
pub const REFUSED: u64 = u64::from_le_bytes(*b"gclipR_1");

/// One tensor of a call with more than one norm. A group is what shares a norm: a tensor, several, or one row of one. The
/// table is in the order of the groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct ScopedTensor {
    /// Address of element 0.
    pub address: u64,
    /// Elements of a row; of the tensor, where rows do not count.
    pub row_numel: u64,
    /// Tiles of all tensors before this one in the table.
    pub first_tile: u32,
    /// Tiles of this one.
    pub num_tiles: u32,
    /// Tiles of each of its rows.
    pub tiles_per_row: u32,
    /// Group of row 0; each row that counts has the next one.
    pub first_group: u32,
    /// A [`Dtype`](crate::Dtype).
    pub dtype: u32,
    /// Index in the caller's list.
    pub index: u32,
}

/// Bits of the `max_norm` of a group that has the threshold of the call.
pub const SAME_THRESHOLD: u64 = 0x7ff8_0000_0000_0001;

/// What shares one norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct ScopedGroup {
    /// Bits of the threshold, or [`SAME_THRESHOLD`].
    pub max_norm: u64,
    /// Elements of all its tensors.
    pub numel: u64,
    /// Its first tile.
    pub first_tile: u32,
    /// Its number of tiles.
    pub num_tiles: u32,
}

/// `first_nonfinite` when there is none.
pub const NO_ELEMENT: u64 = u64::MAX;

/// What a pass sees besides the norm: of a tile, of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Stats {
    /// Largest magnitude of the finite elements.
    pub max_abs: f64,
    /// Elements that are 0 or -0.
    pub zeros: u64,
    /// Elements that are NaN or infinite.
    pub nonfinite: u64,
    /// Index of the first of them, or [`NO_ELEMENT`].
    pub first_nonfinite: u64,
}

/// What is reported of one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct StatsSlot {
    /// Its own norm.
    pub norm: f64,
    /// The rest.
    pub stats: Stats,
}

/// Before the results of a call with more than one norm.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct ScopedHeader {
    /// Number of the call that they are of.
    pub call: u64,
    /// Room.
    pub reserved: [u64; 7],
}

/// The list of a call with more than one norm, as a kernel parameter.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct ScopedTable {
    /// Device address of the tensors.
    pub tensors: u64,
    /// How many.
    pub num_tensors: u32,
    /// Room.
    pub reserved: u32,
}

/// What the second stage of such a call works on.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
#[allow(missing_docs)]
pub struct ScopedJobs {
    pub groups: u64,
    pub num_groups: u32,
    pub num_stats: u32,
    pub sums: u64,
    pub scales: u64,
    pub tile_stats: u64,
    pub reports: u64,
    pub tensor_stats: u64,
}
