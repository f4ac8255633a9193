//! The norm that `clip_with_norm` is given.
#![cfg_attr(not(any(feature = "cuda", feature = "candle", feature = "tch")), allow(dead_code))] // `cpu` takes numbers

use crate::error::{Error, Result};
use crate::fp_env::DefaultFpEnv;
use std::marker::PhantomData;

#[cfg(feature = "cuda")]
use crate::{cuda::Pending, NormReport};

/// The norm to clip by, where the caller has it already: measured before, or put together from the norms of shards or
/// pipeline stages.
///
/// It is that of the gradients as they are, so with the loss scale in it if there is one: what `total_norm` measures. (A
/// call with a [`loss_scale`](crate::ClipNorm::loss_scale) reports its norm without.)
///
/// `f64` and `f32` convert into it. So do the reports of CUDA calls, `&Pending<NormReport>` and, of an adapter,
/// `&Deferred<NormReport>`: that norm stays on the device.
#[derive(Clone, Copy, Debug)]
pub struct TotalNorm<'a>(pub(crate) Source<'a>);

#[derive(Clone, Copy, Debug)]
pub(crate) enum Source<'a> {
    Value(f64),
    /// The marker: without `cuda` nothing else has the lifetime.
    Address(u64, PhantomData<&'a ()>),
    #[cfg(feature = "cuda")]
    Report(&'a Pending<NormReport>),
}

impl TotalNorm<'static> {
    /// A norm that lies on the GPU, an f64 that is read when the work gets there. CUDA only. A negative one counts as NaN.
    ///
    /// # Safety
    /// `address` is that of an f64 in memory of the clipper's device whenever work made with it runs, replays of a graph
    /// included, and nothing writes it at that time unless the stream orders it.
    #[must_use]
    pub const unsafe fn at(address: u64) -> Self {
        Self(Source::Address(address, PhantomData))
    }
}

impl TotalNorm<'_> {
    /// -0 counts as 0. NaN and infinity are norms; what happens then is the policy's to say.
    pub(crate) fn check_value(total_norm: f64) -> Result<f64> {
        let _env = DefaultFpEnv::enter();
        if total_norm < 0.0 {
            let expected = "zero, positive, or not finite";
            return Err(Error::InvalidThreshold { name: "total_norm", expected, got: total_norm });
        }
        Ok(total_norm + 0.0)
    }

    /// What can be said before anything is launched.
    #[cfg(feature = "cuda")]
    pub(crate) fn validate(&self) -> Result<()> {
        match self.0 {
            Source::Value(total_norm) => Self::check_value(total_norm).map(drop),
            Source::Address(address, _) if !address.is_multiple_of(align_of::<f64>() as u64) || address == 0 => {
                let reason = "is null or not a multiple of 8, as that of an f64 is";
                Err(Error::ThresholdAddress { name: "total_norm", address, reason })
            }
            _ => Ok(()),
        }
    }

    /// For gradients in host memory.
    #[cfg(any(feature = "candle", feature = "tch"))]
    pub(crate) fn on_host(&self) -> Result<f64> {
        match self.0 {
            Source::Value(total_norm) => Self::check_value(total_norm),
            Source::Address(address, _) => {
                let reason = "can only be read on a GPU, and the gradients are in host memory";
                Err(Error::ThresholdAddress { name: "total_norm", address, reason })
            }
            #[cfg(feature = "cuda")]
            Source::Report(_) => {
                let reason = "lies on a GPU, and the gradients are in host memory; wait for it, and give its value";
                Err(Error::NormOutOfReach { reason })
            }
        }
    }
}

impl From<f64> for TotalNorm<'static> {
    fn from(total_norm: f64) -> Self {
        Self(Source::Value(total_norm))
    }
}

impl From<f32> for TotalNorm<'static> {
    fn from(total_norm: f32) -> Self {
        f64::from(total_norm).into()
    }
}

#[cfg(feature = "cuda")]
impl<'a> From<&'a Pending<NormReport>> for TotalNorm<'a> {
    fn from(pending: &'a Pending<NormReport>) -> Self {
        Self(Source::Report(pending))
    }
}
