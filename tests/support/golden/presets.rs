//! The presets of `gradclip::compat`: which function a case stands for, and judging what it did.

use super::super::tensor::Tensor;
use super::{identical, judge_clip_norm, judge_policy, Answer, Case, Golden, Op, Outcome, Verdict};
use gradclip::{compat, ClipNorm, ClipValue};

#[derive(Clone, Debug)]
pub struct Preset {
    /// As in `gradclip::compat`.
    pub name: String,
    pub arguments: Vec<f64>,
    pub per_tensor: bool,
    /// Of each tensor, if `per_tensor`.
    pub exact_norms: Vec<f64>,
}

impl Preset {
    pub fn clip_norm(&self) -> Option<ClipNorm> {
        let &[max_norm] = &self.arguments[..] else { return None };
        Some(match self.name.as_str() {
            "torch::clip_grad_norm" => compat::torch::clip_grad_norm(max_norm),
            "optax::clip_by_global_norm" => compat::optax::clip_by_global_norm(max_norm),
            "tensorflow::clip_by_global_norm" => compat::tensorflow::clip_by_global_norm(max_norm),
            "tensorflow::clip_by_norm" => compat::tensorflow::clip_by_norm(max_norm),
            "keras::global_clipnorm" => compat::keras::global_clipnorm(max_norm),
            "keras::clipnorm" => compat::keras::clipnorm(max_norm),
            "megatron::clip_grad" => compat::megatron::clip_grad(max_norm),
            "deepspeed::gradient_clipping" => compat::deepspeed::gradient_clipping(max_norm),
            "burn::norm" => compat::burn::norm(max_norm as f32),
            _ => return None,
        })
    }

    pub fn clip_value(&self) -> Option<ClipValue> {
        Some(match (self.name.as_str(), &self.arguments[..]) {
            ("torch::clip_grad_value", &[value]) => compat::torch::clip_grad_value(value),
            ("optax::clip", &[value]) => compat::optax::clip(value),
            ("tensorflow::clip_by_value", &[lo, hi]) => compat::tensorflow::clip_by_value(lo, hi),
            ("keras::clipvalue", &[value]) => compat::keras::clipvalue(value),
            ("burn::value", &[value]) => compat::burn::value(value as f32),
            _ => return None,
        })
    }
}

/// Clipping by norm: each part that has a norm, by the judge of calls without a preset.
pub fn judge(golden: &Golden, outcome: &Outcome) -> Verdict {
    let (preset, plain) = (golden.case.clip_norm(), golden.case.plain_clip_norm());
    require!(preset == plain, "the preset is {preset:?}, not {plain:?}");
    match &outcome.answer {
        Ok(Answer::Norms(report)) => {
            let tensors = golden.case.grads.len();
            require!(report.groups.len() == tensors, "{} norms of {tensors} tensors", report.groups.len());
            for (index, group) in report.groups.iter().enumerate() {
                // In the report of a list, the index of the tensor; here the list is this tensor.
                let mut alone = *group;
                require!(alone.first_nonfinite.is_none_or(|first| first == index), "tensor {index}: {group:?}");
                alone.first_nonfinite = alone.first_nonfinite.map(|_| 0);
                let part = Outcome { answer: Ok(Answer::Norm(alone)), grads: vec![outcome.grads[index].clone()] };
                judge_part(&tensor_of(golden, index)?, &part).map_err(|what| format!("tensor {index}: {what}"))?;
            }
            Ok(())
        }
        _ => judge_part(golden, outcome),
    }
}

/// One tensor of a case as a case.
fn tensor_of(golden: &Golden, index: usize) -> Result<Golden, String> {
    let preset = golden.case.preset.as_ref().ok_or("no preset")?;
    let one = |tensors: &Option<Vec<Tensor>>| tensors.as_ref().map(|tensors| vec![tensors[index].clone()]);
    let case = Case { grads: vec![golden.case.grads[index].clone()], ..golden.case.clone() };
    let exact_norm = Some(*preset.exact_norms.get(index).ok_or("the file has no norm of it")?);
    let (exact_grads, peer_grads) = (one(&golden.exact_grads), one(&golden.peer_grads));
    Ok(Golden { case, exact_norm, exact_grads, peer_grads, ..golden.clone() })
}

fn judge_part(golden: &Golden, outcome: &Outcome) -> Verdict {
    let Op::ClipNorm { max_norm, nonfinite, .. } = golden.case.op else { return Err("no clip_grad_norm".into()) };
    let exact = golden.exact_norm.ok_or("the file has no norm")?;
    if exact.is_finite() {
        return judge_clip_norm(golden, outcome);
    }
    // A peer that differs is no measure.
    let peer_grads = golden.peer_grads.clone().filter(|_| golden.peer_differs.is_none());
    judge_policy(&Golden { peer_grads, ..golden.clone() }, exact, max_norm, nonfinite, outcome)?;
    let exact_grads = golden.exact_grads.as_ref().ok_or("the file has no gradients")?;
    for (after, exact) in outcome.grads.iter().zip(exact_grads) {
        let equal = after.values().into_iter().zip(exact.values()).all(|(after, exact)| identical(after, exact));
        require!(equal, "gradients are {after:?}, expected {exact:?}");
    }
    Ok(())
}
