//! A norm over several ranks, on device memory. Twin of `src/cpu/shards.rs`.
//!
//! The partial of this rank, and those of all, stay on the device: what exchanges them enqueues on the clipper's
//! stream, between two kernels.

use super::clipper::{clip_params, finish, Clipper};
use super::device_table::DeviceTable;
use super::driver::{is_capturing, CurrentContext};
use super::kernel::Kernel;
use super::launch::{arg, launch, Launcher};
use super::memory::GrowBuffer;
use super::reports::{Applied, Pending};
use crate::abi::{ClipParams, MEASURED, REFUSED, TILE_THREADS};
use crate::adapters::cudarc::{DeviceGrad, DeviceGradMut};
use crate::error::{Error, Result};
use crate::options::{ClipNorm, NormType};
use crate::report::NormReport;
use crate::shards::{check_world_size, Copies, NormPartial};
use cudarc::driver::CudaStream;
use std::sync::Arc;

/// What carries partials between ranks where they lie on GPUs: NCCL (with the feature `nccl`, cudarc's `Comm` is one),
/// or an engine of the caller's, of which one collective is needed. The other half is [`NormPartial`], whose layout
/// they have.
///
/// An engine that only knows host memory can be one too, by copying; it has to wait for the stream then.
///
/// ```no_run
/// use gradclip::cuda::{cudarc::driver::{result, CudaStream, DriverError}, DeviceAllGather};
/// use std::sync::Arc;
/// /// One process alone, which needs no engine.
/// struct Alone;
/// // SAFETY: the copy is of these bytes, to where they belong, in the order of the stream.
/// unsafe impl DeviceAllGather for Alone {
///     type Error = DriverError;
///     fn world_size(&self) -> usize {
///         1
///     }
///     unsafe fn all_gather(&self, on: &Arc<CudaStream>, mine: u64, all: u64, bytes: usize) -> Result<(), DriverError> {
///         // SAFETY: both are addresses of so many bytes.
///         unsafe { result::memcpy_dtod_async(all, mine, bytes, on.cu_stream()) }
///     }
/// }
/// ```
///
/// # Safety
/// `all_gather`, when it has returned `Ok`, has enqueued work on `stream` that writes to `all` the `bytes` bytes at
/// `mine` of each of `world_size` ranks, in rank order, and that touches no other memory of the clipper's and these not
/// after work that is enqueued on the stream later.
pub unsafe trait DeviceAllGather {
    /// Its text becomes that of [`Error::Exchange`].
    type Error: std::fmt::Display;

    /// Number of ranks. The same on all of them.
    fn world_size(&self) -> usize;

    /// Enqueues the collective. Every rank calls it. The context of `stream` is current.
    ///
    /// # Errors
    /// Those of the engine. Nothing is clipped then.
    ///
    /// # Safety
    /// `mine` is the address of `bytes` bytes of device memory, and `all` that of `world_size` times as many, in the
    /// context of `stream`, until the work has run; nothing else uses them at that time.
    unsafe fn all_gather(
        &self,
        stream: &Arc<CudaStream>,
        mine: u64,
        all: u64,
        bytes: usize,
    ) -> std::result::Result<(), Self::Error>;
}

impl Clipper {
    /// Norm over the gradients of all ranks; [`clip_grad_norm_sharded`](Self::clip_grad_norm_sharded) without the
    /// clipping. Every rank calls it.
    ///
    /// Cost: reads each gradient once; three launches, one more where `copies` are others than 1, and one collective of
    /// 32 bytes a rank. No wait.
    ///
    /// # Errors
    /// As [`clip_grad_norm_sharded`](Self::clip_grad_norm_sharded).
    pub fn total_norm_sharded<'a, G: DeviceGrad, E: DeviceAllGather>(
        &mut self,
        grads: &[G],
        copies: impl Into<Copies<'a>>,
        norm_type: NormType,
        ranks: &E,
    ) -> Result<Pending<NormReport>> {
        self.clip_coef_sharded(grads, copies, ClipNorm::measure_only(norm_type), ranks)
    }

    /// [`clip_coef`](Self::clip_coef) by the norm over the gradients of all ranks: what
    /// [`clip_grad_norm_sharded`](Self::clip_grad_norm_sharded) would multiply them by, left on the device for the
    /// optimizer of each rank's shard. Every rank calls it.
    ///
    /// Cost: reads each gradient once, writes nothing; three launches, one more where `copies` are others than 1, and
    /// one collective of 32 bytes a rank. No wait (but [`NonFinite::Error`](crate::NonFinite::Error) waits).
    ///
    /// # Errors
    /// As [`clip_grad_norm_sharded`](Self::clip_grad_norm_sharded). After [`Error::RankFailed`] on another rank,
    /// `found_inf` is 1 here as well.
    pub fn clip_coef_sharded<'a, G: DeviceGrad, E: DeviceAllGather>(
        &mut self,
        grads: &[G],
        copies: impl Into<Copies<'a>>,
        clip: impl Into<ClipNorm>,
        ranks: &E,
    ) -> Result<Pending<NormReport>> {
        let (copies, clip) = (copies.into(), clip.into());
        self.home.check()?;
        let _current = CurrentContext::enter(self.stream.context())?;
        let gathered = clip.validate_over_ranks().and_then(|()| self.list.gather(grads, &self.stream));
        let listed = gathered.is_ok();
        let pending = self.over_ranks(gathered, copies, &clip, ranks, Applied::Nowhere);
        // After an error too: a stage that was launched before it may still be running.
        let released = if listed { self.list.release(grads, &self.stream) } else { Ok(()) };
        let pending = pending?;
        released?;
        finish(pending, &clip)
    }

    /// [`clip_grad_norm`](Self::clip_grad_norm) by the norm over the gradients of all ranks. What it means, `copies`,
    /// and the bits are those of [`cpu::clip_grad_norm_sharded`](crate::cpu::clip_grad_norm_sharded); the partials stay
    /// on the device.
    ///
    /// Cost: reads each gradient once; if it clips, reads and writes each once more. Four launches, one more where
    /// `copies` are others than 1, and one collective of 32 bytes a rank, all on the clipper's stream. No wait (but
    /// [`NonFinite::Error`](crate::NonFinite::Error) has to wait for the norm); no allocation in a repeated call. It
    /// can be captured if the engine's collective can, as NCCL's.
    ///
    /// Every rank calls it, also with an empty list. A rank whose call is refused takes part all the same, and returns
    /// its own error; the others' gradients stay as they are, their `found_inf` is 1, and [`Pending::wait`] gives them
    /// [`Error::RankFailed`]. That cannot be where the rank cannot enqueue anything: after [`Error::WrongThread`],
    /// [`Error::Driver`], [`Error::OutOfMemory`] or [`Error::Exchange`], and during capture. The others wait for it
    /// then, as for any rank that is lost; the engine's time limit, or abort, is what ends that.
    ///
    /// # Errors
    /// As [`clip_grad_norm`](Self::clip_grad_norm); [`Error::ScopeLength`] if `copies` has not one entry for each
    /// gradient; [`Error::Exchange`] from the engine. Nothing is touched then.
    #[cfg_attr(
        feature = "nccl",
        doc = "
```no_run
use gradclip::{cuda::{self, cudarc::nccl::{Comm, Id}, Clipper}, Copies};
fn train(rank: usize, world_size: usize, id: Id) -> gradclip::Result<()> {
    cuda::check_nccl()?; // cudarc panics where there is none
    let stream = cuda::context(rank)?.new_stream()?;
    let comm = Comm::from_rank(stream.clone(), rank, world_size, id)?;
    let mut shards = [stream.clone_htod(&[3.0f32, 4.0])?];
    let mut clipper = Clipper::new(&stream)?;
    let clipped = clipper.clip_grad_norm_sharded(&mut shards, Copies::One, 1.0, &comm)?; // no wait
    println!(\"{}\", clipped.wait()?.total_norm); // waits; the same bits on all ranks
    Ok(())
}
```"
    )]
    pub fn clip_grad_norm_sharded<'a, G: DeviceGradMut, E: DeviceAllGather>(
        &mut self,
        grads: &mut [G],
        copies: impl Into<Copies<'a>>,
        clip: impl Into<ClipNorm>,
        ranks: &E,
    ) -> Result<Pending<NormReport>> {
        let (copies, clip) = (copies.into(), clip.into());
        self.home.check()?;
        let _current = CurrentContext::enter(self.stream.context())?;
        let gathered = clip.validate_over_ranks().and_then(|()| self.list.gather_mut(grads, &self.stream));
        let listed = gathered.is_ok();
        let pending = self.over_ranks(gathered, copies, &clip, ranks, Applied::InPlace);
        let released = if listed { self.list.release_mut(grads, &self.stream) } else { Ok(()) }; // as above
        let pending = pending?;
        released?;
        finish(pending, &clip)
    }

    /// All stages. After an error before the exchange this rank takes part in that, so that the others do not wait.
    fn over_ranks<E: DeviceAllGather>(
        &mut self,
        gathered: Result<()>,
        copies: Copies<'_>,
        clip: &ClipNorm,
        ranks: &E,
        applied: Applied,
    ) -> Result<Pending<NormReport>> {
        let world_size = check_world_size(ranks.world_size())?;
        let measured = gathered.and_then(|()| self.measure_rank(copies, clip, world_size, applied));
        let pending = match measured {
            Ok(pending) => pending.applied(applied),
            Err(error) => {
                // An error in this has nobody to go to.
                let _ = self.refuse(world_size, ranks);
                return Err(error);
            }
        };
        let report = self.reports.address(pending.slot()); // it stays taken after an error: a graph may write it by now
        self.exchange(ranks)?;
        let _current = CurrentContext::enter(self.stream.context())?; // whatever the engine has left
        let shards = self.shards.as_ref().ok_or(NOT_LOADED)?;
        let launcher = self.launcher();
        shards.clip_coef(&launcher, clip, world_size, report)?;
        if applied == Applied::InPlace {
            launcher.scale(report)?;
        }
        Ok(pending)
    }

    /// Stage 1, and all partials to that of this rank. Prepares the later stages, too: once the ranks have exchanged
    /// their partials, none of them should fail.
    fn measure_rank(
        &mut self,
        copies: Copies<'_>,
        clip: &ClipNorm,
        world_size: u32,
        applied: Applied,
    ) -> Result<Pending<NormReport>> {
        let capturing = self.prepare_norm(clip)?;
        copies.check(self.list.tensors().len())?;
        let copies = copies.other_than_one();
        let stages = [Kernel::norm_partials, Kernel::fold_partials, Kernel::clip_coef_of_ranks];
        let weigh = copies.map(|_| Kernel::WeighPartials);
        let scale = (applied == Applied::InPlace).then_some(Kernel::Scale);
        for kernels in [&stages.map(|stage| stage(clip.norm_type))[..], weigh.as_slice(), scale.as_slice()] {
            self.kernels.prepare(kernels, capturing)?;
        }
        let scales = self.workspace.scales(&self.plan, clip.norm_type, capturing)?;
        self.prepare_shards(copies, world_size, capturing)?;
        let slot = self.reports.take(capturing)?;
        let (launcher, sums) = (self.launcher(), self.workspace.sums());
        let shards = self.shards.as_ref().ok_or(NOT_LOADED)?;
        launcher
            .norm_partials(clip.norm_type, sums, scales)
            .and_then(|()| if copies.is_some() { shards.weigh(&launcher, clip, sums) } else { Ok(()) })
            .and_then(|()| {
                let report = self.reports.address(slot);
                shards.fold(&launcher, clip.norm_type, [sums, scales], launcher.num_tiles, MEASURED, report)
            })
            .inspect_err(|_| self.reports.give_back(slot))?;
        Ok(Pending::new(self.reports.clone(), slot, self.plan.clone()).over_ranks())
    }

    fn prepare_shards(&mut self, copies: Option<&[u32]>, world_size: u32, capturing: bool) -> Result<()> {
        let shards = match &mut self.shards {
            Some(shards) => shards,
            None if capturing => return Err(NOT_LOADED),
            none => none.insert(super::driver::KeepsContext::new(Shards::new(&self.stream))),
        };
        shards.prepare(&self.stream, copies, world_size, capturing)
    }

    /// Tells the others that this rank cannot take part.
    fn refuse<E: DeviceAllGather>(&mut self, world_size: u32, ranks: &E) -> Result<()> {
        if is_capturing(&self.stream)? {
            return Ok(()); // nothing can be told now, and the collective would be captured
        }
        self.kernels.prepare(&[Kernel::fold_partials(NormType::L2)], false)?;
        self.prepare_shards(None, world_size, false)?;
        let shards = self.shards.as_ref().ok_or(NOT_LOADED)?;
        shards.fold(&self.launcher(), NormType::L2, [0, 0], 0, REFUSED, 0)?;
        self.exchange(ranks)
    }

    fn exchange<E: DeviceAllGather>(&self, ranks: &E) -> Result<()> {
        let shards = self.shards.as_ref().ok_or(NOT_LOADED)?;
        // SAFETY: the buffers have room for one partial, and for one of each rank; they live as long as the clipper,
        // and every use of them is on its stream.
        let enqueued = unsafe { ranks.all_gather(&self.stream, shards.mine(), shards.all(), NormPartial::BYTES) };
        enqueued.map_err(|error| Error::Exchange { reason: error.to_string() })
    }
}

const NOT_LOADED: Error = Error::CaptureNeedsWarmup { what: "what calls over several ranks need" };

/// What calls over several ranks keep: this rank's partial, those of all, and the copies.
#[derive(Debug)]
pub(super) struct Shards {
    mine: GrowBuffer,
    all: GrowBuffer,
    copies: DeviceTable<u32>,
}

impl Shards {
    fn new(stream: &Arc<CudaStream>) -> Self {
        Self { mine: GrowBuffer::default(), all: GrowBuffer::default(), copies: DeviceTable::new(stream, "the copies") }
    }

    fn prepare(
        &mut self,
        stream: &Arc<CudaStream>,
        copies: Option<&[u32]>,
        world_size: u32,
        capturing: bool,
    ) -> Result<()> {
        let what = "partials of all ranks";
        self.mine.reserve(stream, what, NormPartial::BYTES, capturing)?;
        self.all.reserve(stream, what, world_size as usize * NormPartial::BYTES, capturing)?;
        if let Some(copies) = copies {
            self.copies.set(copies, capturing)?;
        }
        Ok(())
    }

    fn mine(&self) -> u64 {
        self.mine.address()
    }

    fn all(&self) -> u64 {
        self.all.address()
    }

    pub(super) fn device_bytes(&self) -> usize {
        self.mine.bytes() + self.all.bytes() + self.copies.device_bytes()
    }

    pub(super) fn pinned_bytes(&self) -> usize {
        self.copies.pinned_bytes()
    }

    fn weigh(&self, launcher: &Launcher<'_>, clip: &ClipNorm, sums: u64) -> Result<()> {
        let kernel = launcher.kernels.get(Kernel::WeighPartials)?;
        let (copies, norm_type) = (self.copies.address(), clip_params(clip).norm_type);
        let mut args = [arg(launcher.table), arg(&launcher.num_tiles), arg(&copies), arg(&norm_type), arg(&sums)];
        let blocks = launcher.num_tiles.div_ceil(TILE_THREADS as u32);
        // SAFETY: the arguments mirror weigh_partials in kernels/shards.cu; the table of copies has an entry for each
        // tensor, and the sums were written by the launch before.
        unsafe { launch(launcher.stream, "weigh_partials", kernel, (blocks, TILE_THREADS), &mut args) }
    }

    /// `[sums, scales]` to the partial of this rank, and the first bad tile to the report unless that is null.
    fn fold(
        &self,
        launcher: &Launcher<'_>,
        norm_type: NormType,
        [sums, scales]: [u64; 2],
        num_tiles: u32,
        tag: u64,
        report: u64,
    ) -> Result<()> {
        let kernel = launcher.kernels.get(Kernel::fold_partials(norm_type))?;
        let params = clip_params(&ClipNorm::measure_only(norm_type));
        let partial = self.mine();
        let mut args = [
            arg(&sums),
            arg(&scales),
            arg(&num_tiles),
            arg(&params.norm_type),
            arg(&params.p),
            arg(&tag),
            arg(&partial),
            arg(&report),
        ];
        // SAFETY: the arguments mirror fold_partials in kernels/shards.cu; the partials of the tiles were written by
        // the launches before on the same stream, the slot belongs to this call.
        unsafe { launcher.one_block("fold_partials", kernel, &mut args) }
    }

    /// The partials of all ranks to the report.
    fn clip_coef(&self, launcher: &Launcher<'_>, clip: &ClipNorm, world_size: u32, report: u64) -> Result<()> {
        let kernel = launcher.kernels.get(Kernel::clip_coef_of_ranks(clip.norm_type))?;
        let (partials, params): (u64, ClipParams) = (self.all(), clip_params(clip));
        let mut args = [arg(&partials), arg(&world_size), arg(&params), arg(&report)];
        // SAFETY: the arguments mirror clip_coef_of_ranks in kernels/shards.cu; the engine has filled the partials in
        // the order of the stream, the slot belongs to this call.
        unsafe { launcher.one_block("clip_coef_of_ranks", kernel, &mut args) }
    }
}
