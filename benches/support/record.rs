//! The record: `benches/README.md` says how one is made. Here every implementation runs once a round, so that a
//! machine that is busy with something else is so for all of them, and a ratio is that of one round; criterion runs one
//! after the other, which compares them only on a quiet machine.

use super::cases::{cases, Case, Float, List, Op, READ, UPDATE};
use super::shapes::Shapes;
use gradclip::cpu::AsGradMut;
use std::io::Write;
use std::process::Command;
use std::time::{Duration, Instant};

/// Rounds of an operation on a list: as many as fit, but not fewer, and not more.
const TIME: Duration = Duration::from_millis(1500);
const MIN_ROUNDS: usize = 7;
const MAX_ROUNDS: usize = 200;
/// Rounds in which what runs on one core takes part.
const SLOW_ROUNDS: usize = 3;

pub struct Record<W> {
    csv: W,
    /// The first columns.
    run: String,
}

impl<W: Write> Record<W> {
    pub fn new(mut csv: W) -> std::io::Result<Self> {
        writeln!(csv, "machine,cores,load,date,commit,command,list,dtype,op,implementation,GB/s,ratio to limit")?;
        let cores = rayon::current_num_threads();
        let run = format!(
            "{},{cores},{},{},{},{}",
            machine(),
            load(),
            output_of("date", &["-u", "+%F"]),
            output_of("git", &["describe", "--always", "--dirty"]),
            "GRADCLIP_RECORD=... cargo bench --bench cpu --features candle",
        );
        Ok(Self { csv, run })
    }

    /// A row for each implementation of each operation on one list.
    pub fn list<T: Float>(&mut self, shapes: &Shapes) -> std::io::Result<()>
    where
        Vec<T>: AsGradMut,
    {
        let mut list = List::<T>::new(shapes);
        for op in Op::ALL {
            list.fill();
            let cases = cases::<T>(op);
            let rounds = measure(&cases, &mut list);
            let bytes = (op.traffic() * shapes.total() * size_of::<T>()) as f64;
            for (i, case) in cases.iter().enumerate() {
                // A limit moves what one pass moves.
                let bytes = match case.implementation {
                    READ => bytes / op.traffic() as f64,
                    UPDATE | "plain copy" => 2.0 * bytes / op.traffic() as f64,
                    _ => bytes,
                };
                let limit = |times: &[f64]| {
                    let of = |name| cases.iter().position(|case| case.implementation == name).map_or(0.0, |i| times[i]);
                    match case.implementation {
                        READ => of(READ),
                        UPDATE | "plain copy" => of(UPDATE),
                        _ => of(READ) + of(UPDATE),
                    }
                };
                let took_part: Vec<&Vec<f64>> =
                    rounds.iter().filter(|times| times.len() > i && times[i] > 0.0).collect();
                let speed = bytes / median(took_part.iter().map(|times| times[i])) / 1e9;
                let ratio = median(took_part.iter().map(|times| limit(times) / times[i]));
                writeln!(
                    self.csv,
                    "{},{},{},{},{},{speed:.2},{ratio:.3}",
                    self.run,
                    shapes.name,
                    T::NAME,
                    op.name(),
                    case.implementation,
                )?;
                self.csv.flush()?;
            }
        }
        Ok(())
    }
}

/// Seconds of each implementation in each round, 0 where it did not take part.
fn measure<T>(cases: &[Case<T>], list: &mut List<T>) -> Vec<Vec<f64>> {
    let start = Instant::now();
    let mut rounds = Vec::new();
    while rounds.len() < MIN_ROUNDS || (rounds.len() < MAX_ROUNDS && start.elapsed() < TIME) {
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

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
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
