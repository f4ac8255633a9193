//! The verbs without a clipper in sight: each thread keeps one for each stream it has used.

use super::clipper::Clipper;
use super::reports::Pending;
use crate::adapters::cudarc::{DeviceGrad, DeviceGradMut};
use crate::error::Result;
use crate::options::{ClipNorm, ClipValue, NormType};
use crate::report::{NormReport, ValueReport};
use cudarc::driver::CudaStream;
use std::cell::RefCell;
use std::sync::Arc;

thread_local! {
    // By thread too: the per-thread default stream has the same handle in every thread, and is another stream in each.
    static CLIPPERS: RefCell<Vec<Clipper>> = const { RefCell::new(Vec::new()) };
}

fn with_clipper<R>(stream: &Arc<CudaStream>, run: impl FnOnce(&mut Clipper) -> Result<R>) -> Result<R> {
    CLIPPERS.with_borrow_mut(|clippers| {
        let same = |clipper: &Clipper| {
            let own = clipper.stream();
            own.cu_stream() == stream.cu_stream() && own.context() == stream.context()
        };
        let index = match clippers.iter().position(same) {
            Some(index) => index,
            None => {
                clippers.push(Clipper::new(stream)?);
                clippers.len() - 1
            }
        };
        run(&mut clippers[index])
    })
}

/// [`Clipper::total_norm`] with this thread's clipper for `stream`, made on first use.
///
/// # Errors
/// Those of [`Clipper::new`] and [`Clipper::total_norm`].
pub fn total_norm<G: DeviceGrad>(
    stream: &Arc<CudaStream>,
    grads: &[G],
    norm_type: NormType,
) -> Result<Pending<NormReport>> {
    with_clipper(stream, |clipper| clipper.total_norm(grads, norm_type))
}

/// [`Clipper::clip_grad_norm`] with this thread's clipper for `stream`, made on first use.
///
/// # Errors
/// Those of [`Clipper::new`] and [`Clipper::clip_grad_norm`].
pub fn clip_grad_norm<G: DeviceGradMut>(
    stream: &Arc<CudaStream>,
    grads: &mut [G],
    clip: impl Into<ClipNorm>,
) -> Result<Pending<NormReport>> {
    with_clipper(stream, |clipper| clipper.clip_grad_norm(grads, clip))
}

/// [`Clipper::clip_grad_value`] with this thread's clipper for `stream`, made on first use.
///
/// # Errors
/// Those of [`Clipper::new`] and [`Clipper::clip_grad_value`].
pub fn clip_grad_value<G: DeviceGradMut>(
    stream: &Arc<CudaStream>,
    grads: &mut [G],
    clip: impl Into<ClipValue>,
) -> Result<Pending<ValueReport>> {
    with_clipper(stream, |clipper| clipper.clip_grad_value(grads, clip))
}

/// Frees the clippers that the functions above have made in this thread, with their device memory and their hold on the
/// streams. Reports that were not read yet can still be.
pub fn release_thread_clippers() {
    CLIPPERS.with_borrow_mut(Vec::clear);
}
