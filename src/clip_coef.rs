//! The formula: from the norm to the coefficient and to what is done with it. Twin of `decide` in
//! `kernels/decide.cuh`, bit for bit.

use crate::abi::action;
use crate::options::{ClipNorm, NonFinite};
use std::ops::RangeInclusive;

/// Outside of these the f32 split of the multiplier may lose bits to underflow, or overflow: multiply in f64 instead.
pub(crate) const SPLIT_COEFS: RangeInclusive<f64> =
    f64::from_bits((1023 - 60) << 52)..=f64::from_bits((1023 + 60) << 52);

/// What the apply stage has to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Verdict {
    /// Without the loss scale.
    pub total_norm: f64,
    pub clip_coef: f64,
    /// `clip_coef / loss_scale`, or 1 where nothing is written.
    pub multiplier: f64,
    /// One of [`action`].
    pub action: u32,
}

impl Verdict {
    /// The multiplier in f32, rounded down, so that `coef_lo` is not negative and a -0 keeps its sign in
    /// `x * coef_hi + x * coef_lo`.
    pub(crate) fn coef_hi(&self) -> f32 {
        let nearest = self.multiplier as f32;
        if f64::from(nearest) > self.multiplier {
            f32::from_bits(nearest.to_bits() - 1)
        } else {
            nearest
        }
    }

    /// `coef_hi + coef_lo` has at least 47 bits of the multiplier.
    pub(crate) fn coef_lo(&self) -> f32 {
        (self.multiplier - f64::from(self.coef_hi())) as f32
    }

    /// The same of a call that writes outputs.
    pub(crate) fn out_of_place(self, total_norm: f64, nonfinite: NonFinite) -> Self {
        Self { action: out_of_place(self.action, total_norm, nonfinite), ..self }
    }

    pub(crate) fn written(&self) -> bool {
        self.action != action::KEEP
    }
}

/// For a finite norm: `clip_coef = max_norm / (N + eps)` where `N + eps > max_norm`, `N` being `total_norm / loss_scale`.
/// The quotient is below 1 then, also after rounding. A zero norm never divides unless `eps` makes the divisor positive.
/// The gradients are multiplied by `clip_coef / loss_scale`, which is 1 where there is neither a loss scale nor anything
/// to clip.
///
/// `total_norm` is that of the gradients as they are, the loss scale in it.
pub(crate) fn decide(clip: &ClipNorm, total_norm: f64) -> Verdict {
    let unscaled = |x: f64| canonical(if clip.loss_scale == 1.0 { x } else { x / clip.loss_scale });
    let total_norm = unscaled(total_norm);
    let clips = clip.max_norm.is_finite();
    let (clip_coef, multiplier, action) = if total_norm.is_finite() {
        let clip_coef = if clips { coef_of_finite(clip, total_norm) } else { 1.0 };
        let multiplier = unscaled(clip_coef);
        (clip_coef, multiplier, if multiplier == 1.0 { action::KEEP } else { action::SCALE })
    } else if !clips && clip.loss_scale == 1.0 {
        (1.0, 1.0, action::KEEP) // only measured
    } else {
        match clip.nonfinite {
            NonFinite::Skip | NonFinite::Error => (1.0, 1.0, action::KEEP),
            NonFinite::Zero => (0.0, 0.0, action::CLEAR),
            NonFinite::Propagate => {
                let clip_coef = match clips {
                    false => 1.0,
                    true if total_norm.is_nan() => CANONICAL_NAN,
                    true => 0.0,
                };
                (clip_coef, unscaled(clip_coef), action::POISON)
            }
        }
    };
    Verdict { total_norm, clip_coef, multiplier, action }
}

fn coef_of_finite(clip: &ClipNorm, total_norm: f64) -> f64 {
    let (mut numerator, mut denominator) = (clip.max_norm, total_norm + clip.eps);
    if denominator.is_infinite() {
        (numerator, denominator) = (0.5 * numerator, 0.5 * total_norm + 0.5 * clip.eps);
    }
    if denominator > numerator {
        numerator / denominator
    } else {
        1.0
    }
}

/// What keeps the gradients in place writes them, times 1, out of place. Only a norm that is not finite, and is to be
/// skipped, leaves the outputs alone. Twin: `out_of_place` in `kernels/scale_into.cu`.
pub(crate) fn out_of_place(decided: u32, total_norm: f64, nonfinite: NonFinite) -> u32 {
    if decided != action::KEEP {
        decided
    } else if total_norm.is_finite() {
        action::SCALE
    } else if matches!(nonfinite, NonFinite::Skip | NonFinite::Error) {
        action::KEEP
    } else {
        action::POISON
    }
}

/// The one NaN we write; payloads differ between processors.
pub(crate) const CANONICAL_NAN: f64 = f64::from_bits(0x7ff8_0000_0000_0000);

fn canonical(x: f64) -> f64 {
    if x.is_nan() {
        CANONICAL_NAN
    } else {
        x
    }
}
