//! Stage 2: the partials to the norm. Twin of `kernels/clip_coef.cu`, `kernels/fold.cuh` and `norm_of`; the formula itself is in
//! `src/clip_coef.rs`.

use super::isa::{Isa, Kernel, Simd};
use super::partial::{xor_tree, Partial};
use super::power::scaled_root;
use crate::abi::{FOLD_THREADS, WARP_THREADS};
use crate::clip_coef::CANONICAL_NAN;
use crate::options::NormType;

/// The norm of `numel` elements from all their tiles: thread t of the kernel takes tiles t, t + 1024, ..., then come two
/// levels of xor trees.
pub(crate) fn norm_of(partials: &[Partial], norm_type: NormType, numel: u64) -> f64 {
    match norm_type {
        // Each step is a power, so it matters whether the processor's fma is used.
        NormType::P(_) => Isa::detect().run(NormOf { partials, norm_type, numel }),
        _ => fold(partials, norm_type, numel),
    }
}

struct NormOf<'a> {
    partials: &'a [Partial],
    norm_type: NormType,
    numel: u64,
}

impl Kernel for NormOf<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> f64 {
        fold(self.partials, self.norm_type, self.numel)
    }
}

#[inline(always)]
fn fold(partials: &[Partial], norm_type: NormType, numel: u64) -> f64 {
    let combine = |a: Partial, b: Partial| a.combine(b, norm_type.of_partials());
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
    if total.sum == 0.0 || total.sum.is_infinite() {
        return total.sum;
    }
    match norm_type {
        NormType::Inf => total.sum,
        NormType::L1 => total.sum * total.scale,
        NormType::L2 => total.sum.sqrt() * total.scale,
        // Divided before the root: a norm can be beyond f64 where this is not.
        NormType::Rms => (total.sum / numel as f64).sqrt() * total.scale,
        NormType::P(p) => scaled_root(total.sum, total.scale, p),
    }
}

/// The first tile that holds a NaN or an Inf.
pub(crate) fn first_bad_tile(partials: &[Partial]) -> Option<usize> {
    partials.iter().position(|partial| !partial.sum.is_finite())
}
