//! TensorFlow 2.21.0, `tensorflow/python/ops/clip_ops.py`.

use crate::options::{ClipNorm, ClipValue, NonFinite};

/// `tf.clip_by_global_norm(t_list, clip_norm)`.
///
/// ```text
/// TensorFlow    g * (clip_norm * min(1 / N, 1 / clip_norm) + (N - N))
/// here          g * (clip_norm / N)   where N > clip_norm
/// ```
///
/// A norm that is NaN makes every gradient NaN, in both. **One that is infinite makes every gradient NaN there; here
/// finite gradients become 0 and infinite ones NaN** ([`NonFinite::Propagate`]): there is no policy for it. The report
/// says which it was.
///
/// Besides [what differs everywhere](super#what-differs-on-purpose-everywhere): finite gradients whose squares overflow
/// become NaN there; gradients within the threshold are multiplied by `clip_norm * (1 / clip_norm)`, in f32 not 1 for
/// some thresholds (41, 47, 55); an infinite `clip_norm` makes NaN there (`inf * 0`), and so does 0 where the norm is
/// 0; a negative one changes nothing there where `N` is positive. A norm that is known already (`use_norm`) is for
/// [`clip_with_norm`](crate::cpu::clip_with_norm).
///
/// ```
/// use gradclip::{compat, cpu};
/// let mut grads = [[3.0f32, 4.0]];
/// cpu::clip_grad_norm(&mut grads, compat::tensorflow::clip_by_global_norm(1.0))?;
/// assert_eq!(grads, [[0.6, 0.8]]);
/// # Ok::<(), gradclip::Error>(())
/// ```
#[must_use]
pub const fn clip_by_global_norm(clip_norm: f64) -> ClipNorm {
    ClipNorm::new(clip_norm).nonfinite(NonFinite::Propagate)
}

/// `tf.clip_by_norm(t, clip_norm)`, to be used with [`Scope::per_tensor`](crate::Scope::per_tensor).
///
/// ```text
/// TensorFlow    g * clip_norm / max(N, clip_norm)     N of the tensor
/// here          g * (clip_norm / N)   where N > clip_norm
/// ```
///
/// A norm that is NaN makes the tensor NaN; one that is infinite makes its finite elements 0 and its infinite ones NaN.
/// Other tensors are not concerned. `axes` of all dimensions but the first are [`Scope::rows`](crate::Scope::rows);
/// others are not part of the preset.
///
/// Besides [what differs everywhere](super#what-differs-on-purpose-everywhere): `g * clip_norm` may overflow there,
/// also where nothing is to be clipped (f16 200 with threshold 1000 becomes Inf); an infinite `clip_norm` makes NaN
/// there (`inf / inf`); a negative one is 0 there.
#[must_use]
pub const fn clip_by_norm(clip_norm: f64) -> ClipNorm {
    ClipNorm::new(clip_norm).nonfinite(NonFinite::Propagate)
}

/// `tf.clip_by_value(t, clip_value_min, clip_value_max)`: `max(min(g, clip_value_max), clip_value_min)`, and NaN stays
/// NaN. So it is here, with numbers for bounds; it is [`ClipValue::between`].
///
/// Besides what differs everywhere: bounds that cross are an error here, and give `clip_value_min` there; on a CPU,
/// TensorFlow takes subnormal gradients for 0.
#[must_use]
pub const fn clip_by_value(clip_value_min: f64, clip_value_max: f64) -> ClipValue {
    ClipValue::between(clip_value_min, clip_value_max)
}
