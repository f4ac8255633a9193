//! Keras 3.15.1, `keras/src/optimizers/base_optimizer.py`: the arguments of its optimizers. Run on its TensorFlow back
//! end.
//!
//! An optimizer of Keras takes one of the three. 0 switches each of them off, and so does 0 here; a negative or NaN one
//! does so there, and is an error here.

use super::off_at_zero;
use crate::options::{ClipNorm, ClipValue, NonFinite};

/// `global_clipnorm=...`: all gradients by their global norm.
///
/// ```text
/// Keras    g * (global_clipnorm * min(1 / N, 1 / global_clipnorm) + (N - N))     if global_clipnorm > 0
/// here     g * (global_clipnorm / N)   where N > global_clipnorm                 unless it is 0
/// ```
///
/// A norm that is NaN makes every gradient NaN, in both. **One that is infinite makes every gradient NaN there; here
/// finite gradients become 0 and infinite ones NaN** ([`NonFinite::Propagate`]): there is no policy for it.
///
/// Besides [what differs everywhere](super#what-differs-on-purpose-everywhere): finite gradients whose squares overflow
/// become NaN there, and with an infinite threshold all do; 41 as a threshold turns `[3, 4]`, which is within it, into
/// `[2.9999998, 3.9999998]`.
///
/// ```
/// use gradclip::{compat, cpu};
/// let mut grads = [[3.0f32, 4.0]];
/// assert!(!cpu::clip_grad_norm(&mut grads, compat::keras::global_clipnorm(0.0))?.written); // off
/// cpu::clip_grad_norm(&mut grads, compat::keras::global_clipnorm(1.0))?;
/// assert_eq!(grads, [[0.6, 0.8]]);
/// # Ok::<(), gradclip::Error>(())
/// ```
#[must_use]
pub const fn global_clipnorm(max_norm: f64) -> ClipNorm {
    ClipNorm::new(off_at_zero(max_norm)).nonfinite(NonFinite::Propagate)
}

/// `clipnorm=...`: each gradient by its own norm, to be used with [`Scope::per_tensor`](crate::Scope::per_tensor).
///
/// ```text
/// Keras    g * clipnorm / max(N, clipnorm)     N of the tensor, if clipnorm > 0
/// here     g * (clipnorm / N)   where N > clipnorm, unless clipnorm is 0
/// ```
///
/// A norm that is NaN makes the tensor NaN; one that is infinite makes its finite elements 0 and its infinite ones NaN.
/// Other tensors are not concerned.
///
/// Besides [what differs everywhere](super#what-differs-on-purpose-everywhere): `g * clipnorm` may overflow there, also
/// where nothing is to be clipped (f16 200 with threshold 1000 becomes Inf, and with an infinite one all become NaN).
///
/// ```
/// use gradclip::{compat, cpu, Scope};
/// let mut grads = [vec![3.0f32, 4.0], vec![0.5]];
/// cpu::clip_grad_norm_by(&mut grads, &Scope::per_tensor(), compat::keras::clipnorm(1.0))?;
/// assert_eq!(grads, [vec![0.6, 0.8], vec![0.5]]);
/// # Ok::<(), gradclip::Error>(())
/// ```
#[must_use]
pub const fn clipnorm(max_norm: f64) -> ClipNorm {
    ClipNorm::new(off_at_zero(max_norm)).nonfinite(NonFinite::Propagate)
}

/// `clipvalue=...`: `min(max(g, -clipvalue), clipvalue)`, and NaN stays NaN; so it is here. 0 leaves everything as it
/// is. On a CPU, TensorFlow takes subnormal gradients for 0.
#[must_use]
pub const fn clipvalue(clip_value: f64) -> ClipValue {
    ClipValue::new(off_at_zero(clip_value))
}
