//! Rows of the record. `benches/README.md` has the columns.

use super::cases::Case;
use super::lists::Entry;
use super::rounds::{Cache, Times};
use cudarc::driver::CudaContext;
use std::process::Command;

pub const HEADER: &str =
    "gpu,driver,date,commit,pass,list,tensors,bytes,dtype,op,implementation,mode,cache,rounds,calls,\
                          median_us,p10_us,p90_us,GB/s,ratio,host_us,done_us,checked";

/// The first columns, those of the whole run.
pub fn run_columns(context: &CudaContext) -> String {
    let gpu = context.name().unwrap_or_else(|_| "?".into());
    let query = ["--query-gpu=driver_version", "--format=csv,noheader", "--id=0"];
    // On the machine with the GPU there may be no git.
    let commit =
        std::env::var("GRADCLIP_COMMIT").unwrap_or_else(|_| output_of("git", &["describe", "--always", "--dirty"]));
    let columns = [gpu, output_of("nvidia-smi", &query), output_of("date", &["-u", "+%F"]), commit];
    columns.map(|column| column.replace(',', " ")).join(",")
}

fn output_of(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output();
    output
        .ok()
        .filter(|output| output.status.success())
        .map_or_else(|| "?".into(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// What is the same in all rows of one list.
pub struct Rows<'a> {
    pub run: &'a str,
    pub pass: u32,
    pub entry: &'a Entry,
    pub checked: &'static str,
}

impl Rows<'_> {
    pub fn all(&self, cases: &[Case], all: &[Times], cache: Cache) -> Vec<String> {
        let row = |(case, times): (&Case, &Times)| {
            let limit = ratio(times, case.limit(), cases, all);
            self.row(case.names(), case.passes(), limit, times, cache)
        };
        cases.iter().zip(all).map(row).collect()
    }

    /// `passes`: times that the gradients' bytes move. `ratio`: of the limit's time to this one.
    pub fn row(&self, names: [&str; 3], passes: usize, ratio: f64, times: &Times, cache: Cache) -> String {
        let (bytes, [op, implementation, mode]) = (self.entry.bytes(), names);
        let median_us = quantile(&times.gpu, 0.5);
        let speed = if passes > 0 { (passes * bytes) as f64 / median_us / 1e3 } else { f64::NAN };
        format!(
            "{},{},{},{},{bytes},{},{op},{implementation},{mode},{},{},{},{},{},{},{},{},{},{},{}",
            self.run,
            self.pass,
            self.entry.list,
            self.entry.numels.len(),
            self.entry.dtype,
            cache.name(),
            times.gpu.len(),
            times.calls,
            number(median_us, 3),
            number(quantile(&times.gpu, 0.1), 3),
            number(quantile(&times.gpu, 0.9), 3),
            number(speed, 1),
            number(ratio, 4),
            number(quantile(&times.host, 0.5), 2),
            number(quantile(&times.done, 0.5), 2),
            self.checked,
        )
    }
}

/// The limits' time over the case's time, median over the rounds. NaN where there is no limit.
pub fn ratio<C: PartialEq>(times: &Times, limits: &[C], cases: &[C], all: &[Times]) -> f64 {
    let of = |limit: &C, round: usize| {
        cases.iter().position(|case| case == limit).map_or(f64::NAN, |index| all[index].gpu[round])
    };
    let of_round = |round: usize| limits.iter().map(|limit| of(limit, round)).sum::<f64>() / times.gpu[round];
    if limits.is_empty() {
        return f64::NAN;
    }
    quantile(&(0..times.gpu.len()).map(of_round).collect::<Vec<_>>(), 0.5)
}

/// Nothing where there is no number: a clock may have stood still.
pub fn number(value: f64, digits: usize) -> String {
    if value.is_finite() {
        format!("{value:.digits$}")
    } else {
        String::new()
    }
}

pub fn quantile(values: &[f64], at: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let index = (sorted.len().saturating_sub(1) as f64 * at).round() as usize;
    sorted.get(index).copied().unwrap_or(f64::NAN)
}
