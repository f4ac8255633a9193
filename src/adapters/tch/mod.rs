//! Clipping the gradients of tch tensors, where `backward` has left them.
//!
//! ```
//! use tch::nn::{self, OptimizerConfig};
//! use tch::{Device, Kind, Tensor};
//!
//! # fn main() -> tch::Result<()> {
//! let vars = nn::VarStore::new(Device::Cpu);
//! let weight = vars.root().f_var("weight", &[2], nn::Init::Const(0.0))?;
//! let mut optimizer = nn::Sgd::default().build(&vars, 1.0)?;
//!
//! let target = Tensor::from_slice(&[3.0f32, 4.0]);
//! let loss = (&weight - target).square().sum(Kind::Float) * 0.5;
//! optimizer.zero_grad();
//! loss.backward();
//! let clipped = gradclip::tch::clip_grad_norm(&vars.trainable_variables(), 1.0)?;
//! optimizer.step();
//!
//! assert_eq!(clipped.wait()?.total_norm, 5.0);
//! assert!(weight.allclose(&Tensor::from_slice(&[0.6f32, 0.8]), 1e-7, 0.0, false));
//! # Ok(())
//! # }
//! ```
//!
//! # What is clipped
//!
//! The `grad()` of each of the given parameters: tensors, or references to them. One without a gradient is skipped; no
//! gradients, or no parameters, have norm 0. A gradient that two parameters share is clipped once. `Float`, `Double`,
//! `Half` and `BFloat16`, mixed as they come; any other kind, and any layout that is not strided (sparse, MKL-DNN), is
//! an error. All gradients have to be on one device. Indices in reports and errors are those of the parameters.
//!
//! Gradients are clipped in place. The order of dimensions does not matter: one that is transposed or channels-last, as
//! the gradient of such a parameter is, is read and written where it is, and the index of an element, which fixes the
//! order of additions, is its place in memory. Two kinds of gradients are clipped in a contiguous copy, which is copied
//! back if it was written (on a GPU, always): views with gaps, and gradients that autograd tracks (`create_graph`), so
//! that it notices the change. For the overlap check a view with gaps counts as all the memory between its ends.
//!
//! As with any operation of libtorch in place, no other thread may use the same gradients meanwhile.
//!
//! Not here: running norms ([`cpu::RunningNorm`](crate::cpu::RunningNorm)), as tch gives all gradients at once, when
//! `backward` returns. Norms over several ranks and clipping out of place are in [`cpu`](crate::cpu) and `cuda`.
//!
//! # CUDA tensors (feature `cuda`)
//!
//! Everything is enqueued on libtorch's current stream of the gradients' device, and nothing waits: the report stays on
//! the device until [`Deferred::wait`]. Which stream that is, `libtorch_cuda.so` says, which is in the process wherever
//! a CUDA tensor is ([where no tensor gets to a GPU](#if-libtorch-finds-no-cuda)); if it does not, the call
//! is an error. A clipper is kept for each thread and stream;
//! [`cuda::release_thread_clippers`] frees them, until when a stream that libtorch did not make itself has to live. No
//! GPU has run this yet.
//!
//! | per call | launches | copies | waits | allocations |
//! |---|---|---|---|---|
//! | CPU tensors | | | | host only |
//! | CUDA tensors, `clip_grad_norm`, `clip_grad_norm_by` / each of the others | 3 / 2 | of the table of tensors, if they are more than 160 and not where they were at the last call; with a scope of its tables, if list or scope are not those of the last such call | 0 | host only, once a list of that size has been seen |
//! | each gradient that has gaps, or that autograd tracks | 2 more, libtorch's; where nothing is written 1 | of that gradient | 0 | 1, libtorch's |
//! | [`Deferred::wait`] | 0 | 72 bytes | 1 | 0 |
//! | [`DeferredScoped::wait`](crate::DeferredScoped::wait) | 0 | 64 bytes, 72 for each group, with telemetry 40 for each tensor | 1 | host only |
//!
//! tch's own `Optimizer::clip_grad_norm` launches a norm and a product for each tensor and waits for the norm. It
//! panics where there are no gradients, and returns nothing.
//!
//! # If libtorch finds no CUDA
//!
//! The CUDA part of libtorch is a library of its own, `libtorch_cuda.so`, which makes itself known to libtorch when it is
//! loaded. A Rust program uses none of its symbols, so the linker drops it (`--as-needed`): `readelf -d program` lists
//! `libtorch_cpu.so` and `libc10.so`, and no `libtorch_cuda.so`. And libtorch asks only once whether there is CUDA: at the
//! first `backward`, even of CPU tensors, at `tch::manual_seed`, or at `tch::Cuda::is_available`. If the library is not
//! loaded by then, libtorch has no CUDA for the rest of the process, on any machine. `tch::Cuda::is_available()` is
//! false, and a tensor that is moved to `Device::Cuda(0)` gives an error of libtorch's: "Could not run ... with arguments
//! from the 'CUDA' backend", or, if the library was loaded too late, "Cannot initialize CUDA without ATen_cuda library".
//!
//! Each of these loads it in time:
//!
//! * [`load_cuda`], called first in `main`.
//! * The build script of the program. (That of a library, such as this one, cannot do it.)
//!
//!   ```no_run
//!   println!("cargo:rustc-link-arg=-Wl,--no-as-needed");
//!   println!("cargo:rustc-link-arg=-ltorch_cuda"); // or -ltorch, which needs libtorch_cuda.so
//!   ```
//!
//! * The environment, for a program that is built already: `LD_PRELOAD=/path/to/libtorch_cuda.so`.
//!
//! Tried with libtorch 2.13 and its CUDA library, on Linux, without a GPU.
//!
//! [`Deferred::wait`]: crate::Deferred::wait
#![cfg_attr(feature = "cuda", doc = "[`cuda::release_thread_clippers`]: crate::cuda::release_thread_clippers")]
#![cfg_attr(not(feature = "cuda"), doc = "[`cuda::release_thread_clippers`]: crate#features")]
#![cfg_attr(not(feature = "cuda"), doc = "[`load_cuda`]: crate#features")]

mod grads;
#[cfg(feature = "cuda")]
mod loading;
mod on_cpu;
#[cfg(feature = "cuda")]
mod on_cuda;

use super::deferred::{Deferred, DeferredScoped};
use crate::error::{Error, Result};
use crate::options::{ClipNorm, ClipValue, NormType};
use crate::report::{NormReport, ValueReport};
use crate::scope::{Kind, Scope};
use crate::total_norm::TotalNorm;
use ::tch::{TchError, Tensor};
use grads::{GradList, Home, Order};
#[cfg(feature = "cuda")]
pub use loading::load_cuda;
use std::borrow::Borrow;

/// As the one variant of tch's that carries another error: its text is that error's, and `into_inner` of the
/// [`std::io::Error`] gives it back.
impl From<Error> for TchError {
    fn from(error: Error) -> Self {
        Self::Io(std::io::Error::other(error))
    }
}

/// Norm over the gradients of `params`; see [`cpu::total_norm`](crate::cpu::total_norm).
///
/// # Errors
/// Gradients on more than one device, of another kind or layout; gradients that overlap without being the same. Of CUDA
/// tensors also those of [`cuda::Clipper`], and [`Error::Framework`] if libtorch does not say which stream is current.
///
/// ```
/// use gradclip::NormType;
/// use tch::{Device, Kind, Tensor};
///
/// # fn main() -> tch::Result<()> {
/// let weight = Tensor::from_slice(&[3.0f32, 4.0]).set_requires_grad(true);
/// let unused = Tensor::zeros([1000], (Kind::Float, Device::Cpu)).set_requires_grad(true);
/// (weight.square().sum(Kind::Float) * 0.5).backward();
/// let report = gradclip::tch::total_norm(&[&weight, &unused], NormType::L1)?.wait()?;
/// assert_eq!(report.total_norm, 7.0);
/// # Ok(())
/// # }
/// ```
///
#[cfg_attr(feature = "cuda", doc = "[`cuda::Clipper`]: crate::cuda::Clipper")]
#[cfg_attr(not(feature = "cuda"), doc = "[`cuda::Clipper`]: crate#features")]
pub fn total_norm<T: Borrow<Tensor>>(params: &[T], norm_type: NormType) -> Result<Deferred<NormReport>> {
    let list = GradList::gather(params, Order::Any)?;
    match list.home() {
        Home::Cpu => on_cpu::total_norm(list, norm_type),
        #[cfg(feature = "cuda")]
        Home::Cuda(ordinal) => on_cuda::total_norm(list, ordinal, norm_type),
    }
}

/// Scales the gradients of `params` so that their norm together is at most `max_norm`; see
/// [`cpu::clip_grad_norm`](crate::cpu::clip_grad_norm).
///
/// # Errors
/// As [`total_norm`]; a threshold that is negative or NaN, an order that is not positive; a norm that is not finite, if the policy is
/// [`NonFinite::Error`](crate::NonFinite::Error). No value has changed then.
///
/// ```
/// use gradclip::{ClipNorm, NonFinite};
/// use tch::{Kind, Tensor};
///
/// # fn main() -> tch::Result<()> {
/// let weight = Tensor::from_slice(&[3.0f32, 4.0]).set_requires_grad(true);
/// (weight.square().sum(Kind::Float) * 0.5).backward();
/// let clip = ClipNorm::new(2.5).nonfinite(NonFinite::Error);
/// assert!(gradclip::tch::clip_grad_norm(&[&weight], clip)?.wait()?.written);
/// assert_eq!(Vec::<f32>::try_from(weight.grad())?, [1.5, 2.0]);
/// # Ok(())
/// # }
/// ```
pub fn clip_grad_norm<T: Borrow<Tensor>>(params: &[T], clip: impl Into<ClipNorm>) -> Result<Deferred<NormReport>> {
    let clip = clip.into();
    clip.validate()?;
    let list = GradList::gather(params, Order::Any)?;
    match list.home() {
        Home::Cpu => on_cpu::clip_grad_norm(list, &clip),
        #[cfg(feature = "cuda")]
        Home::Cuda(ordinal) => on_cuda::clip_grad_norm(list, ordinal, clip),
    }
}

/// Scales the gradients of `params` by a norm that the caller has; see
/// [`cpu::clip_with_norm`](crate::cpu::clip_with_norm). The norm is a number, or the report of an earlier call for tensors
/// on the same device: of CUDA tensors it stays there.
///
/// # Errors
/// As [`clip_grad_norm`]; a norm that is negative. Of CUDA tensors, [`Error::NormOutOfReach`] for the report of a call
/// in another thread or on another stream.
///
/// ```
/// use gradclip::NormType;
/// use tch::{Kind, Tensor};
///
/// # fn main() -> tch::Result<()> {
/// let weight = Tensor::from_slice(&[3.0f32]).set_requires_grad(true);
/// let bias = Tensor::from_slice(&[4.0f32]).set_requires_grad(true);
/// ((weight.square() + bias.square()) * 0.5).sum(Kind::Float).backward();
/// let norm = gradclip::tch::total_norm(&[&weight, &bias], NormType::L2)?;
/// gradclip::tch::clip_with_norm(&[&weight], &norm, 1.0)?; // one of them, by the norm of both
/// assert_eq!(Vec::<f32>::try_from(weight.grad())?, [0.6]);
/// # Ok(())
/// # }
/// ```
pub fn clip_with_norm<'a, T: Borrow<Tensor>>(
    params: &[T],
    total_norm: impl Into<TotalNorm<'a>>,
    clip: impl Into<ClipNorm>,
) -> Result<Deferred<NormReport>> {
    let (total_norm, clip) = (total_norm.into(), clip.into());
    clip.validate()?;
    let list = GradList::gather(params, Order::Any)?;
    match list.home() {
        Home::Cpu => on_cpu::clip_with_norm(list, total_norm, &clip),
        #[cfg(feature = "cuda")]
        Home::Cuda(ordinal) => on_cuda::clip_with_norm(list, ordinal, total_norm, clip),
    }
}

/// What [`clip_grad_norm`] would multiply the gradients of `params` by, for an optimizer that multiplies them itself; see
/// [`cpu::clip_coef`](crate::cpu::clip_coef). Nothing is written. Of CUDA tensors the factor stays on the device:
/// [`Deferred::pending`](crate::Deferred) has its address.
///
/// # Errors
/// As [`clip_grad_norm`].
pub fn clip_coef<T: Borrow<Tensor>>(params: &[T], clip: impl Into<ClipNorm>) -> Result<Deferred<NormReport>> {
    let clip = clip.into();
    clip.validate()?;
    let list = GradList::gather(params, Order::Any)?;
    match list.home() {
        Home::Cpu => on_cpu::clip_coef(list, &clip),
        #[cfg(feature = "cuda")]
        Home::Cuda(ordinal) => on_cuda::clip_coef(list, ordinal, clip),
    }
}

/// Limits each element of the gradients of `params`; see [`cpu::clip_grad_value`](crate::cpu::clip_grad_value).
///
/// # Errors
/// As [`total_norm`]; a value that is negative or NaN, or bounds with `lo > hi`. No value has changed then.
///
/// ```
/// use tch::{Kind, Tensor};
///
/// # fn main() -> tch::Result<()> {
/// let weight = Tensor::from_slice(&[0.25f32, -4.0]).set_requires_grad(true);
/// (weight.square().sum(Kind::Float) * 0.5).backward();
/// assert_eq!(gradclip::tch::clip_grad_value(&[&weight], 0.5)?.wait()?.clipped, 1);
/// assert_eq!(Vec::<f32>::try_from(weight.grad())?, [0.25, -0.5]);
/// # Ok(())
/// # }
/// ```
pub fn clip_grad_value<T: Borrow<Tensor>>(params: &[T], clip: impl Into<ClipValue>) -> Result<Deferred<ValueReport>> {
    let clip = clip.into();
    clip.validate()?;
    let list = GradList::gather(params, Order::Any)?;
    match list.home() {
        Home::Cpu => on_cpu::clip_grad_value(list, &clip),
        #[cfg(feature = "cuda")]
        Home::Cuda(ordinal) => on_cuda::clip_grad_value(list, ordinal, clip),
    }
}

/// The norm of each group of a [`Scope`]; see [`cpu::norms_by`](crate::cpu::norms_by). The lists of the scope and of the
/// report are as for [`clip_grad_norm_by`].
///
/// # Errors
/// As [`total_norm`], and a scope that does not fit the parameters.
///
/// ```
/// use gradclip::{NormType, Scope};
/// use tch::{Kind, Tensor};
///
/// # fn main() -> tch::Result<()> {
/// let weight = Tensor::from_slice2(&[[3.0f32, 4.0], [0.0, -2.0]]).set_requires_grad(true);
/// (weight.square().sum(Kind::Float) * 0.5).backward();
/// let scope = Scope::leading_dimension().telemetry();
/// let report = gradclip::tch::norms_by(&[&weight], &scope, NormType::L2)?.wait()?;
/// assert_eq!((report.groups[0].total_norm, report.groups[1].total_norm), (5.0, 2.0));
/// assert_eq!((report.tensors[0].max_abs, report.tensors[0].zeros), (4.0, 1));
/// # Ok(())
/// # }
/// ```
pub fn norms_by<T: Borrow<Tensor>>(params: &[T], scope: &Scope<'_>, norm_type: NormType) -> Result<DeferredScoped> {
    let list = GradList::gather(params, order(scope))?;
    match list.home() {
        Home::Cpu => on_cpu::norms_by(&list, scope, norm_type),
        #[cfg(feature = "cuda")]
        Home::Cuda(ordinal) => on_cuda::norms_by(&list, ordinal, scope, norm_type),
    }
}

/// Clips the gradients of `params` by the norm of each group of a [`Scope`]: each gradient by its own, named groups, each
/// row; see [`cpu::clip_grad_norm_by`](crate::cpu::clip_grad_norm_by).
///
/// The lists of the scope and of the report have an entry for each parameter, whether it has a gradient or not: one that
/// has none, or shares that of one before it, counts as one without elements, of the parameter's shape.
/// [`Scope::leading_dimension`] takes the rows from the shapes. With rows, a gradient in which they do not lie one after
/// the other (transposed; channels-last if they are given by [`Scope::rows`]) is clipped in a contiguous copy, which is
/// copied back.
///
/// # Errors
/// As [`clip_grad_norm`], and a scope that does not fit the parameters. No value has changed then.
///
/// ```
/// use gradclip::Scope;
/// use tch::{Kind, Tensor};
///
/// # fn main() -> tch::Result<()> {
/// let encoder = Tensor::from_slice(&[3.0f32, 4.0]).set_requires_grad(true);
/// let head = Tensor::from_slice(&[30.0f32]).set_requires_grad(true);
/// ((encoder.square().sum(Kind::Float) + head.square().sum(Kind::Float)) * 0.5).backward();
/// let scope = Scope::groups(&[0, 1]).max_norms(&[Some(1.0), None]); // the head is only measured
/// let report = gradclip::tch::clip_grad_norm_by(&[&encoder, &head], &scope, 1.0)?.wait()?;
/// assert_eq!((report.groups[0].total_norm, report.groups[1].total_norm), (5.0, 30.0));
/// assert_eq!(Vec::<f32>::try_from(encoder.grad())?, [0.6, 0.8]);
/// assert_eq!(Vec::<f32>::try_from(head.grad())?, [30.0]);
/// # Ok(())
/// # }
/// ```
pub fn clip_grad_norm_by<T: Borrow<Tensor>>(
    params: &[T],
    scope: &Scope<'_>,
    clip: impl Into<ClipNorm>,
) -> Result<DeferredScoped> {
    let clip = clip.into();
    clip.validate()?;
    let mut list = GradList::gather(params, order(scope))?;
    match list.home() {
        Home::Cpu => on_cpu::clip_grad_norm_by(&mut list, scope, &clip),
        #[cfg(feature = "cuda")]
        Home::Cuda(ordinal) => on_cuda::clip_grad_norm_by(&mut list, ordinal, scope, clip),
    }
}

/// What [`clip_grad_norm_by`] would multiply each group by, for an optimizer that multiplies the gradients itself; see
/// [`cpu::clip_coef_by`](crate::cpu::clip_coef_by). Nothing is written. The lists of the scope and of the report are
/// as for [`clip_grad_norm_by`], and each group's factor is its [`multiplier`](NormReport::multiplier). A parameter
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
/// use gradclip::Scope;
/// use tch::{no_grad, Kind, Tensor};
///
/// # fn main() -> tch::Result<()> {
/// let mut params = [&[3.0f32, 4.0][..], &[0.5]].map(|values| Tensor::from_slice(values).set_requires_grad(true));
/// ((params[0].square().sum(Kind::Float) + params[1].square().sum(Kind::Float)) * 0.5).backward();
/// let report = gradclip::tch::clip_coef_by(&params, &Scope::per_tensor(), 2.5)?.wait()?;
/// for (param, group) in params.iter_mut().zip(&report.groups) {
///     let step = param.grad() * (0.5 * group.multiplier);
///     no_grad(|| *param -= step);
/// }
/// assert_eq!((Vec::<f32>::try_from(&params[0])?, Vec::<f32>::try_from(&params[1])?), (vec![2.25, 3.0], vec![0.25]));
/// # Ok(())
/// # }
/// ```
///
#[cfg_attr(feature = "cuda", doc = "[`cuda::release_thread_clippers`]: crate::cuda::release_thread_clippers")]
#[cfg_attr(not(feature = "cuda"), doc = "[`cuda::release_thread_clippers`]: crate#features")]
pub fn clip_coef_by<T: Borrow<Tensor>>(
    params: &[T],
    scope: &Scope<'_>,
    clip: impl Into<ClipNorm>,
) -> Result<DeferredScoped> {
    let clip = clip.into();
    clip.validate()?;
    let list = GradList::gather(params, order(scope))?;
    match list.home() {
        Home::Cpu => on_cpu::clip_coef_by(&list, scope, &clip),
        #[cfg(feature = "cuda")]
        Home::Cuda(ordinal) => on_cuda::clip_coef_by(&list, ordinal, scope, clip),
    }
}

/// Limits each element of the gradients of `params`, and counts for each group of a [`Scope`] how many were outside
/// the bounds; see [`cpu::clip_grad_value_by`](crate::cpu::clip_grad_value_by). Elements become what
/// [`clip_grad_value`] makes of them: NaN is kept and counted, an Inf becomes a bound. The lists of the scope and of
/// the report are as for [`clip_grad_norm_by`]; a parameter without a gradient has no elements.
///
/// Cost: that of [`clip_grad_value`]; of CUDA tensors two launches for any number of groups, no wait.
///
/// # Errors
/// As [`clip_grad_value`], and a scope that does not fit the parameters; [`Error::ScopeForNorms`] for one with
/// [`max_norms`](Scope::max_norms) or [`telemetry`](Scope::telemetry). No value has changed then.
///
/// ```
/// use gradclip::Scope;
/// use tch::{Kind, Tensor};
///
/// # fn main() -> tch::Result<()> {
/// let weight = Tensor::from_slice2(&[[0.25f32, -4.0], [0.5, 0.0]]).set_requires_grad(true);
/// (weight.square().sum(Kind::Float) * 0.5).backward();
/// let report = gradclip::tch::clip_grad_value_by(&[&weight], &Scope::leading_dimension(), 0.5)?.wait()?;
/// let fractions: Vec<f64> = report.groups.iter().map(|row| row.clipped_fraction()).collect();
/// assert_eq!(fractions, [0.5, 0.0]);
/// assert_eq!(Vec::<f32>::try_from(weight.grad().view(4))?, [0.25, -0.5, 0.5, 0.0]);
/// # Ok(())
/// # }
/// ```
pub fn clip_grad_value_by<T: Borrow<Tensor>>(
    params: &[T],
    scope: &Scope<'_>,
    clip: impl Into<ClipValue>,
) -> Result<DeferredScoped<ValueReport>> {
    let clip = clip.into();
    clip.validate()?;
    scope.refuse_norms()?;
    let mut list = GradList::gather(params, order(scope))?;
    match list.home() {
        Home::Cpu => on_cpu::clip_grad_value_by(&mut list, scope, &clip),
        #[cfg(feature = "cuda")]
        Home::Cuda(ordinal) => on_cuda::clip_grad_value_by(&mut list, ordinal, scope, clip),
    }
}

fn order(scope: &Scope<'_>) -> Order {
    match scope.kind {
        Kind::Rows(_) => Order::Contiguous,
        Kind::LeadingDimension => Order::BySlice,
        Kind::Global | Kind::PerTensor | Kind::Groups(_) => Order::Any,
    }
}

/// An error of libtorch's, without the C++ stack that follows its first line.
fn framework(error: TchError) -> Error {
    let text = error.to_string();
    Error::Framework(text.lines().next().unwrap_or_default().to_owned())
}
