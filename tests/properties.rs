//! What holds for any list of gradients: of all dtypes, empty tensors and extreme values among them.
#![allow(clippy::unwrap_used)]

#[path = "support/exact.rs"]
mod exact;
#[path = "support/format.rs"]
mod format;
#[path = "support/lists.rs"]
mod lists;
#[path = "support/naive.rs"]
mod naive;
#[path = "support/tensor.rs"]
mod tensor;
#[path = "support/tolerance.rs"]
mod tolerance;

use format::{power_of_two, DTYPES};
use gradclip::{cpu, ClipNorm, ClipValue, Dtype, Error, NonFinite, NormType};
use lists::{finite_lists, nonfinite_lists, spec, tensors, Content};
use naive::{limited, propagated, wrong_product};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tensor::{bits_of, first_nonfinite, Tensor};

/// Norms in the strict sense.
fn norm_types() -> impl Strategy<Value = NormType> {
    let others = [1.5, 3.0, 4.0, 10.7, 100.0].map(NormType::P);
    prop_oneof![select(&[NormType::L1, NormType::L2, NormType::Inf, NormType::Rms][..]), select(others.to_vec())]
}

/// Those, and what is called a norm below order 1.
fn all_orders() -> impl Strategy<Value = NormType> {
    prop_oneof![3 => norm_types(), 1 => select([0.01, 0.5, 0.9].map(NormType::P).to_vec())]
}

/// Thresholds as parts of the norm: below it, far below it, around it, above it.
fn parts() -> impl Strategy<Value = f64> {
    prop_oneof![(-20.0..1.0f64).prop_map(f64::exp), (-650.0..0.0f64).prop_map(f64::exp), 0.9..1.1f64, Just(1.0)]
}

fn total_norm(grads: &[Tensor], norm_type: NormType) -> f64 {
    cpu::total_norm(grads, norm_type).unwrap().total_norm
}

/// `PROPTEST_CASES` overrides the number of cases.
fn config(cases: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { default.cases } else { cases };
    // A failure prints what the list is made from; nothing needs to be kept in a file.
    ProptestConfig { cases, failure_persistence: None, ..default }
}

// ---------------------------------------------------------------------------------------------------------------------
// The norm
// ---------------------------------------------------------------------------------------------------------------------

proptest! {
    #![proptest_config(config(300))]

    #[test]
    fn norm_is_the_true_one(specs in finite_lists(), norm_type in all_orders()) {
        let grads = tensors(&specs);
        let (got, exact) = (total_norm(&grads, norm_type), exact::total_norm(&grads, norm_type));
        let bound = tolerance::norm(&grads, norm_type);
        let error = tolerance::relative_error(got, exact);
        prop_assert!(tolerance::close(got, exact, bound), "{got:e}, exact {exact:e}: {error:.2e} > {bound:.2e}");
    }

    /// Cutting tensors elsewhere, and listing the pieces in another order, adds in another order, no more.
    #[test]
    fn norm_of_pieces_in_any_order(specs in finite_lists(), norm_type in all_orders(), seed in any::<u64>()) {
        let grads = tensors(&specs);
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut pieces = Vec::new();
        for grad in &grads {
            let (mut bits, dtype) = (grad.bits(), grad.dtype());
            while !bits.is_empty() {
                let rest = bits.split_off(rng.random_range(1..=bits.len()));
                pieces.insert(rng.random_range(0..=pieces.len()), Tensor::from_bits(dtype, bits));
                bits = rest;
            }
        }
        let (whole, cut) = (total_norm(&grads, norm_type), total_norm(&pieces, norm_type));
        let bound = tolerance::reordered(&grads, &pieces, norm_type);
        prop_assert!(tolerance::close(cut, whole, bound), "{cut:e} of {} pieces, {whole:e}", pieces.len());
    }

    /// Nothing depends on the exponent. f64 within all of its range, where partial sums are kept in three ranges; the
    /// others within what they add up in f32.
    #[test]
    fn norm_scales_with_powers_of_two(
        specs in vec(spec(&DTYPES, &[Content::Moderate]), 1..5),
        norm_type in norm_types(),
        wide in -1015..1000i32,
        narrow in -10..13i32,
    ) {
        let grads = tensors(&specs);
        let exponent = if specs.iter().all(|spec| spec.dtype == Dtype::F64) { wide } else { narrow };
        let factor = power_of_two(exponent);
        let scaled: Vec<Tensor> =
            grads.iter().map(|grad| Tensor::from_f64(grad.dtype(), grad.values().into_iter().map(|x| x * factor))).collect();
        prop_assert_eq!(total_norm(&scaled, norm_type), total_norm(&grads, norm_type) * factor);
    }

    /// The larger the order, the smaller the norm; from above it goes to the largest element.
    #[test]
    fn norm_falls_with_its_order(specs in finite_lists(), p in -5.0..8.0f64, factor in 0.0..3.0f64) {
        let grads = tensors(&specs);
        let orders = [p.exp2(), (p + factor).exp2(), 1e300];
        let [low, high, huge] = orders.map(|p| total_norm(&grads, NormType::P(p)));
        let slack = orders.map(|p| tolerance::norm(&grads, NormType::P(p))).iter().sum::<f64>();
        prop_assert!(high <= low * (1.0 + slack) && huge <= high * (1.0 + slack), "{orders:?}: {low:e}, {high:e}, {huge:e}");
        prop_assert!(tolerance::close(huge, total_norm(&grads, NormType::Inf), slack));
    }

    #[test]
    fn norm_does_not_see_signs_zeros_and_empties(
        specs in finite_lists(),
        norm_type in all_orders().prop_filter("zeros count in a mean", |norm_type| *norm_type != NormType::Rms),
    ) {
        let grads = tensors(&specs);
        let mut others: Vec<Tensor> = grads
            .iter()
            .map(|grad| {
                let format = grad.format();
                Tensor::from_bits(grad.dtype(), grad.bits().into_iter().map(|bits| bits ^ format.sign_bit()))
            })
            .collect();
        others.push(Tensor::F16(Vec::new()));
        prop_assert_eq!(total_norm(&others, norm_type).to_bits(), total_norm(&grads, norm_type).to_bits());
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Clipping by norm
// ---------------------------------------------------------------------------------------------------------------------

/// Norms and thresholds below this have too few bits left in f64 for c to be that of the formula.
const SMALLEST_USEFUL: f64 = 1e-290;

proptest! {
    #![proptest_config(config(300))]

    /// Clipped: the norm is the threshold, and each element its product with the one coefficient. Not clipped: the same
    /// bits.
    #[test]
    fn clipping_by_norm(specs in finite_lists(), norm_type in norm_types(), part in parts(), eps in select(&[0.0, 1e-6, 0.5][..])) {
        let before = tensors(&specs);
        let norm = total_norm(&before, norm_type);
        if !norm.is_finite() {
            return Ok(()); // large f64: their norm is beyond f64
        }
        let max_norm = norm * part;
        let mut after = before.clone();
        let report = cpu::clip_grad_norm(&mut after, ClipNorm::new(max_norm).norm_type(norm_type).eps(eps)).unwrap();
        prop_assert_eq!(report.total_norm.to_bits(), norm.to_bits());
        prop_assert_eq!(report.first_nonfinite, None);
        prop_assert_eq!(report.written, norm + eps > max_norm);
        if !report.written {
            prop_assert_eq!(report.clip_coef, 1.0);
            prop_assert_eq!(bits_of(&after), bits_of(&before));
            return Ok(());
        }
        prop_assert_eq!(report.clip_coef, max_norm / (norm + eps));
        prop_assert!(report.clip_coef < 1.0);
        prop_assert_eq!(wrong_product(&before, &after, report.clip_coef), None);
        if eps == 0.0 && max_norm > SMALLEST_USEFUL {
            let (norm_after, miss) = (exact::total_norm(&after, norm_type), tolerance::norm_after_clipping(&before, norm_type));
            let allowed = miss.relative * max_norm + miss.absolute;
            prop_assert!((norm_after - max_norm).abs() <= allowed, "{norm_after:e}, threshold {max_norm:e}");
        }
    }

    /// What is clipped is within the threshold but for rounding, so a second time changes it by no more than that.
    #[test]
    fn clipping_by_norm_twice(specs in finite_lists(), norm_type in norm_types(), part in parts()) {
        let mut grads = tensors(&specs);
        let norm = total_norm(&grads, norm_type);
        let max_norm = norm * part;
        if !norm.is_finite() || max_norm < SMALLEST_USEFUL {
            return Ok(());
        }
        let clip = ClipNorm::new(max_norm).norm_type(norm_type);
        let miss = tolerance::norm_after_clipping(&grads, norm_type);
        let once = cpu::clip_grad_norm(&mut grads, clip).unwrap();
        let kept = bits_of(&grads);
        let twice = cpu::clip_grad_norm(&mut grads, clip).unwrap();
        if !once.written {
            prop_assert_eq!(twice, once);
        }
        if !twice.written {
            prop_assert_eq!(bits_of(&grads), kept);
        }
        // The second norm has an error of measurement again.
        let relative = miss.relative + tolerance::norm(&grads, norm_type) + miss.absolute / max_norm;
        prop_assert!(1.0 - twice.clip_coef <= relative, "{:e} > {relative:e}", 1.0 - twice.clip_coef);
    }

    #[test]
    fn thresholds_zero_and_infinity(specs in finite_lists(), norm_type in norm_types()) {
        let before = tensors(&specs);
        let norm = total_norm(&before, norm_type);
        if !norm.is_finite() {
            return Ok(()); // large f64: their norm is beyond f64
        }
        let mut after = before.clone();
        let report = cpu::clip_grad_norm(&mut after, ClipNorm::new(f64::INFINITY).norm_type(norm_type)).unwrap();
        prop_assert_eq!((report.total_norm.to_bits(), report.written), (norm.to_bits(), false));
        prop_assert_eq!(bits_of(&after), bits_of(&before));
        let report = cpu::clip_grad_norm(&mut after, ClipNorm::new(0.0).norm_type(norm_type)).unwrap();
        prop_assert_eq!(report.written, norm > 0.0);
        for (before, after) in before.iter().zip(&after) {
            // A zero keeps its sign, and so does what becomes one.
            let signs = before.bits().into_iter().map(|bits| bits & before.format().sign_bit());
            prop_assert_eq!(after.bits(), signs.collect::<Vec<_>>());
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// NaN and Inf
// ---------------------------------------------------------------------------------------------------------------------

proptest! {
    #![proptest_config(config(300))]

    #[test]
    fn nonfinite_policies(
        specs in nonfinite_lists(),
        norm_type in norm_types(),
        policy in select(&[NonFinite::Skip, NonFinite::Zero, NonFinite::Propagate, NonFinite::Error][..]),
        max_norm in select(&[0.0, 1.0, 1e300, f64::INFINITY][..]),
    ) {
        let before = tensors(&specs);
        let norm = exact::total_norm(&before, norm_type);
        if norm.is_finite() {
            return Ok(()); // an empty tensor where the bad one should be, or the largest of large elements
        }
        let first = first_nonfinite(&before);
        let measured = cpu::total_norm(&before, norm_type).unwrap();
        prop_assert!(measured.total_norm.to_bits() == norm.to_bits(), "{} is not {norm}", measured.total_norm);
        prop_assert_eq!((measured.first_nonfinite, measured.written, measured.clip_coef), (first, false, 1.0));

        let mut after = before.clone();
        let clip = ClipNorm::new(max_norm).norm_type(norm_type).nonfinite(policy);
        let result = cpu::clip_grad_norm(&mut after, clip);
        if policy == NonFinite::Error {
            let Err(Error::NonFinite { total_norm, tensor }) = result else { panic!("{result:?}") };
            prop_assert_eq!((total_norm.to_bits(), tensor), (norm.to_bits(), first));
            prop_assert_eq!(bits_of(&after), bits_of(&before));
            return Ok(());
        }
        let report = result.unwrap();
        prop_assert_eq!((report.total_norm.to_bits(), report.first_nonfinite), (norm.to_bits(), first));
        let (clip_coef, written) = match policy {
            _ if max_norm.is_infinite() => (1.0, false), // only measures
            NonFinite::Zero => (0.0, true),
            NonFinite::Propagate => (max_norm / norm, true),
            _ => (1.0, false),
        };
        prop_assert_eq!((report.clip_coef.to_bits(), report.written), (clip_coef.to_bits(), written));
        for (before, after) in before.iter().zip(&after) {
            let expected = |bits| match policy {
                _ if !written => bits,
                NonFinite::Zero => 0,
                _ => propagated(before.format(), bits, clip_coef),
            };
            prop_assert_eq!(after.bits(), before.bits().into_iter().map(expected).collect::<Vec<_>>());
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Clipping by value
// ---------------------------------------------------------------------------------------------------------------------

fn bounds() -> impl Strategy<Value = (f64, f64)> {
    let bound = || {
        prop_oneof![
            select(&[0.0, -0.0, 1.0, 0.1, 65504.0, 65520.0, 1e-8, 1e-40, 1e39, f64::INFINITY, 5e-324][..]),
            0.0..10.0f64,
            any::<f64>().prop_filter("a number", |x| !x.is_nan()).prop_map(f64::abs),
        ]
    };
    prop_oneof![
        bound().prop_map(|v| (-v, v)),
        (bound(), bound()).prop_map(|(a, b)| (-a, b)),
        (bound(), bound()).prop_map(|(a, b)| (a.min(b), a.max(b))),
        (bound(), bound()).prop_map(|(a, b)| (-a.max(b), -a.min(b))),
    ]
    // Others are refused.
    .prop_filter("a number between them", |(lo, hi)| *lo < f64::INFINITY && *hi > f64::NEG_INFINITY)
}

const ANY_CONTENT: &[Content] =
    &[Content::Zeros, Content::Moderate, Content::Moderate, Content::Special, Content::AnyFinite, Content::Tiny];

proptest! {
    #![proptest_config(config(400))]

    #[test]
    fn clipping_by_value(specs in vec(spec(&DTYPES, ANY_CONTENT), 0..6), (lo, hi) in bounds()) {
        let before = tensors(&specs);
        let mut after = before.clone();
        let report = cpu::clip_grad_value(&mut after, ClipValue::between(lo, hi)).unwrap();
        let expected: Vec<Vec<u64>> = before.iter().map(|grad| limited(grad, lo, hi)).collect();
        prop_assert_eq!(bits_of(&after), expected.clone());
        // Within the bounds, and as a NaN, an element keeps its bits; outside it cannot.
        let pairs = bits_of(&before).into_iter().flatten().zip(expected.into_iter().flatten());
        let clipped = pairs.filter(|(x, y)| x != y).count() as u64;
        let nan = before.iter().flat_map(Tensor::values).filter(|x| x.is_nan()).count() as u64;
        prop_assert_eq!((report.clipped, report.nan, report.written), (clipped, nan, clipped > 0));
        prop_assert_eq!(report.first_nonfinite, first_nonfinite(&before));

        let kept = bits_of(&after);
        let again = cpu::clip_grad_value(&mut after, ClipValue::between(lo, hi)).unwrap();
        prop_assert_eq!((again.clipped, again.nan, again.written), (0, nan, false));
        prop_assert_eq!(bits_of(&after), kept.clone());
        if lo.to_bits() == (-hi).to_bits() {
            let mut symmetric = before.clone();
            prop_assert_eq!(cpu::clip_grad_value(&mut symmetric, hi).unwrap(), report);
            prop_assert_eq!(bits_of(&symmetric), kept);
        }
    }

    #[test]
    fn refused_thresholds_touch_nothing(specs in vec(spec(&DTYPES, ANY_CONTENT), 0..4), by in 1e-300..10.0f64, at in -10.0..10.0f64) {
        let before = tensors(&specs);
        let mut grads = before.clone();
        for threshold in [-by, f64::NAN, f64::NEG_INFINITY] {
            let norm = cpu::clip_grad_norm(&mut grads, threshold);
            let value = cpu::clip_grad_value(&mut grads, threshold);
            let eps = cpu::clip_grad_norm(&mut grads, ClipNorm::new(1.0).eps(threshold));
            for (result, refused) in [(norm.err(), "max_norm"), (value.err(), "clip_value"), (eps.err(), "eps")] {
                let named = matches!(result, Some(Error::InvalidThreshold { name, .. }) if name == refused);
                prop_assert!(named, "{threshold}: {result:?}");
            }
        }
        for (lo, hi) in [(at, at - by.max(1e-9)), (f64::NAN, at), (at, f64::NAN)] {
            let result = cpu::clip_grad_value(&mut grads, ClipValue::between(lo, hi));
            prop_assert!(matches!(result, Err(Error::InvalidBounds { .. })), "{lo}, {hi}: {result:?}");
        }
        prop_assert_eq!(bits_of(&grads), bits_of(&before));
    }
}

/// Nothing is clipped, nothing is NaN, and still the report says which tensor is infinite.
#[test]
fn an_infinite_element_within_infinite_bounds_is_noticed() {
    for dtype in DTYPES {
        for (value, lo, hi) in [(f64::INFINITY, -1.0, f64::INFINITY), (f64::NEG_INFINITY, f64::NEG_INFINITY, 1.0)] {
            let mut grads = [0.5, value, 0.25].map(|x| Tensor::from_f64(dtype, vec![0.75, x]));
            let report = cpu::clip_grad_value(&mut grads, ClipValue::between(lo, hi)).unwrap();
            assert_eq!((report.clipped, report.nan, report.written), (0, 0, false), "{dtype} {value}");
            assert_eq!(report.first_nonfinite, Some(1), "{dtype} {value}");
        }
    }
}
