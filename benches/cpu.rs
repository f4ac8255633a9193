//! The CPU path over lists of real models, beside what anybody would write, what candle's users write (feature
//! `candle`), and what the machine's memory gives. `benches/README.md` says how to run it, and how a record is made.
//!
//!     cargo bench --bench cpu --features candle -- --quick
//!     cargo bench --bench cpu -- 'GPT-2/bf16/clip/gradclip'
//!
//! Throughput counts the bytes that have to move: a read of the gradients for a norm, a read and a write for a scale or
//! a clamp, both for a clip that clips.
#![allow(clippy::unwrap_used, missing_docs)]

mod support {
    pub mod cases;
    pub mod limits;
    pub mod lists;
    pub mod record;
    pub mod shapes;
}

use anyhow::{Context, Result};
use criterion::{Criterion, Throughput};
use gradclip::cpu::AsGradMut;
use half::{bf16, f16};
use std::collections::HashSet;
use std::io::{BufRead, Write};
use std::time::Duration;
use support::cases::{cases, Float, List, Op, COPY, READ, UPDATE};
use support::lists::{self, Entry};
use support::record::{self, How};
use support::shapes::{self, Shapes};

/// Of one operation in a record without PyTorch.
const TIME: Duration = Duration::from_millis(1500);

/// A list, whatever its type is.
trait Loaded {
    fn rows(&mut self, how: &How<'_>) -> Vec<String>;
    /// What PyTorch is to find, too.
    fn norm(&self) -> f64;
}

impl<T: Float> Loaded for List<T>
where
    Vec<T>: AsGradMut,
{
    fn rows(&mut self, how: &How<'_>) -> Vec<String> {
        record::rows(self, how)
    }

    fn norm(&self) -> f64 {
        self.norm
    }
}

fn load(shapes: &Shapes, dtype: &str) -> Box<dyn Loaded> {
    match dtype {
        "f32" => Box::new(List::<f32>::new(shapes)),
        "f64" => Box::new(List::<f64>::new(shapes)),
        "f16" => Box::new(List::<f16>::new(shapes)),
        _ => Box::new(List::<bf16>::new(shapes)),
    }
}

fn benchmark<T: Float>(criterion: &mut Criterion, shapes: &Shapes)
where
    Vec<T>: AsGradMut,
{
    let mut list = List::<T>::new(shapes);
    let bytes = (shapes.total() * size_of::<T>()) as u64;
    for op in Op::ALL {
        list.fill();
        let mut group = criterion.benchmark_group(format!("{}/{}/{}", shapes.name, T::NAME, op.name()));
        group.sample_size(10);
        for case in cases::<T>(op) {
            let passes = match case.implementation {
                READ => 1,
                UPDATE | COPY => 2,
                _ => op.traffic() as u64,
            };
            group.throughput(Throughput::Bytes(passes * bytes));
            group.bench_function(case.implementation, |bencher| bencher.iter(|| (case.run)(&mut list)));
        }
        group.finish();
    }
}

fn benchmark_as(criterion: &mut Criterion, shapes: &Shapes, dtype: &str) {
    match dtype {
        "f32" => benchmark::<f32>(criterion, shapes),
        "f64" => benchmark::<f64>(criterion, shapes),
        "f16" => benchmark::<f16>(criterion, shapes),
        _ => benchmark::<bf16>(criterion, shapes),
    }
}

/// What there is for a record without PyTorch, and for criterion.
fn all() -> Vec<Entry> {
    let mut entries = lists::first();
    entries.extend(lists::others());
    if std::env::var_os("GRADCLIP_BENCH_LARGE").is_some() {
        let llama = shapes::llama_1b();
        entries.push(Entry { list: llama.name, dtype: "bf16", numels: llama.numels });
    }
    entries
}

/// What is measured beside PyTorch.
fn beside_torch() -> Vec<Entry> {
    [lists::first(), lists::sweeps(), lists::others(), lists::larger()].into_iter().flatten().collect()
}

/// Writes a record without PyTorch: with everything that runs on one core instead.
fn write_record(path: &std::ffi::OsStr) -> Result<()> {
    // Before the file is there, which may change what git says of the commit.
    let run = record::run_columns("GRADCLIP_RECORD=... cargo bench --bench cpu --features candle");
    let mut csv = std::fs::File::create(path)?;
    writeln!(csv, "{}", record::HEADER)?;
    for entry in all() {
        for row in load(&entry.shapes(), entry.dtype).rows(&How { run: &run, pass: 1, time: TIME, slow: true }) {
            writeln!(csv, "{row}")?;
        }
    }
    Ok(())
}

/// Each once, on little: what `cargo test --benches` does.
fn test(criterion: &mut Criterion) {
    let entries = beside_torch();
    let names: HashSet<_> = entries.iter().map(|entry| (entry.list, entry.dtype)).collect();
    assert_eq!(names.len(), entries.len(), "a list is there twice");
    let shapes = Shapes { name: "tiny", numels: vec![1000, 1, 0, 70_000] };
    for dtype in ["f32", "f64", "f16", "bf16"] {
        let rows = load(&shapes, dtype).rows(&How { run: "", pass: 1, time: Duration::ZERO, slow: true });
        let columns = record::HEADER.split(',').count() - record::run_columns("").split(',').count() + 1;
        assert!(rows.iter().all(|row| row.split(',').count() == columns), "{rows:?}");
        benchmark_as(criterion, &shapes, dtype);
    }
}

/// Takes requests `PASS SECONDS INDEX` from the standard input, the last one of the exported lists. Answers each with a
/// line `norm` and the norm of the list, its rows, and a line `done`.
fn serve() -> Result<()> {
    let run = record::run_columns("python3 benches/torch_cpu.py --bench ...");
    let entries = beside_torch();
    let mut loaded: Option<(usize, Box<dyn Loaded>)> = None;
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let mut words = line.split_whitespace();
        let mut word = || words.next().context("a request is PASS SECONDS INDEX");
        let (pass, seconds, index) = (word()?.parse()?, word()?.parse::<f64>()?, word()?.parse::<usize>()?);
        let entry = entries.get(index).context("no such list")?;
        let (_, list) = match loaded.take().filter(|(of, _)| *of == index) {
            Some(same) => loaded.insert(same),
            None => loaded.insert((index, load(&entry.shapes(), entry.dtype))),
        };
        println!("norm {:e}", list.norm());
        let time = Duration::from_secs_f64(seconds / Op::ALL.len() as f64);
        list.rows(&How { run: &run, pass, time, slow: false }).iter().for_each(|row| println!("{row}"));
        println!("done");
        std::io::stdout().flush()?;
    }
    Ok(())
}

fn main() -> Result<()> {
    shapes::check();
    let has = |wanted: &str| std::env::args().any(|arg| arg == wanted);
    // What `torch_cpu.py` asks for; criterion knows neither.
    if has("--export-lists") {
        let threads = rayon::current_num_threads();
        let export = serde_json::json!({ "header": record::HEADER, "threads": threads, "lists": beside_torch() });
        println!("{export}");
        return Ok(());
    }
    if has("--serve") {
        return serve();
    }
    let mut criterion = Criterion::default().configure_from_args();
    if has("--test") || !has("--bench") {
        test(&mut criterion);
    } else if let Some(path) = std::env::var_os("GRADCLIP_RECORD") {
        write_record(&path)?;
    } else {
        for entry in all() {
            benchmark_as(&mut criterion, &entry.shapes(), entry.dtype);
        }
        criterion.final_summary();
    }
    Ok(())
}
