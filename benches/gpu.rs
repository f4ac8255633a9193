//! The CUDA path over lists of real models, beside what the GPU's memory gives. `benches/README.md` says how to run it,
//! also beside PyTorch, and what the columns are.
//!
//!     cargo bench --bench gpu -- --budget 120 --out record.csv
//!     cargo bench --bench gpu -- --list GPT-2 --dtype bf16
//!
//! Needs a GPU; without one it says what is missing and ends.
#![allow(missing_docs)]

mod measure;

use anyhow::{ensure, Context, Result};
use clap::Parser;
use measure::cases::Op;
use measure::lists::{entries, share, Entry};
use measure::{lists, record, shapes, Bench, Options};
use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

#[derive(Parser)]
struct Args {
    /// Seconds for everything; lists that are left then are named as skipped.
    #[arg(long, default_value_t = 120.0)]
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
    /// File for the rows; else they go to the standard output.
    #[arg(long)]
    out: Option<PathBuf>,
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

fn main() -> Result<()> {
    shapes::check();
    let args = Args::parse();
    let entries = entries();
    if args.export_lists {
        let lists = serde_json::json!({
            "header": record::HEADER,
            "align": lists::ALIGN,
            "sigma": measure::arena::SIGMA,
            "weight": lists::WEIGHT,
            "weighted": lists::WEIGHTED,
            "bounds": Op::ALL.map(|op| (op.name(), op.bound())),
            "lists": entries,
        });
        println!("{lists}");
        return Ok(());
    }
    let context = match gradclip::cuda::context(0) {
        Ok(context) => context,
        Err(error) => {
            let required = std::env::var_os("GRADCLIP_REQUIRE_GPU").is_some_and(|value| value == "1");
            ensure!(!required, "GRADCLIP_REQUIRE_GPU=1, and no GPU can be used: {error}");
            println!("SKIPPED, not measured: {error}");
            return Ok(());
        }
    };
    let options = Options { max_bytes: (args.max_gib * f64::from(1 << 30)) as usize, ..Options::default() };
    let mut bench = Bench::new(&context, options)?;
    if args.serve {
        return serve(&mut bench, &entries);
    }
    let wanted = |index: &usize| {
        let entry = &entries[*index];
        entry.list.contains(&args.list) && args.dtype.as_ref().is_none_or(|dtype| entry.dtype == dtype)
    };
    let wanted: Vec<usize> = (0..entries.len()).filter(wanted).collect();
    let mut out: Box<dyn Write> = match &args.out {
        Some(path) => Box::new(std::fs::File::create(path)?),
        None => Box::new(std::io::stdout()),
    };
    all(&mut bench, &entries, &wanted, Duration::from_secs_f64(args.budget), &mut out)
}

/// One list after the other, until the time is over.
fn all(bench: &mut Bench, entries: &[Entry], wanted: &[usize], budget: Duration, out: &mut impl Write) -> Result<()> {
    let started = Instant::now();
    writeln!(out, "{}", record::HEADER)?;
    for (done, index) in wanted.iter().enumerate() {
        let entry = &entries[*index];
        let left = budget.saturating_sub(started.elapsed());
        if left.is_zero() || !bench.fits(entry) {
            let why = if left.is_zero() { "the time is over" } else { "it does not fit" };
            eprintln!("SKIPPED {} {}: {why}", entry.list, entry.dtype);
            continue;
        }
        // A third goes to what is not counted: filling, checking, finding the fastest limits.
        let slice = left.mul_f64(share(&wanted[done..]) * 2.0 / 3.0);
        for row in bench.measure(entry, 1, slice.min(Duration::from_secs(3)))? {
            writeln!(out, "{row}")?;
        }
        out.flush()?;
        eprintln!("{:6.1} s  {} {}", started.elapsed().as_secs_f64(), entry.list, entry.dtype);
    }
    Ok(())
}

/// Answers each request with its rows and a line `done`, or `failed` and why.
fn serve(bench: &mut Bench, entries: &[Entry]) -> Result<()> {
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let answer = (|| {
            let mut words = line.split_whitespace();
            let mut word = || words.next().context("a request is PASS SECONDS INDEX");
            let (pass, seconds, index) = (word()?.parse()?, word()?.parse()?, word()?.parse::<usize>()?);
            let entry = entries.get(index).context("no such list")?;
            bench.measure(entry, pass, Duration::from_secs_f64(seconds))
        })();
        match answer {
            Ok(rows) => rows.iter().map(String::as_str).chain(["done"]).for_each(|row| println!("{row}")),
            Err(error) => println!("failed {error:#}"),
        }
        std::io::stdout().flush()?;
    }
    Ok(())
}
