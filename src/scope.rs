//! Which gradients share a norm.

use crate::abi::{StatsSlot, NO_ELEMENT};
use crate::error::{Error, Result};
use crate::report::{NormReport, Report};
use std::ops::Range;

/// What has a norm, and a coefficient, of its own: the whole list, each tensor, named groups of tensors, or each row.
///
/// ```
/// use gradclip::{cpu, Scope};
/// let mut grads = [vec![3.0f32, 4.0], vec![0.3, 0.4]];
/// let report = cpu::clip_grad_norm_by(&mut grads, &Scope::per_tensor(), 1.0)?;
/// assert_eq!(grads, [[0.6, 0.8], [0.3, 0.4]]); // the second one is within the threshold by itself
/// assert_eq!((report.groups[0].total_norm, report.groups[1].written), (5.0, false));
/// # Ok::<(), gradclip::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scope<'a> {
    pub(crate) kind: Kind<'a>,
    pub(crate) max_norms: Option<&'a [Option<f64>]>,
    pub(crate) telemetry: bool,
    /// Thresholds only say how many groups there are.
    pub(crate) only_measured: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind<'a> {
    Global,
    PerTensor,
    Groups(&'a [usize]),
    Rows(&'a [usize]),
    LeadingDimension,
}

impl<'a> Scope<'a> {
    /// One norm over the whole list, as [`clip_grad_norm`](crate::cpu::clip_grad_norm) has it: for its
    /// [`telemetry`](Self::telemetry).
    #[must_use]
    pub const fn global() -> Self {
        Self::new(Kind::Global)
    }

    /// Each tensor by itself, as Keras' `clipnorm` and burn clip.
    #[must_use]
    pub const fn per_tensor() -> Self {
        Self::new(Kind::PerTensor)
    }

    /// Groups of tensors, as an optimizer's parameter groups: `group_of[i]` is the group of tensor `i`, counted from 0.
    /// Its tensors need not be neighbours in the list.
    ///
    /// ```
    /// use gradclip::{cpu, Scope};
    /// let mut grads = [[3.0f32], [40.0], [4.0]];
    /// let scope = Scope::groups(&[0, 1, 0]).max_norms(&[Some(1.0), None]); // group 1 is only measured
    /// cpu::clip_grad_norm_by(&mut grads, &scope, 1.0)?;
    /// assert_eq!(grads, [[0.6], [40.0], [0.8]]);
    /// # Ok::<(), gradclip::Error>(())
    /// ```
    #[must_use]
    pub const fn groups(group_of: &'a [usize]) -> Self {
        Self::new(Kind::Groups(group_of))
    }

    /// Each row: tensor `i` is `rows[i]` rows of equal length, one after the other (the slices along its leading
    /// dimension), each of which has a norm of its own: unit-wise clipping, and per-sample clipping of one tensor. Where a
    /// sample has a row in several tensors (DP-SGD), its norm goes over all of them; these are norms of single rows.
    ///
    /// ```
    /// use gradclip::{cpu, Scope};
    /// let mut weight = [3.0f32, 4.0, 0.3, 0.4]; // 2 x 2
    /// cpu::clip_grad_norm_by(&mut [&mut weight], &Scope::rows(&[2]), 1.0)?;
    /// assert_eq!(weight, [0.6, 0.8, 0.3, 0.4]);
    /// # Ok::<(), gradclip::Error>(())
    /// ```
    #[must_use]
    pub const fn rows(rows: &'a [usize]) -> Self {
        Self::new(Kind::Rows(rows))
    }

    /// Each row, where tensors know their shapes (candle, tch): the slices along dimension 0. A tensor without dimensions
    /// is one row.
    #[must_use]
    pub const fn leading_dimension() -> Self {
        Self::new(Kind::LeadingDimension)
    }

    const fn new(kind: Kind<'a>) -> Self {
        Self { kind, max_norms: None, telemetry: false, only_measured: false }
    }

    /// A threshold for each group (or tensor, or row); `None`: that one is only measured (and a
    /// [`loss_scale`](crate::ClipNorm::loss_scale) removed). Where
    /// this is given, the threshold of the call decides nothing, but has to be a valid one; without, all have that.
    #[must_use]
    pub const fn max_norms(mut self, max_norms: &'a [Option<f64>]) -> Self {
        self.max_norms = Some(max_norms);
        self
    }

    /// Where tensors know their shapes: `rows[i]` is the leading dimension of tensor `i`.
    #[cfg(any(feature = "candle", feature = "tch"))]
    pub(crate) fn with_leading_dimensions<'b>(&self, rows: &'b [usize]) -> Scope<'b>
    where
        'a: 'b,
    {
        let kind = if self.kind == Kind::LeadingDimension { Kind::Rows(rows) } else { self.kind };
        Scope { kind, ..*self }
    }

    /// Rows of all tensors, where they count.
    #[cfg(feature = "candle")]
    pub(crate) fn num_rows(&self) -> usize {
        let Kind::Rows(rows) = self.kind else { return 0 };
        rows.iter().fold(0, |sum, &rows| sum.saturating_add(rows))
    }

    /// For a call that has no norm.
    pub(crate) fn refuse_norms(&self) -> Result<()> {
        match (self.max_norms, self.telemetry) {
            (Some(_), _) => Err(Error::ScopeForNorms { option: "max_norms" }),
            (_, true) => Err(Error::ScopeForNorms { option: "telemetry" }),
            _ => Ok(()),
        }
    }

    pub(crate) const fn only_measured(mut self) -> Self {
        self.only_measured = true;
        self
    }

    /// Also reports, of each tensor, its norm, its largest magnitude, and how many elements are zero or not finite
    /// ([`ScopedReport::tensors`]). Seen on the same pass: no gradient is read once more.
    #[must_use]
    pub const fn telemetry(mut self) -> Self {
        self.telemetry = true;
        self
    }
}

/// Result of [`clip_grad_norm_by`](crate::cpu::clip_grad_norm_by), [`clip_coef_by`](crate::cpu::clip_coef_by) or
/// [`norms_by`](crate::cpu::norms_by); with [`ValueReport`](crate::ValueReport)s, of
/// [`clip_grad_value_by`](crate::cpu::clip_grad_value_by).
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ScopedReport<R = NormReport> {
    /// Of each group, tensor or row; rows in the order of the list. `first_nonfinite` is an index in the list. One without
    /// elements has norm 0 and is not written.
    pub groups: Vec<R>,
    /// Of each tensor, in the order of the list; empty without [`Scope::telemetry`].
    pub tensors: Vec<TensorStats>,
    /// Where in `groups` tensor `i` is.
    groups_of: Vec<Range<usize>>,
}

/// What was seen of one tensor, as it came: with a [`loss_scale`](crate::ClipNorm::loss_scale) still multiplied by it.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct TensorStats {
    /// Norm of the tensor alone, of the order asked for. (With rows its sum starts anew in each: other last bits.)
    pub norm: f64,
    /// Largest magnitude of its finite elements; 0 if there are none.
    pub max_abs: f64,
    /// Number of elements that are 0 or -0.
    pub zeros: u64,
    /// Number of elements that are NaN or infinite.
    pub nonfinite: u64,
    /// Index of the first element that is NaN or infinite, counted through the tensor as it lies in memory.
    pub first_nonfinite: Option<u64>,
}

impl<R: Report> ScopedReport<R> {
    pub(crate) fn new(groups: Vec<R>, tensors: Vec<TensorStats>, groups_of: Vec<Range<usize>>) -> Self {
        Self { groups, tensors, groups_of }
    }

    /// The reports that tensor `index` of the list is part of: one, or one for each of its rows.
    #[must_use]
    pub fn of_tensor(&self, index: usize) -> Option<&[R]> {
        self.groups.get(self.groups_of.get(index)?.clone())
    }

    /// How many groups, tensors or rows were written.
    #[must_use]
    pub fn num_written(&self) -> usize {
        self.groups.iter().filter(|group| group.is_written()).count()
    }
}

impl ScopedReport {
    /// Whether all norms are finite.
    #[must_use]
    pub fn is_finite(&self) -> bool {
        self.groups.iter().all(NormReport::is_finite)
    }
}

impl From<StatsSlot> for TensorStats {
    fn from(StatsSlot { norm, stats }: StatsSlot) -> Self {
        Self {
            norm,
            max_abs: stats.max_abs,
            zeros: stats.zeros,
            nonfinite: stats.nonfinite,
            first_nonfinite: (stats.first_nonfinite != NO_ELEMENT).then_some(stats.first_nonfinite),
        }
    }
}
