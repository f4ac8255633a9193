//! Rows of the record: `benches/README.md` has the columns. Here every implementation runs once a round, so that a
//! machine that is busy with something else is so for all of them, and a ratio is that of one round; criterion runs one
//! after the other, which compares them only on a quiet machine.

use super::cases::{cases, Case, Float, List, Op, COPY, READ, UPDATE};
use gradclip::cpu::AsGradMut;
use std::process::Command;
use std::time::{Duration, Instant};

/// From `pass` on the names are those of the GPU's record.
pub const HEADER: &str =
    "machine,cores,load,date,commit,command,pass,list,tensors,bytes,dtype,op,implementation,rounds,\
                          median_us,p10_us,p90_us,GB/s,ratio,checked";

/// Rounds of an operation on a list: as many as fit into its time, but not fewer, and not more.
const MIN_ROUNDS: usize = 7;
const MAX_ROUNDS: usize = 200;
/// Rounds in which what runs on one core takes part.
const SLOW_ROUNDS: usize = 3;

/// The first columns, those of the whole run.
pub fn run_columns(command: &str) -> String {
    let columns = [
        machine(),
        rayon::current_num_threads().to_string(),
        load(),
        output_of("date", &["-u", "+%F"]),
        output_of("git", &["describe", "--always", "--dirty"]),
        command.to_owned(),
    ];
    columns.join(",")
}

/// How a list is measured.
pub struct How<'a> {
    pub run: &'a str,
    /// Tells two measurements of one list apart.
    pub pass: u32,
    /// For each operation.
    pub time: Duration,
    /// Whether what runs on one core is measured, too.
    pub slow: bool,
}

/// A row for each implementation of each operation on one list.
pub fn rows<T: Float>(list: &mut List<T>, how: &How<'_>) -> Vec<String>
where
    Vec<T>: AsGradMut,
{
    let bytes = list.numel() * size_of::<T>();
    let mut written = Vec::new();
    for op in Op::ALL {
        list.fill_if_clamped();
        let mut cases = cases::<T>(op);
        cases.retain(|case| how.slow || !case.slow);
        let rounds = measure(&cases, list, how.time);
        for (i, case) in cases.iter().enumerate() {
            let passes = match case.implementation {
                READ => 1,
                UPDATE | COPY => 2,
                _ => op.traffic(),
            };
            let limit = |times: &[f64]| {
                let of = |name| cases.iter().position(|case| case.implementation == name).map_or(0.0, |i| times[i]);
                match case.implementation {
                    READ => of(READ),
                    UPDATE | COPY => of(UPDATE),
                    _ => of(READ) + of(UPDATE),
                }
            };
            let took_part: Vec<&Vec<f64>> = rounds.iter().filter(|times| times[i] > 0.0).collect();
            let times: Vec<f64> = took_part.iter().map(|times| times[i]).collect();
            let ratios: Vec<f64> = took_part.iter().map(|times| limit(times) / times[i]).collect();
            let median = quantile(&times, 0.5);
            written.push(format!(
                "{},{},{},{},{bytes},{},{},{},{},{:.3},{:.3},{:.3},{:.2},{:.3},{}",
                how.run,
                how.pass,
                list.name,
                list.grads.len(),
                T::NAME,
                op.name(),
                case.implementation,
                times.len(),
                median * 1e6,
                quantile(&times, 0.1) * 1e6,
                quantile(&times, 0.9) * 1e6,
                (passes * bytes) as f64 / median / 1e9,
                quantile(&ratios, 0.5),
                if case.implementation == "gradclip" { "all" } else { "no" },
            ));
        }
    }
    written
}

/// Seconds of each implementation in each round, 0 where it did not take part.
fn measure<T>(cases: &[Case<T>], list: &mut List<T>, time: Duration) -> Vec<Vec<f64>> {
    let start = Instant::now();
    let mut rounds = Vec::new();
    while rounds.len() < MIN_ROUNDS || (rounds.len() < MAX_ROUNDS && start.elapsed() < time) {
        let mut time = |case: &Case<T>| {
            if case.slow && rounds.len() >= SLOW_ROUNDS {
                return 0.0;
            }
            let start = Instant::now();
            (case.run)(list);
            start.elapsed().as_secs_f64()
        };
        let times = cases.iter().map(&mut time).collect();
        rounds.push(times);
    }
    rounds
}

fn quantile(values: &[f64], at: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let index = (sorted.len().saturating_sub(1) as f64 * at).round() as usize;
    sorted.get(index).copied().unwrap_or(f64::NAN)
}

fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let of = |key: &str| {
        let line = info.lines().find(|line| line.split(':').next().is_some_and(|name| name.trim() == key));
        line.and_then(|line| line.split(':').nth(1)).unwrap_or("?").trim().replace(',', " ")
    };
    format!("{} family {} model {}", of("model name"), of("cpu family"), of("model"))
}

/// Processes that wanted to run in the minute before.
fn load() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split_whitespace().next().unwrap_or("?").to_owned()
}

fn output_of(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_else(|_| "?".into())
}
