//! What `predictions.json` predicts, measured on this GPU: is it so? A test runs it on the driver double.

pub mod predicted;
mod subject;

use super::{measure, trials};
use anyhow::{bail, ensure, Context, Result};
use cudarc::driver::CudaContext;
use gradclip::cuda::Clipper;
use gradclip::NormType;
use measure::arena::Arena;
use measure::attempt::{attempt, Device, Failed};
use measure::cases::{self, Case, Op};
use measure::check::check;
use measure::limits::Limits;
use measure::lists::{entries, Entry};
use measure::record::{self, number, quantile, Rows};
use measure::rounds::{self, Cache, Times};
use measure::{shapes, Options};
use predicted::{verdict, Interval, Predicted, Predictions, Unit};
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};
use subject::{Timed, Together};
use trials::kernels::Kernels;
use trials::loaded::{self, Mode};
use trials::plans::{What, LIBRARY};

/// The limits first, as a share needs them.
const LIMITS: [Case; 2] = [Case::Read, Case::Copy];

/// Of one list and one state of the cache; some hundred rounds on 1 GiB.
const LONGEST: Duration = Duration::from_secs(2);

/// All that is made once.
pub struct Check {
    arena: Arena,
    limits: Limits,
    clipper: Clipper,
    kernels: Kernels,
    predictions: Predictions,
    /// What the cases name.
    pub lists: Vec<Entry>,
    pub gpu: String,
    run: String,
    options: Options,
}

/// Columns of the record: first the columns of benches/gpu.rs.
pub fn header() -> String {
    format!("{},kernels,unit,low,high,verdict", record::HEADER)
}

/// Those of benches/gpu.rs, and two for the partials: of tensors of one element there are as many partials as tensors.
fn lists() -> Vec<Entry> {
    let partials = [("32768 partials", 1 << 15), ("524288 partials", 1 << 19)];
    let partials = partials.map(|(name, count)| Entry::new(&shapes::equal(name, count, 1), "f32", 0));
    entries().into_iter().chain(partials).collect()
}

/// What launches a case has: a call of the crate, or by the bench itself.
enum Launched {
    Call(Case),
    Itself(What, Mode),
}

impl Predicted {
    fn cache(&self) -> Result<Cache> {
        let found = [Cache::Warm, Cache::Cold].into_iter().find(|cache| cache.name() == self.cache);
        found.with_context(|| format!("a cache is not {}", self.cache))
    }

    fn op(&self) -> Result<Op> {
        Op::ALL.into_iter().find(|op| op.name() == self.op).with_context(|| format!("no operation is {}", self.op))
    }

    fn launched(&self) -> Result<Launched> {
        let (op, modes) = (self.op()?, [Mode::Eager, Mode::Graph]);
        let mode = modes.into_iter().find(|mode| mode.name() == self.mode).context("a mode is eager or graph")?;
        Ok(match (self.implementation.as_str(), mode) {
            ("gradclip", Mode::Eager) => Launched::Call(Case::Eager(op)),
            ("gradclip", Mode::Graph) => Launched::Call(Case::Graph(op)),
            ("launches alone", _) => Launched::Itself(What::Call(op), mode),
            ("norm alone", _) => Launched::Itself(What::Alone(op, "norm"), mode),
            ("clip_coef alone", _) => Launched::Itself(What::Alone(op, "clip_coef"), mode),
            ("clamp alone", _) => Launched::Itself(What::Alone(op, "clamp"), mode),
            (other, _) => bail!("nothing is called {other}"),
        })
    }

    /// Whether the gradients are read: what `clip_coef` reads are the partials.
    fn reads_gradients(&self) -> bool {
        self.implementation != "clip_coef alone"
    }
}

impl Device for Check {
    fn is_alive(&self) -> bool {
        self.arena.is_alive()
    }
}

impl Check {
    pub fn new(context: &Arc<CudaContext>, options: Options) -> Result<Self> {
        let arena = Arena::new(context, options.max_bytes, options.flush)?;
        let limits = Limits::load(&arena)?;
        limits.warm_up(&arena, options.warm_up)?;
        Ok(Self {
            limits,
            clipper: Clipper::new(&arena.stream)?,
            kernels: Kernels::new(context, &[])?,
            predictions: Predictions::read()?,
            lists: lists(),
            gpu: context.name()?,
            run: record::run_columns(context),
            arena,
            options,
        })
    }

    /// A line for each case to `lines`, its row to `out`, list by list in the order of the predictions, until the time is
    /// over.
    pub fn all(
        mut self,
        wanted: &dyn Fn(&str, &str) -> bool,
        budget: Duration,
        lines: &mut dyn Write,
        out: &mut dyn Write,
    ) -> Result<()> {
        let started = Instant::now();
        writeln!(out, "{}", header())?;
        out.flush()?;
        let mut lists: Vec<(String, String)> = Vec::new();
        for case in &self.predictions.cases {
            let list = (case.list.clone(), case.dtype.clone());
            if wanted(&list.0, &list.1) && !lists.contains(&list) {
                lists.push(list);
            }
        }
        let mut failed = false;
        for (done, (list, dtype)) in lists.iter().enumerate() {
            let entry = self.lists.iter().find(|entry| (entry.list, entry.dtype) == (list, dtype)).cloned();
            let entry = entry.with_context(|| format!("there is no list {list} {dtype}"))?;
            let left = budget.saturating_sub(started.elapsed());
            let fits = entry.layout().1 <= self.arena.capacity();
            if !fits || left.is_zero() {
                let why = if fits { "the time is over" } else { "it does not fit" };
                eprintln!("SKIPPED {entry}: {why}");
                continue;
            }
            // Some of it goes to what is not counted.
            let slice = (left / (lists.len() - done) as u32 / 3).min(LONGEST);
            match attempt(&mut self, |check| check.list(&entry, slice, lines, out)) {
                Ok(()) => eprintln!("{:6.1} s  {entry}", started.elapsed().as_secs_f64()),
                Err(Failed::List(why)) => {
                    eprintln!("FAILED {entry}: {why}");
                    failed = true;
                }
                Err(Failed::Everything(why)) => bail!("STOPPED at {entry}: {why}"),
            }
        }
        ensure!(!failed, "not all predictions could be checked");
        Ok(())
    }

    fn list(&mut self, entry: &Entry, slice: Duration, lines: &mut dyn Write, out: &mut dyn Write) -> Result<()> {
        self.arena.fill(entry.dtype(), entry.layout().1)?;
        let checked = check(&self.arena, &mut self.clipper, entry, &self.options)?;
        let norm = self.clipper.total_norm(&self.arena.grads(entry), NormType::L2)?.wait()?.total_norm;
        let of_list = |case: &&Predicted| (case.list.as_str(), case.dtype.as_str()) == (entry.list, entry.dtype);
        let predicted: Vec<&Predicted> = self.predictions.cases.iter().filter(of_list).collect();

        let mut ops = Vec::new();
        for case in &predicted {
            if matches!(case.launched()?, Launched::Call(_)) && !ops.contains(&case.op()?) {
                ops.push(case.op()?);
            }
        }
        let (arena, clipper) = (&self.arena, &mut self.clipper);
        let calls = cases::Loaded::new(arena, clipper, &self.limits, entry, &ops, self.options.tries)?;
        let launches = loaded::Loaded::new(arena, calls.flush_launch(), entry, norm, None)?;
        let mut both = Together { arena, calls, launches };

        // Partials for what starts from them. The norm has to be the crate's, and still is after all has run.
        let whole =
            both.launches.add(&mut self.kernels, What::Call(Op::Norm), &LIBRARY)?.map_err(anyhow::Error::msg)?;
        let same_norm = |both: &mut Together| {
            rounds::Subject::enqueue(both, Timed::Launches(whole, Mode::Eager))?;
            let found = both.launches.report()?.total_norm;
            ensure!(found.to_bits() == norm.to_bits(), "the launches find the norm {found}, the crate {norm}");
            Ok(())
        };
        same_norm(&mut both)?;

        for cache in [Cache::Warm, Cache::Cold] {
            let mut timed = LIMITS.map(Timed::Call).to_vec();
            let mut of_cache = Vec::new();
            for case in &predicted {
                if case.cache()? != cache {
                    continue;
                }
                timed.push(match case.launched()? {
                    Launched::Call(case) => Timed::Call(case),
                    Launched::Itself(what, mode) => {
                        let index =
                            both.launches.add(&mut self.kernels, what, &LIBRARY)?.map_err(anyhow::Error::msg)?;
                        if mode == Mode::Graph {
                            both.launches.capture(index)?;
                        }
                        Timed::Launches(index, mode)
                    }
                });
                of_cache.push(*case);
            }
            if of_cache.is_empty() {
                continue;
            }
            let times = rounds::measure(&mut both, &timed, cache, slice, &self.options)?;
            let rows = Rows { run: &self.run, pass: 1, entry, checked };
            let written = Written { rows, predictions: &self.predictions, gpu: &self.gpu, cache };
            if of_cache.iter().any(|case| case.reads_gradients()) {
                for ((limit, own), what) in LIMITS.iter().zip(&times).zip(&timed) {
                    let ratio = record::ratio(own, &[*what], &timed, &times);
                    write_both(lines, out, written.limit(*limit, own, ratio))?;
                }
            }
            for (case, own) in of_cache.iter().zip(&times[LIMITS.len()..]) {
                let limits = case.op().map(|op| Case::Eager(op).limit().to_vec())?;
                let limits = if case.reads_gradients() { limits } else { Vec::new() };
                let limits: Vec<Timed> = limits.into_iter().map(Timed::Call).collect();
                let share = record::ratio(own, &limits, &timed, &times);
                write_both(lines, out, written.of(case, own, share)?)?;
            }
        }
        rounds::Subject::restore(&both)?;
        same_norm(&mut both)
    }
}

fn write_both(lines: &mut dyn Write, out: &mut dyn Write, [line, row]: [String; 2]) -> Result<()> {
    writeln!(lines, "{line}")?;
    writeln!(out, "{row}")?;
    lines.flush()?;
    Ok(out.flush()?)
}

/// What becomes of a measurement.
struct Written<'a> {
    rows: Rows<'a>,
    predictions: &'a Predictions,
    gpu: &'a str,
    cache: Cache,
}

impl Written<'_> {
    /// As [`of`](Self::of), of what the others are held against.
    fn limit(&self, limit: Case, times: &Times, ratio: f64) -> [String; 2] {
        let names = limit.names();
        let row = self.rows.row(names, limit.passes(), ratio, times, self.cache);
        let [_, name, _] = names;
        let median = quantile(&times.gpu, 0.5);
        let speed = number((limit.passes() * self.rows.entry.bytes()) as f64 / median / 1e3, 0);
        let (entry, cache) = (self.rows.entry, self.cache.name());
        let line = format!("limit: {entry}, {name}, {cache}: {} us, {speed} GB/s", number(median, 1));
        [line, format!("{row},,us,,,limit")]
    }

    /// A line to read, and the row of the record.
    fn of(&self, case: &Predicted, times: &Times, share: f64) -> Result<[String; 2]> {
        let interval = self.predictions.interval(case, self.gpu);
        let (median, digits) = (quantile(&times.gpu, 0.5), 3);
        let (unit, measured) = match case.unit {
            Unit::Us => ("us", median),
            Unit::Share => ("share", share),
        };
        let verdict = verdict(interval, case.unit, measured);
        let Interval { low, high } = interval.unwrap_or(Interval { low: None, high: None });
        let [low, high] = [low, high].map(|end| end.map_or_else(String::new, |end| number(end, digits)));
        let passes = if case.reads_gradients() { case.op()?.passes() } else { 0 };
        let names = [case.op.as_str(), &case.implementation, &case.mode];
        let row = self.rows.row(names, passes, share, times, self.cache);
        let row = format!("{row},{},{unit},{low},{high},{verdict}", self.predictions.kernels(case));
        let [p10, p90] = [0.1, 0.9].map(|at| number(quantile(&times.gpu, at), 1));
        let of_limit =
            if share.is_finite() { format!(", {} % of the limit", number(100.0 * share, 1)) } else { String::new() };
        let predicted = match (low.as_str(), high.as_str()) {
            ("", "") => String::new(),
            (low, "") => format!("; predicted {low} {unit} or more"),
            (low, high) => format!("; predicted {low} to {high} {unit}"),
        };
        let [op, implementation, mode] = names;
        let line = format!(
            "{verdict}: {}, {op}, {implementation}, {mode}, {}: {} us ({p10} to {p90}, {} rounds){of_limit}{predicted}",
            self.rows.entry,
            self.cache.name(),
            number(median, 1),
            times.gpu.len(),
        );
        Ok([line, row])
    }
}
