//! Stage 3, norm clipping: x * clip_coef, in place. Twin of `kernels/scale.cu`.

use super::element::{bf16_from_f32, f16_from_f32, CpuElement};
use super::isa::{Isa, Kernel};
use crate::abi::action;
use crate::clip_coef::{Verdict, SMALLEST_SPLIT_COEF};
use half::{bf16, f16};

/// Applies the verdict to some elements.
pub(crate) fn scale<T: SplitScale>(isa: Isa, verdict: &Verdict, elements: &mut [T]) {
    let coef = verdict.clip_coef;
    match verdict.action {
        action::KEEP => {}
        action::CLEAR => elements.fill(T::zeroed()),
        action::SCALE if coef >= SMALLEST_SPLIT_COEF => {
            let coef = SplitCoef { full: coef, hi: verdict.coef_hi(), lo: verdict.coef_lo() };
            isa.run(ScaleElements { coef, elements });
        }
        _ => elements.iter_mut().for_each(|x| *x = T::from_wide(x.wide() * coef)),
    }
}

#[derive(Clone, Copy)]
pub(crate) struct SplitCoef {
    full: f64,
    hi: f32,
    lo: f32,
}

/// A dtype with the fast product: within one unit in the last place of `x * coef` for every finite x.
pub(crate) trait SplitScale: CpuElement {
    fn times(self, coef: SplitCoef) -> Self;
}

impl SplitScale for f32 {
    #[inline(always)]
    fn times(self, coef: SplitCoef) -> Self {
        self.mul_add(coef.hi, self * coef.lo)
    }
}
impl SplitScale for f64 {
    #[inline(always)]
    fn times(self, coef: SplitCoef) -> Self {
        self * coef.full
    }
}
impl SplitScale for f16 {
    #[inline(always)]
    fn times(self, coef: SplitCoef) -> Self {
        f16_from_f32(self.real() * coef.hi)
    }
}
impl SplitScale for bf16 {
    #[inline(always)]
    fn times(self, coef: SplitCoef) -> Self {
        bf16_from_f32(self.real() * coef.hi)
    }
}

struct ScaleElements<'a, T> {
    coef: SplitCoef,
    elements: &'a mut [T],
}

impl<T: SplitScale> Kernel for ScaleElements<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for x in self.elements {
            *x = x.times(self.coef);
        }
    }
}
