//! The verbs with more than one norm, on device memory.

use super::clipper::{clip_params, Clipper};
use super::device_table::DeviceTable;
use super::driver::{driver_error, is_capturing, CurrentContext, HomeThread, KeepsContext};
use super::kernels::ScopedKernels;
use super::launch::{arg, in_place_blocks, launch};
use super::memory::{DeviceBuffer, GrowBuffer};
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
use cudarc::driver::{result, CudaStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

impl Clipper {
    /// The norm of each group of a [`Scope`]; see [`cpu::norms_by`](crate::cpu::norms_by).
    ///
    /// Cost: reads each gradient once; two launches, no wait. The first such call of a clipper loads its kernels; a new
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
        let pending = self.scoped_stages(&scope.only_measured(), &ClipNorm::measure_only(norm_type), false);
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
        let results = scoped.prepare(&self.stream, &self.plan, scope, capturing)?;
        let pending = scoped.measure(&self.stream, results, clip, capturing)?;
        if clip.nonfinite == NonFinite::Error {
            let report = pending.wait()?;
            if let Some(group) = report.groups.iter().find(|group| !group.is_finite()) {
                return Err(Error::NonFinite { total_norm: group.total_norm, tensor: group.first_nonfinite });
            }
        }
        if apply {
            scoped.scale(&self.stream, &pending, self.multiprocessors)?;
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
    /// The context of `stream` must be current.
    fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        Ok(Self {
            kernels: ScopedKernels::load(stream.context())?,
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
        })
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
        capturing: bool,
    ) -> Result<SharedResults> {
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
        let tiles = plan.num_tiles as usize;
        self.sums.reserve(stream, "partials", tiles * size_of::<f64>(), capturing)?;
        if plan.has_f64() {
            self.scales.reserve(stream, "scales", tiles * size_of::<i32>(), capturing)?;
        }
        if plan.telemetry {
            self.tile_stats.reserve(stream, "telemetry", tiles * size_of::<Stats>(), capturing)?;
        }
        let results = self.room_for_results(stream, Layout::of(&plan).bytes(), capturing)?;
        if capturing {
            self.kernels.leave_to_graphs();
        }
        Ok(results)
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
        stream: &Arc<CudaStream>,
        results: SharedResults,
        clip: &ClipNorm,
        captured: bool,
    ) -> Result<PendingScoped> {
        let plan = self.plan.clone();
        let table = self.table(&plan);
        let layout = Layout::of(&plan);
        let base = results.memory.address();
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
        Ok(PendingScoped { results, plan, call: self.calls, captured })
    }

    /// Stage 3.
    fn scale(&self, stream: &CudaStream, measured: &PendingScoped, multiprocessors: u32) -> Result<()> {
        let plan = &measured.plan;
        let table = self.table(plan);
        let reports = measured.results.memory.address() + Layout::of(plan).reports() as u64;
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
/// Only the last scoped call of a clipper can be read, from any thread (but see [`Error::WrongThread`]), also when the
/// clipper is gone. A captured one can be read whenever one of its replays was the last.
#[derive(Clone, Debug)]
pub struct PendingScoped {
    results: SharedResults,
    plan: Arc<ScopedPlan>,
    call: u64,
    captured: bool,
}

impl PendingScoped {
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
    pub fn wait(&self) -> Result<ScopedReport> {
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
        let groups = bytemuck::cast_slice(groups).iter().map(|slot| NormReport::from_slot(slot, &tensor_of));
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
