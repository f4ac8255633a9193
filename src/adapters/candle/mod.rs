//! Clipping the gradients of candle variables, in the [`GradStore`] that `backward` returns.
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//!
//! # fn main() -> candle_core::Result<()> {
//! let weight = Var::new(&[3.0f32, 4.0], &Device::Cpu)?;
//! let loss = (weight.as_tensor().sqr()? * 0.5)?.sum_all()?;
//!
//! let mut grads = loss.backward()?;
//! let clipped = gradclip::candle::clip_grad_norm(&[weight.clone()], &mut grads, 1.0)?;
//! // optimizer.step(&grads)?;
//!
//! assert_eq!(clipped.wait()?.total_norm, 5.0);
//! assert_eq!(grads.get(&weight).unwrap().to_vec1::<f32>()?, [0.6, 0.8]);
//! # Ok(())
//! # }
//! ```
//!
//! # What is clipped
//!
//! Only the gradients of the given variables are touched: a `GradStore` also holds those of other inputs. A variable
//! without a gradient is skipped, and a gradient that two variables share is clipped once. f32, f64, f16 and bf16, mixed
//! as they come; any other dtype that candle has is an error. Indices in reports and errors are those of the variables.
//!
//! Gradients are clipped in place, as the optimizer will read them: whatever shares their storage sees it, be it a clone
//! of the gradient that was taken before (`copy()` makes one that does not), the tensor behind a view, or, if that was
//! inserted as the gradient, the variable. What `backward` makes shares nothing. A gradient that is not contiguous is
//! replaced in the store by a contiguous copy, which shares nothing either; such a view is not compared with others for
//! overlap.
//!
//! Two variables that share one gradient count once in the norm; PyTorch, which has a gradient for each, counts two.
//!
//! Not here: running norms ([`cpu::RunningNorm`](crate::cpu::RunningNorm)), as candle gives all gradients at once, when
//! `backward` returns. Norms over several ranks and clipping out of place are in [`cpu`](crate::cpu) and `cuda`.
//!
//! # CUDA tensors (feature `candle-cuda`)
//!
//! Everything is enqueued on the stream of the tensors' `CudaDevice`, in the calling thread, and nothing waits: the
//! report stays on the device until [`Deferred::wait`]. candle's own default is the stream of the calling thread, so call
//! from the thread that runs `backward` and `step`. A clipper is kept for each thread and stream;
//! [`cuda::release_thread_clippers`] frees them.
//!
//! | per call | launches | copies | waits | allocations |
//! |---|---|---|---|---|
//! | CPU tensors | | | | host only |
//! | CUDA tensors, `clip_grad_norm`, `clip_grad_norm_by` / each of the others | 3 / 2 | of the table of tensors, if they are more than 160 and not where they were at the last call; with a scope of its tables, if list or scope are not those of the last such call | 0 | 0 once a list of that size has been seen |
//! | each gradient that is not contiguous | 1 more, candle's | of that gradient | 0 | 1, candle's |
//! | [`Deferred::wait`] | 0 | 72 bytes | 1 | 0 |
//! | [`DeferredScoped::wait`](crate::DeferredScoped::wait) | 0 | 64 bytes, 72 for each group, with telemetry 40 for each tensor | 1 | host only |
//!
//! [`Deferred::wait`]: crate::Deferred::wait
#![cfg_attr(feature = "cuda", doc = "[`cuda::release_thread_clippers`]: crate::cuda::release_thread_clippers")]
#![cfg_attr(not(feature = "cuda"), doc = "[`cuda::release_thread_clippers`]: crate#features")]

mod grads;
mod locks;
mod on_cpu;
#[cfg(feature = "candle-cuda")]
mod on_cuda;

use super::deferred::{Deferred, DeferredScoped};
use crate::error::{Error, Result};
use crate::options::{ClipNorm, ClipValue, NormType};
use crate::report::{NormReport, ValueReport};
use crate::scope::Scope;
use crate::total_norm::TotalNorm;
use candle_core::backprop::GradStore;
use candle_core::Var;
use grads::{GradList, Home};

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        Self::wrap(error)
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Framework(error.to_string())
    }
}

/// Norm over the gradients of `vars`; see [`cpu::total_norm`](crate::cpu::total_norm). A gradient that is not contiguous
/// is read by way of a contiguous copy.
///
/// # Errors
/// Gradients on more than one device, or of another dtype; gradients that overlap without being the same. Of CUDA
/// tensors also those of [`cuda::Clipper`].
///
#[cfg_attr(feature = "cuda", doc = "[`cuda::Clipper`]: crate::cuda::Clipper")]
#[cfg_attr(not(feature = "cuda"), doc = "[`cuda::Clipper`]: crate#features")]
pub fn total_norm(vars: &[Var], grads: &GradStore, norm_type: NormType) -> Result<Deferred<NormReport>> {
    let list = GradList::gather(vars, grads)?;
    match list.home() {
        Home::Cpu => on_cpu::total_norm(list, norm_type),
        #[cfg(feature = "candle-cuda")]
        Home::Cuda(stream) => on_cuda::total_norm(list, &stream, norm_type),
    }
}

/// Scales the gradients of `vars` so that their norm together is at most `max_norm`, up to the rounding of each element; see
/// [`cpu::clip_grad_norm`](crate::cpu::clip_grad_norm).
///
/// # Errors
/// As [`total_norm`]; a threshold that is negative or NaN, an order that is not positive; a norm that is not finite, if the policy is
/// [`NonFinite::Error`](crate::NonFinite::Error). No value has changed then.
pub fn clip_grad_norm(vars: &[Var], grads: &mut GradStore, clip: impl Into<ClipNorm>) -> Result<Deferred<NormReport>> {
    let clip = clip.into();
    clip.validate()?;
    let list = GradList::gather(vars, grads)?;
    match list.home() {
        Home::Cpu => on_cpu::clip_grad_norm(list, vars, grads, &clip),
        #[cfg(feature = "candle-cuda")]
        Home::Cuda(stream) => on_cuda::clip_grad_norm(list, &stream, vars, grads, clip),
    }
}

/// Scales the gradients of `vars` by a norm that the caller has; see [`cpu::clip_with_norm`](crate::cpu::clip_with_norm).
/// The norm is a number, or the report of an earlier call for tensors in the same place: of CUDA tensors it stays on the
/// device.
///
/// # Errors
/// As [`clip_grad_norm`]; a norm that is negative. Of CUDA tensors, [`Error::NormOutOfReach`] for the report of a call
/// in another thread or on another stream.
///
/// ```
/// use candle_core::{Device, Var};
/// use gradclip::NormType;
///
/// # fn main() -> candle_core::Result<()> {
/// let (weight, bias) = (Var::new(&[3.0f32], &Device::Cpu)?, Var::new(&[4.0f32], &Device::Cpu)?);
/// let loss = ((weight.as_tensor().sqr()? + bias.as_tensor().sqr()?)? * 0.5)?.sum_all()?;
/// let mut grads = loss.backward()?;
/// let norm = gradclip::candle::total_norm(&[weight.clone(), bias], &grads, NormType::L2)?;
/// gradclip::candle::clip_with_norm(&[weight.clone()], &mut grads, &norm, 1.0)?; // one of them, by the norm of both
/// assert_eq!(grads.get(&weight).unwrap().to_vec1::<f32>()?, [0.6]);
/// # Ok(())
/// # }
/// ```
pub fn clip_with_norm<'a>(
    vars: &[Var],
    grads: &mut GradStore,
    total_norm: impl Into<TotalNorm<'a>>,
    clip: impl Into<ClipNorm>,
) -> Result<Deferred<NormReport>> {
    let (total_norm, clip) = (total_norm.into(), clip.into());
    clip.validate()?;
    let list = GradList::gather(vars, grads)?;
    match list.home() {
        Home::Cpu => on_cpu::clip_with_norm(list, vars, grads, total_norm, &clip),
        #[cfg(feature = "candle-cuda")]
        Home::Cuda(stream) => on_cuda::clip_with_norm(list, &stream, vars, grads, total_norm, clip),
    }
}

/// What [`clip_grad_norm`] would multiply the gradients of `vars` by, for an optimizer that multiplies them itself; see
/// [`cpu::clip_coef`](crate::cpu::clip_coef). Nothing is written. Of CUDA tensors the factor stays on the device:
/// [`Deferred::pending`](crate::Deferred) has its address.
///
/// # Errors
/// As [`clip_grad_norm`].
pub fn clip_coef(vars: &[Var], grads: &GradStore, clip: impl Into<ClipNorm>) -> Result<Deferred<NormReport>> {
    let clip = clip.into();
    clip.validate()?;
    let list = GradList::gather(vars, grads)?;
    match list.home() {
        Home::Cpu => on_cpu::clip_coef(list, &clip),
        #[cfg(feature = "candle-cuda")]
        Home::Cuda(stream) => on_cuda::clip_coef(list, &stream, clip),
    }
}

/// Limits each element of the gradients of `vars`; see [`cpu::clip_grad_value`](crate::cpu::clip_grad_value).
///
/// # Errors
/// As [`total_norm`]; a value that is negative or NaN, or bounds with `lo > hi`. No value has changed then.
pub fn clip_grad_value(
    vars: &[Var],
    grads: &mut GradStore,
    clip: impl Into<ClipValue>,
) -> Result<Deferred<ValueReport>> {
    let clip = clip.into();
    clip.validate()?;
    let list = GradList::gather(vars, grads)?;
    match list.home() {
        Home::Cpu => on_cpu::clip_grad_value(list, vars, grads, &clip),
        #[cfg(feature = "candle-cuda")]
        Home::Cuda(stream) => on_cuda::clip_grad_value(list, &stream, vars, grads, clip),
    }
}

/// The norm of each group of a [`Scope`]; see [`cpu::norms_by`](crate::cpu::norms_by). The lists of the scope and of the
/// report are as for [`clip_grad_norm_by`].
///
/// # Errors
/// As [`total_norm`], and a scope that does not fit the variables.
///
/// ```
/// # use candle_core::{DType, Device, Var};
/// # use gradclip::{NormType, Scope};
/// # fn main() -> candle_core::Result<()> {
/// let weight = Var::new(&[[3.0f32, 4.0], [0.0, -2.0]], &Device::Cpu)?;
/// let unused = Var::zeros(7, DType::F32, &Device::Cpu)?;
/// let grads = (weight.as_tensor().sqr()? * 0.5)?.sum_all()?.backward()?;
/// let scope = Scope::leading_dimension().telemetry();
/// let report = gradclip::candle::norms_by(&[unused, weight], &grads, &scope, NormType::L2)?.wait()?;
/// let norms: Vec<f64> = report.of_tensor(1).unwrap().iter().map(|row| row.total_norm).collect();
/// assert_eq!((norms, report.tensors[1].zeros), (vec![5.0, 2.0], 1));
/// # Ok(())
/// # }
/// ```
pub fn norms_by(vars: &[Var], grads: &GradStore, scope: &Scope<'_>, norm_type: NormType) -> Result<DeferredScoped> {
    let list = GradList::gather(vars, grads)?;
    let rows = leading_dimensions(vars, grads);
    let scope = scope.with_leading_dimensions(&rows);
    match list.home() {
        Home::Cpu => on_cpu::norms_by(&list, &rows, &scope, norm_type),
        #[cfg(feature = "candle-cuda")]
        Home::Cuda(stream) => on_cuda::norms_by(&list, &stream, vars.len(), &scope, norm_type),
    }
}

/// Clips the gradients of `vars` by the norm of each group of a [`Scope`]: each gradient by its own, named groups, each
/// row; see [`cpu::clip_grad_norm_by`](crate::cpu::clip_grad_norm_by).
///
/// The lists of the scope and of the report have an entry for each variable, whether it has a gradient or not: one that
/// has none, or shares that of one before it, counts as one without elements, of the variable's shape.
/// [`Scope::leading_dimension`] takes the rows from the shapes.
///
/// # Errors
/// As [`clip_grad_norm`], and a scope that does not fit the variables. No value has changed then.
///
/// ```
/// # use candle_core::{DType, Device, Var};
/// # use gradclip::Scope;
/// # fn main() -> candle_core::Result<()> {
/// let (encoder, head) = (Var::new(&[3.0f32, 4.0], &Device::Cpu)?, Var::new(&[30.0f32], &Device::Cpu)?);
/// let loss = ((encoder.as_tensor().sqr()?.sum_all()? + head.as_tensor().sqr()?.sum_all()?)? * 0.5)?;
/// let mut grads = loss.backward()?;
/// let scope = Scope::groups(&[0, 1]).max_norms(&[Some(1.0), None]); // the head is only measured
/// let vars = [encoder, head];
/// let report = gradclip::candle::clip_grad_norm_by(&vars, &mut grads, &scope, 1.0)?.wait()?;
/// assert_eq!((report.groups[0].total_norm, report.groups[1].total_norm), (5.0, 30.0));
/// assert_eq!(grads.get(&vars[0]).unwrap().to_vec1::<f32>()?, [0.6, 0.8]);
/// assert_eq!(grads.get(&vars[1]).unwrap().to_vec1::<f32>()?, [30.0]);
/// # Ok(())
/// # }
/// ```
pub fn clip_grad_norm_by(
    vars: &[Var],
    grads: &mut GradStore,
    scope: &Scope<'_>,
    clip: impl Into<ClipNorm>,
) -> Result<DeferredScoped> {
    let clip = clip.into();
    clip.validate()?;
    let list = GradList::gather(vars, grads)?;
    let rows = leading_dimensions(vars, grads);
    let scope = scope.with_leading_dimensions(&rows);
    match list.home() {
        Home::Cpu => on_cpu::clip_grad_norm_by(&list, &rows, vars, grads, &scope, &clip),
        #[cfg(feature = "candle-cuda")]
        Home::Cuda(stream) => on_cuda::clip_grad_norm_by(&list, &stream, vars, grads, &scope, clip),
    }
}

/// What [`clip_grad_norm_by`] would multiply each group by, for an optimizer that multiplies the gradients itself; see
/// [`cpu::clip_coef_by`](crate::cpu::clip_coef_by). Nothing is written. The lists of the scope and of the report are
/// as for [`clip_grad_norm_by`], and each group's factor is its [`multiplier`](NormReport::multiplier). A variable
/// that shares the gradient of one before it has the factor of an empty tensor in the report: the one to use is that
/// of the other.
///
/// Of CUDA tensors the factors stay on the device: [`DeferredScoped::pending`](crate::DeferredScoped) has their
/// addresses, until the next scoped call of this thread on the same stream, and only while this thread's clipper
/// ([`cuda::release_thread_clippers`]) or the result is kept.
///
/// Cost: reads each gradient once, writes nothing; of CUDA tensors two launches for any number of groups, no wait.
///
/// # Errors
/// As [`clip_grad_norm_by`].
///
/// ```
/// # use candle_core::{Device, Var};
/// # use gradclip::Scope;
/// # fn main() -> candle_core::Result<()> {
/// let vars = [Var::new(&[3.0f32, 4.0], &Device::Cpu)?, Var::new(&[0.5f32], &Device::Cpu)?];
/// let loss = ((vars[0].as_tensor().sqr()?.sum_all()? + vars[1].as_tensor().sqr()?.sum_all()?)? * 0.5)?;
/// let grads = loss.backward()?;
/// let report = gradclip::candle::clip_coef_by(&vars, &grads, &Scope::per_tensor(), 2.5)?.wait()?;
/// for (var, group) in vars.iter().zip(&report.groups) {
///     let step = (grads.get(var).unwrap() * (0.5 * group.multiplier))?;
///     var.set(&(var.as_tensor() - step)?)?;
/// }
/// assert_eq!((vars[0].to_vec1::<f32>()?, vars[1].to_vec1::<f32>()?), (vec![2.25, 3.0], vec![0.25]));
/// # Ok(())
/// # }
/// ```
///
#[cfg_attr(feature = "cuda", doc = "[`cuda::release_thread_clippers`]: crate::cuda::release_thread_clippers")]
#[cfg_attr(not(feature = "cuda"), doc = "[`cuda::release_thread_clippers`]: crate#features")]
pub fn clip_coef_by(
    vars: &[Var],
    grads: &GradStore,
    scope: &Scope<'_>,
    clip: impl Into<ClipNorm>,
) -> Result<DeferredScoped> {
    let clip = clip.into();
    clip.validate()?;
    let list = GradList::gather(vars, grads)?;
    let rows = leading_dimensions(vars, grads);
    let scope = scope.with_leading_dimensions(&rows);
    match list.home() {
        Home::Cpu => on_cpu::clip_coef_by(&list, &rows, &scope, &clip),
        #[cfg(feature = "candle-cuda")]
        Home::Cuda(stream) => on_cuda::clip_coef_by(&list, &stream, vars.len(), &scope, clip),
    }
}

/// Limits each element of the gradients of `vars`, and counts for each group of a [`Scope`] how many were outside the
/// bounds; see [`cpu::clip_grad_value_by`](crate::cpu::clip_grad_value_by). Elements become what [`clip_grad_value`]
/// makes of them: NaN is kept and counted, an Inf becomes a bound. The lists of the scope and of the report are as for
/// [`clip_grad_norm_by`]; a variable without a gradient has no elements.
///
/// Cost: that of [`clip_grad_value`]; of CUDA tensors two launches for any number of groups, no wait.
///
/// # Errors
/// As [`clip_grad_value`], and a scope that does not fit the variables; [`Error::ScopeForNorms`] for one with
/// [`max_norms`](Scope::max_norms) or [`telemetry`](Scope::telemetry). No value has changed then.
///
/// ```
/// # use candle_core::{Device, Var};
/// # use gradclip::Scope;
/// # fn main() -> candle_core::Result<()> {
/// let vars = [Var::new(&[0.25f32, -4.0], &Device::Cpu)?, Var::new(&[0.5f32], &Device::Cpu)?];
/// let loss = ((vars[0].as_tensor().sqr()?.sum_all()? + vars[1].as_tensor().sqr()?.sum_all()?)? * 0.5)?;
/// let mut grads = loss.backward()?;
/// let report = gradclip::candle::clip_grad_value_by(&vars, &mut grads, &Scope::per_tensor(), 0.5)?.wait()?;
/// let fractions: Vec<f64> = report.groups.iter().map(|tensor| tensor.clipped_fraction()).collect();
/// assert_eq!(fractions, [0.5, 0.0]);
/// assert_eq!(grads.get(&vars[0]).unwrap().to_vec1::<f32>()?, [0.25, -0.5]);
/// # Ok(())
/// # }
/// ```
pub fn clip_grad_value_by(
    vars: &[Var],
    grads: &mut GradStore,
    scope: &Scope<'_>,
    clip: impl Into<ClipValue>,
) -> Result<DeferredScoped<ValueReport>> {
    let clip = clip.into();
    clip.validate()?;
    scope.refuse_norms()?;
    let list = GradList::gather(vars, grads)?;
    let rows = leading_dimensions(vars, grads);
    let scope = scope.with_leading_dimensions(&rows);
    match list.home() {
        Home::Cpu => on_cpu::clip_grad_value_by(&list, &rows, vars, grads, &scope, &clip),
        #[cfg(feature = "candle-cuda")]
        Home::Cuda(stream) => on_cuda::clip_grad_value_by(&list, &stream, vars, grads, &scope, clip),
    }
}

/// Rows of each gradient, or of the variable that has none. A tensor without dimensions is one row.
fn leading_dimensions(vars: &[Var], grads: &GradStore) -> Vec<usize> {
    let of = |var: &Var| grads.get(var).unwrap_or(var.as_tensor()).dims().first().copied().unwrap_or(1);
    vars.iter().map(of).collect()
}
