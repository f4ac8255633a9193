//! What `docs/performance.md` predicts of other kernels and launches, tried: each variant beside the library's own, in the
//! same rounds, with results compared bit for bit before. `benches/README.md` says how to run it.
//!
//!     cargo bench --bench variants -- --budget 90 --out record.csv
//!     cargo bench --bench variants -- --change "last block" --list "1 MiB"
//!
//! Needs a GPU; without one it says what is missing and ends.
#![allow(missing_docs)]

#[allow(dead_code)] // gpu.rs uses the rest
mod measure;
#[path = "variants/mod.rs"]
mod trials;

use anyhow::{bail, ensure, Result};
use clap::Parser;
use measure::attempt::{attempt, Failed};
use measure::Options;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use trials::{lists, rows, Trials};

#[derive(Parser)]
struct Args {
    /// Seconds for everything; what is left then is named as skipped.
    #[arg(long, default_value_t = 90.0)]
    budget: f64,
    /// GiB of gradients that a list may have; the same again is allocated to restore them from.
    #[arg(long, default_value_t = 16.0)]
    max_gib: f64,
    /// Only lists whose name contains this.
    #[arg(long, default_value = "")]
    list: String,
    /// Only this type.
    #[arg(long)]
    dtype: Option<String>,
    /// Only changes whose key, as in variants.json, contains this.
    #[arg(long, default_value = "")]
    change: String,
    /// File for the rows, as they are made. A table goes to the standard output in any case.
    #[arg(long)]
    out: Option<PathBuf>,
    /// What cargo passes.
    #[arg(long, hide = true)]
    bench: bool,
    #[arg(long, hide = true)]
    test: bool,
}

/// Of one measurement, with the library and all variants of a change; at least 7 rounds are made.
const SLICE: Duration = Duration::from_millis(20);

/// Measured after all others, with what is left of the time: a barrier that never opens would be the end of the run.
const HELD_BACK: &str = "cooperative launch";

fn main() -> Result<()> {
    let started = Instant::now();
    let args = Args::parse();
    let context = match gradclip::cuda::context(0) {
        Ok(context) => context,
        Err(error) => {
            let required = std::env::var_os("GRADCLIP_REQUIRE_GPU").is_some_and(|value| value == "1");
            ensure!(!required, "GRADCLIP_REQUIRE_GPU=1, and no GPU can be used: {error}");
            println!("SKIPPED, not measured: {error}");
            return Ok(());
        }
    };
    let options = Options {
        max_bytes: (args.max_gib * f64::from(1 << 30)) as usize,
        batch: Duration::from_micros(200),
        max_rounds: 30,
        ..Options::default()
    };
    let mut trials = Trials::new(&context, options)?;
    let mut out = args.out.as_ref().map(std::fs::File::create).transpose()?;
    if let Some(out) = &mut out {
        writeln!(out, "{}", rows::HEADER)?;
    }
    println!("{}", rows::TABLE);
    let mut failed = false;
    let budget = Duration::from_secs_f64(args.budget);
    for (wanted, deadline) in [(true, budget.mul_f64(0.9)), (false, budget)] {
        let changes = |change: &str| change.contains(&args.change) && (change != HELD_BACK) == wanted;
        for entry in lists() {
            let named = entry.list.contains(&args.list) && args.dtype.as_ref().is_none_or(|dtype| entry.dtype == dtype);
            if !named {
                continue;
            }
            if !trials.fits(&entry) || started.elapsed() >= deadline {
                let why = if trials.fits(&entry) { "the time is over" } else { "it does not fit" };
                eprintln!("SKIPPED {entry}: {why}");
                continue;
            }
            let mut write = |row: rows::Row| {
                println!("{}", row.line);
                if let Some(out) = &mut out {
                    writeln!(out, "{}", row.csv)?;
                    out.flush()?;
                }
                Ok(())
            };
            let measured =
                attempt(&mut trials, |trials| trials.measure(&entry, &changes, SLICE, started + deadline, &mut write));
            match measured {
                Ok(()) => {}
                Err(Failed::List(why)) => {
                    eprintln!("FAILED {entry}: {why}");
                    failed = true;
                }
                Err(Failed::Everything(why)) => bail!("STOPPED at {entry}: {why}"),
            }
            eprintln!("{:6.1} s  {entry}", started.elapsed().as_secs_f64());
        }
    }
    ensure!(!failed && trials.failed.is_empty(), "not all could be measured");
    Ok(())
}
