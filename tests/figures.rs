//! The figures that the pages show are those of the newest records: computed here once more, from the rows, as
//! `scripts/figures.py` has made them. `scripts/figures.py --check` compares all of the pages; this needs no Python.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "figures/made_up.rs"]
mod made_up;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn folder() -> PathBuf {
    root().join("benches/record")
}

/// A package has no records.
fn skipped() -> bool {
    let skipped = !folder().exists();
    if skipped {
        println!("SKIPPED: {} is not there", folder().display());
    }
    skipped
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// What stands in a page between the markers of that name.
fn block(page: &str, name: &str) -> String {
    let text = read(page);
    let (_, rest) = text.split_once(&format!("<!-- {name}:begin -->\n")).unwrap_or_else(|| panic!("{page}: no {name}"));
    rest.split_once(&format!("<!-- {name}:end -->")).unwrap_or_else(|| panic!("{page}: no end of {name}")).0.to_owned()
}

/// The cells of the rows of the first table in it, its two lines of heading left out.
fn table(text: &str) -> Vec<Vec<String>> {
    let rows = text.lines().filter(|line| line.starts_with('|')).skip(2);
    rows.map(|row| row.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect()).collect()
}

struct Record {
    name: String,
    rows: Vec<HashMap<String, String>>,
}

impl Record {
    fn newest(kind: &str) -> Option<Self> {
        let files = fs::read_dir(folder()).unwrap();
        let paths = files.map(|file| file.unwrap().path());
        let name = |path: &PathBuf| path.file_stem().unwrap().to_str().unwrap().to_owned();
        let date = |path: &PathBuf| name(path)[name(path).len() - "2026-11-22".len()..].to_owned();
        let of_kind = paths.filter(|path| name(path).starts_with(&format!("{kind}-")));
        let path = of_kind.max_by_key(|path| (date(path), name(path)))?;
        let text = fs::read_to_string(&path).unwrap();
        assert!(!text.contains('"'), "a comma within a column is not understood here");
        let mut lines = text.lines();
        let columns: Vec<&str> = lines.next().unwrap().split(',').collect();
        let row =
            |line: &str| columns.iter().map(|name| (*name).to_owned()).zip(line.split(',').map(Into::into)).collect();
        Some(Self { name: name(&path), rows: lines.map(row).collect() })
    }

    /// That column of the rows of a list and an operation.
    fn values(&self, [list, dtype, op]: [&str; 3], implementations: &[&str], column: &str) -> Vec<f64> {
        let wanted = |row: &&HashMap<String, String>| {
            let is = |name: &str, wanted: &str| row.get(name).is_none_or(|value| value == wanted);
            is("list", list)
                && is("dtype", dtype)
                && is("op", op)
                && is("mode", "eager")
                && is("cache", "warm")
                && implementations.contains(&row["implementation"].as_str())
        };
        let rows = self.rows.iter().filter(wanted);
        rows.filter_map(|row| row.get(column).filter(|value| !value.is_empty())).map(|x| x.parse().unwrap()).collect()
    }

    /// How many times as fast as PyTorch: its quickest way against the slower of our turns.
    fn times(&self, case: [&str; 3]) -> Option<f64> {
        let torch = self.values(case, &["torch", "torch foreach=False"], "median_us").into_iter().reduce(f64::min);
        let ours = self.values(case, &["gradclip"], "median_us").into_iter().reduce(f64::max);
        Some(torch? / ours?)
    }

    fn lowest(&self, case: [&str; 3], column: &str) -> Option<f64> {
        self.values(case, &["gradclip"], column).into_iter().reduce(f64::min)
    }
}

const OPS: [&str; 5] = ["norm", "clip; within", "clip", "value; 0 % outside", "value; 2 % outside"];

#[test]
fn figures_of_the_cpu_are_those_of_the_newest_record() {
    if skipped() {
        return;
    }
    let record = Record::newest("cpu").unwrap();
    for (page, name) in [("README.md", "cpu-speed"), ("benches/README.md", "cpu-lists")] {
        let text = block(page, name);
        assert!(text.contains(&format!("record/{}.csv", record.name)), "{page} is of another record");
        let rows = table(&text);
        assert!(rows.len() >= 4, "{page} shows {} lists", rows.len());
        for row in &rows {
            let [list, dtype, cells @ ..] = row.as_slice() else { panic!("{page}: {row:?}") };
            assert_eq!(cells.len(), OPS.len(), "{page}: {row:?}");
            for (op, cell) in OPS.iter().zip(cells) {
                let case = [list.as_str(), dtype, op];
                let (speed, ratio) = (record.lowest(case, "GB/s").unwrap(), record.lowest(case, "ratio").unwrap());
                let mut expected = format!("{speed:.1} GB/s, {:.0} %", 100.0 * ratio);
                match record.times(case) {
                    Some(times) if times < 1.0 => expected += &format!(", **{times:.2} x**"),
                    Some(times) => expected += &format!(", {times:.2} x"),
                    None => {}
                }
                assert_eq!(*cell, expected, "{page}: {case:?}");
            }
        }
    }
}

/// The README keeps none of them back.
#[test]
fn lists_on_which_something_is_slower_than_pytorch_are_shown() {
    if skipped() {
        return;
    }
    let record = Record::newest("cpu").unwrap();
    let shown = table(&block("README.md", "cpu-speed"));
    for row in record.rows.iter().filter(|row| row["implementation"] == "gradclip") {
        let case = ["list", "dtype", "op"].map(|name| row[name].as_str());
        if record.times(case).is_some_and(|times| times < 1.0) {
            assert!(shown.iter().any(|row| row[..2] == case[..2]), "{case:?} is slower, and not shown");
        }
    }
}

#[test]
fn figures_of_the_gpu_are_those_of_the_newest_record() {
    if skipped() {
        return;
    }
    let bars = block("README.md", "gpu-speed");
    let Some(record) = Record::newest("gpu") else {
        assert!(bars.lines().all(|line| line == "No GPU has been measured yet."), "figures without a record: {bars}");
        for name in ["gpu-bars", "gpu-lists"] {
            assert_eq!(block("docs/performance.md", name), "Not measured yet.\n");
        }
        return;
    };
    let run = &record.rows[0];
    let header = format!("{}, driver {}, commit {}, {}", run["gpu"], run["driver"], run["commit"], run["date"]);
    for text in [&bars, &block("docs/performance.md", "gpu-bars"), &block("docs/performance.md", "gpu-lists")] {
        assert!(text.contains(&header), "not of {}", record.name);
    }
    let number = |text: &str| text.split(' ').find_map(|word| word.parse::<f64>().ok()).unwrap();
    let rows = table(&bars);
    assert!(!rows.is_empty());
    for row in &rows {
        let [what, list, bar, measured, met] = row.as_slice() else { panic!("{row:?}") };
        if measured.is_empty() {
            assert_eq!(met, "not measured", "{row:?}");
            continue;
        }
        let above = number(measured) - number(bar);
        // Next to the bar the digits that are shown do not tell.
        if above != 0.0 {
            assert_eq!(met, if (above > 0.0) == bar.starts_with(">=") { "yes" } else { "**no**" }, "{row:?}");
        }
        let (list, dtype) = list.rsplit_once(", ").unwrap();
        let expected = match what.as_str() {
            "norm only, of the plain read" => {
                format!("{:.1} %", 100.0 * record.lowest([list, dtype, "norm"], "ratio").unwrap())
            }
            "clip by norm, not clipped, faster than torch" => {
                format!("{:.2} x", record.times([list, dtype, "clip; within"]).unwrap())
            }
            "clip by norm, clipped, faster than torch" => {
                format!("{:.2} x", record.times([list, dtype, "clip"]).unwrap())
            }
            _ => continue,
        };
        assert_eq!(*measured, expected, "{row:?}");
    }
}

/// The predictions are those that the variants are measured for, and what was found is of the newest record: how often each
/// variant wins.
#[test]
fn predictions_stand_beside_what_was_found() {
    if skipped() {
        return;
    }
    let described: serde_json::Value = serde_json::from_str(&read("benches/variants/variants.json")).unwrap();
    let text = block("docs/performance.md", "predictions");
    let rows = table(&text);
    let changes = described["changes"].as_array().unwrap();
    assert_eq!(rows.len(), changes.len());
    let record = Record::newest("variants");
    for (row, change) in rows.iter().zip(changes) {
        let [what, prediction, place, found] = row.as_slice() else { panic!("{row:?}") };
        assert_eq!(
            [what, prediction, place],
            ["change", "prediction", "where"].map(|name| change[name].as_str().unwrap())
        );
        let measured = record.iter().flat_map(|record| &record.rows).filter(|row| row["change"] == change["key"]);
        let mut variants: Vec<(&str, [usize; 3])> = Vec::new();
        for row in measured.filter(|row| !row["ratio"].is_empty()) {
            let at = variants.iter().position(|(name, _)| *name == row["variant"]).unwrap_or_else(|| {
                variants.push((&row["variant"], [0; 3]));
                variants.len() - 1
            });
            let counts = &mut variants[at].1;
            counts[2] += 1;
            counts[0] += usize::from(row["verdict"] == "wins");
            counts[1] += usize::from(row["verdict"] == "loses");
        }
        if variants.is_empty() {
            assert_eq!(found, "not measured", "{what}");
        }
        for (name, [wins, loses, of]) in variants {
            let expected = format!("{name}: wins {wins} and loses {loses} of {of}, ");
            assert!(found.contains(&expected), "{what}: {expected:?} is not in {found:?}");
        }
    }
    if let Some(record) = record {
        assert!(text.contains(&format!("{}.csv", record.name)), "not of {}", record.name);
    }
}

/// What a first call loads: sums over the rows of its kernels.
#[test]
fn first_calls_are_those_of_the_committed_code() {
    let text = read("kernels/prebuilt/registers.csv");
    let mut lines = text.lines().map(|line| line.split(',').collect::<Vec<_>>());
    let columns = lines.next().unwrap();
    let column = |name: &str| columns.iter().position(|column| *column == name).unwrap();
    let rows: Vec<_> = lines.filter(|row| row[column("target")] == "sm_90").collect();
    let shown = table(&block("README.md", "first-call"));
    assert!(shown.len() >= 10, "{shown:?}");
    for row in &shown {
        let [call, kernels, instructions, kib] = row.as_slice() else { panic!("{row:?}") };
        let kernels: Vec<_> = kernels.split(", ").map(|name| name.trim_matches('`')).collect();
        let sum = |name: &str| -> u64 {
            let of = |kernel: &&str| rows.iter().find(|row| row[column("kernel")] == *kernel).unwrap()[column(name)];
            kernels.iter().map(|kernel| of(kernel).parse::<u64>().unwrap()).sum()
        };
        assert_eq!(instructions.replace(',', ""), sum("instructions").to_string(), "{call}");
        assert_eq!(*kib, format!("{:.0}", sum("ptx_bytes") as f64 / 1024.0), "{call}");
    }
}

/// A picture names the record it was drawn of.
#[test]
fn pictures_are_of_the_newest_record() {
    if skipped() {
        return;
    }
    for kind in ["cpu", "gpu"] {
        let Some(record) = Record::newest(kind) else { continue };
        for file in fs::read_dir(root().join("docs/images")).unwrap() {
            let path = file.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if name.starts_with(&format!("{kind}_")) && name.ends_with(".svg") {
                let drawn = fs::read_to_string(&path).unwrap();
                assert!(drawn.contains(&record.name), "{name} is not of {}; run scripts/plots.py", record.name);
            }
        }
    }
}
