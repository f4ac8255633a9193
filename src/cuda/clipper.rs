//! The verbs on device memory.

use super::driver::{check_driver, driver_error, is_capturing, CurrentContext, HomeThread, KeepsContext};
use super::kernel::Kernel;
use super::kernels::Kernels;
use super::launch::Launcher;
use super::outputs::Outputs;
use super::reports::{Applied, Pending, ReportRing};
use super::scoped::ScopedCalls;
use super::shards::Shards;
use super::workspace::Workspace;
use crate::abi::{nonfinite, norm_type, ClipParams};
use crate::adapters::cudarc::{DeviceGrad, DeviceGradMut, DeviceList};
use crate::error::{Error, Result};
use crate::options::{ClipNorm, ClipValue, NonFinite, NormType};
use crate::plan::Plan;
use crate::report::{NormReport, ValueReport};
use crate::total_norm::{Source, TotalNorm};
use crate::value_bounds;
use cudarc::driver::sys::CUdevice_attribute;
use cudarc::driver::CudaStream;
use std::sync::Arc;

/// Clips gradients that live on one GPU, in the order of one stream.
///
/// Holds what every call needs again: reusable buffers and the plan of the last list. Create one per stream and keep it.
/// The loaded kernels are shared by all clippers of the same CUDA context. The first call of each kind loads its kernels,
/// and the first call with a list is slower than the rest.
///
/// Each call enqueues at most three kernels and returns. The host never waits, nothing is allocated once a list of that
/// size has been seen, and the calling thread's current CUDA context is left as it was. A call can be captured into a
/// CUDA graph if the same call has been made once before (and, in cudarc's multi-stream mode, with its event tracking
/// off: a capture must not wait for an event from before it).
///
/// A graph may outlive the clipper. What a capture has used is therefore never freed, but left to the context: the
/// workspace and the reports (`device_bytes`), and the kernels, which later clippers of the context use again. So keep and
/// use again a clipper that captures, rather than make one for each capture. And do not drop a clipper while some stream of its
/// context captures: the driver allows neither waiting nor freeing then, and the capture can be lost. The last clipper of a
/// context waits for the context when it is dropped, and then unloads the kernels.
///
/// A clipper can be moved to other threads. One for the per-thread default stream works only in the thread that made it
/// ([`Error::WrongThread`]), but may be dropped in any; that waits for the context.
///
/// ```no_run
/// use gradclip::cuda::{self, Clipper};
/// let context = cuda::context(0)?;
/// let stream = context.default_stream();
/// let mut weight = stream.clone_htod(&[3.0f32, 0.0]).unwrap();
/// let mut bias = stream.clone_htod(&[4.0f32]).unwrap();
///
/// let mut clipper = Clipper::new(&stream)?;
/// let clipped = clipper.clip_grad_norm(&mut [&mut weight, &mut bias], 1.0)?; // no wait
/// println!("{}", clipped.wait()?.total_norm); // 5
/// # Ok::<(), gradclip::Error>(())
/// ```
#[derive(Debug)]
pub struct Clipper {
    pub(super) stream: Arc<CudaStream>,
    pub(super) home: HomeThread,
    pub(super) kernels: Arc<KeepsContext<Kernels>>,
    pub(super) workspace: KeepsContext<Workspace>,
    outputs: KeepsContext<Outputs>,
    pub(super) reports: Arc<ReportRing>,
    pub(super) plan: Arc<Plan>,
    pub(super) list: DeviceList,
    pub(super) multiprocessors: u32,
    /// From the first call with a [`Scope`](crate::Scope) on.
    pub(super) scoped: Option<KeepsContext<ScopedCalls>>,
    /// From the first call over several ranks on.
    pub(super) shards: Option<KeepsContext<Shards>>,
}

impl Clipper {
    /// A clipper for `stream`, where its work will be enqueued.
    ///
    /// Cost: 36 KiB of device memory. Loads no kernel: a call loads those that it launches, unless a clipper of the same
    /// context has. At its first load the driver compiles a kernel for its GPU, and keeps the result on disk for later
    /// processes. The README has how much code each call loads.
    ///
    /// # Errors
    /// [`Error::DriverMissing`], [`Error::DriverTooOld`], [`Error::GpuTooOld`], [`Error::OutOfMemory`],
    /// [`Error::CaptureNeedsWarmup`] while the stream captures, [`Error::Driver`].
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        check_driver()?;
        let context = stream.context();
        let _current = CurrentContext::enter(context)?;
        if is_capturing(stream)? {
            return Err(Error::CaptureNeedsWarmup { what: "the clipper" });
        }
        let multiprocessors = context
            .attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(driver_error("cuDeviceGetAttribute"))?;
        Ok(Self {
            stream: stream.clone(),
            home: HomeThread::of(stream),
            kernels: Kernels::of(context)?,
            workspace: KeepsContext::new(Workspace::new(stream)),
            outputs: KeepsContext::new(Outputs::new(stream)),
            reports: Arc::new(ReportRing::new(stream)?),
            plan: Arc::new(Plan::default()),
            list: DeviceList::default(),
            scoped: None,
            shards: None,
            multiprocessors: u32::try_from(multiprocessors).unwrap_or(1).max(1),
        })
    }

    /// Another clipper for the same stream, with the kernels of this one. The context is current.
    pub(super) fn sibling(&self) -> Result<Self> {
        if is_capturing(&self.stream)? {
            return Err(Error::CaptureNeedsWarmup { what: "the running norm" });
        }
        Ok(Self {
            stream: self.stream.clone(),
            home: HomeThread::of(&self.stream),
            kernels: self.kernels.clone(),
            workspace: KeepsContext::new(Workspace::new(&self.stream)),
            outputs: KeepsContext::new(Outputs::new(&self.stream)),
            reports: Arc::new(ReportRing::new(&self.stream)?),
            plan: Arc::default(),
            list: DeviceList::default(),
            scoped: None,
            shards: None,
            multiprocessors: self.multiprocessors,
        })
    }

    /// Norm over all gradients together; see [`cpu::total_norm`](crate::cpu::total_norm) for what it is.
    ///
    /// Cost: reads each gradient once; two launches.
    ///
    /// # Errors
    /// As [`clip_grad_norm`](Self::clip_grad_norm).
    pub fn total_norm<G: DeviceGrad>(&mut self, grads: &[G], norm_type: NormType) -> Result<Pending<NormReport>> {
        let clip = ClipNorm::measure_only(norm_type);
        clip.validate()?;
        self.home.check()?;
        let _current = CurrentContext::enter(self.stream.context())?;
        self.list.gather(grads, &self.stream)?;
        let pending = self.norm_stages(&clip, Applied::Nowhere);
        // After an error too: a stage that was launched before it may still be running.
        let released = self.list.release(grads, &self.stream);
        pending.and_then(|pending| released.map(|()| pending))
    }

    /// Scales all gradients so that their norm together is at most `max_norm`. Formula, options and policies are those
    /// of [`cpu::clip_grad_norm`](crate::cpu::clip_grad_norm), and so are the bits.
    ///
    /// Cost: reads each gradient once; if it clips, reads and writes each once more. Three launches, no wait (but
    /// [`NonFinite::Error`] has to wait for the norm).
    ///
    /// # Errors
    /// A bad threshold, order or list, [`Error::WrongThread`]: nothing is touched. [`Error::CaptureNeedsWarmup`] and
    /// [`Error::NoReportSlot`] during capture. [`Error::Driver`] if a launch was refused: nothing is touched
    /// then either, since the last of the three launches is the only one that writes.
    pub fn clip_grad_norm<G: DeviceGradMut>(
        &mut self,
        grads: &mut [G],
        clip: impl Into<ClipNorm>,
    ) -> Result<Pending<NormReport>> {
        let clip = clip.into();
        clip.validate()?;
        self.home.check()?;
        let _current = CurrentContext::enter(self.stream.context())?;
        self.list.gather_mut(grads, &self.stream)?;
        let pending = self.norm_stages(&clip, Applied::InPlace);
        let released = self.list.release_mut(grads, &self.stream); // after an error too, as above
        let pending = pending?;
        released?;
        finish(pending, &clip)
    }

    /// The same out of place: clipped gradients go to `outputs`, one for each gradient, of its type or f32. The gradients
    /// are only read. What is written, and when, is what [`cpu::clip_grad_norm_into`](crate::cpu::clip_grad_norm_into)
    /// says, bit for bit.
    ///
    /// Cost: reads each gradient twice, writes each output once. Three launches, no wait (but [`NonFinite::Error`] has to
    /// wait for the norm). The outputs' addresses, 16 bytes a tensor, are copied to the device when they are others than
    /// last time. Any alignment works; where that of an output, in units of 16 bytes (8 from f64 to f32), is not that of
    /// its gradient, the load instructions of the last stage double, its traffic with memory does not.
    ///
    /// # Errors
    /// As [`clip_grad_norm`](Self::clip_grad_norm), and those of
    /// [`cpu::clip_grad_norm_into`](crate::cpu::clip_grad_norm_into). No output is touched, unless the error is
    /// [`Error::Driver`] from work that was launched.
    ///
    /// ```no_run
    /// use gradclip::cuda::{self, Clipper};
    /// use half::bf16;
    /// let stream = cuda::context(0)?.default_stream();
    /// let grads = [stream.clone_htod(&[bf16::from_f32(3.0), bf16::from_f32(4.0)])?];
    /// let mut master_grads = [stream.alloc_zeros::<f32>(2)?];
    /// let mut clipper = Clipper::new(&stream)?;
    /// let pending = clipper.clip_grad_norm_into(&grads, &mut master_grads, 1.0)?; // no wait
    /// assert_eq!(stream.clone_dtoh(&master_grads[0])?, [0.6, 0.8]);
    /// # Ok::<(), gradclip::Error>(())
    /// ```
    pub fn clip_grad_norm_into<G: DeviceGrad, O: DeviceGradMut>(
        &mut self,
        grads: &[G],
        outputs: &mut [O],
        clip: impl Into<ClipNorm>,
    ) -> Result<Pending<NormReport>> {
        let clip = clip.into();
        clip.validate()?;
        self.home.check()?;
        let _current = CurrentContext::enter(self.stream.context())?;
        self.list.gather(grads, &self.stream)?;
        self.outputs.gather(outputs, &self.stream)?;
        let pending = self.norm_stages(&clip, Applied::OutOfPlace(clip.nonfinite));
        let released = self.list.release(grads, &self.stream); // after an error too, as above
        let outputs_released = self.outputs.release(outputs, &self.stream);
        let pending = pending?;
        released.and(outputs_released)?;
        finish(pending, &clip)
    }

    /// Scales the gradients by a norm that the caller has, as a number or on the device; see
    /// [`cpu::clip_with_norm`](crate::cpu::clip_with_norm), whose formula and bits these are.
    ///
    /// The norm is an `f64`, the report of an earlier call of this clipper (`&Pending<NormReport>`), or lies at a device
    /// address ([`TotalNorm::at`]); on the device a negative one counts as NaN. It is that of the gradients as they are:
    /// with a [`loss_scale`](ClipNorm::loss_scale), still multiplied by it, as [`total_norm`](Self::total_norm) finds it.
    ///
    /// Cost: within the threshold, reads and writes nothing; else reads and writes each gradient once. Two launches, no
    /// wait (but [`NonFinite::Error`] has to wait for the norm).
    ///
    /// # Errors
    /// As [`clip_grad_norm`](Self::clip_grad_norm); a norm that is negative. [`Error::NormOutOfReach`] for the report of
    /// another clipper, and during capture for that of a call that was not captured; [`Error::ReportExpired`].
    ///
    /// ```no_run
    /// use gradclip::{cuda::{self, Clipper}, NormType};
    /// let stream = cuda::context(0)?.default_stream();
    /// let mut grads = [stream.clone_htod(&[3.0f32, 4.0])?];
    /// let mut clipper = Clipper::new(&stream)?;
    /// let norm = clipper.total_norm(&grads, NormType::L2)?;
    /// clipper.clip_with_norm(&mut grads, &norm, 1.0)?; // the norm stays on the device
    /// clipper.clip_with_norm(&mut grads, norm.wait()?.total_norm, 1.0)?; // or comes from the host
    /// # Ok::<(), gradclip::Error>(())
    /// ```
    pub fn clip_with_norm<'a, G: DeviceGradMut>(
        &mut self,
        grads: &mut [G],
        total_norm: impl Into<TotalNorm<'a>>,
        clip: impl Into<ClipNorm>,
    ) -> Result<Pending<NormReport>> {
        let (total_norm, clip) = (total_norm.into(), clip.into());
        clip.validate()?;
        total_norm.validate()?;
        self.home.check()?;
        let _current = CurrentContext::enter(self.stream.context())?;
        self.list.gather_mut(grads, &self.stream)?;
        let pending = self.given_norm_stages(total_norm, &clip);
        let released = self.list.release_mut(grads, &self.stream); // after an error too, as above
        let pending = pending?;
        released?;
        finish(pending, &clip)
    }

    /// What [`clip_grad_norm`](Self::clip_grad_norm) would multiply the gradients by, left on the device for an optimizer
    /// that multiplies them itself; see [`cpu::clip_coef`](crate::cpu::clip_coef), and there what it gets by each policy.
    ///
    /// [`Pending::multiplier_address`] and [`Pending::multiplier_f32_address`] are where the optimizer's kernel reads the
    /// factor, [`Pending::found_inf_address`] whether it has to leave the step out. The example `fused_adamw` has such a
    /// kernel.
    ///
    /// Cost: reads each gradient once, writes nothing; two launches, no wait (but [`NonFinite::Error`] waits).
    ///
    /// # Errors
    /// As [`clip_grad_norm`](Self::clip_grad_norm).
    ///
    /// ```no_run
    /// use gradclip::{cuda::{self, Clipper}, ClipNorm};
    /// let stream = cuda::context(0)?.default_stream();
    /// let grads = [stream.clone_htod(&[3.0f32, 4.0])?];
    /// let mut clipper = Clipper::new(&stream)?;
    /// let clipped = clipper.clip_coef(&grads, ClipNorm::new(1.0).loss_scale(1024.0))?;
    /// let (multiplier, found_inf) = (clipped.multiplier_f32_address(), clipped.found_inf_address());
    /// // ... the optimizer's kernel, on the same stream, reads an f32 at each ...
    /// # let _ = (multiplier, found_inf);
    /// # Ok::<(), gradclip::Error>(())
    /// ```
    pub fn clip_coef<G: DeviceGrad>(&mut self, grads: &[G], clip: impl Into<ClipNorm>) -> Result<Pending<NormReport>> {
        let clip = clip.into();
        clip.validate()?;
        self.home.check()?;
        let _current = CurrentContext::enter(self.stream.context())?;
        self.list.gather(grads, &self.stream)?;
        let pending = self.norm_stages(&clip, Applied::Nowhere);
        let released = self.list.release(grads, &self.stream); // after an error too, as above
        let pending = pending?;
        released?;
        finish(pending, &clip)
    }

    /// Limits each element to `[-v, v]`, or to the bounds of a [`ClipValue`]; see
    /// [`cpu::clip_grad_value`](crate::cpu::clip_grad_value).
    ///
    /// Cost: reads each gradient once, writes only where something changes. Two launches, no wait.
    ///
    /// # Errors
    /// A bad value or list, [`Error::WrongThread`]: nothing is touched. [`Error::CaptureNeedsWarmup`] and
    /// [`Error::NoReportSlot`] during capture. [`Error::Driver`] if a launch was refused; if it was the second
    /// one, the gradients are clipped but the counts are lost.
    pub fn clip_grad_value<G: DeviceGradMut>(
        &mut self,
        grads: &mut [G],
        clip: impl Into<ClipValue>,
    ) -> Result<Pending<ValueReport>> {
        let clip = clip.into();
        clip.validate()?;
        self.home.check()?;
        let _current = CurrentContext::enter(self.stream.context())?;
        self.list.gather_mut(grads, &self.stream)?;
        let pending = self.value_stages(&clip);
        let released = self.list.release_mut(grads, &self.stream); // after an error too, as above
        pending.and_then(|pending| released.map(|()| pending))
    }

    /// Device memory this clipper holds, in bytes: at most 32 a tensor, 16 for each 32 KiB of gradients, and 36 KiB for
    /// reports; 16 a tensor more once there were outputs; after a call over several ranks 32 for each of them and one more,
    /// and 4 a tensor with copies.
    #[must_use]
    pub fn device_bytes(&self) -> usize {
        let scoped = self.scoped.as_ref().map_or(0, |scoped| scoped.device_bytes());
        let shards = self.shards.as_ref().map_or(0, |shards| shards.device_bytes());
        self.workspace.device_bytes() + self.outputs.device_bytes() + self.reports.bytes() + scoped + shards
    }

    /// Pinned host memory this clipper holds, in bytes: none for lists of up to 160 tensors without
    /// outputs.
    #[must_use]
    pub fn pinned_bytes(&self) -> usize {
        let scoped = self.scoped.as_ref().map_or(0, |scoped| scoped.pinned_bytes());
        let shards = self.shards.as_ref().map_or(0, |shards| shards.pinned_bytes());
        self.workspace.pinned_bytes() + self.outputs.pinned_bytes() + scoped + shards
    }

    /// The stream that all work goes to.
    #[must_use]
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The same stream as another object of cudarc's, maybe of another object for the same context: from here on that one
    /// decides which events are waited for and recorded. What is held already goes on holding the first one.
    pub(super) fn go_on_with(&mut self, stream: &Arc<CudaStream>) -> Result<()> {
        if !Arc::ptr_eq(&self.stream, stream) {
            let _current = CurrentContext::save()?; // the last owner of a context object makes it current
            self.stream = stream.clone();
        }
        Ok(())
    }

    fn norm_stages(&mut self, clip: &ClipNorm, applied: Applied) -> Result<Pending<NormReport>> {
        let capturing = self.prepare_norm(clip)?;
        let stage_3 = match applied {
            Applied::InPlace => Some(Kernel::Scale),
            Applied::OutOfPlace(_) => Some(Kernel::ScaleInto),
            Applied::Nowhere => None,
        };
        let stages = [Kernel::norm_partials(clip.norm_type), Kernel::clip_coef(clip.norm_type)];
        self.kernels.prepare(&stages, capturing)?;
        self.kernels.prepare(stage_3.as_slice(), capturing)?;
        let scales = self.workspace.scales(&self.plan, clip.norm_type, capturing)?;
        let outputs = match applied {
            Applied::OutOfPlace(_) => {
                Some(self.outputs.prepare(self.list.tensors(), &self.plan, &self.stream, capturing)?)
            }
            _ => None,
        };
        let slot = self.reports.take(capturing)?;
        let report = self.reports.address(slot);
        let sums = self.workspace.sums();
        let params = clip_params(clip);
        let launcher = self.launcher();
        launcher
            .norm_partials(clip.norm_type, sums, scales)
            .and_then(|()| launcher.clip_coef(clip.norm_type, &params, [sums, scales], self.plan.numel(), report))
            .inspect_err(|_| self.reports.give_back(slot))?;
        // The slot stays taken after an error: a graph may write it by now.
        match (applied, outputs) {
            (Applied::InPlace, _) => launcher.scale(report)?,
            (_, Some(outputs)) => launcher.scale_into(outputs, params.nonfinite == nonfinite::SKIP, report)?,
            _ => {}
        }
        Ok(Pending::new(self.reports.clone(), slot, self.plan.clone()).applied(applied))
    }

    fn given_norm_stages(&mut self, total_norm: TotalNorm<'_>, clip: &ClipNorm) -> Result<Pending<NormReport>> {
        let capturing = self.prepare_norm(clip)?;
        self.kernels.prepare(&[Kernel::ClipCoefOfNorm, Kernel::ScaleAny], capturing)?;
        let (norm, norm_at) = match total_norm.0 {
            Source::Value(norm) => (norm, 0),
            Source::Address(address, _) => (0.0, address),
            Source::Report(pending) => (0.0, pending.norm_for(&self.reports, capturing)?),
        };
        let slot = self.reports.take(capturing)?;
        let report = self.reports.address(slot);
        let launcher = self.launcher();
        launcher
            .clip_coef_of_norm(&clip_params(clip), norm, norm_at, report)
            .inspect_err(|_| self.reports.give_back(slot))?;
        launcher.scale_any(report)?; // the slot stays taken, as above
        Ok(Pending::new(self.reports.clone(), slot, self.plan.clone()))
    }

    fn value_stages(&mut self, clip: &ClipValue) -> Result<Pending<ValueReport>> {
        let capturing = self.prepare()?;
        self.kernels.prepare(&[Kernel::Clamp, Kernel::ClampCounts], capturing)?;
        let slot = self.reports.take(capturing)?;
        let launcher = self.launcher();
        let counts = self.workspace.sums();
        launcher
            .clamp(&value_bounds::in_each_dtype(clip), counts)
            .and_then(|()| launcher.clamp_counts(counts, self.reports.address(slot)))
            .inspect_err(|_| self.reports.give_back(slot))?;
        Ok(Pending::new(self.reports.clone(), slot, self.plan.clone()))
    }

    /// [`prepare`](Self::prepare), for a call that may have to wait.
    pub(super) fn prepare_norm(&mut self, clip: &ClipNorm) -> Result<bool> {
        let capturing = self.prepare()?;
        if capturing && clip.nonfinite == NonFinite::Error {
            return Err(Error::CaptureNeedsWarmup { what: "the wait of NonFinite::Error" });
        }
        Ok(capturing)
    }

    /// Plan and workspace for the gathered list; whether the stream is capturing.
    fn prepare(&mut self) -> Result<bool> {
        let capturing = self.prepare_plan()?;
        self.workspace.prepare(&self.plan, capturing)?;
        Ok(capturing)
    }

    /// Plan for the gathered list; whether the stream is capturing.
    pub(super) fn prepare_plan(&mut self) -> Result<bool> {
        let capturing = is_capturing(&self.stream)?;
        let same_list = self.plan.is_for(self.list.tensors());
        if !(same_list && self.list.has_known_raw_pointers()) {
            self.list.check_raw_pointers(&self.stream)?;
            if !same_list {
                self.take_plan()?;
            }
            self.list.remember_raw_pointers();
        }
        Ok(capturing)
    }

    fn take_plan(&mut self) -> Result<()> {
        self.outputs.forget_gradients();
        if let Some(plan) = Arc::get_mut(&mut self.plan) {
            return plan.update(self.list.tensors());
        }
        let mut plan = Plan::default(); // a report still refers to the old one
        plan.update(self.list.tensors())?;
        self.plan = Arc::new(plan);
        Ok(())
    }

    pub(super) fn launcher(&self) -> Launcher<'_> {
        Launcher {
            kernels: &self.kernels,
            stream: &self.stream,
            multiprocessors: self.multiprocessors,
            table: self.workspace.table(),
            num_tiles: self.plan.num_tiles(),
        }
    }
}

/// [`NonFinite::Error`] is to be told of the norm.
pub(super) fn finish(pending: Pending<NormReport>, clip: &ClipNorm) -> Result<Pending<NormReport>> {
    if clip.nonfinite == NonFinite::Error {
        let report = pending.wait()?;
        if report.found_inf {
            return Err(Error::NonFinite { total_norm: report.total_norm, tensor: report.first_nonfinite });
        }
    }
    Ok(pending)
}

pub(super) fn clip_params(clip: &ClipNorm) -> ClipParams {
    ClipParams {
        max_norm: clip.max_norm,
        max_norm_at: clip.max_norm_at,
        eps: clip.eps,
        p: clip.norm_type.order(),
        loss_scale: clip.loss_scale,
        loss_scale_at: clip.loss_scale_at,
        norm_type: match clip.norm_type {
            NormType::L1 => norm_type::L1,
            NormType::L2 => norm_type::L2,
            NormType::Inf => norm_type::INF,
            NormType::P(_) => norm_type::P,
            NormType::Rms => norm_type::RMS,
        },
        nonfinite: match clip.nonfinite {
            NonFinite::Skip | NonFinite::Error => nonfinite::SKIP,
            NonFinite::Zero => nonfinite::ZERO,
            NonFinite::Propagate => nonfinite::PROPAGATE,
        },
    }
}
