//! The golden cases of `tests/golden` on the device. `tests/golden.rs` runs them on the CPU.

use super::data::{Tensor, Values};
use super::device;
use crate::backend::with_clipper;
use crate::support::golden::{check, Answer, Case, Op, Outcome};
use gradclip::cuda::Clipper;
use std::cell::RefCell;

fn run(clipper: &mut Clipper, case: &Case) -> Outcome {
    let mut list: Vec<Tensor> = case.grads.iter().map(|values| Tensor { values: values.clone(), offset: 0 }).collect();
    let answer = match case.op {
        Op::TotalNorm(norm_type) => match case.scope() {
            None => device::total_norm(clipper, &list, norm_type).map(Answer::Norm),
            Some(scope) => device::norms_by(clipper, &list, &scope, norm_type).map(Answer::Norms),
        },
        Op::ClipNorm { .. } => match (case.scope(), case.clip_norm().unwrap()) {
            (None, clip) => device::clip_grad_norm(clipper, &mut list, clip).map(Answer::Norm),
            (Some(scope), clip) => device::clip_grad_norm_by(clipper, &mut list, &scope, clip).map(Answer::Norms),
        },
        Op::ClipWithNorm { total_norm, .. } => {
            let clip = case.clip_norm().unwrap();
            device::clip_with_norm(clipper, &mut list, total_norm, clip).map(Answer::Norm)
        }
        Op::ClipValue { .. } => {
            device::clip_grad_value(clipper, &mut list, case.clip_value().unwrap()).map(Answer::Value)
        }
    };
    Outcome { answer, grads: list.into_iter().map(|tensor| -> Values { tensor.values }).collect() }
}

fn check_on_device(file: &str) {
    with_clipper(|clipper| {
        let clipper = RefCell::new(clipper);
        check(file, |case| run(&mut clipper.borrow_mut(), case));
    });
}

#[test]
fn published_cases_of_the_peers() {
    check_on_device("published.json");
}

#[test]
fn norms_at_the_edges() {
    check_on_device("edges.json");
}

#[test]
fn values_and_bounds() {
    check_on_device("value.json");
}

#[test]
fn random_lists() {
    check_on_device("random.json");
}

#[test]
fn norms_of_other_orders() {
    check_on_device("other_orders.json");
}

#[test]
fn loss_scales() {
    check_on_device("loss_scale.json");
}

#[test]
fn given_norms() {
    check_on_device("given_norm.json");
}

#[test]
fn scopes() {
    check_on_device("scopes.json");
}

#[test]
fn invalid_thresholds() {
    check_on_device("invalid_thresholds.json");
}

#[test]
fn presets_of_the_peers() {
    check_on_device("presets.json");
}
