//! Options that stand for the clipping of other libraries, under the names it has there.
//!
//! Each function takes what its original takes and returns a [`ClipNorm`] or a [`ClipValue`], for any verb of any back
//! end. Where the original clips each tensor by itself, pass [`Scope::per_tensor`](crate::Scope::per_tensor) too.
//!
//! ```
//! use gradclip::{compat, cpu, Scope};
//! let mut grads = [vec![3.0f32, 4.0], vec![12.0]];
//! cpu::clip_grad_norm(&mut grads, compat::torch::clip_grad_norm(6.5))?;
//! assert_eq!(grads, [vec![1.4999999, 1.9999999], vec![5.9999995]]);
//!
//! cpu::clip_grad_norm_by(&mut grads, &Scope::per_tensor(), compat::keras::clipnorm(1.25))?;
//! assert_eq!(grads[1], [1.25]);
//! cpu::clip_grad_value(&mut grads, compat::optax::clip(0.5))?;
//! assert_eq!(grads[1], [0.5]);
//! # Ok::<(), gradclip::Error>(())
//! ```
//!
//! | from | function | clips | `eps` | NaN, Inf | 0 |
//! |---|---|---|---|---|---|
//! | PyTorch 2.11.0 | [`torch::clip_grad_norm`] | by global norm | 1e-6 | propagate | all become 0 |
//! | | [`torch::clip_grad_value`] | by value | | | all become 0 |
//! | optax 0.2.8 | [`optax::clip_by_global_norm`] | by global norm | 0 | propagate | all become 0 |
//! | | [`optax::clip_by_block_rms`] | each tensor by its root mean square | 0 | propagate | all become 0 |
//! | | [`optax::clip`] | by value | | | all become 0 |
//! | TensorFlow 2.21.0 | [`tensorflow::clip_by_global_norm`] | by global norm | 0 | propagate | all become 0 |
//! | | [`tensorflow::clip_by_norm`] | each tensor by its norm | 0 | propagate | all become 0 |
//! | | [`tensorflow::clip_by_value`] | by value | | | |
//! | Keras 3.15.1 | [`keras::global_clipnorm`] | by global norm | 0 | propagate | off |
//! | | [`keras::clipnorm`] | each tensor by its norm | 0 | propagate | off |
//! | | [`keras::clipvalue`] | by value | | | off |
//! | Megatron-LM core 0.16.1 | [`megatron::clip_grad`] | by global norm | 1e-6 | skip | off |
//! | DeepSpeed 0.19.8 | [`deepspeed::gradient_clipping`] | by global norm | 1e-6 | skip | off |
//! | burn 0.22.1 | [`burn::norm`] | each tensor by its norm | 0 | propagate | all become 0 |
//! | | [`burn::value`] | by value | | | all become 0 |
//!
//! "Off" is an infinite threshold: the norm is reported, and nothing written. Propagate and skip are those of
//! [`NonFinite`]. A preset is a start: `compat::torch::clip_grad_norm(1.0).nonfinite(NonFinite::Skip)`.
//!
//! # What differs on purpose, everywhere
//!
//! A preset has the formula, the threshold's meaning and the policy of its original, in the arithmetic of this crate:
//!
//! * The norm of finite gradients is right where the original's is not: squares that overflow (f32 1e20, f16 300) or
//!   vanish (f32 1e-30) make most originals' norm infinite or 0, and the gradients 0.
//! * Norm and coefficient are f64, not of the gradients' type, and each element is rounded once. Types can be mixed.
//! * Gradients within the threshold are not written, so they keep their bits. Most originals multiply them by 1, or by
//!   something near.
//! * A zero norm divides nothing: zeros stay, also with threshold 0, where optax, TensorFlow and f16 in PyTorch make
//!   NaN.
//! * A negative or NaN threshold is an error. Originals flip the signs, switch off, or make NaN.
//! * An infinite threshold only measures, also where there is a NaN or an Inf.
//! * Empty lists and empty tensors are fine everywhere.
//! * Value clipping keeps the bits of a NaN, and of all that is within the bounds.
//!
//! The versions above are those that were run, on the CPU, for the tests: `tests/golden/PRESETS.md` lists each case in
//! which an original differs from its preset.
//!
//! [`ClipNorm`]: crate::ClipNorm
//! [`ClipValue`]: crate::ClipValue
//! [`NonFinite`]: crate::NonFinite

pub mod burn;
pub mod deepspeed;
pub mod keras;
pub mod megatron;
pub mod optax;
pub mod tensorflow;
pub mod torch;

/// The threshold of a library where 0 says "do not clip". (By its bits, as the caller may have unmasked the exceptions
/// of arithmetic.)
const fn off_at_zero(threshold: f64) -> f64 {
    if threshold.to_bits() << 1 == 0 {
        f64::INFINITY
    } else {
        threshold
    }
}
