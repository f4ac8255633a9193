//! f16 and bf16 to f32 and back, for every bit pattern, as far as the public functions show it: the code that converts
//! them is our own.
#![allow(clippy::unwrap_used)]

#[path = "support/format.rs"]
mod format;

use format::{product, within_one_unit, Float, Format};
use gradclip::cpu::{self, AsGrad, AsGradMut};
use gradclip::{ClipNorm, ClipValue, Dtype, NonFinite, NormType};
use half::{bf16, f16};

fn all_patterns<T: Float>() -> Vec<T> {
    (0..=u64::from(u16::MAX)).map(T::of_bits).collect()
}

fn all_finite<T: Float>() -> Vec<T> {
    all_patterns::<T>().into_iter().filter(|x| T::FORMAT.is_finite(x.bits())).collect()
}

/// A threshold that makes the coefficient exactly `coef` under the largest magnitude as norm: that is a number of few
/// bits, so `max_norm` is exact for every `coef` of at most 40 bits, and the quotient gives `coef` back.
fn clip_by<T: Float>(coef: f64) -> ClipNorm {
    let largest = T::FORMAT.value(T::FORMAT.inf_bits() - 1);
    ClipNorm::new(coef * largest).norm_type(NormType::Inf)
}

/// Every finite element before and after. In one tensor, where they are converted in vectors; and in pieces so short and
/// so aligned that they are converted one at a time. The bits are the same.
fn scaled<T: Float>(coef: f64) -> (Vec<T>, Vec<T>, f64)
where
    Vec<T>: AsGradMut,
    [T]: AsGradMut,
{
    let before = all_finite::<T>();
    let mut whole = [before.clone()];
    let report = cpu::clip_grad_norm(&mut whole, clip_by::<T>(coef)).unwrap();
    let [after] = whole;
    let mut in_pieces = before.clone();
    let mut pieces: Vec<&mut [T]> = in_pieces.chunks_mut(15).collect();
    assert_eq!(cpu::clip_grad_norm(&mut pieces, clip_by::<T>(coef)).unwrap(), report);
    assert!(in_pieces.iter().zip(&after).all(|(a, b)| a.bits() == b.bits()), "{} * {coef:e} in pieces", T::DTYPE);
    (before, after, report.clip_coef)
}

/// Coefficients of every kind: plain, of f32's least exponents, below what f32 can split, below f32, below f64's
/// normal range.
const COEFS: [f64; 12] = [0.999999, 0.75, 1.0 / 3.0, 0.1, 1e-3, 3e-5, 6e-8, 1e-20, 3.3e-30, 1e-40, 1e-80, 2.5e-310];

fn every_product_is_within_one_unit<T: Float>()
where
    Vec<T>: AsGradMut,
    [T]: AsGradMut,
{
    for coef in COEFS {
        let (before, after, clip_coef) = scaled::<T>(coef);
        assert!((clip_coef / coef - 1.0).abs() < 1e-15 || coef < 1e-300, "{clip_coef:e} for {coef:e}");
        let mut correctly_rounded = 0;
        for (x, got) in before.iter().zip(&after) {
            let exact = product(T::FORMAT, x.bits(), clip_coef);
            let nearest = T::FORMAT.nearest(&exact);
            correctly_rounded += usize::from(got.bits() == nearest);
            assert!(
                within_one_unit(T::FORMAT, &exact, got.bits()),
                "{x:?} * {clip_coef:e} is {got:?}, not {:?}",
                T::of_bits(nearest)
            );
            let sign = T::FORMAT.sign_bit();
            assert_eq!(got.bits() & sign, x.bits() & sign, "{x:?} * {clip_coef:e} is {got:?}: the sign is lost");
        }
        // Taking c to 24 bits may push a product over a tie that it is next to: seldom, but of 0.1 x one in 300 is.
        // More than that means that the final rounding is not to nearest.
        assert!(
            correctly_rounded as f64 > 0.99 * before.len() as f64,
            "{clip_coef:e}: {correctly_rounded} of {} are rounded to nearest",
            before.len()
        );
    }
}

#[test]
fn every_f16_times_any_coefficient() {
    every_product_is_within_one_unit::<f16>();
}

#[test]
fn every_bf16_times_any_coefficient() {
    every_product_is_within_one_unit::<bf16>();
}

/// Multipliers as loss scales make them, on both sides of 1: usual ones, at the ends of what f32 can split, beyond f32.
fn multipliers() -> Vec<f64> {
    let ends = [2f64.powi(60), 2f64.powi(-60), 2f64.powi(127), 2f64.powi(-126)];
    let around = ends.iter().flat_map(|x| [0.99999999, 1.0, 1.00000001, 1.3].map(|y| x * y));
    let usual =
        [1.0 / 65536.0, 1e-3, 1.0 / 3.0, 0.7, 1.5, 3.7, 1000.0, 1e10, 3.3e30, 3.4e38, 1e40, 1e200, 2f64.powi(1021)];
    usual.into_iter().chain(around).collect()
}

/// Every finite f16 or bf16, or as many f32 and f64, by every multiplier. Only removes a scale: `max_norm` is infinite.
fn every_product_of_a_loss_scale<T: Float>(before: &[T])
where
    Vec<T>: AsGradMut,
{
    for multiplier in multipliers() {
        let mut after = [before.to_vec()];
        let clip = ClipNorm::new(f64::INFINITY).norm_type(NormType::Inf).loss_scale(1.0 / multiplier);
        let report = cpu::clip_grad_norm(&mut after, clip).unwrap();
        if report.found_inf {
            continue; // of f64: the unscaled norm overflows
        }
        assert!((report.multiplier / multiplier - 1.0).abs() < 1e-15 && report.clip_coef == 1.0, "{report:?}");
        for (x, got) in before.iter().zip(&after[0]) {
            let exact = product(T::FORMAT, x.bits(), report.multiplier);
            let nearest = T::of_bits(T::FORMAT.nearest(&exact));
            let sign_kept = (got.bits() ^ x.bits()) & T::FORMAT.sign_bit() == 0;
            assert!(
                within_one_unit(T::FORMAT, &exact, got.bits()) && sign_kept,
                "{x:?} * {multiplier:e} is {got:?}, not {nearest:?}"
            );
        }
        // The same products of gradients that nobody looked at before, with NaN and Inf among them.
        let specials = [f64::INFINITY, f64::NEG_INFINITY, f64::NAN].map(T::nearest);
        let mut any = [[before, &specials].concat()];
        cpu::clip_with_norm(&mut any, 1.0, clip).unwrap();
        let (finite, special) = any[0].split_at(before.len());
        assert!(finite.iter().zip(&after[0]).all(|(a, b)| a.bits() == b.bits()), "{multiplier:e}");
        assert!(special.iter().zip(&specials).all(|(a, b)| a.bits() == b.bits()), "{multiplier:e}: {special:?}");
    }
}

#[test]
fn every_f16_and_bf16_without_its_loss_scale() {
    every_product_of_a_loss_scale(&all_finite::<f16>());
    every_product_of_a_loss_scale(&all_finite::<bf16>());
}

/// One pattern in 40,503 of f32, and of f64 the same exponents and more.
#[test]
fn many_f32_and_f64_without_their_loss_scale() {
    let patterns = |step: u64, count: u64| (0..count).map(move |i| i.wrapping_mul(step));
    let f32s = patterns(40_503, (1 << 32) / 40_503).map(f32::of_bits);
    every_product_of_a_loss_scale(&f32s.filter(|x| x.is_finite()).collect::<Vec<_>>());
    let f64s = patterns(0x9e37_79b9_7f4a_7c15, 50_000).map(f64::of_bits);
    every_product_of_a_loss_scale(&f64s.filter(|x| x.abs() < 1e100).collect::<Vec<_>>());
}

/// Powers of two leave nothing to round but what leaves the normal range, and half of that are ties.
fn powers_of_two_are_rounded_to_nearest_even<T: Float>()
where
    Vec<T>: AsGradMut,
    [T]: AsGradMut,
{
    for exponent in (1..45).chain([60, 61, 100, 126, 127, 140, 149, 150, 200, 300]) {
        let coef = format::power_of_two(-exponent);
        let (before, after, clip_coef) = scaled::<T>(coef);
        assert_eq!(clip_coef, coef);
        for (x, got) in before.iter().zip(&after) {
            let expected = T::of_bits(T::FORMAT.nearest(&product(T::FORMAT, x.bits(), coef)));
            assert_eq!(got.bits(), expected.bits(), "{x:?} * 2^-{exponent} is {got:?}, not {expected:?}");
        }
    }
}

#[test]
fn every_f16_times_powers_of_two() {
    powers_of_two_are_rounded_to_nearest_even::<f16>();
}

#[test]
fn every_bf16_times_powers_of_two() {
    powers_of_two_are_rounded_to_nearest_even::<bf16>();
}

/// The products as `half` would have them: from f64, whose products of 8 or 11 bits with 24 are exact.
#[test]
fn half_agrees() {
    for coef in [0.5, 0.25, 2f64.powi(-20)] {
        let (before, after, _) = scaled::<f16>(coef);
        for (x, got) in before.into_iter().zip(after) {
            assert_eq!(got.to_bits(), f16::from_f64(x.to_f64() * coef).to_bits(), "{x:?} * {coef}");
        }
        let (before, after, _) = scaled::<bf16>(coef);
        for (x, got) in before.into_iter().zip(after) {
            assert_eq!(got.to_bits(), bf16::from_f64(x.to_f64() * coef).to_bits(), "{x:?} * {coef}");
        }
    }
}

/// Infinite elements and NaN, as only NonFinite::Propagate scales them.
#[test]
fn nan_and_inf_are_propagated() {
    fn check<T: Float>()
    where
        Vec<T>: AsGradMut,
    {
        // The norm is NaN: so becomes every element, in the one canonical form.
        let mut grads = [all_patterns::<T>()];
        cpu::clip_grad_norm(&mut grads, ClipNorm::new(1.0).nonfinite(NonFinite::Propagate)).unwrap();
        let canonical = T::FORMAT.inf_bits() | 1 << (T::FORMAT.precision - 2);
        assert!(grads[0].iter().all(|x| x.bits() == canonical), "{}", T::DTYPE);
        // The norm is Inf: what is finite becomes a zero of its sign, Inf becomes NaN.
        let before: Vec<T> = all_patterns::<T>().into_iter().filter(|x| !T::FORMAT.is_nan(x.bits())).collect();
        let mut grads = [before.clone()];
        cpu::clip_grad_norm(&mut grads, ClipNorm::new(1.0).nonfinite(NonFinite::Propagate)).unwrap();
        for (x, got) in before.iter().zip(&grads[0]) {
            let zero = x.bits() & T::FORMAT.sign_bit();
            assert_eq!(got.bits(), if T::FORMAT.is_inf(x.bits()) { canonical } else { zero }, "{x:?}");
        }
    }
    check::<f16>();
    check::<bf16>();
}

#[test]
fn infinite_bounds_keep_every_pattern() {
    fn check<T: Float>()
    where
        Vec<T>: AsGradMut,
    {
        let mut grads = [all_patterns::<T>()];
        let report = cpu::clip_grad_value(&mut grads, f64::INFINITY).unwrap();
        assert_eq!(grads[0].iter().map(|x| x.bits()).collect::<Vec<_>>(), (0..=0xffff).collect::<Vec<_>>());
        let nans = (0..=0xffff).filter(|&bits| T::FORMAT.is_nan(bits)).count() as u64;
        assert_eq!((report.nan, report.clipped, report.written), (nans, 0, false), "{}", T::DTYPE);
        assert_eq!(report.first_nonfinite, Some(0));
    }
    check::<f16>();
    check::<bf16>();
}

/// A bound is compared as a number: each pattern as the bound for all.
#[test]
fn finite_bounds_against_every_pattern() {
    fn check<T: Float>()
    where
        Vec<T>: AsGradMut,
    {
        let format = T::FORMAT;
        let magnitudes = [0, 1, 2, 0x3ff, 0x400, 0x401, 0x1234, 0x3bff, 0x3c00, 0x7000, format.inf_bits() - 1];
        for bound in magnitudes {
            let mut grads = [all_patterns::<T>()];
            let report = cpu::clip_grad_value(&mut grads, format.value(bound)).unwrap();
            let expected = |bits: u64| {
                let outside = format.magnitude(bits) > bound && !format.is_nan(bits);
                if outside {
                    bits & format.sign_bit() | bound
                } else {
                    bits
                }
            };
            for (bits, got) in (0..=0xffff).zip(&grads[0]) {
                assert_eq!(got.bits(), expected(bits), "{:?} limited to {bound:#06x}", T::of_bits(bits));
            }
            let outside = (0..=0xffff).filter(|&bits| expected(bits) != bits).count() as u64;
            assert_eq!((report.clipped, report.written), (outside, outside > 0), "{} {bound:#06x}", T::DTYPE);
        }
    }
    check::<f16>();
    check::<bf16>();
}

/// A bound between two elements is rounded to nearest even, from all its 53 bits.
#[test]
fn bounds_are_rounded_once() {
    for dtype in [Dtype::F16, Dtype::BF16] {
        let format = Format::of(dtype);
        for below in [0u64, 1, 2, 0x3ff, 0x400, 0x3c00, 0x3c01, 0x3f80, 0x3f81, 0x5fff] {
            let (low, high) = (format.value(below), format.value(below + 1));
            let middle = (low + high) / 2.0;
            for bound in [middle, next_up(middle), next_down(middle), low + (high - low) * 0.51] {
                let expected = format::nearest(dtype, bound);
                let got = largest_after_clipping(dtype, bound);
                assert_eq!(got, expected, "bound {bound:e} in {dtype} is {got:#06x}, not {expected:#06x}");
            }
        }
    }
}

fn largest_after_clipping(dtype: Dtype, bound: f64) -> u64 {
    if dtype == Dtype::F16 {
        let mut grads = [[f16::INFINITY]];
        cpu::clip_grad_value(&mut grads, ClipValue::new(bound)).unwrap();
        grads[0][0].bits()
    } else {
        let mut grads = [[bf16::INFINITY]];
        cpu::clip_grad_value(&mut grads, ClipValue::new(bound)).unwrap();
        grads[0][0].bits()
    }
}

fn next_up(x: f64) -> f64 {
    f64::from_bits(x.to_bits() + 1)
}

fn next_down(x: f64) -> f64 {
    f64::from_bits(x.to_bits() - 1)
}

/// sqrt(x^2) is |x| for every x (in binary arithmetic without over- and underflow): so is the norm of one element.
fn norm_of_one_is_its_magnitude<T: Float>(patterns: impl Iterator<Item = u64>)
where
    Vec<T>: AsGrad,
{
    let mut element = [vec![T::of_bits(0)]];
    for bits in patterns {
        element[0][0] = T::of_bits(bits);
        for norm_type in [NormType::L1, NormType::L2, NormType::Inf] {
            let report = cpu::total_norm(&element, norm_type).unwrap();
            let expected = T::FORMAT.value(T::FORMAT.magnitude(bits));
            let equal = report.total_norm == expected || (report.total_norm.is_nan() && expected.is_nan());
            assert!(equal, "{norm_type:?} of {:?} is {:e}, not {expected:e}", T::of_bits(bits), report.total_norm);
            let first_nonfinite = (!T::FORMAT.is_finite(bits)).then_some(0);
            assert_eq!(report.first_nonfinite, first_nonfinite, "{:?}", T::of_bits(bits));
        }
    }
}

#[test]
fn norm_of_one_f16() {
    norm_of_one_is_its_magnitude::<f16>(0..=0xffff);
}

#[test]
fn norm_of_one_bf16() {
    norm_of_one_is_its_magnitude::<bf16>(0..=0xffff);
}

/// f32 and f64 have too many patterns: every exponent, with the ends of its fractions and some between.
#[test]
fn norm_of_one_f32_and_f64() {
    let fractions = |bits: u32| [0, 1, (1 << bits) - 1, 1 << (bits - 1), 0x5555_5555_5555_5555 & ((1 << bits) - 1)];
    norm_of_one_is_its_magnitude::<f32>((0..512u64).flat_map(|field| fractions(23).map(|f| field << 23 | f)));
    norm_of_one_is_its_magnitude::<f64>((0..4096u64).flat_map(|field| fractions(52).map(|f| field << 52 | f)));
}
