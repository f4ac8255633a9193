//! Megatron-LM, megatron-core 0.16.1, `megatron/core/optimizer/clip_grads.py`.

use super::off_at_zero;
use crate::options::{ClipNorm, NonFinite};

/// `--clip-grad`, `OptimizerConfig.clip_grad`.
///
/// ```text
/// Megatron    g * clip_coeff   if clip_coeff < 1,   clip_coeff = clip_grad / (N + 1e-6),   if clip_grad > 0
/// here        g * clip_grad / (N + 1e-6)   where N + 1e-6 > clip_grad, unless clip_grad is 0
/// ```
///
/// 0 switches it off, in both; negative too there, and is an error here.
///
/// A norm that is not finite leaves the gradients alone ([`NonFinite::Skip`]), as the step of its mixed-precision
/// optimizer, which looks for NaN and Inf first, and is left out. Where nothing looks (f32, bf16 without a scaler), a
/// NaN leaves them alone there too, since NaN is not below 1; **an Inf makes finite gradients 0 and infinite ones NaN
/// there**: that is [`NonFinite::Propagate`].
///
/// Besides [what differs everywhere](super#what-differs-on-purpose-everywhere): the norm is that of the gradients
/// given, and not added up over ranks; f16 and f64 can be clipped too; norms are f32 there.
///
/// ```
/// use gradclip::{compat, cpu};
/// let mut grads = [[3.0f32, 4.0]];
/// cpu::clip_grad_norm(&mut grads, compat::megatron::clip_grad(1.0))?;
/// assert_eq!(grads, [[0.5999999, 0.79999983]]);
/// # Ok::<(), gradclip::Error>(())
/// ```
#[must_use]
pub const fn clip_grad(clip_grad: f64) -> ClipNorm {
    ClipNorm::new(off_at_zero(clip_grad)).eps(1e-6).nonfinite(NonFinite::Skip)
}
