//! Variants of the crate's kernels and launches, each beside the library's own in the same rounds. A test runs it on the
//! driver double.

pub mod kernels;
pub mod launch;
pub mod loaded;
pub mod plans;
pub mod rows;

use super::measure::{self, Options};
use anyhow::{bail, ensure, Result};
use cudarc::driver::sys::CUdevice_attribute;
use cudarc::driver::CudaContext;
use gradclip::cuda::Clipper;
use gradclip::NormType;
use kernels::{described, Change, Kernels, VARIANTS};
use loaded::{Loaded, Mode, Outcome};
use measure::arena::Arena;
use measure::attempt::Device;
use measure::cases::Op;
use measure::limits::{self, Limits};
use measure::lists::{entries, Entry};
use measure::record::run_columns;
use measure::rounds::{self, Cache, Subject};
use plans::{variants, Variant, What, LIBRARY};
use rows::{Row, Rows};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The lists, the most telling first. Each in f32 and in bf16.
const LISTS: [&str; 13] = [
    "1 GiB",
    "1 MiB",
    "64 MiB",
    "GPT-2",
    "256 MiB",
    "3000 x 4 Ki",
    "16 KiB",
    "16 MiB",
    "4 MiB",
    "4 GiB",
    "1 KiB",
    "256 KiB",
    "16 GiB",
];

pub fn lists() -> Vec<Entry> {
    let all = entries();
    let of = |name: &'static str| {
        all.iter().filter(move |entry| entry.list == name && ["f32", "bf16"].contains(&entry.dtype)).cloned()
    };
    LISTS.into_iter().flat_map(of).collect()
}

/// Up to which size a graph is measured too, and between which a cold cache: elsewhere it makes no difference.
const GRAPH: usize = 64 << 20;
const COLD: [usize; 2] = [16 << 20, 1 << 30];

/// All that is made once.
pub struct Trials {
    arena: Arena,
    flush: limits::Launch,
    clipper: Clipper,
    kernels: Kernels,
    cooperative: bool,
    changes: Vec<Change>,
    /// What this GPU does not take, each once.
    pub skipped: Vec<String>,
    /// What should have been measured, and was not right or did not run.
    pub failed: Vec<String>,
    run: String,
    options: Options,
    /// How many blocks a cooperative launch has, if not as many as fit. The driver double has room for one.
    pub cooperative_blocks: Option<u32>,
    /// Every variant is tried, whatever the size of the list: to see that it is right, not how fast it is.
    pub any_size: bool,
}

/// Whether a change is, by its key.
pub type Wanted<'a> = &'a dyn Fn(&str) -> bool;

/// What is measured with the same baseline.
struct Group {
    change: &'static str,
    what: What,
    variants: Vec<Variant>,
}

/// The variants that are measured on a list of that size, or of any, grouped.
fn groups(bytes: Option<usize>, wanted: Wanted) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for variant in variants() {
        let [least, most] = variant.bytes;
        if bytes.is_some_and(|bytes| bytes < least || bytes > most) || !wanted(variant.change) {
            continue;
        }
        for &what in variant.whats {
            let same = |group: &&mut Group| group.change == variant.change && group.what == what;
            let copy = Variant { ..variant };
            match groups.iter_mut().find(same) {
                Some(group) => group.variants.push(copy),
                None => groups.push(Group { change: variant.change, what, variants: vec![copy] }),
            }
        }
    }
    groups
}

impl Trials {
    pub fn new(context: &Arc<CudaContext>, options: Options) -> Result<Self> {
        let arena = Arena::new(context, options.max_bytes, options.flush)?;
        let limits = Limits::load(&arena)?;
        limits.warm_up(&arena, options.warm_up)?;
        let (flush, _) = limits.tune(&arena, arena.flush_bytes().min(arena.capacity()), options.tries)?;
        let cooperative = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH)? == 1;
        let command: Vec<String> = std::env::args().skip(1).collect();
        let run = format!("{},variants {}", run_columns(context), command.join(" ").replace(',', ";"));
        Ok(Self {
            flush,
            clipper: Clipper::new(&arena.stream)?,
            arena,
            kernels: Kernels::new(context, VARIANTS)?,
            cooperative,
            changes: described()?.changes,
            skipped: Vec::new(),
            failed: Vec::new(),
            run,
            options,
            cooperative_blocks: None,
            any_size: false,
        })
    }

    pub fn fits(&self, entry: &Entry) -> bool {
        entry.layout().1 <= self.arena.capacity()
    }

    /// Gradients that are not random numbers: `bytes` at that place of the list, from the next [`measure`](Self::measure)
    /// of the same type on.
    #[allow(dead_code)] // a test uses it
    pub fn poke(&mut self, entry: &Entry, at: usize, bytes: &[u8]) -> Result<()> {
        self.arena.fill(entry.dtype(), entry.layout().1)?;
        self.arena.poke(at, bytes)
    }

    /// Rows of one list, of the changes that are wanted, as they are made; until the deadline.
    pub fn measure(
        &mut self,
        entry: &Entry,
        wanted: Wanted,
        slice: Duration,
        deadline: Instant,
        write: &mut dyn FnMut(Row) -> Result<()>,
    ) -> Result<()> {
        let (bytes, span) = (entry.bytes(), entry.layout().1);
        ensure!(self.fits(entry), "{} {} needs {span} bytes", entry.list, entry.dtype);
        if Instant::now() >= deadline {
            return Ok(()); // not even the library's own kernels are compiled
        }
        self.arena.fill(entry.dtype(), span)?;
        let norm = self.clipper.total_norm(&self.arena.grads(entry), NormType::L2)?.wait()?.total_norm;
        let norm = if norm.is_finite() { norm } else { 1.0 }; // a test's list may have none; a threshold has to be
        let with_grads = span <= self.options.check_bits;
        for group in groups((!self.any_size).then_some(bytes), wanted) {
            if Instant::now() >= deadline {
                break;
            }
            let expected = self.of_library(entry, group.what, norm, with_grads)?;
            let arena = &self.arena;
            let mut loaded = Loaded::new(arena, self.flush.clone(), entry, norm, self.cooperative_blocks)?;
            let named = |what: &str| format!("{} {}, {}: {what}", entry.list, entry.dtype, group.what.name());

            // The library's own launches, as they are made here; then the variants that this GPU takes.
            let library = loaded.add(&mut self.kernels, group.what, &LIBRARY)?;
            let library = library.map_err(anyhow::Error::msg)?;
            let baseline = loaded.outcome((library, Mode::Eager), with_grads)?;
            expected.compare(&baseline, &named("what is taken for the library"))?;
            let mut taken = Vec::new();
            for variant in group.variants {
                // The driver may take seconds to compile one.
                if Instant::now() >= deadline {
                    skip(&mut self.skipped, format!("the time is over: {} and what follows", named(variant.name)));
                    break;
                }
                if variant.plan.stages == plans::Stages::Cooperative && !self.cooperative {
                    skip(&mut self.skipped, "this GPU has no cooperative launch".into());
                    continue;
                }
                match loaded.add(&mut self.kernels, group.what, &variant.plan)? {
                    Ok(index) => taken.push((variant, index)),
                    Err(why) => skip(&mut self.skipped, why),
                }
            }
            if taken.is_empty() {
                continue;
            }

            let mut modes = vec![(Mode::Eager, Cache::Warm)];
            if bytes <= GRAPH {
                modes.push((Mode::Graph, Cache::Warm));
            }
            if (COLD[0]..=COLD[1]).contains(&bytes) && matches!(group.what, What::Call(Op::Norm | Op::Clip)) {
                modes.push((Mode::Eager, Cache::Cold));
            }
            for (mode, cache) in modes {
                if mode == Mode::Graph {
                    loaded.capture(library)?;
                }
                if Instant::now() >= deadline {
                    break;
                }
                // One that fails takes nothing from the others, unless the GPU takes no more work after it.
                let mut lost = None;
                taken.retain(|(variant, index)| {
                    if lost.is_some() {
                        return false;
                    }
                    let found = match mode {
                        Mode::Eager => Ok(()),
                        Mode::Graph => loaded.capture(*index),
                    };
                    let found = found.and_then(|()| loaded.outcome((*index, mode), with_grads));
                    let why = match found {
                        Ok(found) if found == baseline => return true,
                        Ok(_) => "it does not leave what the library does".to_owned(),
                        Err(error) => format!("{error:#}"),
                    };
                    let why = format!("{} ({}): {why}", named(variant.name), mode.name());
                    if arena.is_alive() {
                        eprintln!("FAILED: {why}");
                        self.failed.push(why);
                    } else {
                        lost = Some(why);
                    }
                    false
                });
                if let Some(why) = lost {
                    bail!("{why}");
                }
                loaded.restore()?;
                let indices = taken.iter().map(|(_, index)| *index);
                let cases = std::iter::once(library).chain(indices).chain([library]).map(|index| (index, mode));
                let cases: Vec<_> = cases.collect();
                let times = rounds::measure(&mut loaded, &cases, cache, slice, &self.options)?;
                let [before, of_variants @ .., after] = times.as_slice() else { continue };
                let rows = Rows {
                    run: &self.run,
                    entry,
                    what: group.what,
                    mode,
                    cache,
                    checked: if with_grads { "bits" } else { "partials" },
                    library: [before, after],
                };
                for ((variant, _), times) in taken.iter().zip(of_variants) {
                    let change = self.changes.iter().find(|change| change.key == variant.change);
                    write(rows.row(variant, change.map_or("", |change| change.prediction.as_str()), times))?;
                }
            }
        }
        Ok(())
    }

    /// What the crate itself makes of the list.
    fn of_library(&mut self, entry: &Entry, what: What, norm: f64, with_grads: bool) -> Result<Expected> {
        self.arena.restore(entry.layout().1)?;
        let mut grads = self.arena.grads(entry);
        let clipper = &mut self.clipper;
        let total_norm = match what {
            What::Telemetry | What::Alone(..) => None,
            What::Call(Op::Norm) => Some(clipper.total_norm(&grads, NormType::L2)?.wait()?.total_norm),
            What::Call(op @ (Op::ClipWithin | Op::Clip)) => {
                Some(clipper.clip_grad_norm(&mut grads, op.clip(norm))?.wait()?.total_norm)
            }
            What::Call(op) => {
                clipper.clip_grad_value(&mut grads, op.bound())?.wait()?;
                None
            }
        };
        let grads = if with_grads { Some(self.arena.download(entry.layout().1)?) } else { None };
        Ok(Expected { total_norm, grads })
    }
}

impl Device for Trials {
    fn is_alive(&self) -> bool {
        self.arena.is_alive()
    }
}

struct Expected {
    total_norm: Option<f64>,
    grads: Option<Vec<u8>>,
}

impl Expected {
    fn compare(&self, found: &Outcome, what: &str) -> Result<()> {
        if let Some(norm) = self.total_norm {
            let there = found.report().total_norm;
            ensure!(norm.to_bits() == there.to_bits(), "{what} finds the norm {there}, the library {norm}");
        }
        if let Some(grads) = &self.grads {
            ensure!(*grads == found.grads, "{what} leaves other gradients than the library");
        }
        Ok(())
    }
}

/// Notes it, and prints it the first time.
fn skip(skipped: &mut Vec<String>, why: String) {
    if !skipped.contains(&why) {
        eprintln!("SKIPPED: {why}");
        skipped.push(why);
    }
}
