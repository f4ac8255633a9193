//! Times, round by round: every case once a round, so that clocks that change do so for all, and a ratio is that of one
//! round.

use super::cases::{Case, Loaded};
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

pub fn measure(
    loaded: &mut Loaded<'_>,
    cases: &[Case],
    cache: Cache,
    slice: Duration,
    options: &Options,
) -> Result<Vec<Times>> {
    let started = Instant::now();
    let pairs = cases.iter().map(|_| Ok([loaded.arena.event()?, loaded.arena.event()?])).collect::<Result<Vec<_>>>()?;
    let mut all = vec![Times { calls: 1, ..Times::default() }; cases.len()];

    // Once before it counts, which also says how many calls are needed between two events.
    for ((case, pair), times) in cases.iter().zip(&pairs).zip(&mut all) {
        enqueue(loaded, *case, cache, 1, pair)?;
        if cache == Cache::Warm && !case.needs_restored() {
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
            enqueue(loaded, *case, cache, times.calls, pair)?;
        }
        loaded.arena.stream.synchronize()?;
        for (pair, times) in pairs.iter().zip(&mut all) {
            times.gpu.push(f64::from(pair[0].elapsed_ms(&pair[1])?) * 1e3 / times.calls as f64);
        }
        if cache == Cache::Warm {
            for (case, times) in cases.iter().zip(&mut all) {
                let [host, done] = by_the_clock(loaded, *case)?;
                times.host.push(host);
                times.done.push(done);
            }
        }
    }
    Ok(all)
}

/// The calls between the two events. Something comes before, so that the GPU is busy while the host enqueues the first.
fn enqueue(
    loaded: &mut Loaded<'_>,
    case: Case,
    cache: Cache,
    calls: usize,
    [start, end]: &[CudaEvent; 2],
) -> Result<()> {
    if case.needs_restored() {
        loaded.restore()?;
    }
    match cache {
        Cache::Cold => loaded.flush()?,
        Cache::Warm if case.needs_restored() => {}
        Cache::Warm => loaded.enqueue(case)?,
    }
    start.record(&loaded.arena.stream)?;
    for _ in 0..calls {
        loaded.enqueue(case)?;
    }
    end.record(&loaded.arena.stream)?;
    Ok(())
}

/// Microseconds until one call has returned, and until its work is done.
fn by_the_clock(loaded: &mut Loaded<'_>, case: Case) -> Result<[f64; 2]> {
    if case.needs_restored() {
        loaded.restore()?;
    }
    loaded.arena.stream.synchronize()?;
    let start = Instant::now();
    loaded.enqueue(case)?;
    let host = start.elapsed();
    loaded.arena.stream.synchronize()?;
    let done = start.elapsed();
    Ok([host, done].map(|took| took.as_secs_f64() * 1e6))
}
