//! What `scripts/figures.py` makes of records whose numbers are made up: times next to what was predicted and next to the
//! bars, on either side.

use super::{block, read, root, skipped, table, Record};
use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::Command;

/// One block of the pages, made from that record alone. None without Python.
fn made_from(name: &str, file: &str, text: &str) -> Option<String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("figures_{name}_{file}"));
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(file), text).unwrap();
    let mut python = Command::new("python3");
    python.arg("-B").arg(root().join("scripts/figures.py")).arg("--records").arg(&folder).args(["--show", name]);
    let Ok(output) = python.output() else {
        println!("SKIPPED: there is no python3");
        return None;
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap())
}

const COLUMNS: &str =
    "gpu,driver,date,commit,pass,list,tensors,bytes,dtype,op,implementation,mode,cache,median_us,ratio,done_us";

/// Times made up around what is predicted for that card: as predicted, too slow, too fast, in turn.
#[test]
fn predicted_times_stand_beside_what_was_found() {
    if skipped() {
        return;
    }
    let described: serde_json::Value = serde_json::from_str(&read("benches/predictions/predictions.json")).unwrap();
    let cases = described["cases"].as_array().unwrap();
    let text = |case: &serde_json::Value, name: &str| case[name].as_str().unwrap().to_owned();
    let key = |case: &serde_json::Value| {
        let [list, dtype, mode, cache] = ["list", "dtype", "mode", "cache"].map(|name| text(case, name));
        [format!("{list}, {dtype}"), text(case, "op"), text(case, "implementation"), format!("{mode}, {cache}")]
    };
    // The page says what is so today.
    let page = table(&block("docs/performance.md", "predicted-times"));
    assert_eq!(page.iter().map(|row| row[..4].to_vec()).collect::<Vec<_>>(), cases.iter().map(key).collect::<Vec<_>>());
    if Record::newest("gpu").is_none() && Record::newest("predictions").is_none() {
        assert!(page.iter().all(|row| row.last().unwrap() == "not measured"));
    }

    for (card, kind) in [("h100", "predictions"), ("h200", "gpu")] {
        let gpu = described["cards"][card]["name"].as_str().unwrap();
        let (mut rows, mut expected) = (String::new(), Vec::new());
        for (number, case) in cases.iter().enumerate() {
            let which = if text(case, "op").starts_with("value") { "value" } else { "norm" };
            let ends = &case["predicted"][card][described["kernels"][which].as_str().unwrap()];
            let [low, high] = match ends.as_array().map(Vec::as_slice) {
                Some([only]) => [only.as_f64(), only.as_f64()],
                Some([low, high]) => [low.as_f64(), high.as_f64()],
                _ => [None, None],
            };
            let (within, share) = (case["within"].as_f64().unwrap(), case["unit"] == "share");
            // Just inside and just outside of what counts.
            let (inside, slow, fast) = match (low, high, share) {
                (Some(low), None, true) => (low, low - 0.001, None),
                (Some(low), Some(high), false) => {
                    let (low, high) = (low * (1.0 - within), high * (1.0 + within));
                    (if number % 2 == 0 { low + 0.02 } else { high - 0.02 }, high + 0.02, Some(low - 0.02))
                }
                _ => (1.0, 2.0, Some(0.5)),
            };
            let (measured, verdict) = match (number % 4, fast) {
                (3, _) => (None, ""),
                (2, Some(fast)) => (Some(fast), "**refuted: faster**"),
                (1, _) => (Some(slow), "**refuted: slower**"),
                _ => (Some(inside), "confirmed"),
            };
            let verdict = if low.is_none() { "**no prediction**" } else { verdict };
            let Some(measured) = measured else {
                expected.push("not measured".to_owned());
                continue;
            };
            let shown = if share { format!("{:.1} %", 100.0 * measured) } else { format!("{measured:.1} us") };
            expected.push(format!("{shown}, {verdict}"));
            let [list, dtype, op, implementation, mode, cache] =
                ["list", "dtype", "op", "implementation", "mode", "cache"].map(|name| text(case, name));
            // Two passes: what counts is the slower one.
            for pass in [1, 2] {
                let better = if pass == 1 { 0.001 } else { 0.0 };
                let (us, ratio) = if share { (1.0, measured + better) } else { (measured - better, 0.5) };
                rows += &format!(
                    "{gpu},580,2026-01-01,abc,{pass},{list},1,4,{dtype},{op},{implementation},{mode},{cache},{us},{ratio},\n"
                );
            }
        }
        let record = format!("{COLUMNS}\n{rows}");
        let Some(made) = made_from("predicted-times", &format!("{kind}-made-up-2026-01-01.csv"), &record) else {
            return;
        };
        assert!(made.contains(gpu) && made.contains(&format!("{kind}-made-up-2026-01-01.csv")), "{made}");
        let found: Vec<String> = table(&made).iter().map(|row| row.last().unwrap().clone()).collect();
        assert_eq!(found, expected, "{card}");
    }
    // A card for which there are no predictions.
    let row = "NVIDIA A100,580,2026-01-01,abc,1,1 GiB,1,4,f32,norm,gradclip,eager,warm,375,0.9,";
    let Some(made) = made_from("predicted-times", "gpu-a-2026-01-01.csv", &format!("{COLUMNS}\n{row}\n")) else {
        return;
    };
    assert_eq!(made.matches("| 375.0 us, **no prediction** |").count(), 1, "{made}");
    // A record says which kernels it is of: 350 us is too fast for the first ones, and what is predicted of the batched.
    let row = "NVIDIA H100 80GB HBM3,580,2026-01-01,abc,1,1 GiB,1,4,f32,norm,gradclip,eager,warm,350,0.9,";
    for (kernels, verdict) in [("now", "**refuted: faster**"), ("batched", "confirmed")] {
        let record = format!("{COLUMNS},kernels\n{row},{kernels}\n");
        let Some(made) = made_from("predicted-times", &format!("predictions-{kernels}-2026-01-01.csv"), &record) else {
            return;
        };
        assert_eq!(made.matches(&format!("| 350.0 us, {verdict} |")).count(), 1, "{made}");
    }
}

/// The bars, with made-up times next to each: which lists, which bar, met or not.
#[test]
fn bars_are_those_of_the_design() {
    if skipped() {
        return;
    }
    const GI: usize = 1 << 30;
    let mut rows = String::new();
    let mut add = |list: &str, dtype: &str, tensors: usize, bytes: usize, times: &[(&str, &str, &str, f64, f64)]| {
        for (op, implementation, mode, us, ratio) in times {
            rows += &format!(
                "G,580,2026-01-01,abc,1,{list},{tensors},{bytes},{dtype},{op},{implementation},{mode},warm,{us},{ratio},{us}\n"
            );
        }
    };
    let (ours, torch) = ("gradclip", "torch");
    add(
        "1 GiB",
        "f32",
        1,
        GI,
        &[
            ("norm", ours, "eager", 100.0, 0.97),
            ("clip; within", ours, "eager", 103.0, 0.9),
            ("clip; within", torch, "eager", 278.0, 0.0),
            ("clip", ours, "eager", 300.0, 0.95),
            ("clip", torch, "eager", 331.0, 0.0),
            ("value; 0 % outside", ours, "eager", 100.0, 0.969),
            ("value; 100 % outside", ours, "eager", 200.0, 0.971),
            ("value; 1 % outside", ours, "eager", 150.0, 0.5),
            ("value; 0 % outside", torch, "eager", 191.0, 0.0),
            ("value; 100 % outside", torch, "eager", 381.0, 0.0),
            ("value; 1 % outside", torch, "eager", 284.0, 0.0),
        ],
    );
    add("many", "f32", 300, GI, &[("clip", ours, "eager", 300.0, 0.96), ("clip", torch, "eager", 331.0, 0.0)]);
    add("half", "bf16", 1, GI / 2, &[("norm", ours, "eager", 100.0, 0.5), ("clip; within", ours, "eager", 104.0, 0.5)]);
    add(
        "small",
        "bf16",
        1,
        GI / 16,
        &[("norm", ours, "eager", 100.0, 0.5), ("clip; within", ours, "eager", 109.0, 0.5)],
    );
    add("smaller", "bf16", 1, GI / 16 - 1, &[("norm", ours, "eager", 100.0, 0.5)]);
    add("2^31 + 1 elements", "bf16", 1, 4 * GI, &[("norm", ours, "eager", 100.0, 0.98)]);
    add("1 GiB", "f16", 1, GI, &[("norm", ours, "eager", 100.0, 0.5)]);
    add("GPT-2", "f32", 148, GI / 2 - 1, &[("clip", ours, "eager", 10.0, 0.5), ("clip", torch, "eager", 99.0, 0.0)]);
    add("1 MiB", "f32", 1, 1 << 20, &[("clip", ours, "eager", 6.5, 0.5), ("clip", ours, "graph", 4.6, 0.5)]);
    let record = format!("{COLUMNS}\n{rows}");
    let Some(made) = made_from("gpu-bars", "gpu-made-up-2026-01-01.csv", &record) else { return };
    let rows = table(&made);
    // What was measured of the bars, and whether each is met.
    for (what, list, bar, measured, met) in [
        ("norm only, of the plain read", "1 GiB, f32", ">= 97.0 %", "97.0 %", "yes"),
        ("norm only, of the plain read", "2^31 + 1 elements, bf16", ">= 97.0 %", "98.0 %", "yes"),
        ("clip by norm, not clipped, to norm only", "1 GiB, f32", "<= 1.030 x", "1.030 x", "yes"),
        ("clip by norm, not clipped, to norm only", "half, bf16", "<= 1.030 x", "1.040 x", "**no**"),
        ("clip by norm, not clipped, to norm only", "small, bf16", "<= 1.100 x", "1.090 x", "yes"),
        ("clip by norm, not clipped, faster than torch", "1 GiB, f32", ">= 2.70 x", "2.70 x", "**no**"),
        ("clip by norm, clipped, to read + copy", "1 GiB, f32", "<= 1.050 x", "1.053 x", "**no**"),
        ("clip by norm, clipped, to read + copy", "many, f32", "<= 1.050 x", "1.042 x", "yes"),
        ("clip by norm, clipped, faster than torch", "1 GiB, f32", ">= 1.10 x", "1.10 x", "yes"),
        ("clip by norm, clipped, faster than torch", "many, f32", ">= 1.20 x", "1.10 x", "**no**"),
        ("clip by value, all outside, of the copy", "1 GiB, f32", ">= 97.0 %", "97.1 %", "yes"),
        ("clip by value, nothing outside, of the plain read", "1 GiB, f32", ">= 97.0 %", "96.9 %", "**no**"),
        ("clip by value, faster than torch", "1 GiB, f32", ">= 1.90 x", "1.89 x", "**no**"),
        ("call to done, clip, faster than torch", "GPT-2, f32", ">= 10.00 x", "9.90 x", "**no**"),
        ("clip by norm, clipped, on a stream", "1 MiB, f32", "<= 6.50 us", "6.50 us", "yes"),
        ("clip by norm, clipped, in a graph", "1 MiB, f32", "<= 4.50 us", "4.60 us", "**no**"),
        ("clip by norm, clipped, faster than torch", "4 GiB, bf16", ">= 1.20 x", "", "not measured"),
        ("call to done, clip; within, faster than torch", "Qwen3-30B-A3B 1/32, bf16", ">= 10.00 x", "", "not measured"),
        ("clip by norm, clipped, in a graph", "1 MiB in 160, bf16", "<= 4.50 us", "", "not measured"),
    ] {
        let row: Vec<_> = [what, list, bar, measured, met].map(str::to_owned).into();
        assert!(rows.contains(&row), "{row:?} is not in {made}");
    }
    // Which lists there is each bar for.
    let usual = |names: &[&str]| {
        names.iter().flat_map(|name| ["f32", "bf16"].map(|dtype| format!("{name}, {dtype}"))).collect()
    };
    let named: Vec<String> = usual(&["1 GiB", "4 GiB", "16 GiB"]);
    let with = |more: &[&str]| [named.clone(), more.iter().map(|list| (*list).to_owned()).collect()].concat();
    let large = with(&["many, f32", "2^31 + 1 elements, bf16"]);
    let beside_torch = with(&["many, f32"]);
    for (what, lists) in [
        ("norm only, of the plain read", large.clone()),
        (
            "clip by norm, not clipped, to norm only",
            with(&["many, f32", "half, bf16", "2^31 + 1 elements, bf16", "small, bf16", "GPT-2, f32"]),
        ),
        ("clip by norm, not clipped, faster than torch", with(&["many, f32", "half, bf16"])),
        ("clip by norm, clipped, to read + copy", large.clone()),
        ("clip by norm, clipped, faster than torch", beside_torch.clone()),
        ("clip by value, all outside, of the copy", large.clone()),
        ("clip by value, nothing outside, of the plain read", large),
        ("clip by value, faster than torch", beside_torch),
        ("call to done, clip; within, faster than torch", usual(&["3000 x 4 Ki", "GPT-2", "Qwen3-30B-A3B 1/32"])),
        ("call to done, clip, faster than torch", usual(&["3000 x 4 Ki", "GPT-2", "Qwen3-30B-A3B 1/32"])),
        ("clip by norm, clipped, on a stream", usual(&["1 MiB", "1 MiB in 160"])),
        ("clip by norm, clipped, in a graph", usual(&["1 MiB", "1 MiB in 160"])),
    ] {
        let mut found: Vec<_> = rows.iter().filter(|row| row[0] == what).map(|row| row[1].clone()).collect();
        let mut lists = lists;
        found.sort();
        lists.sort();
        assert_eq!(found, lists, "{what}");
    }
    let whats: HashSet<_> = rows.iter().map(|row| row[0].as_str()).collect();
    assert_eq!(whats.len(), 12, "{whats:?}");
}
