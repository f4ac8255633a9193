//! What is timed on one list: the verbs, eager and as captured graphs, and the limits.

use super::arena::{Arena, SIGMA};
use super::limits::{Launch, Limits};
use super::lists::Entry;
use super::rounds::Subject;
use anyhow::{Context, Result};
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::CudaGraph;
use gradclip::cuda::{Clipper, RawGrad};
use gradclip::{ClipNorm, NormType, Scope};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// The norm alone.
    Norm,
    /// A clip that finds the norm within the threshold.
    ClipWithin,
    /// The same, of each tensor by its own norm; and with telemetry.
    EachWithin,
    Telemetry,
    /// A clip that scales.
    Clip,
    /// Value clipping with nothing outside the bounds, with one element in a hundred, with next to all.
    Value0,
    Value1,
    Value100,
}

impl Op {
    pub const ALL: [Self; 8] = [
        Self::Norm,
        Self::ClipWithin,
        Self::EachWithin,
        Self::Telemetry,
        Self::Clip,
        Self::Value0,
        Self::Value1,
        Self::Value100,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Norm => "norm",
            Self::ClipWithin => "clip; within",
            Self::EachWithin => "clip each tensor; within",
            Self::Telemetry => "clip each tensor; within; telemetry",
            Self::Clip => "clip",
            Self::Value0 => "value; 0 % outside",
            Self::Value1 => "value; 1 % outside",
            Self::Value100 => "value; 100 % outside",
        }
    }

    /// Times that the gradients' bytes have to move.
    pub fn passes(self) -> usize {
        match self {
            Self::Norm | Self::ClipWithin | Self::EachWithin | Self::Telemetry | Self::Value0 => 1,
            Self::Value1 | Self::Value100 => 2,
            Self::Clip => 3,
        }
    }

    pub fn is_value(self) -> bool {
        matches!(self, Self::Value0 | Self::Value1 | Self::Value100)
    }

    /// Whether a second call would find less to do than the first.
    pub fn needs_restored(self) -> bool {
        matches!(self, Self::Value1 | Self::Value100)
    }

    /// Bounds of value clipping, by the quantiles of the normal distribution.
    pub fn bound(self) -> f64 {
        let sigmas = match self {
            Self::Value1 => 2.5758,
            Self::Value100 => 1.0 / 16384.0,
            _ => 16.0,
        };
        sigmas * f64::from(SIGMA)
    }

    /// The threshold, of a list with that norm. A clip that scales does so by `1 - 2^-16` here, however often it is
    /// called: without eps it would do so once, and find the norm within the threshold from then on.
    pub fn clip(self, norm: f64) -> ClipNorm {
        let [max_norm, eps] = self.threshold(norm);
        ClipNorm::new(max_norm).eps(eps)
    }

    /// The threshold and what is added to the norm.
    pub fn threshold(self, norm: f64) -> [f64; 2] {
        match self {
            Self::Norm => [f64::INFINITY, 0.0],
            Self::Clip => [norm * 65536.0; 2],
            _ => [norm * 2.0, 0.0],
        }
    }
}

/// One thing that is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    /// A kernel that only reads.
    Read,
    /// A kernel that reads and writes in place.
    Update,
    /// The driver's copy, to the gradients from what they were.
    Copy,
    Eager(Op),
    Graph(Op),
}

impl Case {
    pub fn op(self) -> Option<Op> {
        match self {
            Self::Eager(op) | Self::Graph(op) => Some(op),
            _ => None,
        }
    }

    pub fn passes(self) -> usize {
        match self {
            Self::Read => 1,
            Self::Update | Self::Copy => 2,
            Self::Eager(op) | Self::Graph(op) => op.passes(),
        }
    }

    pub fn needs_restored(self) -> bool {
        self.op().is_some_and(Op::needs_restored)
    }

    /// Columns op, implementation and mode.
    pub fn names(self) -> [&'static str; 3] {
        match self {
            Self::Read => ["limit", "plain read", "eager"],
            Self::Update => ["limit", "plain update", "eager"],
            Self::Copy => ["limit", "copy", "eager"],
            Self::Eager(op) => [op.name(), "gradclip", "eager"],
            Self::Graph(op) => [op.name(), "gradclip", "graph"],
        }
    }

    /// The limits that it is held against, to be added.
    pub fn limit(self) -> &'static [Self] {
        match self {
            Self::Read => &[Self::Read],
            Self::Update | Self::Copy => &[Self::Copy],
            Self::Eager(op) | Self::Graph(op) => match op {
                Op::Norm | Op::ClipWithin | Op::EachWithin | Op::Telemetry | Op::Value0 => &[Self::Read],
                Op::Value1 | Op::Value100 => &[Self::Copy],
                Op::Clip => &[Self::Read, Self::Copy],
            },
        }
    }

    /// The limits first: a ratio needs them.
    pub fn all() -> Vec<Self> {
        let mut all = vec![Self::Read, Self::Update, Self::Copy];
        all.extend(Op::ALL.iter().flat_map(|op| [Self::Eager(*op), Self::Graph(*op)]));
        all
    }
}

/// One list on the device, and all that its cases need.
pub struct Loaded<'a> {
    arena: &'a Arena,
    graphs: Vec<(Op, CudaGraph)>,
    clipper: &'a mut Clipper,
    grads: Vec<RawGrad>,
    norm: f64,
    bytes: usize,
    span: usize,
    read: Launch,
    update: Launch,
    flush: Launch,
}

impl<'a> Loaded<'a> {
    /// The arena is filled with the list's type. `ops` are what can be timed: each is captured.
    pub fn new(
        arena: &'a Arena,
        clipper: &'a mut Clipper,
        limits: &Limits,
        entry: &Entry,
        ops: &[Op],
        tries: usize,
    ) -> Result<Self> {
        let (bytes, (_, span)) = (entry.bytes(), entry.layout());
        let (read, update) = limits.tune(arena, bytes, tries)?;
        let flush = read.clone();
        let mut grads = arena.grads(entry);
        let norm = clipper.total_norm(&grads, NormType::L2)?.wait()?.total_norm;
        let mut graphs = Vec::new();
        for &op in ops {
            enqueue(clipper, &mut grads, op, norm)?; // before it is captured: the workspace has to be there
            arena.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
            let captured = enqueue(clipper, &mut grads, op, norm);
            let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
            let graph = arena.stream.end_capture(flags)?.context("nothing was captured")?;
            captured?;
            graph.upload()?;
            graphs.push((op, graph));
        }
        arena.restore(span)?;
        Ok(Self { arena, graphs, clipper, grads, norm, bytes, span, read, update, flush })
    }
}

impl Loaded<'_> {
    /// Reads what was written to empty the cache.
    #[allow(dead_code)] // the predictions use it
    pub fn flush_launch(&self) -> Launch {
        self.flush.clone()
    }
}

impl Subject for Loaded<'_> {
    type Case = Case;

    fn arena(&self) -> &Arena {
        self.arena
    }

    fn needs_restored(&self, case: Case) -> bool {
        case.needs_restored()
    }

    fn restore(&self) -> Result<()> {
        self.arena.restore(self.span)
    }

    /// Leaves nothing of the list in the L2 cache, and of what is written there as little as can be: the buffer that was
    /// written is read once more.
    fn flush(&mut self) -> Result<()> {
        self.arena.write_flush()?;
        self.flush.run(self.arena, self.arena.flush_address(), self.arena.flush_bytes())
    }

    fn enqueue(&mut self, case: Case) -> Result<()> {
        match case {
            Case::Read => self.read.run(self.arena, self.arena.address(), self.bytes),
            Case::Update => self.update.run(self.arena, self.arena.address(), self.bytes),
            Case::Copy => self.arena.restore(self.bytes),
            Case::Eager(op) => enqueue(self.clipper, &mut self.grads, op, self.norm),
            Case::Graph(op) => {
                let graph = self.graphs.iter().find(|(of, _)| *of == op).context("it was not captured")?;
                Ok(graph.1.launch()?)
            }
        }
    }
}

fn enqueue(clipper: &mut Clipper, grads: &mut [RawGrad], op: Op, norm: f64) -> Result<()> {
    match op {
        Op::Norm => clipper.total_norm(grads, NormType::L2).map(drop)?,
        Op::ClipWithin | Op::Clip => clipper.clip_grad_norm(grads, op.clip(norm)).map(drop)?,
        Op::EachWithin => drop(clipper.clip_grad_norm_by(grads, &Scope::per_tensor(), op.clip(norm))?),
        Op::Telemetry => drop(clipper.clip_grad_norm_by(grads, &Scope::per_tensor().telemetry(), op.clip(norm))?),
        Op::Value0 | Op::Value1 | Op::Value100 => clipper.clip_grad_value(grads, op.bound()).map(drop)?,
    }
    Ok(())
}
