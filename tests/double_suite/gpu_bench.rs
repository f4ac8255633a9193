//! The measuring of benches/gpu.rs runs: every case of a list gives a row, answers are checked, nothing is left behind.

use crate::support::double;
use gradclip::cuda;
use std::collections::HashSet;
use std::time::Duration;

#[path = "../../benches/measure/mod.rs"]
#[allow(dead_code)]
pub mod measure;

use measure::cases::Case;
use measure::lists::{entries, Entry, LARGEST};
use measure::shapes::Shapes;
use measure::{record, Bench, Options};

fn tiny() -> Options {
    Options {
        max_bytes: 1 << 20,
        flush: Some(1 << 16),
        cold: 1 << 16,
        min_rounds: 2,
        max_rounds: 2,
        batch: Duration::ZERO,
        max_calls: 2,
        tries: 0,
        ..Options::default()
    }
}

fn lists() -> Vec<Entry> {
    let list = |name, numels: &[usize]| Shapes { name, numels: numels.to_vec() };
    vec![
        Entry::new(&list("several", &[1000, 1, 0, 9000]), "f32", 0),
        Entry::new(&list("off by one", &[3000, 17]), "bf16", 1),
        Entry::new(&list("a table in memory", &[5; 200]), "f16", 0),
    ]
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
            let rows = bench.measure(&entry, 1, Duration::ZERO).unwrap();
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
