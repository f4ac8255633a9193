//! DeepSpeed 0.19.8, `deepspeed/runtime/zero/stage_1_and_2.py` and `stage3.py` (`unscale_and_clip_grads`), and
//! `deepspeed/runtime/utils.py`.

use super::off_at_zero;
use crate::options::{ClipNorm, NonFinite};

/// `"gradient_clipping": ...` of the configuration.
///
/// ```text
/// DeepSpeed    g / (S * max((N / S + 1e-6) / clip, 1))   if clip > 0, else g / S
/// here         g / S * (clip / (N / S + 1e-6))           where N / S + 1e-6 > clip and clip is not 0, else g / S
///              S: the loss scale; N: the norm of g, S in it
/// ```
///
/// The loss scale is [`ClipNorm::loss_scale`], 1 without it. Every gradient is written once, unscaled and clipped:
/// `compat::deepspeed::gradient_clipping(1.0).loss_scale(1024.0)`.
///
/// 0 switches clipping off, in both; negative too there, and is an error here.
///
/// A norm that is not finite leaves the gradients alone ([`NonFinite::Skip`]): ZeRO's and the f16 optimizers' step sees
/// the overflow first and is left out, and yours is to be left out if the report is not finite. There is no sentinel
/// here: of a NaN or an Inf, `get_global_norm_of_tensors` makes a norm of -1, with which
/// **`clip_tensors_by_global_norm` flips the signs of all gradients**; `clip_grad_norm_` does what PyTorch's does.
///
/// Besides [what differs everywhere](super#what-differs-on-purpose-everywhere): the norm is that of the gradients
/// given, and not added up (nor, with experts, averaged) over ranks, and the report has `N / S`; gradients within the
/// threshold are multiplied by 1 there; finite gradients whose squares overflow pass its check, and become 0.
///
/// ```
/// use gradclip::{compat, cpu};
/// let mut grads = [[3.0f32, 4.0]];
/// cpu::clip_grad_norm(&mut grads, compat::deepspeed::gradient_clipping(1.0))?;
/// assert_eq!(grads, [[0.5999999, 0.79999983]]);
///
/// let mut scaled = [[3.0f32 * 1024.0, 4.0 * 1024.0]];
/// cpu::clip_grad_norm(&mut scaled, compat::deepspeed::gradient_clipping(1.0).loss_scale(1024.0))?;
/// assert_eq!(scaled, grads);
/// # Ok::<(), gradclip::Error>(())
/// ```
#[must_use]
pub const fn gradient_clipping(clip: f64) -> ClipNorm {
    ClipNorm::new(off_at_zero(clip)).eps(1e-6).nonfinite(NonFinite::Skip)
}
