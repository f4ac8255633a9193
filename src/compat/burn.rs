//! burn 0.22.1, `crates/burn-optim/src/grad_clipping/base.rs`. Thresholds are f32, as there.

use crate::options::{ClipNorm, ClipValue, NonFinite};

/// `GradientClippingConfig::Norm(max_norm)`: each parameter's gradient by its own norm, to be used with
/// [`Scope::per_tensor`](crate::Scope::per_tensor). burn has no global norm; for one, leave the scope out.
///
/// ```text
/// burn    g * min(max_norm / (N + m), 1)     N of the tensor; m: the smallest normal number of its type
/// here    g * (max_norm / N)   where N > max_norm
/// ```
///
/// `m` is there to make no 0 / 0, and vanishes in all other sums; here nothing is divided where `N` is 0, and it is
/// left out.
///
/// A norm that is NaN makes the tensor NaN; one that is infinite makes its finite elements 0 and its infinite ones NaN.
/// Other tensors are not concerned.
///
/// Besides [what differs everywhere](super#what-differs-on-purpose-everywhere): f16 and bf16 are clipped in f32 there,
/// so f16 300 has a norm in both, and f32 1e20 only here. (burn 0.21 has neither.)
///
/// ```
/// use gradclip::{compat, cpu, Scope};
/// let mut grads = [vec![3.0f32, 4.0], vec![0.5]];
/// cpu::clip_grad_norm_by(&mut grads, &Scope::per_tensor(), compat::burn::norm(1.0))?;
/// assert_eq!(grads, [vec![0.6, 0.8], vec![0.5]]);
/// # Ok::<(), gradclip::Error>(())
/// ```
#[must_use]
pub const fn norm(max_norm: f32) -> ClipNorm {
    ClipNorm::new(max_norm as f64).nonfinite(NonFinite::Propagate)
}

/// `GradientClippingConfig::Value(threshold)`: above `threshold` it becomes that, below `-threshold` that, and NaN
/// stays NaN. So it is here; it is [`ClipValue::new`].
#[must_use]
pub const fn value(threshold: f32) -> ClipValue {
    ClipValue::new(threshold as f64)
}
