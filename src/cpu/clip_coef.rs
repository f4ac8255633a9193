//! Stage 2: the partials to the norm. Twin of `kernels/clip_coef.cu`, `kernels/fold.cuh` and `norm_of`; the formula itself is in
//! `src/clip_coef.rs`.

use super::isa::{Isa, Kernel, Simd};
use super::partial::{xor_tree, Partial};
use super::power::scaled_root;
use crate::abi::{FOLD_THREADS, WARP_THREADS};
use crate::clip_coef::CANONICAL_NAN;
use crate::options::NormType;

/// The norm of `numel` elements over all their tiles.
pub(crate) fn norm_of(partials: &[Partial], norm_type: NormType, numel: u64) -> f64 {
    let mut total = total_of(partials, norm_type.of_partials());
    if matches!(norm_type, NormType::Rms) {
        total = mean_of(total, numel);
    }
    norm_of_total(total, norm_type.of_partials())
}

/// A sum of squares to their mean. Twin of `mean_of` in `kernels/decide.cuh`, which says why before the root.
fn mean_of(total: Partial, numel: u64) -> Partial {
    let sum = if total.sum == 0.0 { 0.0 } else { total.sum / numel as f64 };
    Partial { sum, ..total }
}

/// All partials in one: thread t of the kernel takes tiles t, t + 1024, ..., then come two levels of xor trees.
pub(crate) fn total_of(partials: &[Partial], norm_type: NormType) -> Partial {
    match norm_type {
        // Each step is a power, so it matters whether the processor's fma is used.
        NormType::P(_) => Isa::detect().run(TotalOf { partials, norm_type }),
        _ => fold(partials, norm_type),
    }
}

struct TotalOf<'a> {
    partials: &'a [Partial],
    norm_type: NormType,
}

impl Kernel for TotalOf<'_> {
    type Output = Partial;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Partial {
        fold(self.partials, self.norm_type)
    }
}

#[inline(always)]
fn fold(partials: &[Partial], norm_type: NormType) -> Partial {
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
    xor_tree(warps, combine)
}

/// Twin: `norm_of` in `kernels/decide.cuh`.
pub(crate) fn norm_of_total(total: Partial, norm_type: NormType) -> f64 {
    if total.sum.is_nan() {
        return CANONICAL_NAN;
    }
    if total.sum == 0.0 || total.sum.is_infinite() {
        return total.sum;
    }
    match norm_type {
        NormType::Inf => total.sum,
        NormType::L1 => total.sum * total.scale,
        NormType::L2 | NormType::Rms => total.sum.sqrt() * total.scale, // of the sum, or of the mean
        NormType::P(p) => scaled_root(total.sum, total.scale, p),
    }
}

/// The first tile that holds a NaN or an Inf.
pub(crate) fn first_bad_tile(partials: &[Partial]) -> Option<usize> {
    partials.iter().position(|partial| !partial.sum.is_finite())
}
