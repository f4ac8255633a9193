//! The verbs with more than one norm, on device memory.

use super::clipper::{clip_params, Clipper};
use super::device_table::DeviceTable;
use super::driver::{driver_error, is_capturing, CurrentContext, HomeThread, KeepsContext};
use super::kernel::Kernel;
use super::kernels::Kernels;
use super::launch::{arg, in_place_blocks, launch};
use super::memory::{DeviceBuffer, GrowBuffer};
use super::reports::Applied;
use crate::abi::{
    action, ClampBounds, ClipParams, ReportSlot, ScopedGroup, ScopedHeader, ScopedJobs, ScopedTable, ScopedTensor,
    Stats, StatsSlot, FOLD_THREADS, TILE_THREADS, WARP_THREADS,
};
use crate::adapters::cudarc::{DeviceGrad, DeviceGradMut};
use crate::error::{Error, Result};
use crate::options::{ClipNorm, ClipValue, NonFinite, NormType};
use crate::plan::Plan;
use crate::report::{NormReport, Report, ValueReport};
use crate::scope::{Scope, ScopedReport};
use crate::scoped_plan::ScopedPlan;
use crate::value_bounds;
use cudarc::driver::{result, CudaStream};
use std::marker::PhantomData;
use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

impl Clipper {
    /// The norm of each group of a [`Scope`]; see [`cpu::norms_by`](crate::cpu::norms_by).
    ///
    /// Cost: reads each gradient once; two launches, no wait. A new list, or a new scope, copies two tables to the
    /// device.
    ///
    /// # Errors
    /// As [`clip_grad_norm_by`](Self::clip_grad_norm_by).
    pub fn norms_by<G: DeviceGrad>(
        &mut self,
        grads: &[G],
        scope: &Scope<'_>,
        norm_type: NormType,
    ) -> Result<PendingScoped> {
        let clip = ClipNorm::measure_only(norm_type);
        clip.validate()?;
        self.home.check()?;
        let _current = CurrentContext::enter(self.stream.context())?;
        self.list.gather(grads, &self.stream)?;
        let pending = self.scoped_stages(&scope.only_measured(), &clip, Applied::Nowhere);
        let released = self.list.release(grads, &self.stream); // after an error too: a stage may be running
        pending.and_then(|pending| released.map(|()| pending))
    }

    /// Clips each group of a [`Scope`] by its own norm: each tensor, named groups of tensors, each row; see
    /// [`cpu::clip_grad_norm_by`](crate::cpu::clip_grad_norm_by). The bits are the same.
    ///
    /// Cost: reads each gradient once; reads and writes those of the groups that clip once more. Three launches for any
    /// number of groups, no wait (but [`NonFinite::Error`] waits before the third). A row takes a block of threads, so
    /// rows below 4 KiB leave most of it idle.
    ///
    /// # Errors
    /// As [`clip_grad_norm`](Self::clip_grad_norm), and a scope that does not fit the list: nothing is touched.
    pub fn clip_grad_norm_by<G: DeviceGradMut>(
        &mut self,
        grads: &mut [G],
        scope: &Scope<'_>,
        clip: impl Into<ClipNorm>,
    ) -> Result<PendingScoped> {
        let clip = clip.into();
        clip.validate()?;
        self.home.check()?;
        let _current = CurrentContext::enter(self.stream.context())?;
        self.list.gather_mut(grads, &self.stream)?;
        let pending = self.scoped_stages(scope, &clip, Applied::InPlace);
        let released = self.list.release_mut(grads, &self.stream); // as above
        pending.and_then(|pending| released.map(|()| pending))
    }

    /// What [`clip_grad_norm_by`](Self::clip_grad_norm_by) would multiply each group by, left on the device for an optimizer
    /// that multiplies the gradients itself; see [`cpu::clip_coef_by`](crate::cpu::clip_coef_by). Where its kernel finds
    /// the factor of a group, [`PendingScoped::multiplier_address`] says, and which group a tensor is in, the scope.
    ///
    /// Cost: reads each gradient once, writes nothing; two launches for any number of groups, no wait (but
    /// [`NonFinite::Error`] waits).
    ///
    /// # Errors
    /// As [`clip_grad_norm_by`](Self::clip_grad_norm_by).
    ///
    /// ```no_run
    /// use gradclip::{cuda::{self, Clipper, PendingScoped}, Scope};
    /// let stream = cuda::context(0)?.default_stream();
    /// let grads = [stream.clone_htod(&[3.0f32, 4.0])?, stream.clone_htod(&[0.3f32, 0.4])?];
    /// let mut clipper = Clipper::new(&stream)?;
    /// let clipped = clipper.clip_coef_by(&grads, &Scope::per_tensor(), 1.0)?; // no wait
    /// let (first, step) = (clipped.multiplier_f32_address(0), PendingScoped::ADDRESS_STEP);
    /// // ... the optimizer's kernel, on the same stream, reads the f32 of tensor i at first + i * step ...
    /// # let _ = (first, step);
    /// # Ok::<(), gradclip::Error>(())
    /// ```
    pub fn clip_coef_by<G: DeviceGrad>(
        &mut self,
        grads: &[G],
        scope: &Scope<'_>,
        clip: impl Into<ClipNorm>,
    ) -> Result<PendingScoped> {
        let clip = clip.into();
        clip.validate()?;
        self.home.check()?;
        let _current = CurrentContext::enter(self.stream.context())?;
        self.list.gather(grads, &self.stream)?;
        let pending = self.scoped_stages(scope, &clip, Applied::Nowhere);
        let released = self.list.release(grads, &self.stream); // as above
        pending.and_then(|pending| released.map(|()| pending))
    }

    /// Clips by value with a report for each group of a [`Scope`]: what part of each tensor, named group or row was outside
    /// the bounds; see [`cpu::clip_grad_value_by`](crate::cpu::clip_grad_value_by).
    ///
    /// Cost: that of [`clip_grad_value`](Self::clip_grad_value), reads and writes and two launches, no wait. A new
    /// list, or a new scope, copies two tables to the device.
    ///
    /// # Errors
    /// As [`clip_grad_value`](Self::clip_grad_value), and those of a scope that
    /// [`cpu::clip_grad_value_by`](crate::cpu::clip_grad_value_by) has.
    ///
    /// ```no_run
    /// use gradclip::{cuda::{self, Clipper}, Scope};
    /// let stream = cuda::context(0)?.default_stream();
    /// let mut grads = [stream.clone_htod(&[0.1f32, -7.0])?, stream.clone_htod(&[0.3f32])?];
    /// let mut clipper = Clipper::new(&stream)?;
    /// let clipped = clipper.clip_grad_value_by(&mut grads, &Scope::per_tensor(), 0.5)?; // no wait
    /// assert_eq!(clipped.wait()?.groups[0].clipped_fraction(), 0.5);
    /// # Ok::<(), gradclip::Error>(())
    /// ```
    pub fn clip_grad_value_by<G: DeviceGradMut>(
        &mut self,
        grads: &mut [G],
        scope: &Scope<'_>,
        clip: impl Into<ClipValue>,
    ) -> Result<PendingScoped<ValueReport>> {
        let clip = clip.into();
        clip.validate()?;
        scope.refuse_norms()?;
        self.home.check()?;
        let _current = CurrentContext::enter(self.stream.context())?;
        self.list.gather_mut(grads, &self.stream)?;
        let pending = self.scoped_value_stages(scope, &clip);
        let released = self.list.release_mut(grads, &self.stream); // as above
        pending.and_then(|pending| released.map(|()| pending))
    }

    fn scoped_value_stages(&mut self, scope: &Scope<'_>, clip: &ClipValue) -> Result<PendingScoped<ValueReport>> {
        let capturing = self.prepare_plan()?;
        self.kernels.prepare(&[Kernel::ScopedClamp, Kernel::ScopedClampCounts], capturing)?;
        let scoped = self.scoped.get_or_insert_with(|| KeepsContext::new(ScopedCalls::new(&self.stream)));
        let results = scoped.prepare_clamp(&self.stream, &self.plan, scope, capturing)?;
        let device = Device { kernels: &self.kernels, stream: &self.stream, multiprocessors: self.multiprocessors };
        scoped.clamp(&device, results, &value_bounds::in_each_dtype(clip), capturing)
    }

    fn scoped_stages(&mut self, scope: &Scope<'_>, clip: &ClipNorm, applied: Applied) -> Result<PendingScoped> {
        let capturing = self.prepare_plan()?;
        if capturing && clip.nonfinite == NonFinite::Error {
            return Err(Error::CaptureNeedsWarmup { what: "the wait of NonFinite::Error" });
        }
        let measure =
            [Kernel::scoped_partials, Kernel::scoped_coefs].map(|stage| stage(clip.norm_type, scope.telemetry));
        let scale = (applied == Applied::InPlace).then_some(Kernel::ScopedScale);
        self.kernels.prepare(&measure, capturing)?;
        self.kernels.prepare(scale.as_slice(), capturing)?;
        let scoped = self.scoped.get_or_insert_with(|| KeepsContext::new(ScopedCalls::new(&self.stream)));
        let results = scoped.prepare(&self.stream, &self.plan, scope, clip.norm_type, capturing)?;
        let device = Device { kernels: &self.kernels, stream: &self.stream, multiprocessors: self.multiprocessors };
        let pending = scoped.measure(&device, results, clip, applied, capturing)?;
        if clip.nonfinite == NonFinite::Error {
            let report = pending.wait()?;
            if let Some(group) = report.groups.iter().find(|group| !group.is_finite()) {
                return Err(Error::NonFinite { total_norm: group.total_norm, tensor: group.first_nonfinite });
            }
        }
        if applied == Applied::InPlace {
            scoped.scale(&device, &pending)?;
        }
        Ok(pending)
    }
}

/// Where the stages of scoped calls run. Their kernels have been prepared.
struct Device<'a> {
    kernels: &'a Kernels,
    stream: &'a CudaStream,
    multiprocessors: u32,
}

/// What scoped calls keep: their tables and partials, and the results of the last one.
#[derive(Debug)]
pub(super) struct ScopedCalls {
    tensors: DeviceTable<ScopedTensor>,
    groups: DeviceTable<ScopedGroup>,
    sums: GrowBuffer,
    scales: GrowBuffer,
    tile_stats: GrowBuffer,
    results: Option<SharedResults>,
    /// Written by captured graphs only. Here to be counted.
    retired: Vec<SharedResults>,
    plan: Arc<ScopedPlan>,
    /// Whether the tables on the device are those of the plan.
    has_tables: bool,
    calls: u64,
}

/// Where calls leave their results: the last one's are there. Reports that were not read yet keep the memory.
#[derive(Debug)]
struct Results {
    memory: DeviceBuffer,
    stream: Arc<CudaStream>,
    home: HomeThread,
    captured: AtomicBool,
}

type SharedResults = Arc<KeepsContext<Results>>;

impl Results {
    /// The context of `stream` must be current.
    fn new(stream: &Arc<CudaStream>, bytes: usize) -> Result<Self> {
        let mut memory = DeviceBuffer::new(stream, "reports", bytes)?;
        memory.fill(0)?; // no call has the number 0
        Ok(Self { memory, stream: stream.clone(), home: HomeThread::of(stream), captured: AtomicBool::new(false) })
    }

    fn is_captured(&self) -> bool {
        self.captured.load(Ordering::Relaxed)
    }
}

impl Drop for Results {
    fn drop(&mut self) {
        if self.is_captured() {
            self.memory.leave_to_graphs();
        }
    }
}

impl ScopedCalls {
    fn new(stream: &Arc<CudaStream>) -> Self {
        Self {
            tensors: DeviceTable::new(stream, "the table of tensors"),
            groups: DeviceTable::new(stream, "the table of groups"),
            sums: GrowBuffer::default(),
            scales: GrowBuffer::default(),
            tile_stats: GrowBuffer::default(),
            results: None,
            retired: Vec::new(),
            plan: Arc::default(),
            has_tables: false,
            calls: 0,
        }
    }

    pub(super) fn device_bytes(&self) -> usize {
        self.tensors.device_bytes()
            + self.groups.device_bytes()
            + [&self.sums, &self.scales, &self.tile_stats].map(GrowBuffer::bytes).iter().sum::<usize>()
            + self.results.iter().chain(&self.retired).map(|results| results.memory.bytes()).sum::<usize>()
    }

    pub(super) fn pinned_bytes(&self) -> usize {
        self.tensors.pinned_bytes() + self.groups.pinned_bytes()
    }

    /// Plan, tables and room for one call; where its results go.
    fn prepare(
        &mut self,
        stream: &Arc<CudaStream>,
        list: &Plan,
        scope: &Scope<'_>,
        norm_type: NormType,
        capturing: bool,
    ) -> Result<SharedResults> {
        self.prepare_tables(list, scope, capturing)?;
        let plan = self.plan.clone();
        let tiles = plan.num_tiles as usize;
        self.sums.reserve(stream, "partials", tiles * size_of::<f64>(), capturing)?;
        if norm_type.has_scales(plan.has_f64()) {
            self.scales.reserve(stream, "scales", tiles * size_of::<f64>(), capturing)?;
        }
        if plan.telemetry {
            self.tile_stats.reserve(stream, "telemetry", tiles * size_of::<Stats>(), capturing)?;
        }
        self.room_for_results(stream, Layout::of(&plan).bytes(), capturing)
    }

    /// The same for value clipping.
    fn prepare_clamp(
        &mut self,
        stream: &Arc<CudaStream>,
        list: &Plan,
        scope: &Scope<'_>,
        capturing: bool,
    ) -> Result<SharedResults> {
        self.prepare_tables(list, scope, capturing)?;
        self.sums.reserve(stream, "counts", self.plan.num_tiles as usize * size_of::<u64>(), capturing)?;
        self.room_for_results(stream, Layout::of(&self.plan).bytes(), capturing)
    }

    fn prepare_tables(&mut self, list: &Plan, scope: &Scope<'_>, capturing: bool) -> Result<()> {
        if !self.plan.is_for(list, scope) {
            self.plan = Arc::new(ScopedPlan::new(list, scope)?);
            self.has_tables = false;
        }
        let plan = self.plan.clone();
        if !self.has_tables || capturing {
            self.tensors.set(&plan.tensors, capturing)?;
            self.groups.set(&plan.groups, capturing)?;
            self.has_tables = true;
        }
        Ok(())
    }

    fn room_for_results(&mut self, stream: &Arc<CudaStream>, bytes: usize, capturing: bool) -> Result<SharedResults> {
        let results = match &self.results {
            Some(results) if results.memory.bytes() >= bytes => results.clone(),
            _ if capturing => return Err(Error::CaptureNeedsWarmup { what: "reports" }),
            _ => {
                let grown = Arc::new(KeepsContext::new(Results::new(stream, bytes)?));
                let old = self.results.replace(grown.clone());
                self.retired.extend(old.filter(|old| old.is_captured()));
                grown
            }
        };
        if capturing {
            results.captured.store(true, Ordering::Relaxed);
        }
        Ok(results)
    }

    /// Stages 1 and 2.
    fn measure(
        &mut self,
        device: &Device<'_>,
        results: SharedResults,
        clip: &ClipNorm,
        applied: Applied,
        captured: bool,
    ) -> Result<PendingScoped> {
        let plan = self.plan.clone();
        let table = self.table(&plan);
        let layout = Layout::of(&plan);
        let base = results.memory.address();
        let (sums, tile_stats) = (self.sums.address(), self.tile_stats.address());
        let scales = if clip.norm_type.has_scales(plan.has_f64()) { self.scales.address() } else { 0 };
        let p = clip.norm_type.order();
        let first = [arg(&table), arg(&plan.num_tiles), arg(&sums), arg(&scales)];
        let any_order = usize::from(matches!(clip.norm_type, NormType::P(_)));
        let (last, count) = if plan.telemetry {
            ([arg(&tile_stats), arg(&p)], 5 + any_order)
        } else {
            ([arg(&p), arg(&p)], 4 + any_order)
        };
        let kernel = device.kernels.get(Kernel::scoped_partials(clip.norm_type, plan.telemetry))?;
        let mut args = [first[0], first[1], first[2], first[3], last[0], last[1]];
        // SAFETY: the arguments mirror scoped_partials_* and scoped_stats_* in the kernels; the plan keeps every tile inside
        // its tensor, there is a place for each tile, and the caller of the clipper keeps the tensors alive.
        unsafe {
            launch(device.stream, "scoped_partials", kernel, (plan.num_tiles, TILE_THREADS), &mut args[..count])
        }?;

        let num_stats = if plan.telemetry { plan.tensors.len() as u32 } else { 0 };
        let jobs = ScopedJobs {
            groups: self.groups.address(),
            num_groups: plan.groups.len() as u32,
            num_stats,
            sums,
            scales,
            tile_stats,
            reports: base + layout.reports() as u64,
            tensor_stats: base + layout.tensors() as u64,
        };
        let params: ClipParams = clip_params(clip);
        self.calls += 1;
        let blocks = (jobs.num_groups + num_stats).div_ceil(WARP_THREADS as u32).max(1); // one writes the header
        let mut args = [arg(&table), arg(&jobs), arg(&params), arg(&self.calls), arg(&base)];
        let kernel = device.kernels.get(Kernel::scoped_coefs(clip.norm_type, plan.telemetry))?;
        // SAFETY: the arguments mirror scoped_coefs and its variants in the kernels; the partials are written by the launch
        // before, and the results have room for each group and tensor.
        unsafe { launch(device.stream, "scoped_coefs", kernel, (blocks, FOLD_THREADS), &mut args) }?;
        Ok(PendingScoped { results, plan, call: self.calls, captured, applied, report: PhantomData })
    }

    /// Both stages of value clipping.
    fn clamp(
        &mut self,
        device: &Device<'_>,
        results: SharedResults,
        bounds: &ClampBounds,
        captured: bool,
    ) -> Result<PendingScoped<ValueReport>> {
        let [clamp, clamp_counts] =
            [Kernel::ScopedClamp, Kernel::ScopedClampCounts].map(|kernel| device.kernels.get(kernel));
        let (clamp, clamp_counts) = (clamp?, clamp_counts?);
        let plan = self.plan.clone();
        let (table, counts, base) = (self.table(&plan), self.sums.address(), results.memory.address());
        let blocks = in_place_blocks(plan.num_tiles, device.multiprocessors);
        let mut args = [arg(&table), arg(&plan.num_tiles), arg(bounds), arg(&counts)];
        // SAFETY: the arguments mirror scoped_clamp in kernels/scoped_clamp.cu; the tensors are borrowed mutably by the caller,
        // and do not overlap; there is a place for the counts of each tile.
        unsafe { launch(device.stream, "scoped_clamp", clamp, (blocks, TILE_THREADS), &mut args) }?;
        self.calls += 1;
        let (groups, num_groups) = (self.groups.address(), plan.groups.len() as u32);
        let reports = base + Layout::of(&plan).reports() as u64;
        let blocks = num_groups.div_ceil(WARP_THREADS as u32).max(1); // one writes the header
        let mut args = [arg(&groups), arg(&num_groups), arg(&counts), arg(&reports), arg(&self.calls), arg(&base)];
        // SAFETY: the arguments mirror scoped_clamp_counts there; the counts are written by the launch before, and the
        // results have room for each group.
        unsafe { launch(device.stream, "scoped_clamp_counts", clamp_counts, (blocks, FOLD_THREADS), &mut args) }?;
        let applied = Applied::InPlace;
        Ok(PendingScoped { results, plan, call: self.calls, captured, applied, report: PhantomData })
    }

    /// Stage 3.
    fn scale(&self, device: &Device<'_>, measured: &PendingScoped) -> Result<()> {
        let kernel = device.kernels.get(Kernel::ScopedScale)?;
        let plan = &measured.plan;
        let table = self.table(plan);
        let reports = measured.results.memory.address() + Layout::of(plan).reports() as u64;
        let mut args = [arg(&table), arg(&plan.num_tiles), arg(&reports)];
        let blocks = in_place_blocks(plan.num_tiles, device.multiprocessors);
        // SAFETY: the arguments mirror scoped_scale in kernels/scoped.cu; the tensors are borrowed mutably by the caller, and
        // do not overlap; the launch before wrote the reports.
        unsafe { launch(device.stream, "scoped_scale", kernel, (blocks, TILE_THREADS), &mut args) }
    }

    fn table(&self, plan: &ScopedPlan) -> ScopedTable {
        ScopedTable { tensors: self.tensors.address(), num_tensors: plan.tensors.len() as u32, reserved: 0 }
    }
}

/// Where the results of a call lie, from the start of their buffer: the header, a report for each group, what was seen of
/// each tensor.
struct Layout {
    groups: usize,
    tensors: usize,
}

impl Layout {
    fn of(plan: &ScopedPlan) -> Self {
        Self { groups: plan.groups.len(), tensors: if plan.telemetry { plan.tensors.len() } else { 0 } }
    }
    fn reports(&self) -> usize {
        size_of::<ScopedHeader>()
    }
    fn tensors(&self) -> usize {
        self.reports() + self.groups * size_of::<ReportSlot>()
    }
    fn bytes(&self) -> usize {
        self.tensors() + self.tensors * size_of::<StatsSlot>()
    }
}

/// The result of a scoped call that may still be running. Dropping it costs nothing; the work goes on.
///
/// Only the last scoped call of a clipper can be read, from any thread (but see [`Error::WrongThread`]), also when the
/// clipper is gone. A captured one can be read whenever one of its replays was the last.
#[derive(Clone, Debug)]
pub struct PendingScoped<R = NormReport> {
    results: SharedResults,
    plan: Arc<ScopedPlan>,
    call: u64,
    captured: bool,
    applied: Applied,
    report: PhantomData<R>,
}

/// Where kernels later on the same stream find what was decided for each group (or tensor, or row): what is said of group
/// `index` lies [`ADDRESS_STEP`](Self::ADDRESS_STEP) bytes behind what is said of the one before. `None` beyond the last
/// group.
///
/// There until the next scoped call of the clipper, of any kind, which may overwrite it; and only while the clipper or this
/// value is kept. If the call was captured, as long as the context, until a later scoped call or replay.
impl PendingScoped {
    /// Bytes from the address for one group to that for the next.
    pub const ADDRESS_STEP: u64 = size_of::<ReportSlot>() as u64;

    /// Device address of a group's `total_norm`, an f64.
    #[must_use]
    pub fn total_norm_address(&self, index: usize) -> Option<u64> {
        self.address_of(index, offset_of!(ReportSlot, total_norm))
    }

    /// Device address of a group's `clip_coef`, an f64.
    #[must_use]
    pub fn clip_coef_address(&self, index: usize) -> Option<u64> {
        self.address_of(index, offset_of!(ReportSlot, clip_coef))
    }

    /// Device address of a group's [`multiplier`](NormReport::multiplier), an f64: what an optimizer that multiplies by it
    /// itself is to take after [`Clipper::clip_coef_by`].
    #[must_use]
    pub fn multiplier_address(&self, index: usize) -> Option<u64> {
        self.address_of(index, offset_of!(ReportSlot, multiplier))
    }

    /// Device address of the same as an f32, rounded to nearest; see
    /// [`Pending::multiplier_f32_address`](super::Pending::multiplier_f32_address).
    #[must_use]
    pub fn multiplier_f32_address(&self, index: usize) -> Option<u64> {
        self.address_of(index, offset_of!(ReportSlot, multiplier_f32))
    }

    /// Device address of a group's [`found_inf`](NormReport::found_inf), an f32 that is 1 if its norm is NaN or infinite,
    /// else 0.
    #[must_use]
    pub fn found_inf_address(&self, index: usize) -> Option<u64> {
        self.address_of(index, offset_of!(ReportSlot, found_inf))
    }

    fn address_of(&self, index: usize, field: usize) -> Option<u64> {
        let first = self.results.memory.address() + Layout::of(&self.plan).reports() as u64;
        (index < self.plan.groups.len()).then(|| first + index as u64 * Self::ADDRESS_STEP + field as u64)
    }
}

impl<R: Report> PendingScoped<R> {
    /// Waits for the stream, and reads the reports of all groups.
    ///
    /// Cost: one copy, of 64 bytes and 72 more for each group, with telemetry 40 for each tensor; one synchronisation of
    /// the stream.
    ///
    /// # Errors
    /// [`Error::ReportExpired`] after a later scoped call; [`Error::ReportNotReady`] for a captured call that no replay has
    /// run; [`Error::CaptureNeedsWarmup`] while the stream captures, which goes on; [`Error::WrongThread`] for the
    /// per-thread default stream of another thread; [`Error::OutOfMemory`]; [`Error::Driver`] if the work on the stream
    /// failed.
    pub fn wait(&self) -> Result<ScopedReport<R>> {
        let stream = &self.results.stream;
        self.results.home.check()?;
        let _current = CurrentContext::enter(stream.context())?;
        if is_capturing(stream)? {
            return Err(Error::CaptureNeedsWarmup { what: "the wait for a report" });
        }
        let layout = Layout::of(&self.plan);
        let mut words = zeroes(layout.bytes() / size_of::<u64>())?;
        let target: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
        // All in one copy: a call that another thread makes meanwhile comes before it or after it.
        // SAFETY: the memory is as large as this call's results, and kept by this value; the target lives until the
        // synchronisation below, which happens even if the copy was refused.
        let copied = unsafe { result::memcpy_dtoh_async(target, self.results.memory.address(), stream.cu_stream()) };
        // SAFETY: the stream is alive, held by the results.
        let waited = unsafe { result::stream::synchronize(stream.cu_stream()) };
        copied.map_err(driver_error("copying the reports"))?;
        waited.map_err(driver_error("waiting for the reports"))?;
        let (header, rest) = words.split_at(layout.reports() / size_of::<u64>());
        let (groups, tensors) = rest.split_at(layout.groups * size_of::<ReportSlot>() / size_of::<u64>());
        let last_call = bytemuck::cast_slice::<u64, ScopedHeader>(header)[0].call;
        if last_call != self.call {
            let to_come = self.captured && last_call < self.call;
            return Err(if to_come { Error::ReportNotReady } else { Error::ReportExpired });
        }
        let tensor_of = |tile| self.plan.tensor_of(tile);
        let of_group = |(slot, group): (&ReportSlot, &ScopedGroup)| {
            let mut slot = *slot;
            if self.applied == Applied::Nowhere {
                slot.action = action::KEEP;
            }
            R::from_slot(&slot, group.numel, &tensor_of)
        };
        let groups = bytemuck::cast_slice(groups).iter().zip(&self.plan.groups).map(of_group);
        let tensors = bytemuck::cast_slice::<u64, StatsSlot>(tensors).iter().map(|&slot| slot.into());
        Ok(ScopedReport::new(groups.collect(), tensors.collect(), self.plan.groups_of.clone()))
    }
}

fn zeroes(count: usize) -> Result<Vec<u64>> {
    let mut zeroes = Vec::new();
    let bytes = count.saturating_mul(size_of::<u64>());
    zeroes.try_reserve_exact(count).map_err(|_| Error::OutOfMemory { what: "reports", bytes })?;
    zeroes.resize(count, 0);
    Ok(zeroes)
}
