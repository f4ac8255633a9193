//! What to clip by, and what to do when it cannot be done.

use crate::error::{Error, Result};
use crate::fp_env::DefaultFpEnv;

/// Order of the norm.
///
/// `P` with the order of a name is the norm of that name: `P(2.0) == L2`.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub enum NormType {
    /// Sum of magnitudes.
    L1,
    /// Square root of the sum of squares.
    #[default]
    L2,
    /// Largest magnitude; NaN if any element is NaN.
    Inf,
    /// `(sum |x|^p)^(1/p)` for any `p > 0`; where `p` is 1, 2 or infinite, the norm of that name, bit for bit. Zero,
    /// negative and NaN are [`Error::InvalidNormType`] when it is used.
    ///
    /// No power overflows or vanishes, whatever `p` is: of one element the norm is its magnitude, exactly, and for a
    /// `p` of 1e300 that of many is the largest. For `p < 1` it is a quasi-norm: clipping by it works, but the norm of a
    /// sum can exceed the sum of the norms. It grows as `p` falls, up to `n^(1/p)` times the largest of `n` elements. So
    /// it can be infinite although every element is finite (at `p = 0.01`, beyond some 1200 equal elements of 1): then
    /// [`NonFinite`] decides, and no tensor is named.
    ///
    /// Cost: a logarithm and an exponential of every element in f64, some 45 operations. GPUs with few f64 units (most
    /// that are not made for data centres) take many times as long as for the other orders.
    ///
    /// ```
    /// use gradclip::{cpu, NormType};
    /// let grads = [[1.0f32, 4.0, 9.0]];
    /// let norm = cpu::total_norm(&grads, NormType::P(0.5))?.total_norm; // (1 + 2 + 3)^2
    /// assert!((norm / 36.0 - 1.0).abs() < 1e-14);
    /// # Ok::<(), gradclip::Error>(())
    /// ```
    P(f64),
    /// Root mean square: `sqrt(sum x^2 / numel)`, the L2 norm over the root of the number of elements, so that one
    /// threshold fits tensors of all sizes. Of nothing 0; NaN and infinite where the L2 norm is. For elements that f64
    /// holds it never overflows, where the L2 norm can.
    ///
    /// With [`Scope::per_tensor`](crate::Scope::per_tensor) it is what Adafactor and optax's `clip_by_block_rms` clip by.
    /// What has a norm (the list, a group, a row) is what the mean is over. Over several ranks it is
    /// [`Error::RmsOverRanks`].
    ///
    /// ```
    /// use gradclip::{cpu, ClipNorm, NormType, Scope};
    /// let mut grads = [vec![3.0f32, 4.0, 0.0, 0.0], vec![1.0; 100]];
    /// let clip = ClipNorm::new(1.0).norm_type(NormType::Rms);
    /// let report = cpu::clip_grad_norm_by(&mut grads, &Scope::per_tensor(), clip)?;
    /// assert_eq!((report.groups[0].total_norm, report.groups[1].written), (2.5, false)); // L2 norms: 5 and 10
    /// assert_eq!(grads[0], [1.2, 1.6, 0.0, 0.0]);
    /// # Ok::<(), gradclip::Error>(())
    /// ```
    Rms,
}

impl NormType {
    /// The order as a number: 1, 2, infinity or `p`; of a root mean square 2.
    #[must_use]
    pub const fn order(self) -> f64 {
        match self {
            Self::L1 => 1.0,
            Self::L2 | Self::Rms => 2.0,
            Self::Inf => f64::INFINITY,
            Self::P(p) => p,
        }
    }

    /// The norm whose partials are those of this one.
    pub(crate) const fn of_partials(self) -> Self {
        match self {
            Self::Rms => Self::L2,
            other => other,
        }
    }

    /// Whether partials of this norm have scales other than 1.
    #[cfg(feature = "cuda")]
    pub(crate) const fn has_scales(self, has_f64: bool) -> bool {
        has_f64 || matches!(self, Self::P(_))
    }

    /// The norms that have a name by their name.
    const fn canonical(self) -> Self {
        match self {
            Self::P(1.0) => Self::L1,
            Self::P(2.0) => Self::L2,
            Self::P(f64::INFINITY) => Self::Inf,
            other => other,
        }
    }
}

impl PartialEq for NormType {
    fn eq(&self, other: &Self) -> bool {
        self.order() == other.order() && matches!(self, Self::Rms) == matches!(other, Self::Rms)
    }
}

/// The norm of order `p`, as PyTorch's `norm_type` says it.
impl From<f64> for NormType {
    fn from(p: f64) -> Self {
        Self::P(p).canonical()
    }
}

/// What to do when the norm is NaN or infinite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NonFinite {
    /// Leave every gradient as it is; the report says so, and which tensor was first.
    #[default]
    Skip,
    /// Set every gradient to zero, so that the optimizer step can go on without anybody waiting for the report. What is
    /// only measured is left alone: by an infinite `max_norm` without a loss scale, or in a group that has no threshold.
    Zero,
    /// Multiply by `max_norm / norm` all the same, as PyTorch does (unless `max_norm` is infinite, which only measures or
    /// removes a loss scale): a NaN anywhere makes every gradient NaN; an Inf makes finite elements 0 and infinite ones NaN.
    Propagate,
    /// Leave every gradient as it is, wait for the result, and return [`Error::NonFinite`].
    Error,
}

/// Clipping by global norm: if the norm of all gradients together exceeds `max_norm`, all are multiplied by
///
/// ```text
/// clip_coef = max_norm / (total_norm + eps)        applied only where total_norm + eps > max_norm
/// ```
///
/// An `f64` converts into the plain case, so `clip_grad_norm(&mut grads, 1.0)` is enough for it.
///
/// ```
/// use gradclip::{ClipNorm, NonFinite, NormType};
/// let clip = ClipNorm::new(1.0).norm_type(NormType::L1).nonfinite(NonFinite::Zero);
/// let like_torch = ClipNorm::new(1.0).torch_compatible();
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClipNorm {
    pub(crate) max_norm: f64,
    /// Device address of the threshold, if not 0.
    pub(crate) max_norm_at: u64,
    pub(crate) norm_type: NormType,
    pub(crate) eps: f64,
    pub(crate) loss_scale: f64,
    /// Device address of the loss scale, if not 0.
    pub(crate) loss_scale_at: u64,
    pub(crate) nonfinite: NonFinite,
}

impl ClipNorm {
    /// The `eps` of `torch.nn.utils.clip_grad_norm_`.
    pub const TORCH_EPS: f64 = 1e-6;

    /// L2 norm, eps 0, [`NonFinite::Skip`]. `max_norm` 0 sets all gradients to 0; infinity only measures. A negative or
    /// NaN one is an error when it is used.
    #[must_use]
    pub const fn new(max_norm: f64) -> Self {
        // A threshold of -0 is 0: the sign would reach the gradients. (By its bits, as the caller may have unmasked the
        // exceptions of arithmetic.)
        let max_norm = if max_norm.to_bits() == (-0.0f64).to_bits() { 0.0 } else { max_norm };
        Self {
            max_norm,
            max_norm_at: 0,
            norm_type: NormType::L2,
            eps: 0.0,
            loss_scale: 1.0,
            loss_scale_at: 0,
            nonfinite: NonFinite::Skip,
        }
    }

    /// [`new`](Self::new) with a `max_norm` that lies on the GPU, an f64 that is read when the work gets there: so a
    /// captured graph, or a schedule that the device computes, can have another one every time. CUDA only: gradients in
    /// host memory need it by value, and say so. A negative or NaN one on the device only measures.
    ///
    /// # Safety
    /// `address` is that of an f64 in memory of the clipper's device whenever work made with it runs, replays of a graph
    /// included, and nothing writes it at that time unless the stream orders it.
    #[must_use]
    pub const unsafe fn max_norm_at(address: u64) -> Self {
        let mut clip = Self::new(f64::INFINITY);
        clip.max_norm_at = address;
        clip
    }

    /// Order of the norm.
    #[must_use]
    pub const fn norm_type(mut self, norm_type: NormType) -> Self {
        self.norm_type = norm_type.canonical();
        self
    }

    /// Added to the norm in the quotient: 0 (the default) makes the clipped norm equal to `max_norm`, as TensorFlow and
    /// optax do. Negative, infinite or NaN is an error when it is used.
    #[must_use]
    pub const fn eps(mut self, eps: f64) -> Self {
        self.eps = eps;
        self
    }

    /// `min(max_norm / (total_norm + 1e-6), 1)`, the formula of PyTorch: eps is 1e-6, so a norm within 1e-6 below
    /// `max_norm` is scaled too. What happens to NaN and Inf stays [`nonfinite`](Self::nonfinite)'s to say;
    /// [`compat::torch::clip_grad_norm`](crate::compat::torch::clip_grad_norm) has PyTorch's answer to them besides.
    #[must_use]
    pub const fn torch_compatible(self) -> Self {
        self.eps(Self::TORCH_EPS)
    }

    /// The gradients are those of a loss that was multiplied by `loss_scale`, as in mixed-precision training: remove it
    /// in the same call. `max_norm`, and the norm that is reported, are those of the unscaled gradients:
    ///
    /// ```text
    /// total_norm = norm(gradients) / loss_scale
    /// multiplier = clip_coef / loss_scale          clip_coef is 1 where nothing is clipped
    /// ```
    ///
    /// Every gradient is multiplied by `multiplier`, once, also where nothing is clipped, unless it is 1: a loss scale of
    /// 1 is the same as none. An infinite `max_norm` only removes the scale. (With a scale of 1 it only measures, whatever the
    /// policy; `f64::MAX` clips as little, and keeps the policy.) A norm that is not finite is an overflow:
    /// [`NonFinite`] says what becomes of the gradients ([`Skip`](NonFinite::Skip) leaves the scale in them), and
    /// [`found_inf`](crate::NormReport::found_inf) is true, on a GPU without a wait
    #[cfg_attr(feature = "cuda", doc = "([`found_inf_address`](crate::cuda::Pending::found_inf_address)).")]
    #[cfg_attr(not(feature = "cuda"), doc = "(in the feature `cuda`).")]
    ///
    /// An unscaled f16 gradient can be too small for its type, which the loss scale was there to prevent: below 2^-24 it
    /// becomes 0 or 2^-24. That is so wherever scales are removed from f16 in place.
    ///
    /// Zero, negative, subnormal, infinite or NaN is an error when it is used.
    ///
    /// ```
    /// use gradclip::{cpu, ClipNorm};
    /// let mut grads = [[3.0f32 * 1024.0, 4.0 * 1024.0]];
    /// let report = cpu::clip_grad_norm(&mut grads, ClipNorm::new(2.5).loss_scale(1024.0))?;
    /// assert_eq!((report.total_norm, report.clip_coef, report.multiplier), (5.0, 0.5, 0.5 / 1024.0));
    /// assert_eq!(grads, [[1.5, 2.0]]);
    /// # Ok::<(), gradclip::Error>(())
    /// ```
    #[must_use]
    pub const fn loss_scale(mut self, loss_scale: f64) -> Self {
        self.loss_scale = loss_scale;
        self.loss_scale_at = 0;
        self
    }

    /// [`loss_scale`](Self::loss_scale) where it lies on the GPU, an f32 that is read when the work gets there: as the
    /// loss scalers of PyTorch, Megatron and TransformerEngine keep it, and as a captured graph can be given another one.
    /// The scale, not its inverse, which in f32 is rounded. CUDA only: gradients in host memory need it by value, and
    /// say so.
    ///
    /// On the device nobody can be told of a loss scale that is zero, negative, infinite or NaN. The norm is NaN then:
    /// an overflow was found, and what becomes of the gradients is [`NonFinite`]'s to say.
    ///
    /// # Safety
    /// `address` is that of an f32 in memory of the clipper's device whenever work made with it runs, replays of a graph
    /// included, and nothing writes it at that time unless the stream orders it.
    #[must_use]
    pub const unsafe fn loss_scale_at(mut self, address: u64) -> Self {
        self.loss_scale = 1.0;
        self.loss_scale_at = address;
        self
    }

    /// What to do when the norm is NaN or infinite.
    #[must_use]
    pub const fn nonfinite(mut self, nonfinite: NonFinite) -> Self {
        self.nonfinite = nonfinite;
        self
    }

    pub(crate) const fn measure_only(norm_type: NormType) -> Self {
        Self::new(f64::INFINITY).norm_type(norm_type)
    }

    /// Itself, if it is valid.
    pub(crate) fn validated(self) -> Result<Self> {
        self.validate().map(|()| self)
    }

    /// For a running norm of that order: 2, which nobody may have asked for, becomes it.
    pub(crate) fn of_running_norm(self, running: NormType) -> Result<Self> {
        if self.norm_type != NormType::L2 && self.norm_type != running {
            return Err(Error::OtherNormType { running, got: self.norm_type });
        }
        Ok(self.norm_type(running))
    }

    /// For a call over several ranks.
    pub(crate) fn validate_over_ranks(&self) -> Result<()> {
        if matches!(self.norm_type, NormType::Rms) {
            return Err(Error::RmsOverRanks);
        }
        self.validate()
    }

    pub(crate) fn validate(&self) -> Result<()> {
        let _env = DefaultFpEnv::enter(); // else a negative subnormal may pass for zero
        if self.max_norm.is_nan() || self.max_norm < 0.0 {
            return Err(Error::InvalidThreshold { name: "max_norm", expected: "zero or positive", got: self.max_norm });
        }
        if !self.max_norm_at.is_multiple_of(align_of::<f64>() as u64) {
            let reason = "is not a multiple of 8, as that of an f64 is";
            return Err(Error::ThresholdAddress { name: "max_norm", address: self.max_norm_at, reason });
        }
        // A subnormal one has no inverse in f64.
        if !self.loss_scale.is_normal() || self.loss_scale < 0.0 {
            let expected = "positive, finite and not subnormal";
            return Err(Error::InvalidThreshold { name: "loss_scale", expected, got: self.loss_scale });
        }
        if !self.loss_scale_at.is_multiple_of(align_of::<f32>() as u64) {
            let reason = "is not a multiple of 4, as that of an f32 is";
            return Err(Error::ThresholdAddress { name: "loss_scale", address: self.loss_scale_at, reason });
        }
        if !self.eps.is_finite() || self.eps < 0.0 {
            return Err(Error::InvalidThreshold { name: "eps", expected: "finite and not negative", got: self.eps });
        }
        if let NormType::P(p) = self.norm_type {
            if p.is_nan() || p <= 0.0 {
                return Err(Error::InvalidNormType { got: p });
            }
        }
        Ok(())
    }
}

impl ClipNorm {
    /// What a call on host memory has to check besides.
    pub(crate) fn refuse_device_threshold(&self) -> Result<()> {
        let reason = "can only be read on a GPU, and the gradients are in host memory";
        match (self.max_norm_at, self.loss_scale_at) {
            (0, 0) => Ok(()),
            (0, address) => Err(Error::ThresholdAddress { name: "loss_scale", address, reason }),
            (address, _) => Err(Error::ThresholdAddress { name: "max_norm", address, reason }),
        }
    }
}

impl From<f32> for ClipNorm {
    fn from(max_norm: f32) -> Self {
        Self::new(max_norm.into())
    }
}

impl From<f64> for ClipNorm {
    fn from(max_norm: f64) -> Self {
        Self::new(max_norm)
    }
}

/// Clipping by value: each element becomes `min(max(x, lo), hi)`.
///
/// A bound that a gradient's type cannot hold is rounded to nearest in it, and a finite one stays finite: an infinite
/// gradient always ends at a bound. NaN stays NaN, bit for bit, and is counted.
///
/// An `f64` `v` converts into the bounds `-v, v`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClipValue {
    pub(crate) lo: f64,
    pub(crate) hi: f64,
    symmetric: bool,
}

impl ClipValue {
    /// Bounds `-clip_value` and `clip_value`. A negative or NaN one is an error when it is used.
    #[must_use]
    pub const fn new(clip_value: f64) -> Self {
        Self { lo: -clip_value, hi: clip_value, symmetric: true }
    }

    /// Bounds `lo` and `hi`; either may be infinite, on its own side. `lo > hi`, a NaN or a `lo` of infinity is an error
    /// when it is used.
    #[must_use]
    pub const fn between(lo: f64, hi: f64) -> Self {
        Self { lo, hi, symmetric: false }
    }

    pub(crate) fn validate(&self) -> Result<()> {
        let _env = DefaultFpEnv::enter();
        if self.symmetric && (self.hi.is_nan() || self.hi < 0.0) {
            return Err(Error::InvalidThreshold { name: "clip_value", expected: "zero or positive", got: self.hi });
        }
        let encloses_no_number = self.lo == f64::INFINITY || self.hi == f64::NEG_INFINITY;
        if self.lo.is_nan() || self.hi.is_nan() || self.lo > self.hi || encloses_no_number {
            return Err(Error::InvalidBounds { lo: self.lo, hi: self.hi });
        }
        Ok(())
    }
}

impl From<f32> for ClipValue {
    fn from(clip_value: f32) -> Self {
        Self::new(clip_value.into())
    }
}

impl From<f64> for ClipValue {
    fn from(clip_value: f64) -> Self {
        Self::new(clip_value)
    }
}
