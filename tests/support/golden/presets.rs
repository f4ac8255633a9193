//! The presets of `gradclip::compat`: which function a case stands for, and judging what it did.

use super::{parts, Golden, Outcome, Verdict};
use gradclip::{compat, ClipNorm, ClipValue};

#[derive(Clone, Debug)]
pub struct Preset {
    /// As in `gradclip::compat`.
    pub name: String,
    pub arguments: Vec<f64>,
}

impl Preset {
    pub fn clip_norm(&self) -> Option<ClipNorm> {
        let &[max_norm] = &self.arguments[..] else { return None };
        Some(match self.name.as_str() {
            "torch::clip_grad_norm" => compat::torch::clip_grad_norm(max_norm),
            "optax::clip_by_global_norm" => compat::optax::clip_by_global_norm(max_norm),
            "optax::clip_by_block_rms" => compat::optax::clip_by_block_rms(max_norm),
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
    parts::judge(golden, outcome)
}
