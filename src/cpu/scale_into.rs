//! Stage 3, norm clipping out of place: x * clip_coef, to an output of the same type or of f32. Twin of
//! `kernels/scale_into.cu`.

use super::element::CpuElement;
use super::grads::{Grad, GradMut};
use super::isa::{Isa, Kernel, Simd};
use super::scale::{Product, SplitCoef, SplitScale};
use crate::clip_coef::Verdict;
use half::{bf16, f16};

/// A gradient and the output for it, of as many elements.
pub(crate) enum Pair<'a> {
    F32(&'a [f32], &'a mut [f32]),
    F64(&'a [f64], &'a mut [f64]),
    F16(&'a [f16], &'a mut [f16]),
    BF16(&'a [bf16], &'a mut [bf16]),
    F64ToF32(&'a [f64], &'a mut [f32]),
    F16ToF32(&'a [f16], &'a mut [f32]),
    BF16ToF32(&'a [bf16], &'a mut [f32]),
}

/// Evaluates `$body` with `$input` and `$output` bound to the slices inside `$pair`, whatever their types.
macro_rules! with_pair {
    ($pair:expr, $input:ident, $output:ident => $body:expr) => {
        match $pair {
            Pair::F32($input, $output) => $body,
            Pair::F64($input, $output) => $body,
            Pair::F16($input, $output) => $body,
            Pair::BF16($input, $output) => $body,
            Pair::F64ToF32($input, $output) => $body,
            Pair::F16ToF32($input, $output) => $body,
            Pair::BF16ToF32($input, $output) => $body,
        }
    };
}
pub(crate) use with_pair;

impl<'a> Pair<'a> {
    /// None for types of which `can_take` in src/outputs.rs says no.
    pub(crate) fn of(grad: Grad<'a>, output: GradMut<'a>) -> Option<Self> {
        Some(match (grad, output) {
            (Grad::F32(input), GradMut::F32(output)) => Self::F32(input, output),
            (Grad::F64(input), GradMut::F64(output)) => Self::F64(input, output),
            (Grad::F16(input), GradMut::F16(output)) => Self::F16(input, output),
            (Grad::BF16(input), GradMut::BF16(output)) => Self::BF16(input, output),
            (Grad::F64(input), GradMut::F32(output)) => Self::F64ToF32(input, output),
            (Grad::F16(input), GradMut::F32(output)) => Self::F16ToF32(input, output),
            (Grad::BF16(input), GradMut::F32(output)) => Self::BF16ToF32(input, output),
            _ => return None,
        })
    }
}

/// Applies the verdict to some elements, of which there are as many outputs.
pub(crate) fn scale_into<T: ScaleInto<O>, O: SplitScale>(isa: Isa, verdict: &Verdict, input: &[T], output: &mut [O]) {
    match Product::of(verdict) {
        Product::Keep => {}
        Product::Clear => output.fill(O::zeroed()),
        Product::Split(coef) => isa.run(ScaleElementsInto { coef, input, output }),
        Product::Wide(coef) => output.iter_mut().zip(input).for_each(|(out, x)| *out = O::from_wide(x.wide() * coef)),
    }
}

/// A dtype with the fast product to another one. Where that holds every value of this one, the product is the one in
/// place, after an exact conversion.
pub(crate) trait ScaleInto<O>: CpuElement {
    fn scale_into<S: Simd>(simd: S, coef: SplitCoef, input: &[Self], output: &mut [O]);
}

impl<T: SplitScale> ScaleInto<T> for T {
    #[inline(always)]
    fn scale_into<S: Simd>(simd: S, coef: SplitCoef, input: &[T], output: &mut [T]) {
        output.copy_from_slice(input);
        T::scale(simd, coef, output);
    }
}

impl ScaleInto<f32> for f64 {
    #[inline(always)]
    fn scale_into<S: Simd>(_: S, coef: SplitCoef, input: &[f64], output: &mut [f32]) {
        for (out, x) in output.iter_mut().zip(input) {
            *out = (x * coef.full) as f32;
        }
    }
}

impl ScaleInto<f32> for f16 {
    #[inline(always)]
    fn scale_into<S: Simd>(simd: S, coef: SplitCoef, input: &[f16], output: &mut [f32]) {
        let ((vectors, rest), (out_vectors, out_rest)) = (input.as_chunks(), output.as_chunks_mut());
        for (out, x) in out_vectors.iter_mut().zip(vectors) {
            *out = simd.f32_from_f16(x);
        }
        for (out, x) in out_rest.iter_mut().zip(rest) {
            *out = x.real();
        }
        f32::scale(simd, coef, output);
    }
}

impl ScaleInto<f32> for bf16 {
    #[inline(always)]
    fn scale_into<S: Simd>(simd: S, coef: SplitCoef, input: &[bf16], output: &mut [f32]) {
        for (out, x) in output.iter_mut().zip(input) {
            *out = x.real();
        }
        f32::scale(simd, coef, output);
    }
}

/// Elements that are converted before they are multiplied: 8 KiB of f32 or 16 of f64, which stay in L1.
const CHUNK_NUMEL: usize = 2048;

struct ScaleElementsInto<'a, T, O> {
    coef: SplitCoef,
    input: &'a [T],
    output: &'a mut [O],
}

impl<T: ScaleInto<O>, O> Kernel for ScaleElementsInto<'_, T, O> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (input, output) in self.input.chunks(CHUNK_NUMEL).zip(self.output.chunks_mut(CHUNK_NUMEL)) {
            T::scale_into(simd, self.coef, input, output);
        }
    }
}
