//! Times, round by round: every case once a round, so that clocks that change do so for all, and a ratio is that of one
//! round.

use super::arena::Arena;
use super::Options;
use anyhow::Result;
use cudarc::driver::CudaEvent;
use std::time::{Duration, Instant};

/// State of the L2 cache when a case starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// As the same case, just before, has left it (value clipping with something outside: as the copy that restored).
    Warm,
    /// Nothing of the list.
    Cold,
}

impl Cache {
    pub fn name(self) -> &'static str {
        match self {
            Self::Warm => "warm",
            Self::Cold => "cold",
        }
    }
}

/// Microseconds of one case, one for each round.
#[derive(Clone, Debug, Default)]
pub struct Times {
    /// Calls between two events; `gpu` is that of one.
    pub calls: usize,
    pub gpu: Vec<f64>,
    /// Until the call has returned, on an idle stream.
    pub host: Vec<f64>,
    /// Until its work is done.
    pub done: Vec<f64>,
}

/// One list, and what is timed on it.
pub trait Subject {
    type Case: Copy;
    fn arena(&self) -> &Arena;
    /// Whether a second call would find less to do than the first.
    fn needs_restored(&self, case: Self::Case) -> bool;
    fn restore(&self) -> Result<()>;
    /// Leaves nothing of the list in the L2 cache.
    fn flush(&mut self) -> Result<()>;
    fn enqueue(&mut self, case: Self::Case) -> Result<()>;
}

pub fn measure<S: Subject>(
    subject: &mut S,
    cases: &[S::Case],
    cache: Cache,
    slice: Duration,
    options: &Options,
) -> Result<Vec<Times>> {
    let started = Instant::now();
    let pairs =
        cases.iter().map(|_| Ok([subject.arena().event()?, subject.arena().event()?])).collect::<Result<Vec<_>>>()?;
    let mut all = vec![Times { calls: 1, ..Times::default() }; cases.len()];

    // Once before it counts, which also says how many calls are needed between two events.
    for ((case, pair), times) in cases.iter().zip(&pairs).zip(&mut all) {
        enqueue(subject, *case, cache, 1, pair)?;
        if cache == Cache::Warm && !subject.needs_restored(*case) {
            let took = f64::from(pair[0].elapsed_ms(&pair[1])?) * 1e3;
            let calls = options.batch.as_secs_f64() * 1e6 / took;
            times.calls = if took > 0.0 { (calls as usize).clamp(1, options.max_calls) } else { 1 };
        }
    }

    for round in 0..options.max_rounds {
        if round >= options.min_rounds && started.elapsed() >= slice {
            break;
        }
        for ((case, pair), times) in cases.iter().zip(&pairs).zip(&all) {
            enqueue(subject, *case, cache, times.calls, pair)?;
        }
        subject.arena().stream.synchronize()?;
        for (pair, times) in pairs.iter().zip(&mut all) {
            times.gpu.push(f64::from(pair[0].elapsed_ms(&pair[1])?) * 1e3 / times.calls as f64);
        }
        if cache == Cache::Warm {
            for (case, times) in cases.iter().zip(&mut all) {
                let [host, done] = by_the_clock(subject, *case)?;
                times.host.push(host);
                times.done.push(done);
            }
        }
    }
    Ok(all)
}

/// The calls between the two events. Something comes before, so that the GPU is busy while the host enqueues the first.
fn enqueue<S: Subject>(
    subject: &mut S,
    case: S::Case,
    cache: Cache,
    calls: usize,
    [start, end]: &[CudaEvent; 2],
) -> Result<()> {
    if subject.needs_restored(case) {
        subject.restore()?;
    }
    match cache {
        Cache::Cold => subject.flush()?,
        Cache::Warm if subject.needs_restored(case) => {}
        Cache::Warm => subject.enqueue(case)?,
    }
    start.record(&subject.arena().stream)?;
    for _ in 0..calls {
        subject.enqueue(case)?;
    }
    end.record(&subject.arena().stream)?;
    Ok(())
}

/// Microseconds until one call has returned, and until its work is done.
fn by_the_clock<S: Subject>(subject: &mut S, case: S::Case) -> Result<[f64; 2]> {
    if subject.needs_restored(case) {
        subject.restore()?;
    }
    subject.arena().stream.synchronize()?;
    let start = Instant::now();
    subject.enqueue(case)?;
    let host = start.elapsed();
    subject.arena().stream.synchronize()?;
    let done = start.elapsed();
    Ok([host, done].map(|took| took.as_secs_f64() * 1e6))
}
