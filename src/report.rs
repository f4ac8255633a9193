//! What a call found and did.

use crate::abi::{action, ReportSlot, NO_TILE};

/// Result of [`clip_grad_norm`](crate::cpu::clip_grad_norm), [`clip_with_norm`](crate::cpu::clip_with_norm),
/// [`clip_coef`](crate::cpu::clip_coef) or [`total_norm`](crate::cpu::total_norm).
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct NormReport {
    /// Norm over all gradients, before clipping. NaN if any element is NaN, else infinite if any is. With a
    /// [`loss_scale`](crate::ClipNorm::loss_scale), that of the unscaled gradients.
    pub total_norm: f64,
    /// What clipping asks for: `max_norm / (total_norm + eps)`, or 1 where it asks for nothing. A policy may say
    /// otherwise when the norm is not finite.
    pub clip_coef: f64,
    /// What the gradients were multiplied by: `clip_coef`, over the loss scale if there is one; 1 when they were left
    /// alone. For [`clip_coef`](crate::cpu::clip_coef), which writes nothing: what they are to be multiplied by.
    pub multiplier: f64,
    /// Whether the norm is NaN or infinite: an optimizer's step with these gradients is to be left out.
    pub found_inf: bool,
    /// Whether the gradients were written.
    pub written: bool,
    /// Index of the first tensor that holds a NaN or an Inf. Of a call over several ranks, in the list of this rank.
    pub first_nonfinite: Option<usize>,
    /// Of a call over several ranks ([`clip_grad_norm_sharded`](crate::cpu::clip_grad_norm_sharded)): the first rank whose
    /// gradients hold a NaN or an Inf. The same on all ranks.
    pub first_nonfinite_rank: Option<usize>,
}

/// Result of [`clip_grad_value`](crate::cpu::clip_grad_value), and for each group of a scope that of
/// [`clip_grad_value_by`](crate::cpu::clip_grad_value_by).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ValueReport {
    /// Number of elements that were outside the bounds, infinite ones included.
    pub clipped: u64,
    /// Number of NaN elements; they stay as they are.
    pub nan: u64,
    /// Number of all elements.
    pub numel: u64,
    /// Whether anything was written.
    pub written: bool,
    /// Index of the first tensor that held a NaN or an Inf.
    pub first_nonfinite: Option<usize>,
}

impl NormReport {
    /// Whether the norm is finite. If not, [`NonFinite`](crate::NonFinite) has said what became of the gradients, and an
    /// optimizer's step with them is usually to be left out.
    #[must_use]
    pub fn is_finite(&self) -> bool {
        self.total_norm.is_finite()
    }
}

impl ValueReport {
    /// The part of the elements that was outside the bounds, from 0 to 1; 0 where there are none.
    #[must_use]
    pub fn clipped_fraction(&self) -> f64 {
        if self.numel == 0 {
            return 0.0;
        }
        self.clipped as f64 / self.numel as f64
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::NormReport {}
    impl Sealed for super::ValueReport {}
}

/// A report of any verb: [`NormReport`], [`ValueReport`].
pub trait Report: sealed::Sealed + Copy {
    /// What a kernel has left on the device.
    #[doc(hidden)]
    fn from_slot(slot: &ReportSlot, numel: u64, tensor_of: &dyn Fn(u64) -> Option<usize>) -> Self;
    /// Whether gradients were written.
    #[doc(hidden)]
    fn is_written(&self) -> bool;
    /// The same report, with the index of its tensor changed.
    #[doc(hidden)]
    #[must_use]
    fn rename_tensors(self, name: &dyn Fn(usize) -> usize) -> Self;
    /// The same report, of a call over several ranks.
    #[doc(hidden)]
    #[must_use]
    fn of_ranks(self, _first_nonfinite_rank: Option<usize>) -> Self {
        self
    }
}

fn first_nonfinite(slot: &ReportSlot, tensor_of: &dyn Fn(u64) -> Option<usize>) -> Option<usize> {
    (slot.first_bad_tile != NO_TILE).then(|| tensor_of(slot.first_bad_tile)).flatten()
}

impl Report for NormReport {
    fn is_written(&self) -> bool {
        self.written
    }
    fn from_slot(slot: &ReportSlot, _numel: u64, tensor_of: &dyn Fn(u64) -> Option<usize>) -> Self {
        Self {
            total_norm: slot.total_norm,
            clip_coef: slot.clip_coef,
            multiplier: slot.multiplier,
            found_inf: slot.found_inf != 0.0,
            written: slot.action != action::KEEP,
            first_nonfinite: first_nonfinite(slot, tensor_of),
            first_nonfinite_rank: None, // only calls over several ranks write it
        }
    }
    fn rename_tensors(self, name: &dyn Fn(usize) -> usize) -> Self {
        Self { first_nonfinite: self.first_nonfinite.map(name), ..self }
    }
    fn of_ranks(self, first_nonfinite_rank: Option<usize>) -> Self {
        Self { first_nonfinite_rank, ..self }
    }
}

impl Report for ValueReport {
    fn is_written(&self) -> bool {
        self.written
    }
    fn from_slot(slot: &ReportSlot, numel: u64, tensor_of: &dyn Fn(u64) -> Option<usize>) -> Self {
        Self {
            clipped: slot.clipped_elements,
            nan: slot.nan_elements,
            numel,
            written: slot.action != action::KEEP,
            first_nonfinite: first_nonfinite(slot, tensor_of),
        }
    }
    fn rename_tensors(self, name: &dyn Fn(usize) -> usize) -> Self {
        Self { first_nonfinite: self.first_nonfinite.map(name), ..self }
    }
}
