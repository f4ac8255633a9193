//! The verbs with more than one norm, on device memory.

use super::clipper::{clip_params, Clipper};
use super::device_table::DeviceTable;
use super::driver::{driver_error, is_capturing, CurrentContext, HomeThread, KeepsContext};
use super::kernels::ScopedKernels;
use super::launch::{arg, in_place_blocks, launch};
use super::memory::GrowBuffer;
use crate::abi::{
    ClipParams, ReportSlot, ScopedGroup, ScopedHeader, ScopedJobs, ScopedTable, ScopedTensor, Stats, StatsSlot,
    FOLD_THREADS, TILE_THREADS, WARP_THREADS,
};
use crate::adapters::cudarc::{DeviceGrad, DeviceGradMut};
use crate::error::{Error, Result};
use crate::options::{ClipNorm, NonFinite, NormType};
use crate::plan::Plan;
use crate::report::{NormReport, Report};
use crate::scope::{Scope, ScopedReport};
use crate::scoped_plan::ScopedPlan;
use bytemuck::Zeroable;
use cudarc::driver::{result, CudaStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

impl Clipper {
    /// The norm of each group of a [`Scope`]; see [`cpu::norms_by`](crate::cpu::norms_by).
    ///
    /// Cost: reads each gradient once; two launches, no wait; thresholds of the scope do not matter. The first such call of a clipper loads its kernels; a new
    /// list, or a new scope, copies two tables to the device.
    ///
    /// # Errors
    /// As [`clip_grad_norm_by`](Self::clip_grad_norm_by).
    pub fn norms_by<G: DeviceGrad>(
        &mut self,
        grads: &[G],
        scope: &Scope<'_>,
        norm_type: NormType,
    ) -> Result<PendingScoped> {
        self.home.check()?;
        let _current = CurrentContext::enter(self.stream.context())?;
        self.list.gather(grads, &self.stream)?;
        let pending = self.scoped_stages(&scope.without_thresholds(), &ClipNorm::measure_only(norm_type), false);
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
        let pending = self.scoped_stages(scope, &clip, true);
        let released = self.list.release_mut(grads, &self.stream); // as above
        pending.and_then(|pending| released.map(|()| pending))
    }

    fn scoped_stages(&mut self, scope: &Scope<'_>, clip: &ClipNorm, apply: bool) -> Result<PendingScoped> {
        let capturing = self.prepare_plan()?;
        if capturing && clip.nonfinite == NonFinite::Error {
            return Err(Error::CaptureNeedsWarmup { what: "the wait of NonFinite::Error" });
        }
        let scoped = match &mut self.scoped {
            Some(scoped) => scoped,
            None if capturing => return Err(Error::CaptureNeedsWarmup { what: "the kernels of scoped calls" }),
            none => none.insert(KeepsContext::new(ScopedCalls::new(&self.stream)?)),
        };
        let plan = scoped.prepare(&self.stream, &self.plan, scope, capturing)?;
        let pending = scoped.measure(&self.stream, plan, clip)?;
        if clip.nonfinite == NonFinite::Error {
            let report = pending.wait()?;
            if let Some(group) = report.groups.iter().find(|group| !group.is_finite()) {
                return Err(Error::NonFinite { total_norm: group.total_norm, tensor: group.first_nonfinite });
            }
        }
        if apply {
            scoped.scale(&self.stream, &pending.plan, self.multiprocessors)?;
        }
        Ok(pending)
    }
}

/// What scoped calls keep: their kernels, tables and partials, and the results of the last one.
#[derive(Debug)]
pub(super) struct ScopedCalls {
    kernels: ScopedKernels,
    tensors: DeviceTable<ScopedTensor>,
    groups: DeviceTable<ScopedGroup>,
    sums: GrowBuffer,
    scales: GrowBuffer,
    tile_stats: GrowBuffer,
    results: Arc<KeepsContext<Results>>,
    plan: Arc<ScopedPlan>,
    calls: u64,
}

/// Where the results of the last call are. Reports that were not read yet refer to it.
#[derive(Debug)]
struct Results {
    stream: Arc<CudaStream>,
    home: HomeThread,
    buffer: Mutex<GrowBuffer>,
}

impl Results {
    /// The buffer is only looked at and replaced under the lock, so a panic elsewhere leaves it whole.
    fn lock(&self) -> MutexGuard<'_, GrowBuffer> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ScopedCalls {
    /// The context of `stream` must be current.
    fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        Ok(Self {
            kernels: ScopedKernels::load(stream.context())?,
            tensors: DeviceTable::new(stream, "the table of tensors"),
            groups: DeviceTable::new(stream, "the table of groups"),
            sums: GrowBuffer::default(),
            scales: GrowBuffer::default(),
            tile_stats: GrowBuffer::default(),
            results: Arc::new(KeepsContext::new(Results {
                stream: stream.clone(),
                home: HomeThread::of(stream),
                buffer: Mutex::default(),
            })),
            plan: Arc::default(),
            calls: 0,
        })
    }

    pub(super) fn device_bytes(&self) -> usize {
        self.tensors.device_bytes()
            + self.groups.device_bytes()
            + [&self.sums, &self.scales, &self.tile_stats].map(GrowBuffer::bytes).iter().sum::<usize>()
            + self.results.lock().bytes()
    }

    pub(super) fn pinned_bytes(&self) -> usize {
        self.tensors.pinned_bytes() + self.groups.pinned_bytes()
    }

    fn prepare(
        &mut self,
        stream: &Arc<CudaStream>,
        list: &Plan,
        scope: &Scope<'_>,
        capturing: bool,
    ) -> Result<Arc<ScopedPlan>> {
        if !self.plan.is_for(list, scope) {
            self.plan = Arc::new(ScopedPlan::new(list, scope)?);
        }
        let plan = self.plan.clone();
        let tiles = plan.num_tiles as usize;
        self.tensors.set(&plan.tensors, capturing)?;
        self.groups.set(&plan.groups, capturing)?;
        self.sums.reserve(stream, "partials", tiles * size_of::<f64>(), capturing)?;
        if plan.has_f64() {
            self.scales.reserve(stream, "scales", tiles * size_of::<i32>(), capturing)?;
        }
        if plan.telemetry {
            self.tile_stats.reserve(stream, "telemetry", tiles * size_of::<Stats>(), capturing)?;
        }
        let mut results = self.results.lock();
        if results.reserve(stream, "reports", Layout::of(&plan).bytes(), capturing)? {
            results.fill(0)?; // no call has the number 0
        }
        drop(results);
        if capturing {
            self.kernels.leave_to_graphs();
        }
        Ok(plan)
    }

    /// Stages 1 and 2.
    fn measure(&mut self, stream: &Arc<CudaStream>, plan: Arc<ScopedPlan>, clip: &ClipNorm) -> Result<PendingScoped> {
        let table = self.table(&plan);
        let layout = Layout::of(&plan);
        let base = self.results.lock().address();
        let (sums, tile_stats) = (self.sums.address(), self.tile_stats.address());
        let scales = if plan.has_f64() { self.scales.address() } else { 0 };
        let mut args = [arg(&table), arg(&plan.num_tiles), arg(&sums), arg(&scales), arg(&tile_stats)];
        let (kernel, args) = if plan.telemetry {
            (self.kernels.stats(clip.norm_type), &mut args[..])
        } else {
            (self.kernels.partials(clip.norm_type), &mut args[..4])
        };
        // SAFETY: the arguments mirror scoped_partials_* and scoped_stats_* in the kernels; the plan keeps every tile inside
        // its tensor, there is a place for each tile, and the caller of the clipper keeps the tensors alive.
        unsafe { launch(stream, "scoped_partials", kernel, (plan.num_tiles, TILE_THREADS), args) }?;

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
        // SAFETY: the arguments mirror scoped_coefs in kernels/scoped.cu; the partials are written by the launch before, and
        // the results have room for each group and tensor.
        unsafe { launch(stream, "scoped_coefs", self.kernels.coefs, (blocks, FOLD_THREADS), &mut args) }?;
        Ok(PendingScoped { results: self.results.clone(), base, plan, call: self.calls })
    }

    /// Stage 3.
    fn scale(&self, stream: &CudaStream, plan: &ScopedPlan, multiprocessors: u32) -> Result<()> {
        let table = self.table(plan);
        let reports = self.results.lock().address() + Layout::of(plan).reports() as u64;
        let mut args = [arg(&table), arg(&plan.num_tiles), arg(&reports)];
        let blocks = in_place_blocks(plan.num_tiles, multiprocessors);
        // SAFETY: the arguments mirror scoped_scale in kernels/scoped.cu; the tensors are borrowed mutably by the caller, and
        // do not overlap; the launch before wrote the reports.
        unsafe { launch(stream, "scoped_scale", self.kernels.scale, (blocks, TILE_THREADS), &mut args) }
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
/// Only the last scoped call of a clipper can be read. A captured one can be after any replay that was the last.
#[derive(Clone, Debug)]
pub struct PendingScoped {
    results: Arc<KeepsContext<Results>>,
    /// Address of `results` when the call was made.
    base: u64,
    plan: Arc<ScopedPlan>,
    call: u64,
}

impl PendingScoped {
    /// Waits for the stream, and reads the reports of all groups.
    ///
    /// Cost: one copy of 72 bytes for each group and 40 for each tensor, one synchronisation of the stream.
    ///
    /// # Errors
    /// [`Error::ReportExpired`] after a later scoped call, and for a captured call that has not run;
    /// [`Error::CaptureNeedsWarmup`] while the stream captures, which goes on; [`Error::WrongThread`] for the per-thread
    /// default stream of another thread; [`Error::Driver`] if the work on the stream failed.
    pub fn wait(&self) -> Result<ScopedReport> {
        let stream = &self.results.stream;
        self.results.home.check()?;
        let _current = CurrentContext::enter(stream.context())?;
        if is_capturing(stream)? {
            return Err(Error::CaptureNeedsWarmup { what: "the wait for a report" });
        }
        let layout = Layout::of(&self.plan);
        let mut header = [ScopedHeader::zeroed()];
        let mut groups = zeroes::<ReportSlot>(layout.groups)?;
        let mut tensors = zeroes::<StatsSlot>(layout.tensors)?;
        let results = self.results.lock(); // no call replaces the buffer while it is read
        if results.address() != self.base {
            return Err(Error::ReportExpired);
        }
        let parts: [(&mut [u8], usize); 3] = [
            (bytemuck::cast_slice_mut(&mut groups), layout.reports()),
            (bytemuck::cast_slice_mut(&mut tensors), layout.tensors()),
            (bytemuck::cast_slice_mut(&mut header), 0), // last: it says whose the rest is
        ];
        let mut copied = Ok(());
        for (target, offset) in parts.into_iter().filter(|(target, _)| !target.is_empty()) {
            // SAFETY: the part lies inside the buffer, which the lock keeps; the target lives until the synchronisation
            // below, which happens even if a copy was refused.
            let copy = unsafe { result::memcpy_dtoh_async(target, self.base + offset as u64, stream.cu_stream()) };
            copied = copied.and(copy);
        }
        // SAFETY: the stream is alive, held here.
        let waited = unsafe { result::stream::synchronize(stream.cu_stream()) };
        copied.map_err(driver_error("copying the reports"))?;
        waited.map_err(driver_error("waiting for the reports"))?;
        if header[0].call != self.call {
            return Err(Error::ReportExpired);
        }
        let groups = groups.iter().map(|slot| NormReport::from_slot(slot, &|tile| self.plan.tensor_of(tile)));
        let tensors = tensors.into_iter().map(Into::into);
        Ok(ScopedReport::new(groups.collect(), tensors.collect(), self.plan.groups_of.clone()))
    }
}

fn zeroes<T: Zeroable + Clone>(count: usize) -> Result<Vec<T>> {
    let mut zeroes = Vec::new();
    let bytes = count.saturating_mul(size_of::<T>());
    zeroes.try_reserve_exact(count).map_err(|_| Error::OutOfMemory { what: "reports", bytes })?;
    zeroes.resize(count, T::zeroed());
    Ok(zeroes)
}
