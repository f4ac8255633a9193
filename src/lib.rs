//! Gradient clipping for training on NVIDIA GPUs, by global norm and by value, with a CPU path that gives the same
//! bits.
//!
//! Between `backward` and the optimizer's step, one call measures the norm of all gradients together and, if it exceeds
//! a threshold, scales all of them so that it equals the threshold. On a GPU that is three kernel launches for any
//! number of tensors of any of four types; the host does not wait, and gradients within the threshold are not written.
//!
//! ```
//! let mut grads = [vec![3.0f32, 0.0], vec![4.0]]; // one vector for each parameter
//! let clipped = gradclip::cpu::clip_grad_norm(&mut grads, 1.0)?;
//! assert_eq!((clipped.total_norm, clipped.clip_coef), (5.0, 0.2));
//! assert_eq!(grads, [vec![0.6, 0.0], vec![0.8]]);
//! # Ok::<(), gradclip::Error>(())
//! ```
//!
//! `clip_grad_norm_into` does the same out of place, also from f16, bf16 or f64 gradients to f32 ones.
//!
//! # Back ends
//!
//! The verbs are the same in each:
//!
//! | verb | what |
//! |---|---|
//! | `clip_grad_norm` | measures the norm, and scales where it exceeds the threshold; removes a [loss scale](ClipNorm::loss_scale) |
//! | `clip_grad_value` | limits each element |
//! | `total_norm` | only measures |
//! | `clip_with_norm` | only scales, by a norm that the caller has |
//! | `clip_coef` | measures, and gives the factor to an optimizer that multiplies by it; writes nothing |
//! | `norms_by`, `clip_grad_norm_by`, `clip_coef_by` | where not all gradients share one norm ([`Scope`]): of each tensor, group or row |
//! | `clip_grad_value_by` | limits each element, and counts for each tensor, group or row |
//! | `total_norm_sharded`, `clip_grad_norm_sharded`, `clip_coef_sharded` | the same where ranks hold a part of the gradients each ([`NormPartial`]): in [`cpu`] and [`cuda`] |
//!
//! | module | gradients in | result |
//! |---|---|---|
//! | [`cpu`] | slices, vectors and arrays in host memory | a report |
//! | [`cuda`] | slices and views of cudarc, raw device pointers | a `Pending` report, which stays on the device until asked for |
//! | [`candle`] | the `GradStore` of candle, CPU and CUDA tensors | a `Deferred` report: there at once, or on the device until asked for |
//! | [`tch`] | the `grad()` of tch tensors, on the CPU or a GPU | a `Deferred` report, which waits only when asked |
//!
//! On a GPU, keep a `Clipper` for each stream, or let the functions of the module [`cuda`] keep one:
//!
#![cfg_attr(feature = "cuda", doc = "```no_run")]
#![cfg_attr(not(feature = "cuda"), doc = "```ignore")]
//! use gradclip::cuda::{self, Clipper};
//! let stream = cuda::context(0)?.default_stream();
//! let mut weight = stream.clone_htod(&[3.0f32, 0.0])?;
//! let mut bias = stream.clone_htod(&[4.0f32])?;
//! let mut clipper = Clipper::new(&stream)?;
//! let clipped = clipper.clip_grad_norm(&mut [&mut weight, &mut bias], 1.0)?; // no wait
//! println!("{}", clipped.wait()?.total_norm); // waits: 5
//! # Ok::<(), gradclip::Error>(())
//! ```
//!
//! # Semantics
//!
//! `N` is the norm over all gradients before clipping; the report gives it back. If `N + eps > max_norm`, every element
//! becomes `x * max_norm / (N + eps)`. Otherwise nothing is written. `eps` is 0, so the clipped norm equals `max_norm`;
//! [`ClipNorm::torch_compatible`] makes it PyTorch's 1e-6, and [`compat`] has presets for the clipping of other libraries.
//!
//! ```
//! use gradclip::{cpu, ClipNorm, Error};
//! # use half::f16;
//! // A norm that is exactly the threshold is within it; PyTorch's formula scales it all the same.
//! let mut grads = [[3.0f32, 4.0]];
//! assert!(!cpu::clip_grad_norm(&mut grads, 5.0)?.written);
//! assert!(cpu::clip_grad_norm(&mut grads, ClipNorm::new(5.0).torch_compatible())?.written);
//!
//! // Finite values whose squares are out of range have a norm all the same.
//! let mut grads = [[1e20f32], [1e20]];
//! cpu::clip_grad_norm(&mut grads, 1.0)?;
//! assert_eq!(grads, [[0.70710677], [0.70710677]]);
//! let mut grads = [[f16::from_f32(60000.0)], [f16::from_f32(60000.0)]];
//! assert_eq!(cpu::clip_grad_norm(&mut grads, 1.0)?.total_norm as f32, 84852.81);
//!
//! // A NaN or an Inf: by default nothing is touched, and the report names the first tensor that has one.
//! let mut grads = [[1.0f32], [f32::NAN]];
//! let report = cpu::clip_grad_norm(&mut grads, 1.0)?;
//! assert_eq!((report.written, report.first_nonfinite, grads[0]), (false, Some(1), [1.0]));
//!
//! // A bad threshold is an error. Nothing is touched.
//! assert!(matches!(cpu::clip_grad_norm(&mut grads, -1.0), Err(Error::InvalidThreshold { .. })));
//! # Ok::<(), gradclip::Error>(())
//! ```
//!
//! * `max_norm` 0 makes every gradient 0; infinity only measures.
//! * The norm is of order 2, 1, infinity or any other above 0, or the root mean square: [`NormType`]. Powers neither
//!   overflow nor vanish.
//! * With a [loss scale](ClipNorm::loss_scale) `S`, `N` is the measured norm over `S`, every element becomes
//!   `x * clip_coef / S`, and [`found_inf`](NormReport::found_inf) says that the scaled gradients overflowed.
//! * Gradients can be added to a [`RunningNorm`](cpu::RunningNorm) one after the other, as backward produces them.
//! * Where gradients are sharded over processes, ranks exchange 32 bytes each and end with the same bits:
//!   [`cpu::clip_grad_norm_sharded`].
//! * [`NonFinite`] says what happens when the norm is NaN or infinite: `Skip`, `Zero`, `Propagate`, `Error`.
//! * Out of place ([`cpu::clip_grad_norm_into`]) each output is `x * clip_coef` rounded once to its own type, and is
//!   written also where nothing is clipped. Only a norm that is skipped, or an error, leaves the outputs as they were.
//! * An empty list, and empty gradients anywhere in one, have norm 0 and are left alone.
//! * Gradients that share memory are refused: they would be counted, and scaled, twice. (Where candle or tch gives
//!   several variables one gradient, it is clipped once.)
//! * Value clipping is `min(max(x, lo), hi)`. NaN stays and is counted; Inf becomes a bound.
//! * f32, f64, f16 and bf16 can be mixed in one list. Any length, any alignment that the type allows.
//!
//! Every error is an [`enum@Error`]. Nothing panics on what a caller passes, nor where a driver or a GPU is missing.
//!
//! # Guarantees on bits
//!
//! The order of every addition is fixed by the index of an element inside its tensor and by the order of the list: not
//! by the grid, the GPU, the number of threads or the instruction set. The same list gives the same norm, coefficient
//! and gradients in every run and on every back end. f32 sums carry their rounding errors along; f64 takes over after
//! at most 64 elements of f16 or bf16; values out of the safe range are added up again in f64. The norm of normally
//! distributed gradients is promised within 1e-9 for f32 and f64, and within 5e-8 for f16 and bf16; any norm within
//! 2e-6. Each clipped element is within one unit in the last place of `x * clip_coef`, over the loss scale if there is one.
//!
//! The tests compare the kernels, compiled for the host, with the CPU path bit for bit. No GPU has run them yet. The
//! order and the error bounds are in `docs/numerics.md` of the repository.
//!
//! # Features
//!
//! * `cuda` (default): the module [`cuda`]. Builds without a CUDA toolkit and loads the driver when it is first used.
//!   To clip on a GPU it takes compute capability 7.5 and a driver for CUDA 12.0 (525), or later.
//! * `nccl`: norms over several ranks by NCCL, through cudarc. NCCL is loaded when it is first used.
//! * `candle`: the module [`candle`], for candle-core 0.11, CPU tensors.
//! * `candle-cuda`: CUDA tensors too. It turns on candle's own feature `cuda`, which takes a CUDA toolkit to build and
//!   links the driver: such a program does not start where there is none.
//! * `tch`: the module [`tch`], for tch 0.24 or 0.26, whichever the program has. Needs the libtorch of that release:
//!   2.11 or 2.13. CUDA tensors need `cuda` too.
//!
#![cfg_attr(feature = "cuda", doc = "[`cuda`]: crate::cuda")]
#![cfg_attr(not(feature = "cuda"), doc = "[`cuda`]: #features")]
#![cfg_attr(feature = "candle", doc = "[`candle`]: crate::candle")]
#![cfg_attr(not(feature = "candle"), doc = "[`candle`]: #features")]
#![cfg_attr(feature = "tch", doc = "[`tch`]: crate::tch")]
#![cfg_attr(not(feature = "tch"), doc = "[`tch`]: #features")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod adapters;
pub mod compat;
pub mod cpu;
#[cfg(feature = "cuda")]
#[cfg_attr(docsrs, doc(cfg(feature = "cuda")))]
pub mod cuda;
#[cfg(feature = "candle")]
#[cfg_attr(docsrs, doc(cfg(feature = "candle")))]
pub use adapters::candle;
#[cfg(feature = "tch")]
#[cfg_attr(docsrs, doc(cfg(feature = "tch")))]
pub use adapters::tch;
#[cfg(any(feature = "candle", feature = "tch"))]
#[cfg_attr(docsrs, doc(cfg(any(feature = "candle", feature = "tch"))))]
pub use adapters::{Deferred, DeferredScoped};

#[doc(hidden)]
pub mod abi;
mod address_sort;
mod clip_coef;
mod dtype;
mod error;
mod fp_env;
mod options;
mod outputs;
mod plan;
mod report;
mod running_list;
mod scope;
mod scoped_plan;
mod shards;
mod total_norm;
mod value_bounds;

pub use dtype::{Dtype, Element};
pub use error::{Error, Result};
pub use options::{ClipNorm, ClipValue, NonFinite, NormType};
pub use report::{NormReport, Report, ValueReport};
pub use scope::{Scope, ScopedReport, TensorStats};
pub use shards::{AllGather, Copies, NormPartial};
pub use total_norm::TotalNorm;

/// Reports of past calls that a CUDA clipper keeps on the device.
pub const REPORTS_KEPT: usize = 256;

/// The snippets of the README, compiled and run as tests.
#[cfg(all(doctest, feature = "candle", feature = "cuda", feature = "tch"))]
#[doc = include_str!("../README.md")]
struct Readme;
