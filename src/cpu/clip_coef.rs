//! Stage 2: the partials to the norm. Twin of `kernels/clip_coef.cu`, `kernels/fold.cuh` and `norm_of`; the formula itself is in
//! `src/clip_coef.rs`.

use super::partial::{xor_tree, Partial, RANGE_FACTOR, RANGE_FACTOR_INVERSE};
use crate::abi::{FOLD_THREADS, WARP_THREADS};
use crate::clip_coef::CANONICAL_NAN;
use crate::options::NormType;

/// The norm over all tiles: thread t of the kernel takes tiles t, t + 1024, ..., then come two levels of xor trees.
pub(crate) fn norm_of(partials: &[Partial], norm_type: NormType) -> f64 {
    let combine = |a: Partial, b: Partial| a.combine(b, norm_type);
    let thread = |thread: usize| {
        let own = partials.get(thread..).unwrap_or_default();
        own.iter().step_by(FOLD_THREADS).copied().fold(Partial::default(), combine)
    };
    let warps: [Partial; WARP_THREADS] = std::array::from_fn(|warp| {
        if warp * WARP_THREADS >= partials.len() {
            return Partial::default(); // what the tree would give
        }
        xor_tree(std::array::from_fn::<_, WARP_THREADS, _>(|lane| thread(warp * WARP_THREADS + lane)), combine)
    });
    let total = xor_tree(warps, combine);
    if total.sum.is_nan() {
        return CANONICAL_NAN;
    }
    let norm = if norm_type == NormType::L2 { total.sum.sqrt() } else { total.sum };
    match total.scale {
        1 => norm * RANGE_FACTOR,
        -1 => norm * RANGE_FACTOR_INVERSE,
        _ => norm,
    }
}

/// The first tile that holds a NaN or an Inf.
pub(crate) fn first_bad_tile(partials: &[Partial]) -> Option<usize> {
    partials.iter().position(|partial| !partial.sum.is_finite())
}
