//! benches/variants.rs: each variant leaves the bits that the library does, and what cannot be measured is said.
//!
//! The kernels are compiled from their sources here, so what is replaced in the text of PTX is not tried: cache hints and
//! `griddepcontrol` change no result.

use super::gpu_bench::{measure, ILLEGAL_ADDRESS};
use crate::support::double;
use gradclip::cuda;
use measure::attempt::{attempt, Failed};
use measure::lists::Entry;
use measure::shapes::Shapes;
use measure::Options;
use std::collections::HashSet;
use std::time::{Duration, Instant};

#[path = "../../benches/variants/mod.rs"]
#[allow(dead_code)]
pub mod trials;

use trials::plans::{variants, What};
use trials::{lists, rows, Trials};

fn tiny() -> Options {
    Options {
        max_bytes: 1 << 20,
        flush: Some(1 << 16),
        min_rounds: 1,
        max_rounds: 1,
        batch: Duration::ZERO,
        max_calls: 2,
        tries: 0,
        warm_up: Duration::ZERO,
        ..Options::default()
    }
}

/// Whole tiles, ends, empties and short tensors; some segments have to be looked at twice.
fn list(dtype: &'static str, offset: usize) -> Entry {
    let tile = (32 << 10) / size_of_dtype(dtype);
    let numels = vec![2 * tile, 1, 0, tile + 100, 77];
    Entry::new(&Shapes { name: "several", numels }, dtype, offset)
}

fn size_of_dtype(dtype: &str) -> usize {
    match dtype {
        "f64" => 8,
        "f32" => 4,
        _ => 2,
    }
}

/// What is put where: values whose squares f32, or f64, cannot hold; a NaN and an Inf.
fn awkward(dtype: &str) -> Vec<(usize, Vec<u8>)> {
    let tile = 32 << 10;
    match dtype {
        // The 0 stays what it is, in a pack of which all else changes.
        "f32" => vec![(5000, 1e20f32.to_le_bytes().into()), (12, vec![0; 4])],
        "f64" => vec![(2 * tile + 4096, 1e200f64.to_le_bytes().into())],
        "bf16" => vec![(tile + 64, vec![0x80, 0x7e])],
        _ => vec![(0, vec![0, 0x7e]), (tile, vec![0, 0x7c])], // f16: NaN, Inf
    }
}

fn measured(trials: &mut Trials, entry: &Entry, wanted: trials::Wanted) -> Vec<String> {
    let mut written = Vec::new();
    let mut write = |row: rows::Row| {
        written.push(row.csv);
        Ok(())
    };
    let deadline = Instant::now() + Duration::from_secs(3600);
    trials.measure(entry, wanted, Duration::ZERO, deadline, &mut write).unwrap();
    written
}

#[test]
fn every_variant_leaves_the_bits_of_the_library() {
    let Some(double) = double::lock() else { return };
    // Adverse: threads and blocks in reversed order, all work deferred.
    for (dtype, adverse) in [("f32", false), ("f32", true), ("f64", true), ("f16", false), ("bf16", true)] {
        double.reset();
        double.set_compute_capability(10, 0); // for those of 256 bits
        double.set_multiprocessors(1); // so that blocks that stay have more than one tile
        double.set_reversed_order(adverse);
        double.set_deferred(adverse);
        let context = cuda::context(0).unwrap();
        let mut trials = Trials::new(&context, tiny()).unwrap();
        trials.any_size = true;
        trials.cooperative_blocks = Some(1);
        for (offset, poked) in [(0, false), (0, true), (1, false)] {
            let entry = list(dtype, offset);
            if poked {
                for (at, bytes) in awkward(dtype) {
                    trials.poke(&entry, at, &bytes).unwrap();
                }
            }
            let rows = measured(&mut trials, &entry, &|_| true);
            let field = |row: &String, name: &str| {
                let columns: Vec<&str> = rows::HEADER.split(',').collect();
                let fields: Vec<&str> = row.split(',').collect();
                assert_eq!(fields.len(), columns.len(), "{row}");
                fields[columns.iter().position(|column| *column == name).unwrap()].to_owned()
            };
            assert!(rows.iter().all(|row| field(row, "checked") == "bits"));
            for mode in ["eager", "graph"] {
                let seen: HashSet<_> = rows
                    .iter()
                    .filter(|row| field(row, "mode") == mode)
                    .map(|row| ["variant", "op"].map(|name| field(row, name)))
                    .collect();
                for variant in variants() {
                    for what in variant.whats {
                        let wanted = [variant.name.replace(',', ";"), what.name().to_owned()];
                        assert!(seen.contains(&wanted), "{wanted:?} as {mode}");
                    }
                }
            }
        }
        assert_eq!((&trials.skipped, &trials.failed), (&Vec::new(), &Vec::new()));
        drop((trials, context));
        assert_eq!((double.violated_guards(), double.counters().faults), (0, 0), "{dtype}");
    }
}

/// A tile for each element: more than stage 2 has threads, in every launch that does stage 2 with fewer.
#[test]
fn many_tiles_are_folded_as_by_the_library() {
    let Some(double) = double::lock() else { return };
    double.set_multiprocessors(1);
    let context = cuda::context(0).unwrap();
    let mut trials = Trials::new(&context, tiny()).unwrap();
    trials.any_size = true;
    trials.cooperative_blocks = Some(1);
    let entry = Entry::new(&Shapes { name: "many", numels: vec![1; 1100] }, "f64", 0);
    let rows = measured(&mut trials, &entry, &|change| ["last block", "cooperative launch"].contains(&change));
    assert_eq!((&trials.skipped, &trials.failed), (&Vec::new(), &Vec::new()));
    assert_eq!(rows.len(), 8, "two operations each, eager and as a graph");
}

/// A GPU that lacks an instruction gets a line that says so, and the rest is measured.
#[test]
fn what_a_gpu_lacks_is_said_once() {
    let Some(double) = double::lock() else { return };
    for (major, minor, lacking) in [(9, 0, 2), (8, 0, 4), (7, 5, 6)] {
        double.reset();
        double.set_compute_capability(major, minor);
        let context = cuda::context(0).unwrap();
        let mut trials = Trials::new(&context, tiny()).unwrap();
        trials.any_size = true;
        trials.cooperative_blocks = Some(1);
        let rows = measured(&mut trials, &list("f32", 0), &|_| true);
        assert!(rows.iter().any(|row| row.contains(",last block,")));
        assert!(!rows.iter().any(|row| row.contains("256 bits")));
        assert_eq!(rows.iter().any(|row| row.contains(",programmatic launch,")), major >= 9);
        assert_eq!(trials.skipped.len(), lacking, "{:?}", trials.skipped);
        let named = format!("this GPU has {major}.{minor}");
        assert!(trials.skipped.iter().all(|why| why.contains(&named)), "{:?}", trials.skipped);
    }
}

/// Every change that is predicted has variants, and every kernel that is described is used.
#[test]
fn the_table_is_whole() {
    let described = trials::kernels::described().unwrap();
    let keys: HashSet<_> = described.changes.iter().map(|change| change.key.as_str()).collect();
    assert_eq!(keys.len(), described.changes.len());
    assert_eq!(variants().iter().map(|variant| variant.change).collect::<HashSet<_>>(), keys);
    let mut used = HashSet::from(["clamp_counts"]);
    for variant in variants() {
        let plan = variant.plan;
        used.extend([plan.norm, plan.clip_coef, plan.scale, plan.clamp, plan.stats]);
        assert!(!variant.name.is_empty() && !variant.whats.is_empty());
        assert!(variant.whats.iter().all(|what| (*what == What::Telemetry) == (variant.change == "telemetry")));
    }
    let known: HashSet<_> = described.kernels.iter().map(|kernel| kernel.name.as_str()).collect();
    assert_eq!(known.len(), described.kernels.len());
    assert_eq!(used, known);
    for kernel in &described.kernels {
        assert_eq!(
            kernel.text(trials::kernels::VARIANTS).unwrap().matches(".visible .entry ").count(),
            1,
            "{}",
            kernel.name
        );
    }
    assert_eq!(lists().len(), 26);
}

#[test]
fn a_variant_wins_beyond_the_spread_only() {
    for (ratio, spread, verdict) in [
        (0.98, 0.01, "wins"),
        (0.995, 0.01, "within the spread"),
        (1.005, 0.01, "within the spread"),
        (1.02, 0.01, "loses"),
        (f64::NAN, 0.01, "no time"),
        (1.0, f64::INFINITY, "no time"),
    ] {
        assert_eq!(rows::verdict(ratio, spread), verdict, "{ratio}");
    }
}

fn trials_of(context: &std::sync::Arc<cudarc::driver::CudaContext>) -> Trials {
    let mut trials = Trials::new(context, tiny()).unwrap();
    trials.any_size = true;
    trials.cooperative_blocks = Some(1);
    trials
}

/// Wherever an illegal address is met, the list and what ran there are named once, and nothing is tried after it.
#[test]
fn a_lost_gpu_ends_the_trials() {
    let Some(double) = double::lock() else { return };
    let entry = Entry::new(&Shapes { name: "few", numels: vec![40] }, "f32", 0);
    let wanted = |change: &str| change == "last block";
    let deadline = Instant::now() + Duration::from_secs(3600);
    let rows_of = |crashes_at: Option<u64>| {
        double.reset();
        let context = cuda::context(0).unwrap();
        let mut trials = trials_of(&context);
        double.reset_counters();
        if let Some(index) = crashes_at {
            double.crash_kernel(index, ILLEGAL_ADDRESS);
        }
        let mut rows = 0;
        let mut write = |_: rows::Row| {
            rows += 1;
            Ok(())
        };
        let measured =
            attempt(&mut trials, |trials| trials.measure(&entry, &wanted, Duration::ZERO, deadline, &mut write));
        assert!(trials.failed.is_empty(), "{:?}", trials.failed);
        (measured, rows, double.counters().kernels_run)
    };
    let (measured, all, kernels) = rows_of(None);
    assert_eq!((measured, all), (Ok(()), 4));
    for index in (0..kernels).step_by(3).chain([kernels - 1]) {
        let (measured, rows, _) = rows_of(Some(index));
        let Err(Failed::Everything(why)) = measured else { panic!("{index}: {measured:?}") };
        assert!(why.contains("ILLEGAL_ADDRESS"), "{index}: {why}");
        assert!(rows < all, "{index}");
    }
}

/// When the time is over the driver is not asked to compile another kernel.
#[test]
fn no_kernel_is_loaded_after_the_deadline() {
    let Some(double) = double::lock() else { return };
    let context = cuda::context(0).unwrap();
    let (mut trials, entry) = (trials_of(&context), list("f32", 0));
    let loads = double.counters().module_loads;
    let mut write = |row: rows::Row| panic!("{}", row.csv);
    trials.measure(&entry, &|_| true, Duration::ZERO, Instant::now(), &mut write).unwrap();
    assert_eq!(double.counters().module_loads, loads);
}
