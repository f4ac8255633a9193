//! The measuring of benches/gpu.rs runs: every case of a list gives a row, answers are checked, nothing is left behind. What
//! fails is named, and takes no row that was there.

use crate::support::double;
use gradclip::cuda;
use std::collections::HashSet;
use std::io::{self, Write};
use std::time::Duration;

#[path = "../../benches/measure/mod.rs"]
#[allow(dead_code)]
pub mod measure;

use measure::attempt::{attempt, Device, Failed};
use measure::cases::Case;
use measure::lists::{entries, Entry, LARGEST, MOST_ELEMENTS_OF_TORCH, WEIGHTED};
use measure::shapes::Shapes;
use measure::{program, record, Bench, Options};

pub fn tiny() -> Options {
    Options {
        max_bytes: 1 << 20,
        flush: Some(1 << 16),
        cold: 1 << 16,
        min_rounds: 2,
        max_rounds: 2,
        batch: Duration::ZERO,
        max_calls: 2,
        tries: 0,
        warm_up: Duration::ZERO,
        ..Options::default()
    }
}

pub fn lists() -> [Entry; 3] {
    let list = |name, numels: &[usize]| Shapes { name, numels: numels.to_vec() };
    [
        Entry::new(&list("several", &[1000, 1, 0, 9000]), "f32", 0),
        Entry::new(&list("off by one", &[3000, 17]), "bf16", 1),
        Entry::new(&list("a table in memory", &[5; 200]), "f16", 0),
    ]
}

fn rows_of(bench: &mut Bench, entry: &Entry) -> Vec<String> {
    let mut rows = Vec::new();
    let mut write = |row: &str| {
        rows.push(row.to_owned());
        Ok(())
    };
    bench.measure(entry, 1, Duration::ZERO, &mut write).unwrap();
    rows
}

#[test]
fn every_case_of_a_list_gives_a_row() {
    let Some(double) = double::lock() else { return };
    for deferred in [false, true] {
        double.reset();
        double.set_deferred(deferred);
        let context = cuda::context(0).unwrap();
        let mut bench = Bench::new(&context, tiny()).unwrap();
        for entry in lists() {
            let columns: Vec<&str> = record::HEADER.split(',').collect();
            let rows = rows_of(&mut bench, &entry);
            let mut seen = HashSet::new();
            for row in &rows {
                let fields: Vec<&str> = row.split(',').collect();
                assert_eq!(fields.len(), columns.len(), "{row}");
                let field = |name: &str| fields[columns.iter().position(|column| *column == name).unwrap()].to_owned();
                assert_eq!((field("list"), field("dtype")), (entry.list.into(), entry.dtype.into()));
                assert_eq!((field("bytes"), field("checked")), (entry.bytes().to_string(), "bits".into()));
                assert_eq!(field("rounds"), "2");
                // With deferred work all of it runs in one go, and a clock may not have moved on.
                assert!(deferred || field("median_us").parse::<f64>().unwrap() > 0.0, "{row}");
                seen.insert(["op", "implementation", "mode", "cache"].map(field));
            }
            let caches: &[&str] = if entry.layout().1 <= tiny().cold { &["warm", "cold"] } else { &["warm"] };
            assert_eq!(rows.len(), Case::all().len() * caches.len());
            for cache in caches {
                for case in Case::all() {
                    let [op, implementation, mode] = case.names();
                    assert!(seen.contains(&[op, implementation, mode, cache].map(str::to_owned)), "{case:?} {cache}");
                }
            }
        }
        drop((bench, context));
        assert_eq!(double.violated_guards(), 0);
        // What graphs may use is left to the context: three buffers of the workspace, and the reports; of each list two
        // tables for each of the two captured calls with a scope, and up to two buffers that they outgrew.
        assert!(double.live_allocations() <= 4 + 6 * lists().len() as u64, "{}", double.live_allocations());
        assert_eq!(double.counters().faults, 0);
    }
}

/// An idle GPU is slow: it reads for a while before the first list, and only then.
#[test]
fn the_clocks_are_raised_once() {
    let Some(double) = double::lock() else { return };
    let context = cuda::context(0).unwrap();
    let entry = Entry::new(&Shapes { name: "few", numels: vec![40] }, "f32", 0);
    let kernels = |options: Options| {
        let mut bench = Bench::new(&context, options).unwrap();
        [(); 2].map(|()| {
            double.reset_counters();
            rows_of(&mut bench, &entry);
            double.counters().kernels_run
        })
    };
    let [first, second] = kernels(tiny());
    let warm_up = Duration::from_millis(1);
    assert_eq!(kernels(Options { warm_up, ..tiny() }), [first + 8, second]);
}

/// A clip that scales does so every time, and value clipping finds every time what its name says: else the second call
/// would be timed doing nothing.
#[test]
fn every_call_does_what_its_case_is_named_for() {
    use gradclip::cuda::Clipper;
    use gradclip::NormType;
    use measure::arena::Arena;
    use measure::cases::Op;
    let Some(_double) = double::lock() else { return };
    let context = cuda::context(0).unwrap();
    for entry in lists() {
        let mut arena = Arena::new(&context, 1 << 20, Some(1 << 16)).unwrap();
        let (numel, span) = (entry.numels.iter().sum::<usize>() as f64, entry.layout().1);
        arena.fill(entry.dtype(), span).unwrap();
        let mut clipper = Clipper::new(&arena.stream).unwrap();
        let mut grads = arena.grads(&entry);
        let norm = clipper.total_norm(&grads, NormType::L2).unwrap().wait().unwrap().total_norm;
        assert!((norm / numel.sqrt() * 64.0 - 1.0).abs() < 0.1, "{norm}");
        for _ in 0..20 {
            let within = clipper.clip_grad_norm(&mut grads, Op::ClipWithin.clip(norm)).unwrap().wait().unwrap();
            assert!(!within.written);
            let clipped = clipper.clip_grad_norm(&mut grads, Op::Clip.clip(norm)).unwrap().wait().unwrap();
            assert!(clipped.written && clipped.clip_coef < 1.0 && clipped.total_norm > norm * 0.999);
        }
        arena.restore(span).unwrap();
        for (op, expected) in [(Op::Value0, 0.0), (Op::Value1, 0.01), (Op::Value100, 1.0)] {
            let report = clipper.clip_grad_value(&mut grads, op.bound()).unwrap().wait().unwrap();
            let share = report.clipped as f64 / numel;
            assert!((share - expected).abs() < 0.01, "{op:?}: {share}");
            arena.restore(span).unwrap();
        }
    }
}

#[test]
fn lists_are_whole_and_named_once() {
    measure::shapes::check();
    let entries = entries();
    let names: HashSet<_> = entries.iter().map(|entry| (entry.list, entry.dtype)).collect();
    assert_eq!(names.len(), entries.len());
    for entry in &entries {
        let (starts, span) = entry.layout();
        assert_eq!(starts.len(), entry.numels.len());
        let room = if entry.list == LARGEST { 64 << 30 } else { Options::default().max_bytes };
        assert!(span <= room, "{} {}", entry.list, entry.dtype);
        assert!(!entry.list.contains(','));
    }
}

/// What cannot be measured beside PyTorch is named here and in `scripts/record_to_tables.py`: no bar asks for it.
#[test]
fn pytorch_takes_every_list_that_it_is_compared_on() {
    let entries = entries();
    for entry in &entries {
        let fits = entry.numels.iter().all(|numel| *numel <= MOST_ELEMENTS_OF_TORCH);
        assert_eq!(fits, ![LARGEST, "2^31 + 1 elements"].contains(&entry.list), "{entry}");
    }
    let first: HashSet<_> = entries[..WEIGHTED].iter().map(|entry| entry.list).collect();
    let named = ["1 GiB", "1 MiB", "1 MiB in 160", "3000 x 4 Ki", "GPT-2", "Qwen3-30B-A3B 1/32", "4 GiB"];
    assert_eq!(first, named.into());
}

/// Keeps only what was flushed: what a process leaves when it is killed.
#[derive(Default)]
struct Flushed {
    pending: Vec<u8>,
    flushed: Vec<u8>,
}

impl Flushed {
    fn lines(&self) -> Vec<&str> {
        std::str::from_utf8(&self.flushed).unwrap().lines().collect()
    }
}

impl Write for Flushed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.pending.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.flushed.append(&mut self.pending);
        Ok(())
    }
}

pub const OUT_OF_MEMORY: i32 = 2;
pub const ILLEGAL_ADDRESS: i32 = 700;

#[test]
fn a_list_that_fails_leaves_the_others() {
    let Some(double) = double::lock() else { return };
    let context = cuda::context(0).unwrap();
    let (entries, row_of) = (lists(), |line: &&str| line.contains(",eager,") || line.contains(",graph,"));
    {
        let mut bench = Bench::new(&context, tiny()).unwrap();
        let requests = "1 0 0\n1 0 7\n1 -1 0\n1\n1 0 1\n2 0 2\n";
        let mut out = Flushed::default();
        double.fail_named("cuMemcpyHtoDAsync_v2", 0, OUT_OF_MEMORY);
        assert!(program::serve(&mut bench, &entries, requests.as_bytes(), &mut out).unwrap());
        let lines = out.lines();
        assert_eq!(lines[0], "ready");
        let answers: Vec<&str> = lines[1..].iter().copied().filter(|line| !row_of(line)).collect();
        let [first, no_list, no_time, no_words, second, third] = answers[..] else { panic!("{answers:?}") };
        assert!(first.starts_with("failed ") && first.contains("OUT_OF_MEMORY"), "{first}");
        assert_eq!(no_list, "failed no such list");
        assert!(no_time.starts_with("failed ") && no_words.starts_with("failed "), "{no_time}, {no_words}");
        assert_eq!((second, third), ("done", "done"));
        assert!(lines.iter().any(|line| line.contains(",2,a table in memory,")));
    }
    let mut bench = Bench::new(&context, tiny()).unwrap();
    let mut out = Flushed::default();
    double.fail_named("cuMemcpyHtoDAsync_v2", 0, OUT_OF_MEMORY);
    let budget = Duration::from_secs(600);
    let error = program::all(&mut bench, &entries, &[0, 1, 2], budget, &mut out).unwrap_err();
    assert_eq!(error.to_string(), "not all lists could be measured");
    assert!(!out.lines().iter().any(|line| line.contains(",several,")));
    assert!(out.lines().iter().any(|line| line.contains(",off by one,")));
}

/// After an illegal address no call works: the list that met it is named once, no other one is tried, and its rows from
/// before stay.
#[test]
fn a_lost_gpu_ends_the_run() {
    let Some(double) = double::lock() else { return };
    let list = |name, numel| Entry::new(&Shapes { name, numels: vec![numel; 3] }, "f32", 0);
    let entries = ["first", "second", "third"].map(|name| list(name, 40));
    let (budget, cases) = (Duration::from_secs(600), Case::all().len());
    let kernels_of = |wanted: &[usize]| {
        double.reset();
        let context = cuda::context(0).unwrap();
        let mut bench = Bench::new(&context, tiny()).unwrap();
        let mut out = Flushed::default();
        program::all(&mut bench, &entries, wanted, budget, &mut out).unwrap();
        double.counters().kernels_run
    };
    let [first, all] = [kernels_of(&[0]), kernels_of(&[0, 1, 2])];
    for (serves, crashes_at, list, rows) in [
        (false, 0, "first f32", 0),
        // Among the last that the first list runs: those of the cold cache. The warm ones are written by then.
        (true, first - 3, "first f32", cases),
        (false, first + 1, "second f32", 2 * cases),
        (true, all - 3, "third f32", 5 * cases),
    ] {
        double.reset();
        let context = cuda::context(0).unwrap();
        let mut bench = Bench::new(&context, tiny()).unwrap();
        let mut out = Flushed::default();
        double.crash_kernel(crashes_at, ILLEGAL_ADDRESS);
        let error = if serves {
            // What `all` returns as an error is the last line here.
            let requests = "1 0 0\n1 0 1\n1 0 2\n1 0 0\n1 0 1\n";
            assert!(!program::serve(&mut bench, &entries, requests.as_bytes(), &mut out).unwrap());
            out.lines().last().unwrap().replace("stopped", "STOPPED")
        } else {
            program::all(&mut bench, &entries, &[0, 1, 2], budget, &mut out).unwrap_err().to_string()
        };
        assert!(error.starts_with(&format!("STOPPED at {list}: ")) && error.contains("ILLEGAL_ADDRESS"), "{error}");
        let lines = out.lines();
        let found = lines.iter().filter(|line| entries.iter().any(|entry| line.contains(&format!(",{},", entry.list))));
        assert_eq!(found.count(), rows, "{list}, {crashes_at}");
        let said = lines.iter().filter(|line| line.starts_with("stopped") || line.starts_with("failed")).count();
        assert_eq!(said, usize::from(serves));
    }
    double.reset();
}

#[test]
fn a_panic_ends_the_run_too() {
    struct Alive(bool);
    impl Device for Alive {
        fn is_alive(&self) -> bool {
            self.0
        }
    }
    let error = || Err(anyhow::anyhow!("out of luck").context("the second"));
    assert_eq!(attempt(&mut Alive(true), |_| Ok(())), Ok(()));
    assert_eq!(attempt(&mut Alive(true), |_| error()), Err(Failed::List("the second: out of luck".into())));
    let lost = "the second: out of luck; the GPU takes no more work";
    assert_eq!(attempt(&mut Alive(false), |_| error()), Err(Failed::Everything(lost.into())));
    for (panics, why) in [
        ((|| panic!("3 is not {}", 4)) as fn() -> anyhow::Result<()>, "panicked: 3 is not 4"),
        (|| panic!("it broke"), "panicked: it broke"),
        (|| std::panic::panic_any(3), "panicked: without a message"),
    ] {
        assert_eq!(attempt(&mut Alive(true), |_| panics()), Err(Failed::Everything(why.into())));
    }
}
