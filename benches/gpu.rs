//! The CUDA path over lists of real models, beside what the GPU's memory gives. `benches/README.md` says how to run it,
//! also beside PyTorch, and what the columns are.
//!
//!     cargo bench --bench gpu -- --predictions --out predictions.csv
//!     cargo bench --bench gpu -- --budget 120 --out record.csv
//!     cargo bench --bench gpu -- --list GPT-2 --dtype bf16
//!
//! Needs a GPU; without one it says what is missing and ends.
#![allow(missing_docs)]

#[allow(dead_code)] // variants.rs uses the rest
mod measure;
#[path = "predictions/mod.rs"]
mod predictions;
#[allow(dead_code)]
#[path = "variants/mod.rs"]
mod trials;

use anyhow::{ensure, Result};
use clap::Parser;
use measure::lists::entries;
use measure::{program, shapes, Bench, Options};
use predictions::Check;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

#[derive(Parser)]
struct Args {
    /// Seconds for everything; lists that are left then are named as skipped.
    #[arg(long, default_value_t = 120.0)]
    budget: f64,
    /// GiB of gradients that a list may have; the same again is allocated to restore them from. 16, or 1 with
    /// `--predictions`.
    #[arg(long)]
    max_gib: Option<f64>,
    /// Only lists whose name contains this.
    #[arg(long, default_value = "")]
    list: String,
    /// Only this type.
    #[arg(long)]
    dtype: Option<String>,
    /// File for the rows; else they go to the standard output.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Measures what `predictions/predictions.json` predicts, and says of each whether it is so: a line for each as it is
    /// measured, on the standard output, and the rows to the file.
    #[arg(long)]
    predictions: bool,
    /// Writes the lists as JSON, and ends: no GPU is needed.
    #[arg(long)]
    export_lists: bool,
    /// Takes one line after the other from the standard input: `PASS SECONDS INDEX`, the last one of the exported lists.
    /// What `torch_gpu.py` uses to have both measured in turn.
    #[arg(long)]
    serve: bool,
    /// What cargo passes.
    #[arg(long, hide = true)]
    bench: bool,
    #[arg(long, hide = true)]
    test: bool,
}

fn main() -> Result<ExitCode> {
    shapes::check();
    let args = Args::parse();
    if args.export_lists {
        println!("{}", program::exported(&entries()));
        return Ok(ExitCode::SUCCESS);
    }
    let context = match gradclip::cuda::context(0) {
        Ok(context) => context,
        Err(error) => {
            let required = std::env::var_os("GRADCLIP_REQUIRE_GPU").is_some_and(|value| value == "1");
            ensure!(!required, "GRADCLIP_REQUIRE_GPU=1, and no GPU can be used: {error}");
            println!("SKIPPED, not measured: {error}");
            return Ok(ExitCode::SUCCESS);
        }
    };
    let max_gib = args.max_gib.unwrap_or(if args.predictions { 1.0 } else { 16.0 });
    let options = Options { max_bytes: (max_gib * f64::from(1 << 30)) as usize, ..Options::default() };
    let named =
        |list: &str, dtype: &str| list.contains(&args.list) && args.dtype.as_ref().is_none_or(|wanted| dtype == wanted);
    let budget = Duration::from_secs_f64(args.budget);
    if args.predictions {
        let mut out: Box<dyn Write> = match &args.out {
            Some(path) => Box::new(File::create(path)?),
            None => Box::new(std::io::sink()),
        };
        Check::new(&context, options)?.all(&named, budget, &mut std::io::stdout(), &mut out)?;
        return Ok(ExitCode::SUCCESS);
    }
    let (mut bench, entries) = (Bench::new(&context, options)?, entries());
    if args.serve {
        // Whoever asked has read why, if not.
        let served = program::serve(&mut bench, &entries, std::io::stdin().lock(), &mut std::io::stdout())?;
        return Ok(if served { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let wanted = |index: &usize| named(entries[*index].list, entries[*index].dtype);
    let wanted: Vec<usize> = (0..entries.len()).filter(wanted).collect();
    let mut out: Box<dyn Write> = match &args.out {
        Some(path) => Box::new(File::create(path)?),
        None => Box::new(std::io::stdout()),
    };
    program::all(&mut bench, &entries, &wanted, budget, &mut out)?;
    Ok(ExitCode::SUCCESS)
}
