//! PyTorch 2.11.0, `torch/nn/utils/clip_grad.py`.

use crate::options::{ClipNorm, ClipValue, NonFinite};

/// `torch.nn.utils.clip_grad_norm_(parameters, max_norm)`.
///
/// ```text
/// PyTorch    g * min(max_norm / (N + 1e-6), 1)
/// here       g * max_norm / (N + 1e-6)   where N + 1e-6 > max_norm
/// ```
///
/// A norm that is NaN makes every gradient NaN; one that is infinite makes finite gradients 0 and infinite ones NaN.
/// With `error_if_nonfinite=True`, add [`nonfinite`](ClipNorm::nonfinite)`(NonFinite::Error)`; with another
/// `norm_type`, [`norm_type`](ClipNorm::norm_type).
///
/// This is [`ClipNorm::torch_compatible`], which sets `eps` alone, with PyTorch's answer to NaN and Inf besides.
///
/// Besides [what differs everywhere](super#what-differs-on-purpose-everywhere): an empty tensor and the infinity norm
/// are no error; in f16 and bf16 PyTorch rounds norm and coefficient to that type, and `1e-6` vanishes.
///
/// ```
/// use gradclip::{compat, cpu};
/// let mut grads = [[3.0f32, 4.0]];
/// cpu::clip_grad_norm(&mut grads, compat::torch::clip_grad_norm(1.0))?;
/// assert_eq!(grads, [[0.5999999, 0.79999983]]);
/// # Ok::<(), gradclip::Error>(())
/// ```
#[must_use]
pub const fn clip_grad_norm(max_norm: f64) -> ClipNorm {
    ClipNorm::new(max_norm).torch_compatible().nonfinite(NonFinite::Propagate)
}

/// `torch.nn.utils.clip_grad_value_(parameters, clip_value)`: `min(max(g, -clip_value), clip_value)`, and NaN stays
/// NaN. So it is here; it is [`ClipValue::new`].
///
/// Besides what differs everywhere: a `clip_value` that a gradient's type cannot hold is that type's largest value, and
/// no `RuntimeError`; nor is an empty list.
#[must_use]
pub const fn clip_grad_value(clip_value: f64) -> ClipValue {
    ClipValue::new(clip_value)
}
