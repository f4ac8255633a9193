//! The table at the end.

use std::time::Duration;

use crate::step_share::StepTime;
use crate::train::{Clipping, Run};

impl Clipping {
    pub fn label(self) -> String {
        match self {
            Self::Off => "no clipping".into(),
            Self::Norm(max_norm) => format!("norm clipping, {max_norm}"),
            Self::Value(clip_value) => format!("value clipping, {clip_value}"),
            Self::NormByCandle(max_norm) => format!("norm clipping by candle's own operations, {max_norm}"),
        }
    }
}

/// One row for each run, then one line for each kind of clipping.
pub fn print(runs: &[Run]) {
    println!(
        "{:<21} {:>4} {:>14} {:>13} {:>10} {:>9} {:>12} {:>10}",
        "", "seed", "steps clipped", "largest norm", "test loss", "accuracy", "diverged", "clip time"
    );
    for run in runs {
        println!("{}", row(run));
    }
    println!("largest norm: before clipping; clip time: share of forward, backward, clip and update\n");
    for same in runs.chunk_by(|a, b| a.clipping == b.clipping) {
        println!("{:<21} {}", same[0].clipping.label(), outcome(same));
    }
}

/// What came of the runs, in a few words.
pub fn outcome(runs: &[Run]) -> String {
    let scores = || runs.iter().filter_map(|run| run.score.as_ref());
    let mut words = Vec::new();
    if let Some((low, high)) = range(scores().filter_map(|score| score.accuracy)) {
        words.push(format!("accuracy {}", span(low, high, |x| format!("{:.0}", 100.0 * x)) + " %"));
    } else if let Some((low, high)) = range(scores().map(|score| score.loss)) {
        words.push(format!("test loss {}", span(low, high, number)));
    }
    let diverged = runs.iter().filter(|run| run.diverged.is_some()).count();
    if diverged > 0 {
        words.push(format!("{diverged} of {} diverged", runs.len()));
    }
    words.join(", ")
}

fn range(mut values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let first = values.next()?;
    Some(values.fold((first, first), |(low, high), x| (low.min(x), high.max(x))))
}

fn span(low: f64, high: f64, format: impl Fn(f64) -> String) -> String {
    match (format(low), format(high)) {
        (low, high) if low == high => low,
        (low, high) => format!("{low} to {high}"),
    }
}

fn row(run: &Run) -> String {
    let (loss, accuracy) = match &run.score {
        Some(score) => (number(score.loss), score.accuracy.map_or("-".into(), |a| format!("{:.1} %", 100.0 * a))),
        None => ("-".into(), "-".into()),
    };
    let (clipped, time) = match run.clipping {
        Clipping::Off => ("-".into(), "-".into()),
        _ => (
            format!("{} ({:.0} %)", run.clipped, percent(run.clipped as f64, run.losses.len() as f64)),
            format!("{:.1} %", clip_share(&run.times)),
        ),
    };
    let mut diverged = run.diverged.map_or("no".into(), |step| format!("at step {step}"));
    if run.skipped > 0 {
        diverged += &format!(", {} skipped", run.skipped);
    }
    let largest = number(run.norms.iter().copied().fold(0.0, f64::max));
    let label = run.clipping.label();
    format!(
        "{label:<21} {:>4} {clipped:>14} {largest:>13} {loss:>10} {accuracy:>9} {diverged:>12} {time:>10}",
        run.seed
    )
}

/// Percent of the time of all steps.
fn clip_share(times: &[StepTime]) -> f64 {
    let sum = |part: fn(&StepTime) -> Duration| times.iter().map(part).sum::<Duration>().as_secs_f64();
    percent(sum(|time| time.clip), sum(|time| time.step))
}

fn percent(part: f64, whole: f64) -> f64 {
    100.0 * part / whole.max(f64::MIN_POSITIVE)
}

/// Three significant digits, with an exponent where that is shorter.
fn number(x: f64) -> String {
    match x.abs() {
        a if a >= 1e5 || (a > 0.0 && a < 1e-3) => format!("{x:.1e}"),
        a if a >= 100.0 => format!("{x:.0}"),
        a if a >= 10.0 => format!("{x:.1}"),
        a if a >= 1.0 => format!("{x:.2}"),
        _ => format!("{x:.3}"),
    }
}
