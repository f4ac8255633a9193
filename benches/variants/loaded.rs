//! One list on the device, and the launches that the library or a variant makes for it.

use super::kernels::{Found, Kernels};
use super::launch::{arg, Arg, Attribute, Launch};
use super::measure::arena::Arena;
use super::measure::cases::Op;
use super::measure::limits;
use super::measure::lists::Entry;
use super::measure::rounds::Subject;
use super::plans::{Grid, Plan, Stages, What};
use anyhow::{Context, Result};
use bytemuck::Zeroable;
use cudarc::driver::sys::{CUdevice_attribute, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{result, CudaGraph, CudaSlice, DevicePtr};
use gradclip::abi::{
    nonfinite, norm_type, ClampBounds, ClipParams, ReportSlot, ScopedTable, ScopedTensor, Stats, TensorDesc,
    TensorTable, FOLD_THREADS, INLINE_TENSORS, TILE_BYTES, TILE_THREADS,
};
use gradclip::Dtype;
use half::{bf16, f16};
use std::mem::offset_of;

/// How the launches reach the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Eager,
    Graph,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Self::Eager => "eager",
            Self::Graph => "graph",
        }
    }
}

/// Launches in order, of a plan, and the same as a graph once it was asked for.
pub struct Sequence {
    what: What,
    launches: Vec<Launch>,
    graph: Option<CudaGraph>,
}

/// A launch by the name of its kernel.
struct Step {
    name: &'static str,
    blocks: u32,
    threads: u32,
    args: Vec<Arg>,
    attribute: Option<Attribute>,
}

/// What a call leaves behind.
#[derive(PartialEq, Eq)]
pub struct Outcome {
    /// Report, partials, counts, statistics.
    pub results: Vec<u8>,
    /// All bytes from the first gradient to the last, where they are few enough.
    pub grads: Vec<u8>,
}

impl Outcome {
    pub fn report(&self) -> ReportSlot {
        bytemuck::pod_read_unaligned(&self.results[..size_of::<ReportSlot>()])
    }
}

/// Parts of the scratch memory, in bytes from its start. What is before `arrivals` is compared.
struct Layout {
    sums: usize,
    scales: usize,
    counts: usize,
    stats: usize,
    arrivals: usize,
    descs: usize,
    scoped: usize,
    end: usize,
}

impl Layout {
    fn new(tiles: usize, tensors: usize) -> Self {
        let mut end = size_of::<ReportSlot>();
        let mut part = |bytes: usize| {
            let start = end.next_multiple_of(256);
            end = start + bytes;
            start
        };
        let [sums, scales, counts] = [(); 3].map(|()| part(8 * tiles));
        let (stats, arrivals) = (part(size_of::<Stats>() * tiles), part(4));
        let (descs, scoped) = (part(size_of::<TensorDesc>() * tensors), part(size_of::<ScopedTensor>() * tensors));
        Self { sums, scales, counts, stats, arrivals, descs, scoped, end }
    }
}

pub struct Loaded<'a> {
    arena: &'a Arena,
    flush: limits::Launch,
    scratch: CudaSlice<u8>,
    layout: Layout,
    table: TensorTable,
    scoped: ScopedTable,
    num_tiles: u32,
    has_f64: bool,
    span: usize,
    keep_from: u32,
    cooperative_blocks: Option<u32>,
    /// What thresholds are made of: the list's.
    norm: f64,
    pub sequences: Vec<Sequence>,
}

impl<'a> Loaded<'a> {
    /// The arena is filled. `cooperative_blocks`: how many blocks a cooperative launch has, if not as many as fit.
    pub fn new(
        arena: &'a Arena,
        flush: limits::Launch,
        entry: &Entry,
        norm: f64,
        cooperative_blocks: Option<u32>,
    ) -> Result<Self> {
        let (starts, span) = entry.layout();
        let (mut descs, mut scoped) = (Vec::new(), Vec::new());
        let (mut first_tile, dtype) = (0, entry.dtype());
        for (index, (start, numel)) in starts.iter().zip(&entry.numels).enumerate() {
            let (address, numel) = (arena.address() + *start as u64, *numel as u64);
            let num_tiles = numel.div_ceil((TILE_BYTES / dtype.size()) as u64) as u32;
            descs.push(TensorDesc { address, numel, first_tile, dtype: dtype as u32 });
            scoped.push(ScopedTensor {
                address,
                row_numel: numel,
                first_tile,
                num_tiles,
                tiles_per_row: num_tiles.max(1),
                first_group: index as u32,
                dtype: dtype as u32,
                index: index as u32,
            });
            first_tile += num_tiles;
        }
        let num_tiles = first_tile;
        let layout = Layout::new(num_tiles as usize, descs.len());
        let mut scratch = arena.stream.alloc_zeros::<u8>(layout.end)?;
        let base = scratch.device_ptr(&arena.stream).0;
        arena.stream.memcpy_htod(bytemuck::cast_slice(&descs), &mut scratch.slice_mut(layout.descs..layout.scoped))?;
        arena.stream.memcpy_htod(bytemuck::cast_slice(&scoped), &mut scratch.slice_mut(layout.scoped..))?;
        arena.stream.synchronize()?; // the vectors go

        let mut table = TensorTable { num_tensors: descs.len() as u64, in_memory: 0, ..TensorTable::zeroed() };
        if descs.len() <= INLINE_TENSORS {
            table.inline_tensors[..descs.len()].copy_from_slice(&descs);
        } else {
            table.in_memory = base + layout.descs as u64;
        }
        let scoped = ScopedTable { tensors: base + layout.scoped as u64, num_tensors: descs.len() as u32, reserved: 0 };
        let l2 = arena.stream.context().attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?;
        let kept = u32::try_from(l2).unwrap_or(0) / 2 / TILE_BYTES as u32;
        Ok(Self {
            arena,
            flush,
            scratch,
            layout,
            table,
            scoped,
            num_tiles,
            has_f64: dtype == Dtype::F64,
            span,
            keep_from: num_tiles.saturating_sub(kept),
            cooperative_blocks,
            norm,
            sequences: Vec::new(),
        })
    }

    /// Adds the launches of a plan; the case is its index. Or says why this GPU does not take it.
    pub fn add(
        &mut self,
        kernels: &mut Kernels,
        what: What,
        plan: &Plan,
    ) -> Result<core::result::Result<usize, String>> {
        Ok(match self.launches(kernels, what, plan)? {
            Err(why) => Err(why),
            Ok(launches) => {
                self.sequences.push(Sequence { what, launches, graph: None });
                Ok(self.sequences.len() - 1)
            }
        })
    }

    fn launches(
        &self,
        kernels: &mut Kernels,
        what: What,
        plan: &Plan,
    ) -> Result<core::result::Result<Vec<Launch>, String>> {
        let base = self.scratch.device_ptr(&self.arena.stream).0;
        let at = |offset: usize| arg(&(base + offset as u64));
        let (report, layout) = (at(0), &self.layout);
        let mut table = self.table;
        if plan.table_in_memory {
            table.in_memory = base + layout.descs as u64;
        }
        let table = arg(&table);
        let (tiles, sums) = (arg(&self.num_tiles), at(layout.sums));
        let scales = if self.has_f64 { at(layout.scales) } else { arg(&0u64) };
        let (norm_grid, in_place_grid) = (self.blocks(plan.norm_grid), self.blocks(plan.in_place_grid));
        let next = plan.programmatic.then_some(Attribute::Programmatic);
        let (tile_threads, fold_threads) = (TILE_THREADS as u32, FOLD_THREADS as u32);

        let mut wanted = Vec::new();
        let mut step = |name, blocks, threads, args, attribute| {
            wanted.push(Step { name, blocks, threads, args, attribute });
        };
        match what {
            What::Telemetry => {
                let args = vec![arg(&self.scoped), tiles, sums, scales, at(layout.stats)];
                step(plan.stats, self.num_tiles, tile_threads, args, None);
            }
            What::Call(op) | What::Alone(op, _) if op.is_value() => {
                let counts = at(layout.counts);
                let args = vec![table, tiles.clone(), arg(&bounds(op)), counts.clone()];
                step(plan.clamp, in_place_grid, tile_threads, args, None);
                step("clamp_counts", 1, fold_threads, vec![counts, tiles, report], None);
            }
            What::Call(op) | What::Alone(op, _) => {
                let (params, arrivals) = (arg(&params(op, self.norm)), at(layout.arrivals));
                let mut args = vec![table.clone(), tiles.clone(), sums.clone(), scales.clone()];
                match plan.stages {
                    Stages::Apart => {
                        if plan.keeps_end {
                            args.push(arg(&self.keep_from));
                        }
                        step(plan.norm, norm_grid, plan.norm_threads, args, None);
                        let args = vec![sums, scales, tiles.clone(), params, report.clone()];
                        step(plan.clip_coef, 1, fold_threads, args, next);
                    }
                    Stages::LastBlock => {
                        args.extend([arrivals, params, report.clone()]);
                        step(plan.norm, norm_grid, tile_threads, args, None);
                    }
                    Stages::Cooperative => {
                        args.extend([arrivals, params, report.clone()]);
                        step(plan.norm, 0, tile_threads, args, Some(Attribute::Cooperative));
                    }
                }
                if op != Op::Norm && plan.stages != Stages::Cooperative {
                    step(plan.scale, in_place_grid, tile_threads, vec![table, tiles, report], next);
                }
            }
        }
        if let What::Alone(_, kernel) = what {
            wanted.retain(|step| step.name == kernel);
        }
        let mut launches = Vec::new();
        for Step { name, mut blocks, threads, args, attribute } in wanted {
            let function = match kernels.get(name)? {
                Found::Ok(function) => function,
                Found::Err(why) => return Ok(Err(why)),
            };
            if attribute == Some(Attribute::Cooperative) {
                let fit = function.occupancy_max_active_blocks_per_multiprocessor(threads, 0, None)?;
                let fit = self.cooperative_blocks.unwrap_or(fit * self.arena.multiprocessors);
                if fit == 0 {
                    return Ok(Err(format!("{name} does not fit a multiprocessor")));
                }
                blocks = self.num_tiles.min(fit);
            }
            launches.push(Launch { function, blocks, threads, args, attribute });
        }
        Ok(Ok(launches))
    }

    fn blocks(&self, grid: Grid) -> u32 {
        match grid {
            Grid::OneATile => self.num_tiles,
            Grid::Multiprocessor(count) => self.num_tiles.min(count * self.arena.multiprocessors),
        }
    }

    /// Captures what was added as a graph.
    pub fn capture(&mut self, index: usize) -> Result<()> {
        self.arena.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let enqueued = self.run(index);
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = self.arena.stream.end_capture(flags);
        enqueued?;
        let graph = graph?.context("nothing was captured")?;
        graph.upload()?;
        self.sequences[index].graph = Some(graph);
        Ok(())
    }

    fn run(&self, index: usize) -> Result<()> {
        for launch in &self.sequences[index].launches {
            // SAFETY: `launches` gives each kernel its parameters: the list in the arena, and scratch memory with a place
            // for each of its tiles, both alive as long as `self`, which waits before it goes.
            unsafe { launch.run(&self.arena.stream) }?;
        }
        Ok(())
    }

    /// What the last launch of `clip_coef` has left.
    #[allow(dead_code)] // the predictions use it
    pub fn report(&self) -> Result<ReportSlot> {
        let mut report = vec![0; size_of::<ReportSlot>()];
        self.arena.stream.memcpy_dtoh(&self.scratch.slice(..report.len()), &mut report)?;
        self.arena.stream.synchronize()?;
        Ok(bytemuck::pod_read_unaligned(&report))
    }

    /// Runs it once on the gradients as they were, with nothing left of an earlier run.
    pub fn outcome(&mut self, case: (usize, Mode), with_grads: bool) -> Result<Outcome> {
        self.restore()?;
        let compared = self.layout.arrivals;
        let stream = self.arena.stream.clone();
        let base = self.scratch.device_ptr(&stream).0;
        // SAFETY: a part of the scratch memory, on the stream of all work.
        unsafe { result::memset_d8_async(base, 0xFF, compared, stream.cu_stream()) }?;
        self.enqueue(case)?;
        let mut results = vec![0; compared];
        stream.memcpy_dtoh(&self.scratch.slice(..compared), &mut results)?;
        stream.synchronize()?;
        // The one field that these calls do not write.
        let rank = offset_of!(ReportSlot, rank);
        results[rank..rank + 4].fill(0);
        let grads = if with_grads { self.arena.download(self.span)? } else { Vec::new() };
        Ok(Outcome { results, grads })
    }
}

impl Drop for Loaded<'_> {
    fn drop(&mut self) {
        let _ = self.arena.stream.synchronize();
    }
}

impl Subject for Loaded<'_> {
    type Case = (usize, Mode);

    fn arena(&self) -> &Arena {
        self.arena
    }

    fn needs_restored(&self, (index, _): Self::Case) -> bool {
        self.sequences[index].what.needs_restored()
    }

    fn restore(&self) -> Result<()> {
        self.arena.restore(self.span)
    }

    fn flush(&mut self) -> Result<()> {
        self.arena.write_flush()?;
        self.flush.run(self.arena, self.arena.flush_address(), self.arena.flush_bytes())
    }

    fn enqueue(&mut self, (index, mode): Self::Case) -> Result<()> {
        match mode {
            Mode::Eager => self.run(index),
            Mode::Graph => Ok(self.sequences[index].graph.as_ref().context("it was captured")?.launch()?),
        }
    }
}

fn params(op: Op, norm: f64) -> ClipParams {
    let [max_norm, eps] = op.threshold(norm);
    ClipParams {
        max_norm,
        max_norm_at: 0,
        eps,
        p: 2.0,
        loss_scale: 1.0,
        loss_scale_at: 0,
        norm_type: norm_type::L2,
        nonfinite: nonfinite::SKIP,
    }
}

fn bounds(op: Op) -> ClampBounds {
    let hi = op.bound();
    let (hi_f32, hi_f16, hi_bf16) = (hi as f32, f16::from_f64(hi).to_f32(), bf16::from_f64(hi).to_f32());
    ClampBounds {
        lo_f64: -hi,
        hi_f64: hi,
        lo_f32: -hi_f32,
        hi_f32,
        lo_f16: -hi_f16,
        hi_f16,
        lo_bf16: -hi_bf16,
        hi_bf16,
    }
}
