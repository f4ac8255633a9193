//! One function for each stage: grid, arguments, launch. Asynchronous, on the caller's stream, no allocation.

use super::driver::driver_error;
use super::kernel::Kernel;
use super::kernels::Kernels;
use super::outputs::Ready;
use crate::abi::{ClampBounds, ClipParams, TensorTable, FOLD_THREADS, TILE_THREADS, WARP_THREADS};
use crate::error::Result;
use crate::options::NormType;
use cudarc::driver::sys::CUfunction;
use cudarc::driver::{result, CudaStream};
use std::ffi::c_void;

/// Blocks of the in-place stages, for each multiprocessor. They take tiles in turn, so that a launch that finds nothing
/// to do ends after one small wave. Not yet tuned on a GPU.
const IN_PLACE_BLOCKS_PER_SM: u32 = 16;

/// Where the stages run. Their kernels have been prepared.
pub(crate) struct Launcher<'a> {
    pub kernels: &'a Kernels,
    pub stream: &'a CudaStream,
    pub multiprocessors: u32,
    pub table: &'a TensorTable,
    pub num_tiles: u32,
}

/// The address of a kernel argument.
pub(super) fn arg<T>(value: &T) -> *mut c_void {
    std::ptr::from_ref(value).cast_mut().cast()
}

impl Launcher<'_> {
    /// `sums[tile]` (and `scales[tile]`, unless null) for every tile. One block a tile: the hardware balances them.
    pub(crate) fn norm_partials(&self, norm_type: NormType, sums: u64, scales: u64) -> Result<()> {
        let p = norm_type.order();
        let mut args = [arg(self.table), arg(&self.num_tiles), arg(&sums), arg(&scales), arg(&p)];
        // Only the kernel for any order has the last one.
        let count = args.len() - usize::from(!matches!(norm_type, NormType::P(_)));
        let kernel = self.kernels.get(Kernel::norm_partials(norm_type))?;
        // SAFETY: the arguments mirror norm_partials_* in kernels/norm_partials.cu and norm_partials_p.cu. The plan keeps
        // every tile inside its tensor, the workspace has a place for each tile, and the caller of the clipper keeps the
        // tensors alive.
        unsafe { self.over_tiles("norm_partials", kernel, self.num_tiles, &mut args[..count]) }
    }

    /// Partials to report, by the norm that `params` are made of.
    pub(crate) fn clip_coef(
        &self,
        norm_type: NormType,
        params: &ClipParams,
        [sums, scales]: [u64; 2],
        numel: u64,
        report: u64,
    ) -> Result<()> {
        let kernel = self.kernels.get(Kernel::clip_coef(norm_type))?;
        let (sums, scales, tiles, numel) = (arg(&sums), arg(&scales), arg(&self.num_tiles), arg(&numel));
        let (params, report) = (arg(params), arg(&report));
        let args = match norm_type {
            NormType::Rms => &mut [sums, scales, tiles, numel, params, report][..],
            _ => &mut [sums, scales, tiles, params, report][..],
        };
        // SAFETY: the arguments mirror clip_coef, clip_coef_p and clip_coef_rms in kernels/clip_coef.cu; the partials were
        // written by the launches before on the same stream, the slot belongs to this call.
        unsafe { self.one_block("clip_coef", kernel, args) }
    }

    /// A norm, by value or (if not null) by address, to report.
    pub(crate) fn clip_coef_of_norm(&self, params: &ClipParams, norm: f64, norm_at: u64, report: u64) -> Result<()> {
        let mut args = [arg(&norm), arg(&norm_at), arg(params), arg(&report)];
        let kernel = self.kernels.get(Kernel::ClipCoefOfNorm)?;
        // SAFETY: the arguments mirror clip_coef_of_norm in kernels/clip_coef.cu; the norm is that of a report on this
        // stream, or whoever made the `TotalNorm` vouches for it; the slot belongs to this call.
        unsafe { launch(self.stream, "clip_coef_of_norm", kernel, (1, WARP_THREADS), &mut args) }
    }

    /// Applies the report to the gradients, which `clip_coef` has looked at.
    pub(crate) fn scale(&self, report: u64) -> Result<()> {
        // SAFETY: `apply` takes this kernel.
        unsafe { self.apply("scale", Kernel::Scale, report) }
    }

    /// Applies the report to gradients that may hold NaN or Inf.
    pub(crate) fn scale_any(&self, report: u64) -> Result<()> {
        // SAFETY: as above.
        unsafe { self.apply("scale_any", Kernel::ScaleAny, report) }
    }

    /// # Safety
    /// `kernel` is scale or scale_any.
    unsafe fn apply(&self, op: &'static str, kernel: Kernel, report: u64) -> Result<()> {
        let kernel = self.kernels.get(kernel)?;
        let mut args = [arg(self.table), arg(&self.num_tiles), arg(&report)];
        // SAFETY: the arguments mirror those of both in kernels/scale.cu; the tensors are borrowed mutably by the caller,
        // and do not overlap.
        unsafe { self.over_tiles(op, kernel, self.in_place_blocks(), &mut args) }
    }

    /// Applies the report to the gradients, and writes their outputs. The grid is that of [`scale`](Self::scale).
    pub(crate) fn scale_into(&self, outputs: Ready, skip_nonfinite: bool, report: u64) -> Result<()> {
        let (kernel, skip_nonfinite) = (self.kernels.get(Kernel::ScaleInto)?, u32::from(skip_nonfinite));
        let mut args = [arg(self.table), arg(&self.num_tiles), arg(&outputs.table), arg(&skip_nonfinite), arg(&report)];
        // SAFETY: the arguments mirror scale_into in kernels/scale_into.cu; the table has a row for each tensor, with as
        // many elements behind it, borrowed mutably by the caller, and no byte of them is in another row or a gradient.
        unsafe { self.over_tiles("scale_into", kernel, self.in_place_blocks(), &mut args) }
    }

    /// Clamps the gradients; `counts[tile]` for every tile.
    pub(crate) fn clamp(&self, bounds: &ClampBounds, counts: u64) -> Result<()> {
        let kernel = self.kernels.get(Kernel::Clamp)?;
        let mut args = [arg(self.table), arg(&self.num_tiles), arg(bounds), arg(&counts)];
        // SAFETY: the arguments mirror clamp in kernels/clamp.cu; tensors as for `scale`, counts as for `norm_partials`.
        unsafe { self.over_tiles("clamp", kernel, self.in_place_blocks(), &mut args) }
    }

    /// Counts to report.
    pub(crate) fn clamp_counts(&self, counts: u64, report: u64) -> Result<()> {
        let kernel = self.kernels.get(Kernel::ClampCounts)?;
        let mut args = [arg(&counts), arg(&self.num_tiles), arg(&report)];
        // SAFETY: the arguments mirror clamp_counts in kernels/clamp.cu; the counts were written by the launch before.
        unsafe { self.one_block("clamp_counts", kernel, &mut args) }
    }

    fn in_place_blocks(&self) -> u32 {
        in_place_blocks(self.num_tiles, self.multiprocessors)
    }

    /// # Safety
    /// As [`launch`].
    unsafe fn over_tiles(
        &self,
        op: &'static str,
        kernel: CUfunction,
        blocks: u32,
        args: &mut [*mut c_void],
    ) -> Result<()> {
        // SAFETY: passed on to the caller; `kernels` holds the module.
        unsafe { launch(self.stream, op, kernel, (blocks, TILE_THREADS), args) }
    }

    /// # Safety
    /// As [`launch`].
    pub(super) unsafe fn one_block(
        &self,
        op: &'static str,
        kernel: CUfunction,
        args: &mut [*mut c_void],
    ) -> Result<()> {
        // SAFETY: passed on to the caller; `kernels` holds the module.
        unsafe { launch(self.stream, op, kernel, (1, FOLD_THREADS), args) }
    }
}

/// Blocks of the stages that work in place, of a GPU with that many multiprocessors.
pub(super) fn in_place_blocks(num_tiles: u32, multiprocessors: u32) -> u32 {
    num_tiles.min(multiprocessors.saturating_mul(IN_PLACE_BLOCKS_PER_SM))
}

/// Enqueues a kernel, unless there is nothing to do for it.
///
/// # Safety
/// `args` are those of `kernel`, whose module is loaded in the stream's context, and what they point to may be used as the
/// kernel does until it has run.
pub(super) unsafe fn launch(
    stream: &CudaStream,
    op: &'static str,
    kernel: CUfunction,
    (blocks, threads): (u32, usize),
    args: &mut [*mut c_void],
) -> Result<()> {
    if blocks == 0 {
        return Ok(()); // only empty tensors
    }
    let (grid, block) = ((blocks, 1, 1), (threads as u32, 1, 1));
    // SAFETY: the driver copies the arguments before it returns; the rest is the caller's.
    unsafe { result::launch_kernel(kernel, grid, block, 0, stream.cu_stream(), args) }.map_err(driver_error(op))
}
