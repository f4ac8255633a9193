//! The verbs without a clipper in sight: each thread keeps one for each stream it has used lately.

use super::clipper::Clipper;
use super::driver::{check_driver, CurrentContext};
use super::reports::Pending;
use super::scoped::PendingScoped;
use crate::adapters::cudarc::{DeviceGrad, DeviceGradMut};
use crate::error::{Error, Result};
use crate::options::{ClipNorm, ClipValue, NormType};
use crate::report::{NormReport, ValueReport};
use crate::scope::Scope;
use crate::total_norm::TotalNorm;
use cudarc::driver::CudaStream;
use std::cell::{Cell, RefCell};
use std::sync::Arc;

/// Streams that a thread keeps clippers for. A thread that uses more loses the clipper used longest ago, and makes it
/// again when its stream comes back. So a program that makes streams or contexts again and again holds on to this many.
const KEPT: usize = 64;

thread_local! {
    /// Used last comes first. By thread too: the per-thread default stream has the same handle in every thread, and is
    /// another stream in each.
    static CLIPPERS: RefCell<Vec<Clipper>> = const { RefCell::new(Vec::new()) };
    /// Whether this thread has called the driver from here.
    static DRIVER_CALLED: Cell<bool> = const { Cell::new(false) };
}

/// What a thread keeps is dropped in the opposite order of its first use. The clippers call the driver when they are
/// dropped, so what the driver keeps for the thread has to be there before them.
fn call_driver_first() -> Result<()> {
    if !DRIVER_CALLED.get() {
        check_driver()?;
        drop(CurrentContext::save()?);
        DRIVER_CALLED.set(true);
    }
    Ok(())
}

/// `run` must not come back here: the list is borrowed meanwhile. So callers convert their arguments before.
fn with_clipper<R>(stream: &Arc<CudaStream>, run: impl FnOnce(&mut Clipper) -> Result<R>) -> Result<R> {
    call_driver_first()?;
    let in_list = |clippers: &RefCell<Vec<Clipper>>| {
        let mut clippers = clippers.borrow_mut();
        // By stream, not by object: cudarc makes another object for the same default stream at each request, adapters
        // for a stream that they borrow, and each `CudaContext::new` another one for the same context. The clipper of
        // the stream serves them all, and goes on with the caller's object: that one knows what cudarc tracks.
        let same = |clipper: &Clipper| {
            let own = clipper.stream();
            own.cu_stream() == stream.cu_stream() && own.context() == stream.context()
        };
        match clippers.iter().position(same) {
            Some(index) => clippers[..=index].rotate_right(1),
            None => {
                let clipper = Clipper::new(stream)?;
                let _current = CurrentContext::save()?;
                clippers.truncate(KEPT - 1);
                clippers.insert(0, clipper);
            }
        }
        clippers[0].go_on_with(stream)?;
        run(&mut clippers[0])
    };
    CLIPPERS.try_with(in_list).unwrap_or(Err(Error::ThreadEnding))
}

/// [`Clipper::total_norm`] with this thread's clipper for `stream`, made on first use.
///
/// # Errors
/// Those of [`Clipper::new`] and [`Clipper::total_norm`]; [`Error::ThreadEnding`].
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
/// Those of [`Clipper::new`] and [`Clipper::clip_grad_norm`]; [`Error::ThreadEnding`].
pub fn clip_grad_norm<G: DeviceGradMut>(
    stream: &Arc<CudaStream>,
    grads: &mut [G],
    clip: impl Into<ClipNorm>,
) -> Result<Pending<NormReport>> {
    let clip = clip.into();
    with_clipper(stream, |clipper| clipper.clip_grad_norm(grads, clip))
}

/// [`Clipper::clip_grad_norm_into`] with this thread's clipper for `stream`, made on first use.
///
/// # Errors
/// Those of [`Clipper::new`] and [`Clipper::clip_grad_norm_into`]; [`Error::ThreadEnding`].
pub fn clip_grad_norm_into<G: DeviceGrad, O: DeviceGradMut>(
    stream: &Arc<CudaStream>,
    grads: &[G],
    outputs: &mut [O],
    clip: impl Into<ClipNorm>,
) -> Result<Pending<NormReport>> {
    let clip = clip.into();
    with_clipper(stream, |clipper| clipper.clip_grad_norm_into(grads, outputs, clip))
}

/// [`Clipper::norms_by`] with this thread's clipper for `stream`, made on first use.
///
/// # Errors
/// Those of [`Clipper::new`] and [`Clipper::norms_by`]; [`Error::ThreadEnding`].
pub fn norms_by<G: DeviceGrad>(
    stream: &Arc<CudaStream>,
    grads: &[G],
    scope: &Scope<'_>,
    norm_type: NormType,
) -> Result<PendingScoped> {
    with_clipper(stream, |clipper| clipper.norms_by(grads, scope, norm_type))
}

/// [`Clipper::clip_grad_norm_by`] with this thread's clipper for `stream`, made on first use.
///
/// # Errors
/// Those of [`Clipper::new`] and [`Clipper::clip_grad_norm_by`]; [`Error::ThreadEnding`].
pub fn clip_grad_norm_by<G: DeviceGradMut>(
    stream: &Arc<CudaStream>,
    grads: &mut [G],
    scope: &Scope<'_>,
    clip: impl Into<ClipNorm>,
) -> Result<PendingScoped> {
    let clip = clip.into();
    with_clipper(stream, |clipper| clipper.clip_grad_norm_by(grads, scope, clip))
}

/// [`Clipper::clip_coef_by`] with this thread's clipper for `stream`, made on first use.
///
/// # Errors
/// Those of [`Clipper::new`] and [`Clipper::clip_coef_by`]; [`Error::ThreadEnding`].
pub fn clip_coef_by<G: DeviceGrad>(
    stream: &Arc<CudaStream>,
    grads: &[G],
    scope: &Scope<'_>,
    clip: impl Into<ClipNorm>,
) -> Result<PendingScoped> {
    let clip = clip.into();
    with_clipper(stream, |clipper| clipper.clip_coef_by(grads, scope, clip))
}

/// [`Clipper::clip_grad_value_by`] with this thread's clipper for `stream`, made on first use.
///
/// # Errors
/// Those of [`Clipper::new`] and [`Clipper::clip_grad_value_by`]; [`Error::ThreadEnding`].
pub fn clip_grad_value_by<G: DeviceGradMut>(
    stream: &Arc<CudaStream>,
    grads: &mut [G],
    scope: &Scope<'_>,
    clip: impl Into<ClipValue>,
) -> Result<PendingScoped<ValueReport>> {
    let clip = clip.into();
    with_clipper(stream, |clipper| clipper.clip_grad_value_by(grads, scope, clip))
}

/// [`Clipper::clip_with_norm`] with this thread's clipper for `stream`, made on first use. A norm that stays on the
/// device has to be that of another of these functions, in the same thread and on the same stream.
///
/// # Errors
/// Those of [`Clipper::new`] and [`Clipper::clip_with_norm`]; [`Error::ThreadEnding`].
pub fn clip_with_norm<'a, G: DeviceGradMut>(
    stream: &Arc<CudaStream>,
    grads: &mut [G],
    total_norm: impl Into<TotalNorm<'a>>,
    clip: impl Into<ClipNorm>,
) -> Result<Pending<NormReport>> {
    let (total_norm, clip) = (total_norm.into(), clip.into());
    with_clipper(stream, |clipper| clipper.clip_with_norm(grads, total_norm, clip))
}

/// [`Clipper::clip_coef`] with this thread's clipper for `stream`, made on first use.
///
/// # Errors
/// Those of [`Clipper::new`] and [`Clipper::clip_coef`]; [`Error::ThreadEnding`].
pub fn clip_coef<G: DeviceGrad>(
    stream: &Arc<CudaStream>,
    grads: &[G],
    clip: impl Into<ClipNorm>,
) -> Result<Pending<NormReport>> {
    let clip = clip.into();
    with_clipper(stream, |clipper| clipper.clip_coef(grads, clip))
}

/// [`Clipper::clip_grad_value`] with this thread's clipper for `stream`, made on first use.
///
/// # Errors
/// Those of [`Clipper::new`] and [`Clipper::clip_grad_value`]; [`Error::ThreadEnding`].
pub fn clip_grad_value<G: DeviceGradMut>(
    stream: &Arc<CudaStream>,
    grads: &mut [G],
    clip: impl Into<ClipValue>,
) -> Result<Pending<ValueReport>> {
    let clip = clip.into();
    with_clipper(stream, |clipper| clipper.clip_grad_value(grads, clip))
}

/// Frees the clippers that the functions above have made in this thread, with their device memory and their hold on the
/// streams. Reports that were not read yet can still be. A thread that ends does the same.
///
/// Without it a thread keeps the clippers of the 64 streams that it has used last.
pub fn release_thread_clippers() {
    // Where the list is gone already, so are the clippers.
    let _ = CLIPPERS.try_with(|clippers| clippers.borrow_mut().clear());
}
