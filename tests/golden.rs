//! The CPU back end against answers of PyTorch, optax and exact arithmetic.
#![allow(clippy::unwrap_used)]

#[path = "support/exact.rs"]
mod exact;
#[path = "support/format.rs"]
mod format;
#[path = "support/golden.rs"]
mod golden;
#[path = "support/tensor.rs"]
mod tensor;
#[path = "support/tolerance.rs"]
mod tolerance;

use golden::{check, folder, read, wrong_cases, Answer, Case, Counts, Golden, Op, Outcome};
use gradclip::{cpu, Error};
use std::collections::BTreeMap;

/// The files read here.
const FILES: [&str; 9] = [
    "published.json",
    "edges.json",
    "value.json",
    "random.json",
    "other_orders.json",
    "loss_scale.json",
    "given_norm.json",
    "scopes.json",
    "invalid_thresholds.json",
];
const PRESETS: &str = "presets.json";

fn run(case: &Case) -> Outcome {
    let mut grads = case.grads.clone();
    let answer = match case.op {
        Op::TotalNorm(norm_type) => match case.scope() {
            None => cpu::total_norm(&grads, norm_type).map(Answer::Norm),
            Some(scope) => cpu::norms_by(&grads, &scope, norm_type).map(Answer::Norms),
        },
        Op::ClipNorm { .. } => match case.scope() {
            None => cpu::clip_grad_norm(&mut grads, case.clip_norm().unwrap()).map(Answer::Norm),
            Some(scope) => cpu::clip_grad_norm_by(&mut grads, &scope, case.clip_norm().unwrap()).map(Answer::Norms),
        },
        Op::ClipWithNorm { total_norm, .. } => {
            cpu::clip_with_norm(&mut grads, total_norm, case.clip_norm().unwrap()).map(Answer::Norm)
        }
        Op::ClipValue { .. } => cpu::clip_grad_value(&mut grads, case.clip_value().unwrap()).map(Answer::Value),
    };
    Outcome { answer, grads }
}

#[test]
fn published_cases_of_the_peers() {
    check("published.json", run);
}

#[test]
fn norms_at_the_edges() {
    check("edges.json", run);
}

#[test]
fn values_and_bounds() {
    check("value.json", run);
}

#[test]
fn random_lists() {
    check("random.json", run);
}

#[test]
fn norms_of_other_orders() {
    check("other_orders.json", run);
}

#[test]
fn loss_scales() {
    check("loss_scale.json", run);
}

#[test]
fn given_norms() {
    check("given_norm.json", run);
}

#[test]
fn scopes() {
    check("scopes.json", run);
}

#[test]
fn invalid_thresholds() {
    check("invalid_thresholds.json", run);
}

#[test]
fn presets_of_the_peers() {
    check(PRESETS, run);
}

/// The page of the presets counts their cases, and each of [`gradclip::compat`] has some.
#[test]
fn no_preset_is_missed() {
    let page = std::fs::read_to_string(folder().join("PRESETS.md")).unwrap();
    let mut found: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for golden in read(PRESETS) {
        let (cases, differ) = found.entry(golden.case.preset.unwrap().name).or_default();
        *cases += 1;
        *differ += usize::from(golden.peer_differs.is_some());
    }
    assert_eq!(found.len(), 15);
    for (name, counts) in found {
        let row = page.lines().find(|line| line.starts_with(&format!("| `{name}` | clip_grad_"))).unwrap();
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        assert_eq!((cells[5].parse().unwrap(), cells[6].parse().unwrap()), counts, "{name}");
    }
}

/// The README of the golden files counts its cases; all are read, and none is in a file that nobody reads.
#[test]
fn no_case_is_missed() {
    let readme = std::fs::read_to_string(folder().join("README.md")).unwrap();
    for file in FILES {
        let row = readme.lines().find(|line| line.starts_with(&format!("| `{file}` |"))).unwrap();
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let mut written: BTreeMap<String, usize> = BTreeMap::new();
        for (peer, cell) in ["torch", "optax", "exact"].into_iter().zip(&cells[4..7]) {
            written.insert(peer.into(), cell.parse().unwrap());
        }
        let mut found: BTreeMap<String, usize> = written.keys().map(|peer| (peer.clone(), 0)).collect();
        read(file).iter().for_each(|golden| *found.get_mut(&golden.peer).unwrap() += 1);
        assert_eq!(found, written, "{file}");
        assert_eq!(cells[3].parse::<usize>().unwrap(), found.values().sum::<usize>(), "{file}");
    }
    let mut files: Vec<String> = std::fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".json"))
        .collect();
    let mut known = [&FILES[..], &[PRESETS]].concat();
    files.sort();
    known.sort_unstable();
    assert_eq!(files, known);
}

/// Two independent pieces of exact arithmetic: the files were computed with Python's fractions.
#[test]
fn the_oracle_of_these_tests_agrees() {
    for Golden { case, exact_norm, .. } in FILES.into_iter().flat_map(read) {
        let (norm_type, loss_scale) = match case.op {
            Op::TotalNorm(norm_type) => (norm_type, 1.0),
            Op::ClipNorm { norm_type, loss_scale, .. } => (norm_type, loss_scale),
            _ => continue,
        };
        let Some(exact_norm) = exact_norm else { continue }; // one for each tensor, group or row
        let (ours, theirs) = (exact::total_norm(&case.grads, norm_type) / loss_scale, exact_norm);
        assert!(ours == theirs || (ours.is_nan() && theirs.is_nan()), "{}: {ours:e}, {theirs:e}", case.name);
    }
}

/// The judge itself: it has to notice a back end that is wrong, in each thing it looks at.
mod a_wrong_back_end_is_noticed {
    use super::*;
    use crate::tensor::Tensor;
    use gradclip::{NormReport, ValueReport};

    /// Whether the judge objects to more of the cases once `spoil` had its way with the outcomes.
    fn noticed(file: &str, spoil: impl Fn(&Case, &mut Outcome)) -> bool {
        let spoiled = |case: &Case| {
            let mut outcome = run(case);
            spoil(case, &mut outcome);
            outcome
        };
        let goldens = read(file);
        wrong_cases(&goldens, spoiled).len() > wrong_cases(&goldens, run).len()
    }

    fn change_norm(change: impl Fn(&mut NormReport)) -> impl Fn(&Case, &mut Outcome) {
        move |_, outcome| {
            if let Ok(Answer::Norm(report)) = &mut outcome.answer {
                change(report);
            }
        }
    }

    fn change_norms(change: impl Fn(&mut NormReport)) -> impl Fn(&Case, &mut Outcome) {
        move |_, outcome| {
            if let Ok(Answer::Norms(report)) = &mut outcome.answer {
                report.groups.iter_mut().for_each(&change);
            }
        }
    }

    fn change_value(change: impl Fn(&mut ValueReport)) -> impl Fn(&Case, &mut Outcome) {
        move |_, outcome| {
            if let Ok(Answer::Value(report)) = &mut outcome.answer {
                change(report);
            }
        }
    }

    /// Another preset in place of that of the case.
    #[test]
    fn presets() {
        let goldens = read(PRESETS);
        for (from, to) in [
            ("keras::clipnorm", "burn::norm"),
            ("keras::global_clipnorm", "tensorflow::clip_by_global_norm"),
            ("torch::clip_grad_norm", "optax::clip_by_global_norm"),
            ("megatron::clip_grad", "torch::clip_grad_norm"),
            ("optax::clip_by_block_rms", "tensorflow::clip_by_norm"),
        ] {
            let other = |case: &Case| {
                let mut case = case.clone();
                if let Some(preset) = case.preset.as_mut().filter(|preset| preset.name == from) {
                    preset.name = to.into();
                }
                run(&case)
            };
            assert!(!wrong_cases(&goldens, other).is_empty(), "{from} as {to}");
        }
    }

    /// Moves every element of the first tensor by some units in the last place.
    fn move_elements(units: u64) -> impl Fn(&Case, &mut Outcome) {
        move |_, outcome| {
            if let Some(tensor) = outcome.grads.first_mut() {
                *tensor = Tensor::from_bits(tensor.dtype(), tensor.bits().into_iter().map(|bits| bits + units));
            }
        }
    }

    #[test]
    fn reports() {
        assert!(!noticed("edges.json", |_, _| {}));
        assert!(noticed("edges.json", change_norm(|report| report.total_norm *= 1.0 + 1e-11)));
        assert!(noticed("edges.json", change_norm(|report| report.clip_coef *= 1.0 + 1e-15)));
        assert!(noticed("edges.json", change_norm(|report| report.written = false)));
        assert!(noticed("edges.json", change_norm(|report| report.first_nonfinite = None)));
        assert!(noticed(PRESETS, change_norms(|report| report.total_norm *= 1.0 + 1e-11)));
        assert!(noticed(PRESETS, change_norms(|report| report.clip_coef *= 1.0 + 1e-15)));
        assert!(noticed(PRESETS, change_norms(|report| report.first_nonfinite = None)));
        assert!(noticed("scopes.json", change_norms(|report| report.total_norm *= 1.0 + 1e-11)));
        assert!(noticed("scopes.json", change_norms(|report| report.clip_coef *= 1.0 + 1e-15)));
        assert!(noticed("scopes.json", change_norms(|report| report.first_nonfinite = None)));
        assert!(noticed("loss_scale.json", change_norm(|report| report.multiplier = report.clip_coef)));
        assert!(noticed("loss_scale.json", change_norm(|report| report.found_inf = !report.found_inf)));
        assert!(noticed("loss_scale.json", change_norm(|report| report.total_norm *= 2.0)));
        assert!(noticed("given_norm.json", change_norm(|report| report.first_nonfinite = Some(0))));
        assert!(noticed("value.json", change_value(|report| report.clipped += report.nan)));
        assert!(noticed("value.json", change_value(|report| report.nan = 0)));
        assert!(noticed("value.json", change_value(|report| report.written = true)));
        assert!(noticed("value.json", change_value(|report| report.first_nonfinite = None)));
    }

    #[test]
    fn gradients() {
        assert!(noticed("published.json", move_elements(2)));
        assert!(noticed(PRESETS, move_elements(2)));
        assert!(noticed(PRESETS, |case, outcome| outcome.grads.clone_from(&case.grads)));
        assert!(noticed("scopes.json", move_elements(2)));
        assert!(noticed("loss_scale.json", move_elements(2)));
        assert!(noticed("given_norm.json", move_elements(2)));
        assert!(noticed("value.json", move_elements(1)));
        assert!(noticed("edges.json", |case, outcome| outcome.grads.clone_from(&case.grads)));
        assert!(noticed("edges.json", |case, outcome| {
            if outcome.answer.is_err() {
                outcome.grads = case.grads.iter().map(|t| Tensor::from_f64(t.dtype(), vec![0.0; t.numel()])).collect();
            }
        }));
    }

    #[test]
    fn errors() {
        let other = |_: &Case, outcome: &mut Outcome| {
            if let Err(error) = &mut outcome.answer {
                *error = Error::ReportExpired;
            }
        };
        assert!(noticed("invalid_thresholds.json", other));
        assert!(noticed("edges.json", other));
    }
}

/// Totals over all files, for a reader of the log (`cargo test --test golden -- --nocapture summary`).
#[test]
fn summary() {
    let mut counts = Counts::default();
    FILES.into_iter().chain([PRESETS]).flat_map(read).for_each(|golden| counts.add(&golden));
    println!("golden cases\n{counts}");
    assert!(counts.cases.values().sum::<usize>() > 1000);
}
