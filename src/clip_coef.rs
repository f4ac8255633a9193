//! The formula: from the norm to the coefficient and to what is done with it. Twin of `decide` in
//! `kernels/decide.cuh`, bit for bit.

use crate::abi::action;
use crate::options::{ClipNorm, NonFinite};

/// Below this the f32 split of the coefficient may lose bits to underflow: multiply in f64 instead.
pub(crate) const SMALLEST_SPLIT_COEF: f64 = f64::from_bits((1023 - 60) << 52);

/// What the apply stage has to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Verdict {
    pub clip_coef: f64,
    /// One of [`action`].
    pub action: u32,
}

impl Verdict {
    /// The coefficient in f32, rounded down, so that `coef_lo` is not negative and a -0 keeps its sign in
    /// `x * coef_hi + x * coef_lo`.
    pub(crate) fn coef_hi(&self) -> f32 {
        let nearest = self.clip_coef as f32;
        if f64::from(nearest) > self.clip_coef {
            f32::from_bits(nearest.to_bits() - 1)
        } else {
            nearest
        }
    }

    /// `coef_hi + coef_lo` has at least 47 bits of the coefficient.
    pub(crate) fn coef_lo(&self) -> f32 {
        (self.clip_coef - f64::from(self.coef_hi())) as f32
    }

    /// The same of a call that writes outputs.
    pub(crate) fn out_of_place(self, total_norm: f64, nonfinite: NonFinite) -> Self {
        Self { action: out_of_place(self.action, total_norm, nonfinite), ..self }
    }

    pub(crate) fn written(&self) -> bool {
        self.action != action::KEEP
    }
}

/// For a finite norm: `clip_coef = max_norm / (total_norm + eps)` where `total_norm + eps > max_norm`. The quotient is
/// below 1 then, also after rounding. A zero norm never divides unless `eps` makes the divisor positive.
pub(crate) fn decide(clip: &ClipNorm, total_norm: f64) -> Verdict {
    if clip.max_norm.is_infinite() {
        // only measured
    } else if total_norm.is_finite() {
        let (mut numerator, mut denominator) = (clip.max_norm, total_norm + clip.eps);
        if denominator.is_infinite() {
            (numerator, denominator) = (0.5 * numerator, 0.5 * total_norm + 0.5 * clip.eps);
        }
        if denominator > numerator {
            return Verdict { clip_coef: numerator / denominator, action: action::SCALE };
        }
    } else if clip.nonfinite == NonFinite::Zero {
        return Verdict { clip_coef: 0.0, action: action::CLEAR };
    } else if clip.nonfinite == NonFinite::Propagate {
        let clip_coef = if total_norm.is_nan() { CANONICAL_NAN } else { 0.0 };
        return Verdict { clip_coef, action: action::POISON };
    }
    Verdict { clip_coef: 1.0, action: action::KEEP }
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
