//! The report of a call on a framework's tensors, wherever these are.

use super::variables::Variables;
use crate::error::Result;
use crate::report::{NormReport, Report};
use crate::scope::ScopedReport;
use crate::total_norm::TotalNorm;

#[cfg(feature = "cuda")]
use crate::cuda::{Pending, PendingScoped};

/// The report of a call on tensors that may be in host memory or on a GPU. Of CPU tensors it is there at once; of CUDA
/// tensors it stays on the device until [`wait`](Self::wait) is called. Dropping it costs nothing.
///
/// ```
/// # #[cfg(feature = "candle")] {
/// # use candle_core::{Device, Var};
/// # fn main() -> candle_core::Result<()> {
/// # let weight = Var::new(&[3.0f32, 4.0], &Device::Cpu)?;
/// # let mut grads = (weight.as_tensor().sqr()? * 0.5)?.sum_all()?.backward()?;
/// let clipped = gradclip::candle::clip_grad_norm(&[weight], &mut grads, 1.0)?; // no wait
/// assert_eq!(clipped.wait()?.total_norm, 5.0);
/// # Ok(()) }
/// # main().unwrap(); }
/// ```
#[derive(Clone, Debug)]
#[must_use = "the report says what was found; `let _ =` it where that is of no interest"]
pub struct Deferred<R> {
    report: Place<R>,
    variables: Variables,
}

/// For [`TotalNorm`]: of CUDA tensors, the norm stays on the device.
impl<'a> From<&'a Deferred<NormReport>> for TotalNorm<'a> {
    fn from(report: &'a Deferred<NormReport>) -> Self {
        match &report.report {
            Place::Host(report) => report.total_norm.into(),
            #[cfg(feature = "cuda")]
            Place::Device(pending) => pending.into(),
        }
    }
}

#[derive(Clone, Debug)]
enum Place<R> {
    Host(R),
    #[cfg(feature = "cuda")]
    Device(Pending<R>),
}

impl<R: Report> Deferred<R> {
    pub(crate) fn on_host(report: R, variables: Variables) -> Self {
        Self { report: Place::Host(report), variables }
    }

    #[cfg(feature = "cuda")]
    #[allow(dead_code)] // without an adapter that has CUDA tensors
    pub(crate) fn of_call(call: Result<Pending<R>>, variables: Variables) -> Result<Self> {
        match call {
            Ok(report) => Ok(Self { report: Place::Device(report), variables }),
            Err(error) => Err(variables.name_in(error)),
        }
    }

    /// The report. Of CUDA tensors it waits for the stream, and copies 72 bytes; see [`cuda::Pending::wait`].
    ///
    /// # Errors
    /// None of CPU tensors; those of [`cuda::Pending::wait`] of CUDA tensors.
    ///
    #[cfg_attr(feature = "cuda", doc = "[`cuda::Pending::wait`]: crate::cuda::Pending::wait")]
    #[cfg_attr(not(feature = "cuda"), doc = "[`cuda::Pending::wait`]: crate#features")]
    pub fn wait(&self) -> Result<R> {
        match &self.report {
            Place::Host(report) => Ok(*report),
            #[cfg(feature = "cuda")]
            Place::Device(pending) => pending.wait(),
        }
        .map(|report| report.rename_tensors(&|index| self.variables.name(index)))
    }

    /// Of CUDA tensors, the report on the device: its addresses are for kernels that go on without a wait. Indices in it
    /// are those of the tensors that took part, not of the variables.
    #[cfg(feature = "cuda")]
    #[must_use]
    pub fn pending(&self) -> Option<&Pending<R>> {
        match &self.report {
            Place::Host(_) => None,
            Place::Device(pending) => Some(pending),
        }
    }
}

/// The report of a call with a [`Scope`](crate::Scope), on tensors that may be in host memory or on a GPU: a
/// [`Deferred`] with more than one norm, or with a [`ValueReport`](crate::ValueReport) for each group. Its lists have
/// an entry for each variable.
///
/// ```
/// # #[cfg(feature = "candle")] {
/// # use candle_core::{Device, Var};
/// # use gradclip::Scope;
/// # fn main() -> candle_core::Result<()> {
/// # let weight = Var::new(&[3.0f32, 4.0], &Device::Cpu)?;
/// # let mut grads = (weight.as_tensor().sqr()? * 0.5)?.sum_all()?.backward()?;
/// let clipped = gradclip::candle::clip_grad_norm_by(&[weight], &mut grads, &Scope::per_tensor(), 1.0)?; // no wait
/// assert_eq!(clipped.wait()?.groups[0].total_norm, 5.0);
/// # Ok(()) }
/// # main().unwrap(); }
/// ```
#[derive(Clone, Debug)]
#[must_use = "the report says what was found; `let _ =` it where that is of no interest"]
pub struct DeferredScoped<R = NormReport>(ScopedPlace<R>);

#[derive(Clone, Debug)]
enum ScopedPlace<R> {
    Host(ScopedReport<R>),
    #[cfg(feature = "cuda")]
    Device(PendingScoped<R>),
}

impl<R: Report> DeferredScoped<R> {
    pub(crate) fn on_host(report: ScopedReport<R>) -> Self {
        Self(ScopedPlace::Host(report))
    }

    #[cfg(feature = "cuda")]
    #[allow(dead_code)] // without an adapter that has CUDA tensors
    pub(crate) fn on_device(pending: PendingScoped<R>) -> Self {
        Self(ScopedPlace::Device(pending))
    }

    /// The report. Of CUDA tensors it waits for the stream, and copies it; see [`cuda::PendingScoped::wait`].
    ///
    /// # Errors
    /// None of CPU tensors; those of [`cuda::PendingScoped::wait`] of CUDA tensors.
    ///
    #[cfg_attr(feature = "cuda", doc = "[`cuda::PendingScoped::wait`]: crate::cuda::PendingScoped::wait")]
    #[cfg_attr(not(feature = "cuda"), doc = "[`cuda::PendingScoped::wait`]: crate#features")]
    pub fn wait(&self) -> Result<ScopedReport<R>> {
        match &self.0 {
            ScopedPlace::Host(report) => Ok(report.clone()),
            #[cfg(feature = "cuda")]
            ScopedPlace::Device(pending) => pending.wait(),
        }
    }

    /// Of CUDA tensors, the report on the device. Its addresses are for kernels that go on without a wait, and group
    /// `index` there is group `index` of the report.
    #[cfg(feature = "cuda")]
    #[must_use]
    pub fn pending(&self) -> Option<&PendingScoped<R>> {
        match &self.0 {
            ScopedPlace::Host(_) => None,
            ScopedPlace::Device(pending) => Some(pending),
        }
    }
}
