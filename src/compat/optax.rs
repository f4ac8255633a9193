//! optax 0.2.8, `optax/transforms/_clipping.py`.

use crate::options::{ClipNorm, ClipValue, NonFinite, NormType};

/// `optax.clip_by_global_norm(max_norm)`.
///
/// ```text
/// optax    N < max_norm ? g : (g / N) * max_norm
/// here     N > max_norm ? g * (max_norm / N) : g
/// ```
///
/// A norm that is NaN makes every gradient NaN; one that is infinite makes finite gradients 0 and infinite ones NaN.
///
/// Besides [what differs everywhere](super#what-differs-on-purpose-everywhere): at `N == max_norm` optax divides and
/// multiplies, which may move a gradient by a rounding; and XLA on a CPU takes subnormal gradients for 0.
///
/// ```
/// use gradclip::{compat, cpu};
/// let mut grads = [[3.0f32, 4.0]];
/// cpu::clip_grad_norm(&mut grads, compat::optax::clip_by_global_norm(1.0))?;
/// assert_eq!(grads, [[0.6, 0.8]]);
/// # Ok::<(), gradclip::Error>(())
/// ```
#[must_use]
pub const fn clip_by_global_norm(max_norm: f64) -> ClipNorm {
    ClipNorm::new(max_norm).nonfinite(NonFinite::Propagate)
}

/// `optax.clip_by_block_rms(threshold)`: each gradient by its own root mean square, to be used with
/// [`Scope::per_tensor`](crate::Scope::per_tensor).
///
/// ```text
/// optax    g / max(1, rms / threshold)     rms = sqrt(mean(g^2)) of the tensor
/// here     g * (threshold / rms)   where rms > threshold
/// ```
///
/// A root mean square that is NaN makes the tensor NaN; one that is infinite makes its finite elements 0 and its infinite
/// ones NaN. Other tensors are not concerned. The report has it as [`total_norm`](crate::NormReport::total_norm).
///
/// Besides [what differs everywhere](super#what-differs-on-purpose-everywhere): an empty tensor is left alone.
///
/// ```
/// use gradclip::{compat, cpu, Scope};
/// let mut grads = [vec![3.0f32, 4.0, 0.0, 0.0], vec![0.5]];
/// cpu::clip_grad_norm_by(&mut grads, &Scope::per_tensor(), compat::optax::clip_by_block_rms(1.0))?;
/// assert_eq!(grads, [vec![1.2, 1.6, 0.0, 0.0], vec![0.5]]); // 2.5 was the first one's
/// # Ok::<(), gradclip::Error>(())
/// ```
#[must_use]
pub const fn clip_by_block_rms(threshold: f64) -> ClipNorm {
    ClipNorm::new(threshold).norm_type(NormType::Rms).nonfinite(NonFinite::Propagate)
}

/// `optax.clip(max_delta)`: `min(max(g, -max_delta), max_delta)`, and NaN stays NaN. So it is here; it is
/// [`ClipValue::new`].
///
/// Besides what differs everywhere: a `max_delta` that a gradient's type cannot hold is that type's largest value here,
/// and infinite in optax, where an Inf passes then.
#[must_use]
pub const fn clip(max_delta: f64) -> ClipValue {
    ClipValue::new(max_delta)
}
