//! `gpu_bench --predictions`: every predicted case is measured, and the verdict is that of the interval.

use super::gpu_bench::measure;
use super::variants::trials;
use crate::support::double;
use gradclip::cuda;
use measure::lists::Entry;
use measure::shapes::Shapes;
use measure::Options;
use std::collections::HashMap;
use std::time::Duration;

#[path = "../../benches/predictions/mod.rs"]
mod checker;

use checker::predicted::{verdict, Interval, Predictions, Unit};
use checker::{header, Check};

const H100: &str = "NVIDIA H100 80GB HBM3";
const H200: &str = "NVIDIA H200";

fn tiny() -> Options {
    Options {
        max_bytes: 1 << 20,
        flush: Some(1 << 16),
        min_rounds: 2,
        max_rounds: 2,
        batch: Duration::ZERO,
        max_calls: 2,
        tries: 0,
        warm_up: Duration::ZERO,
        ..Options::default()
    }
}

/// Under the names of the lists, some that fibers get through; the largest does not fit.
fn stand_ins(cases: &[checker::predicted::Predicted]) -> Vec<Entry> {
    let mut lists: Vec<Entry> = Vec::new();
    for case in cases {
        if lists.iter().any(|entry| (entry.list, entry.dtype) == (&case.list, &case.dtype)) {
            continue;
        }
        let numels = match case.list.as_str() {
            "16 GiB" => vec![1 << 20],
            "32768 partials" => vec![1; 40],
            "524288 partials" => vec![1; 70],
            "3000 x 4 Ki" => vec![300; 200],
            _ => vec![20_000],
        };
        let [list, dtype] = [&case.list, &case.dtype].map(|text| &*Box::leak(text.clone().into_boxed_str()));
        lists.push(Entry::new(&Shapes { name: list, numels }, dtype, 0));
    }
    lists
}

/// A writer that keeps what was flushed.
#[derive(Default)]
struct Kept(Vec<u8>, Vec<u8>);

impl std::io::Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.1.append(&mut self.0);
        Ok(())
    }
}

impl Kept {
    fn rows(&self) -> Vec<HashMap<String, String>> {
        let text = std::str::from_utf8(&self.1).unwrap();
        let mut lines = text.lines().map(|line| line.split(',').map(str::to_owned).collect::<Vec<_>>());
        let columns = lines.next().unwrap();
        assert_eq!(columns.join(","), header());
        let row = |fields: Vec<String>| {
            assert_eq!(fields.len(), columns.len(), "{fields:?}");
            columns.iter().cloned().zip(fields).collect()
        };
        lines.map(row).collect()
    }
}

#[test]
fn every_prediction_is_measured_and_judged() {
    let Some(double) = double::lock() else { return };
    let predicted = Predictions::read().unwrap();
    for (gpu, judged) in [(H100, true), (H200, true), ("NVIDIA H100 PCIe", false)] {
        double.reset();
        let context = cuda::context(0).unwrap();
        let mut check = Check::new(&context, tiny()).unwrap();
        check.lists = stand_ins(&predicted.cases);
        check.gpu = gpu.into();
        let [mut lines, mut out] = [Kept::default(), Kept::default()];
        check.all(&|_, _| true, Duration::from_secs(600), &mut lines, &mut out).unwrap();
        let (rows, lines) = (out.rows(), String::from_utf8(lines.1).unwrap());
        assert_eq!(lines.lines().count(), rows.len());
        for (case, expected) in predicted.cases.iter().map(|case| (case, predicted.interval(case, gpu))) {
            let key = [
                ("list", &case.list),
                ("dtype", &case.dtype),
                ("op", &case.op),
                ("implementation", &case.implementation),
                ("mode", &case.mode),
                ("cache", &case.cache),
            ];
            let found: Vec<_> =
                rows.iter().filter(|row| key.iter().all(|(column, value)| row[*column] == **value)).collect();
            assert_eq!(found.len(), usize::from(case.list != "16 GiB"), "{key:?}");
            let Some(row) = found.first() else { continue };
            let at = lines.lines().find(|line| line.contains(&case.list) && line.contains(&case.implementation));
            assert!(at.is_some(), "{key:?} has no line");
            assert_eq!((row["rounds"].as_str(), row["kernels"].as_str()), ("2", predicted.kernels(case)));
            assert_eq!(row["ratio"].is_empty(), case.implementation == "clip_coef alone", "{row:?}");
            let measured = if case.unit == Unit::Share { &row["ratio"] } else { &row["median_us"] };
            assert_eq!(row["verdict"], verdict(expected, case.unit, measured.parse().unwrap()), "{row:?}");
            assert!(judged || (row["verdict"] == "no prediction" && row["low"].is_empty()), "{row:?}");
            let end = |end: Option<f64>| end.map_or_else(String::new, |end| format!("{end:.3}"));
            let Interval { low, high } = expected.unwrap_or(Interval { low: None, high: None });
            assert_eq!((&row["low"], &row["high"]), (&end(low), &end(high)));
        }
        drop(context);
        assert_eq!((double.violated_guards(), double.counters().faults), (0, 0));
    }
}

/// Each kernel alone is the one that it is named for.
#[test]
fn what_is_launched_alone_is_one_kernel() {
    let Some(double) = double::lock() else { return };
    let predicted = Predictions::read().unwrap();
    let context = cuda::context(0).unwrap();
    let mut check = Check::new(&context, tiny()).unwrap();
    check.lists = stand_ins(&predicted.cases);
    double.reset_counters();
    let [mut lines, mut out] = [Kept::default(), Kept::default()];
    check.all(&|list, _| list == "32768 partials", Duration::from_secs(600), &mut lines, &mut out).unwrap();
    let runs = double.kernel_runs();
    let of = |symbol: &str| runs.iter().filter(|run| run.symbol == symbol).count();
    // One warm-up and two rounds of one call, beside those that measure the norm: each of these launches both.
    assert_eq!(of("clip_coef") - of("norm_partials_l2"), 3, "{runs:?}");
}

#[test]
fn a_verdict_is_that_of_the_interval() {
    let of = |low, high| Some(Interval { low, high });
    for (interval, unit, measured, expected) in [
        (of(Some(356.25), Some(393.75)), Unit::Us, 375.0, "confirmed"),
        (of(Some(356.25), Some(393.75)), Unit::Us, 356.25, "confirmed"),
        (of(Some(356.25), Some(393.75)), Unit::Us, 394.0, "refuted: slower"),
        (of(Some(356.25), Some(393.75)), Unit::Us, 350.0, "refuted: faster"),
        (of(Some(0.98), None), Unit::Share, 1.2, "confirmed"),
        (of(Some(0.98), None), Unit::Share, 0.97, "refuted: slower"),
        (of(Some(0.9), Some(0.95)), Unit::Share, 0.97, "refuted: faster"),
        (of(Some(1.0), Some(2.0)), Unit::Us, f64::NAN, "no time"),
        (None, Unit::Us, 1.0, "no prediction"),
    ] {
        assert_eq!(verdict(interval, unit, measured), expected, "{interval:?} {measured}");
    }
}

/// What is read of the file, for some cases by hand; and each prediction is a number or a range.
#[test]
fn intervals_are_those_of_the_file() {
    let predicted = Predictions::read().unwrap();
    let of = |gpu, names: [&str; 6]| {
        let is = |case: &&checker::predicted::Predicted| {
            [&case.list, &case.dtype, &case.op, &case.implementation, &case.mode, &case.cache] == names
        };
        let mut found = predicted.cases.iter().filter(is);
        let case = found.next().unwrap();
        assert!(found.next().is_none(), "{names:?} is there twice");
        predicted.interval(case, gpu).map(|Interval { low, high }| [low, high].map(|end| end.map(|x| x.round())))
    };
    let both = |low, high| Some([Some(low), Some(high)]);
    let large = |op| ["1 GiB", "f32", op, "gradclip", "eager", "warm"];
    assert_eq!(of(H100, large("norm")), both(356.0, 394.0)); // 375 and 5 %
    assert_eq!(of(H200, large("norm")), both(254.0, 280.0)); // 267 and 5 %
    assert_eq!(of("NVIDIA H100 80GB HBM3 MIG 1g.10gb", large("norm")), None);
    assert_eq!(of("NVIDIA GH200 480GB", large("norm")), None);
    assert_eq!(of(H200, large("value; 1 % outside")), None);
    let partials = |list| [list, "f32", "norm", "clip_coef alone", "eager", "cold"];
    assert_eq!(of(H100, partials("32768 partials")), both(12.0, 14.0));
    assert_eq!(of(H200, partials("524288 partials")), both(181.0, 200.0)); // 190 and 5 %
    assert_eq!(of(H100, ["1 GiB", "bf16", "norm", "norm alone", "eager", "warm"]), Some([Some(1.0), None]));
}

/// What was measured before the GPU was lost is there, and the list that lost it is named.
#[test]
fn a_lost_gpu_leaves_what_was_measured() {
    let Some(double) = double::lock() else { return };
    let predicted = Predictions::read().unwrap();
    let run = |wanted: &dyn Fn(&str, &str) -> bool, crashes_at: Option<u64>| {
        double.reset();
        let context = cuda::context(0).unwrap();
        let mut check = Check::new(&context, tiny()).unwrap();
        check.lists = stand_ins(&predicted.cases);
        let [mut lines, mut out] = [Kept::default(), Kept::default()];
        double.reset_counters();
        if let Some(index) = crashes_at {
            double.crash_kernel(index, super::gpu_bench::ILLEGAL_ADDRESS);
        }
        let ran = check.all(wanted, Duration::from_secs(600), &mut lines, &mut out);
        (ran.map_err(|error| error.to_string()), out.rows(), double.counters().kernels_run)
    };
    let (ran, first, kernels) = run(&|list, _| list == "32768 partials", None);
    assert_eq!((ran, first.len()), (Ok(()), 1));
    let (ran, rows, _) = run(&|list, _| list.ends_with("partials"), Some(kernels + 20));
    let error = ran.unwrap_err();
    assert!(error.starts_with("STOPPED at 524288 partials f32: "), "{error}");
    assert_eq!(rows.len(), 1);
    double.reset();
}

#[test]
fn lists_without_time_are_left_out() {
    let Some(_double) = double::lock() else { return };
    let context = cuda::context(0).unwrap();
    let check = Check::new(&context, tiny()).unwrap();
    let [mut lines, mut out] = [Kept::default(), Kept::default()];
    check.all(&|_, _| true, Duration::ZERO, &mut lines, &mut out).unwrap();
    assert!(out.rows().is_empty() && lines.1.is_empty());
}
