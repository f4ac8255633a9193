//! What a call found and did.

/// Result of [`clip_grad_norm`](crate::cpu::clip_grad_norm) or [`total_norm`](crate::cpu::total_norm).
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct NormReport {
    /// Norm over all gradients, before clipping. NaN if any element is NaN, else infinite if any is.
    pub total_norm: f64,
    /// What the gradients were multiplied by; 1 when they were left alone.
    pub clip_coef: f64,
    /// Whether the gradients were written.
    pub written: bool,
    /// Index of the first tensor that holds a NaN or an Inf.
    pub first_nonfinite: Option<usize>,
}

/// Result of [`clip_grad_value`](crate::cpu::clip_grad_value).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ValueReport {
    /// Number of elements that were outside the bounds, infinite ones included.
    pub clipped: u64,
    /// Number of NaN elements; they stay as they are.
    pub nan: u64,
    /// Whether anything was written.
    pub written: bool,
    /// Index of the first tensor that held a NaN or an Inf.
    pub first_nonfinite: Option<usize>,
}
