//! What the element-wise functions have to do, element by element.
#![allow(dead_code)] // every test binary uses a part

use super::format::{nearest, product, within_one_unit, Format};
use super::tensor::Tensor;
use gradclip::Dtype;

/// The first element that is not `x * clip_coef` to one unit in the last place, or has lost its sign.
pub fn wrong_product(before: &[Tensor], after: &[Tensor], clip_coef: f64) -> Option<String> {
    for (tensor, (before, after)) in before.iter().zip(after).enumerate() {
        let format = before.format();
        for (index, (x, got)) in before.bits().into_iter().zip(after.bits()).enumerate() {
            let exact = product(format, x, clip_coef);
            if !within_one_unit(format, &exact, got) || (x ^ got) & format.sign_bit() != 0 {
                let (x, got) = (format.value(x), format.value(got));
                return Some(format!("element {index} of tensor {tensor}: {x:e} * {clip_coef:e} is {got:e}"));
            }
        }
    }
    None
}

/// One element under Propagate: the product, as IEEE 754 has it; any NaN is the canonical one.
pub fn propagated(format: Format, bits: u64, clip_coef: f64) -> u64 {
    if clip_coef.is_nan() || !format.is_finite(bits) {
        format.inf_bits() | 1 << (format.precision - 2)
    } else {
        bits & format.sign_bit() // times 0
    }
}

/// The bound in a dtype: to nearest, and a finite one stays finite.
pub fn bound_in(dtype: Dtype, bound: f64) -> u64 {
    let (format, bits) = (Format::of(dtype), nearest(dtype, bound));
    if bound.is_finite() && format.is_inf(bits) {
        bits - 1
    } else {
        bits
    }
}

/// The naive loop.
pub fn limited(grad: &Tensor, lo: f64, hi: f64) -> Vec<u64> {
    let format = grad.format();
    let (low, high) = (bound_in(grad.dtype(), lo), bound_in(grad.dtype(), hi));
    let limit = |bits: u64| match format.value(bits) {
        x if x < format.value(low) => low,
        x if x > format.value(high) => high,
        _ => bits,
    };
    grad.bits().into_iter().map(limit).collect()
}
