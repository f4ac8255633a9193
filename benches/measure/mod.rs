//! The measuring of `benches/gpu.rs`. A test runs it on the driver double.

pub mod arena;
pub mod attempt;
pub mod cases;
pub mod check;
pub mod limits;
pub mod lists;
pub mod program;
pub mod record;
pub mod rounds;
#[path = "../support/shapes.rs"]
pub mod shapes;

use anyhow::{ensure, Result};
use arena::Arena;
use attempt::Device;
use cases::{Case, Loaded, Op};
use cudarc::driver::CudaContext;
use gradclip::cuda::Clipper;
use gradclip::REPORTS_KEPT;
use limits::Limits;
use lists::Entry;
use record::Rows;
use rounds::Cache;
use std::sync::Arc;
use std::time::Duration;

/// How thoroughly.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of gradients that there is room for; it is allocated twice.
    pub max_bytes: usize,
    /// Bytes that are written to empty the L2 cache; none: two and a half times its size.
    pub flush: Option<usize>,
    /// Lists up to this many bytes have their norm compared with the CPU's; up to the other, all results.
    pub check_norm: usize,
    pub check_bits: usize,
    /// Lists up to this many bytes are also measured with a cold cache; of larger ones it holds a small part.
    pub cold: usize,
    pub min_rounds: usize,
    pub max_rounds: usize,
    /// Time between two events that is long enough, and the calls that it may take.
    pub batch: Duration,
    pub max_calls: usize,
    /// Times that each launch of a limit is tried.
    pub tries: usize,
    /// Reads before the first list is measured.
    pub warm_up: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_bytes: 16 << 30,
            flush: None,
            check_norm: 512 << 20,
            check_bits: 64 << 20,
            cold: 512 << 20,
            min_rounds: 7,
            max_rounds: 100,
            batch: Duration::from_micros(300),
            max_calls: 100,
            tries: 3,
            warm_up: Duration::from_secs(1),
        }
    }
}

/// All that is made once.
pub struct Bench {
    clipper: Clipper,
    /// Reports of the clipper that a graph has taken for good.
    captured: usize,
    warm: bool,
    arena: Arena,
    limits: Limits,
    run: String,
    options: Options,
}

impl Bench {
    pub fn new(context: &Arc<CudaContext>, options: Options) -> Result<Self> {
        let arena = Arena::new(context, options.max_bytes, options.flush)?;
        let limits = Limits::load(&arena)?;
        let clipper = Clipper::new(&arena.stream)?;
        Ok(Self { clipper, captured: 0, warm: false, arena, limits, run: record::run_columns(context), options })
    }

    pub fn fits(&self, entry: &Entry) -> bool {
        entry.layout().1 <= self.arena.capacity()
    }

    /// Writes the rows of one list as they are made, in about the time that `slice` says. `pass` tells two measurements of
    /// one list apart; only the first is checked.
    pub fn measure(
        &mut self,
        entry: &Entry,
        pass: u32,
        slice: Duration,
        write: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<()> {
        let (_, span) = entry.layout();
        ensure!(self.fits(entry), "{entry} needs {span} bytes");
        if !std::mem::replace(&mut self.warm, true) {
            // Here and not in `new`: PyTorch is started in between.
            self.limits.warm_up(&self.arena, self.options.warm_up)?;
        }
        self.arena.fill(entry.dtype(), span)?;
        self.captured += Op::ALL.len();
        if self.captured > REPORTS_KEPT / 2 {
            // Not for every list: loading the kernels may mean that the driver compiles them.
            (self.clipper, self.captured) = (Clipper::new(&self.arena.stream)?, Op::ALL.len());
        }
        let checked =
            if pass == 1 { check::check(&self.arena, &mut self.clipper, entry, &self.options)? } else { "no" };
        let mut loaded =
            Loaded::new(&self.arena, &mut self.clipper, &self.limits, entry, &Op::ALL, self.options.tries)?;
        let (cases, rows) = (Case::all(), Rows { run: &self.run, pass, entry, checked });
        let caches = if span <= self.options.cold { &[Cache::Warm, Cache::Cold][..] } else { &[Cache::Warm] };
        for cache in caches {
            let times = rounds::measure(&mut loaded, &cases, *cache, slice / caches.len() as u32, &self.options)?;
            rows.all(&cases, &times, *cache).iter().try_for_each(|row| write(row))?;
        }
        Ok(())
    }
}

impl Device for Bench {
    fn is_alive(&self) -> bool {
        self.arena.is_alive()
    }
}
