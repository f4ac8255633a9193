//! Clipping gradients in device memory, through cudarc.
//!
//! Gradients are [`CudaSlice`](cudarc::driver::CudaSlice)s, views of them, or [`RawGrad`]s: device pointers that some
//! other framework owns. A [`Clipper`] runs the kernels on one stream; the free functions below keep one for each thread
//! and stream.
//!
//! The driver is loaded when it is first needed. Where there is none, [`context`] and [`check_driver`] say so; cudarc's
//! own `CudaContext::new` panics.

mod clipper;
mod device_table;
mod driver;
mod kernel;
mod kernels;
mod launch;
mod memory;
#[cfg(feature = "nccl")]
mod nccl;
mod outputs;
mod reports;
mod running;
mod scoped;
mod shards;
mod thread_clippers;
mod workspace;

pub use crate::adapters::cudarc::{DeviceGrad, DeviceGradMut, RawGrad};
pub use clipper::Clipper;
pub use driver::{check_driver, context};
pub use kernels::compiler;
#[cfg(feature = "nccl")]
#[cfg_attr(docsrs, doc(cfg(feature = "nccl")))]
pub use nccl::check_nccl;
pub use reports::Pending;
pub use running::RunningNorm;
pub use scoped::PendingScoped;
pub use shards::DeviceAllGather;
pub use thread_clippers::{
    clip_coef, clip_coef_by, clip_grad_norm, clip_grad_norm_by, clip_grad_norm_into, clip_grad_value,
    clip_grad_value_by, clip_with_norm, norms_by, release_thread_clippers, total_norm,
};

/// The cudarc whose types the calls take.
pub use ::cudarc;

pub(crate) use driver::driver_error;
#[cfg(feature = "tch")]
pub(crate) use driver::loader_text;
