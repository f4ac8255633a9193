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
    /// `x * clip_coef`, every x finite.
    pub const SCALE: u32 = 1;
    /// +0 everywhere.
    pub const CLEAR: u32 = 2;
    /// `x * clip_coef` where one of them is not finite.
    pub const POISON: u32 = 3;
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
    /// A [`NormType`](crate::NormType).
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
    /// Norm before clipping.
    pub total_norm: f64,
    /// What the gradients were multiplied by.
    pub clip_coef: f64,
    /// Lowest tile with a NaN or an Inf, or [`NO_TILE`].
    pub first_bad_tile: u64,
    /// Value clipping: elements that were outside.
    pub clipped_elements: u64,
    /// Value clipping: NaNs.
    pub nan_elements: u64,
    /// `clip_coef` in f32, rounded down.
    pub coef_hi: f32,
    /// What that left over.
    pub coef_lo: f32,
    /// One of [`action`].
    pub action: u32,
    /// Room.
    pub reserved: [u32; 3],
}
