//! Stage 3, norm clipping: x * multiplier, in place. Twin of `kernels/scale.cu`.

use super::element::{bf16_from_f32, f16_from_f32, CpuElement};
use super::isa::{Isa, Kernel, Simd};
use crate::abi::action;
use crate::clip_coef::{Verdict, SPLIT_COEFS};
use half::{bf16, f16};

/// Applies the verdict to some elements. If it is to scale them, they are finite.
pub(crate) fn scale<T: SplitScale>(isa: Isa, verdict: &Verdict, elements: &mut [T]) {
    match Product::of(verdict) {
        Product::Keep => {}
        Product::Clear => elements.fill(T::zeroed()),
        Product::Split(coef) => isa.run(ScaleElements { coef, elements }),
        Product::Wide(coef) => elements.iter_mut().for_each(|x| *x = T::from_wide(x.wide() * coef)),
    }
}

/// The way to the product, in place and out of place alike.
pub(crate) enum Product {
    Keep,
    Clear,
    /// By [`SplitScale`].
    Split(SplitCoef),
    /// `T::from_wide(x.wide() * coef)`: multipliers tiny or huge, NaN and Inf.
    Wide(f64),
}

impl Product {
    pub(crate) fn of(verdict: &Verdict) -> Self {
        let coef = verdict.multiplier;
        match verdict.action {
            action::KEEP => Self::Keep,
            action::CLEAR => Self::Clear,
            action::SCALE if SPLIT_COEFS.contains(&coef) => Self::Split(SplitCoef::of(verdict)),
            _ => Self::Wide(coef),
        }
    }
}

/// The same for elements that may be NaN or infinite: as in IEEE 754, but NaNs canonical.
pub(crate) fn scale_any<T: SplitScale>(isa: Isa, verdict: &Verdict, elements: &mut [T]) {
    if verdict.action != action::SCALE || !SPLIT_COEFS.contains(&verdict.multiplier) {
        return scale(isa, verdict, elements); // in f64, which takes any element
    }
    // Few blocks have one that is not finite: those go element by element.
    for block in elements.chunks_mut(ANY_BLOCK) {
        let is_finite = |x: &T| x.magnitude_bits() < T::INF_BITS;
        if block.iter().fold(true, |all, x| all & is_finite(x)) {
            scale(isa, verdict, block);
            continue;
        }
        for x in block {
            if is_finite(x) {
                scale(isa, verdict, std::slice::from_mut(x));
            } else {
                *x = T::from_wide(x.wide()); // times a positive number
            }
        }
    }
}

/// Elements: half a tile of f32. In cache, when they are scaled after they were looked at.
const ANY_BLOCK: usize = 4096;

#[derive(Clone, Copy)]
pub(crate) struct SplitCoef {
    pub full: f64,
    pub hi: f32,
    pub lo: f32,
}

impl SplitCoef {
    fn of(verdict: &Verdict) -> Self {
        Self { full: verdict.multiplier, hi: verdict.coef_hi(), lo: verdict.coef_lo() }
    }
}

/// A dtype with the fast product: within one unit in the last place of `x * multiplier` for every finite x.
pub(crate) trait SplitScale: CpuElement {
    fn scale<S: Simd>(simd: S, coef: SplitCoef, elements: &mut [Self]);
}

impl SplitScale for f32 {
    #[inline(always)]
    fn scale<S: Simd>(simd: S, coef: SplitCoef, elements: &mut [Self]) {
        for x in elements {
            *x = simd.mul_add(*x, coef.hi, *x * coef.lo);
        }
    }
}

impl SplitScale for f64 {
    #[inline(always)]
    fn scale<S: Simd>(_: S, coef: SplitCoef, elements: &mut [Self]) {
        for x in elements {
            *x *= coef.full;
        }
    }
}

impl SplitScale for f16 {
    #[inline(always)]
    fn scale<S: Simd>(simd: S, coef: SplitCoef, elements: &mut [Self]) {
        let (vectors, rest) = elements.as_chunks_mut();
        for vector in vectors {
            let mut x = simd.f32_from_f16(vector);
            for x in &mut x {
                *x *= coef.hi;
            }
            *vector = simd.f16_from_f32(&x);
        }
        for x in rest {
            *x = f16_from_f32(x.real() * coef.hi);
        }
    }
}

impl SplitScale for bf16 {
    /// Two elements at a time, as the 32-bit word that they are: fewer instructions than two conversions, which also
    /// shuffle (scale in L2 cache, read and written: 143 instead of 86 GB/s with AVX-512, 66 instead of 47 with AVX2).
    #[inline(always)]
    fn scale<S: Simd>(_: S, coef: SplitCoef, elements: &mut [Self]) {
        let (head, words, tail) = bytemuck::pod_align_to_mut::<_, u32>(elements);
        for word in words {
            let low = bf16_from_f32(f32::from_bits(*word << 16) * coef.hi);
            let high = bf16_from_f32(f32::from_bits(*word & 0xffff_0000) * coef.hi);
            *word = u32::from(high.to_bits()) << 16 | u32::from(low.to_bits());
        }
        for x in head.iter_mut().chain(tail) {
            *x = bf16_from_f32(x.real() * coef.hi);
        }
    }
}

struct ScaleElements<'a, T> {
    coef: SplitCoef,
    elements: &'a mut [T],
}

impl<T: SplitScale> Kernel for ScaleElements<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        T::scale(simd, self.coef, self.elements);
    }
}
