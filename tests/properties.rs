//! What holds for any list of gradients: of all dtypes, empty tensors and extreme values among them.
#![allow(clippy::unwrap_used)]

#[path = "support/exact.rs"]
mod exact;
#[path = "support/format.rs"]
mod format;
#[path = "support/tensor.rs"]
mod tensor;
#[path = "support/tolerance.rs"]
mod tolerance;

use format::{nearest, power_of_two, product, within_one_unit, Format, DTYPES};
use gradclip::{cpu, ClipNorm, ClipValue, Dtype, Error, NonFinite, NormType};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tensor::{bits_of, first_nonfinite, Tensor};

// ---------------------------------------------------------------------------------------------------------------------
// Lists
// ---------------------------------------------------------------------------------------------------------------------

/// A tensor by what it is made from: short to print, and to shrink.
#[derive(Clone, Debug)]
struct Spec {
    dtype: Dtype,
    numel: usize,
    content: Content,
    seed: u64,
}

#[derive(Clone, Copy, Debug)]
enum Content {
    Zeros,
    /// Between -8 and 8, none closer to 0 than 1/8.
    Moderate,
    /// Any finite pattern: all exponents.
    AnyFinite,
    /// Around the smallest normal number.
    Tiny,
    /// Near the largest.
    Huge,
    /// Moderate, with NaN and Inf among them: one at least.
    Special,
}

impl Spec {
    fn tensor(&self) -> Tensor {
        let format = Format::of(self.dtype);
        let mut rng = SmallRng::seed_from_u64(self.seed);
        let hidden = 1u64 << (format.precision - 1);
        let special = rng.random_range(0..self.numel.max(1));
        let bits = (0..self.numel).map(|i| {
            let sign = if rng.random() { format.sign_bit() } else { 0 };
            let moderate = nearest(self.dtype, rng.random_range(0.125..8.0));
            sign | match self.content {
                Content::Zeros => 0,
                Content::Moderate => moderate,
                Content::AnyFinite => rng.random_range(0..format.inf_bits()),
                Content::Tiny => rng.random_range(0..4 * hidden),
                Content::Huge => rng.random_range(format.inf_bits() - 2 * hidden..format.inf_bits()),
                Content::Special if i != special && rng.random_range(0..40) > 0 => moderate,
                Content::Special if rng.random() => format.inf_bits(),
                Content::Special => format.inf_bits() + rng.random_range(1..hidden),
            }
        });
        Tensor::from_bits(self.dtype, bits)
    }
}

/// Lengths around a pack, a row, a segment and a tile, and empty.
fn numel() -> impl Strategy<Value = usize> {
    prop_oneof![
        1 => Just(0usize),
        6 => 1..10usize,
        6 => 1..300usize,
        3 => 500..2100usize,
        1 => 4000..20_000usize,
    ]
}

fn spec(dtypes: &'static [Dtype], contents: &'static [Content]) -> impl Strategy<Value = Spec> {
    (select(dtypes), numel(), select(contents), any::<u64>()).prop_map(|(dtype, numel, content, seed)| Spec {
        dtype,
        numel,
        content,
        seed,
    })
}

const FINITE: &[Content] =
    &[Content::Zeros, Content::Moderate, Content::Moderate, Content::AnyFinite, Content::Tiny, Content::Huge];

/// Lists of finite elements: of one kind of content, or of all mixed.
fn finite_lists() -> impl Strategy<Value = Vec<Spec>> {
    prop_oneof![
        vec(spec(&DTYPES, FINITE), 0..7),
        vec(spec(&DTYPES, &[Content::Moderate]), 1..7),
        vec(spec(&DTYPES, &[Content::Tiny, Content::Zeros]), 1..4),
        vec(spec(&[Dtype::F64], &[Content::AnyFinite]), 1..4),
    ]
}

/// Lists with a bad element, or with f64 whose norm is beyond f64.
fn nonfinite_lists() -> impl Strategy<Value = Vec<Spec>> {
    let any = || vec(spec(&DTYPES, &[Content::Special, Content::Moderate, Content::Huge, Content::Zeros]), 0..4);
    let bad = prop_oneof![3 => spec(&DTYPES, &[Content::Special]).boxed(), 1 => spec(&[Dtype::F64], &[Content::Huge]).boxed()];
    (any(), bad, any()).prop_map(|(before, bad, after)| [before, vec![bad], after].concat())
}

fn tensors(specs: &[Spec]) -> Vec<Tensor> {
    specs.iter().map(Spec::tensor).collect()
}

fn norm_types() -> impl Strategy<Value = NormType> {
    select(&[NormType::L1, NormType::L2, NormType::Inf][..])
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
    fn norm_is_the_true_one(specs in finite_lists(), norm_type in norm_types()) {
        let grads = tensors(&specs);
        let (got, exact) = (total_norm(&grads, norm_type), exact::total_norm(&grads, norm_type));
        let bound = tolerance::norm(&grads, norm_type);
        let error = tolerance::relative_error(got, exact);
        prop_assert!(tolerance::close(got, exact, bound), "{got:e}, exact {exact:e}: {error:.2e} > {bound:.2e}");
    }

    /// Cutting tensors elsewhere, and listing the pieces in another order, adds in another order, no more.
    #[test]
    fn norm_of_pieces_in_any_order(specs in finite_lists(), norm_type in norm_types(), seed in any::<u64>()) {
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

    #[test]
    fn norm_does_not_see_signs_zeros_and_empties(specs in finite_lists(), norm_type in norm_types()) {
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

/// The first element that is not `x * clip_coef` to one unit in the last place, or has lost its sign.
fn wrong_product(before: &[Tensor], after: &[Tensor], clip_coef: f64) -> Option<String> {
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

/// One element under Propagate: the product, as IEEE 754 has it; any NaN is the canonical one.
fn propagated(format: Format, bits: u64, clip_coef: f64) -> u64 {
    if clip_coef.is_nan() || !format.is_finite(bits) {
        format.inf_bits() | 1 << (format.precision - 2)
    } else {
        bits & format.sign_bit() // times 0
    }
}

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

/// The bound in a dtype: to nearest, and a finite one stays finite.
fn bound_in(dtype: Dtype, bound: f64) -> u64 {
    let (format, bits) = (Format::of(dtype), nearest(dtype, bound));
    if bound.is_finite() && format.is_inf(bits) {
        bits - 1
    } else {
        bits
    }
}

/// The naive loop.
fn limited(grad: &Tensor, lo: f64, hi: f64) -> Vec<u64> {
    let format = grad.format();
    let (low, high) = (bound_in(grad.dtype(), lo), bound_in(grad.dtype(), hi));
    let limit = |bits: u64| match format.value(bits) {
        x if x < format.value(low) => low,
        x if x > format.value(high) => high,
        _ => bits,
    };
    grad.bits().into_iter().map(limit).collect()
}

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
        let pairs = || bits_of(&before).into_iter().flatten().zip(expected.into_iter().flatten());
        let clipped = pairs().filter(|(x, y)| x != y).count() as u64;
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

// ---------------------------------------------------------------------------------------------------------------------
// Threads
// ---------------------------------------------------------------------------------------------------------------------

/// What the functions say of a list, and what they make of it.
#[derive(PartialEq)]
struct Everything {
    measured: Vec<(u64, f64)>,
    clipped: Vec<Vec<Tensor>>,
    counted: (u64, u64),
    limited: Vec<Tensor>,
}

impl Everything {
    fn of(grads: &[Tensor]) -> Self {
        let (mut measured, mut clipped) = (Vec::new(), Vec::new());
        for norm_type in [NormType::L1, NormType::L2, NormType::Inf] {
            let mut grads = grads.to_vec();
            let report = cpu::clip_grad_norm(&mut grads, ClipNorm::new(LIMIT).norm_type(norm_type)).unwrap();
            measured.push((report.total_norm.to_bits(), report.clip_coef));
            clipped.push(grads);
        }
        let mut limited = grads.to_vec();
        let report = cpu::clip_grad_value(&mut limited, LIMIT).unwrap();
        Self { measured, clipped, counted: (report.clipped, report.nan), limited }
    }
}

const LIMIT: f64 = 0.37;

/// Tensors of many tasks, of one, and of parts of one: large enough that work is handed out at all. Much of it f64, whose
/// sums use all their bits, so that another order of adding them shows.
fn large_list() -> Vec<Tensor> {
    let numels = [500_000, 400_000, 0, 120_001, 65_536, 1000, 300_000, 3, 9000, 70_000];
    let specs = numels.into_iter().zip(DTYPES.into_iter().cycle()).zip(0..);
    specs.map(|((numel, dtype), seed)| Spec { dtype, numel, content: Content::Moderate, seed }.tensor()).collect()
}

#[test]
fn the_number_of_threads_does_not_show() {
    let grads = large_list();
    let expected = Everything::of(&grads);
    for num_threads in [1, 2, 3, 7] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(num_threads).build().unwrap();
        for _ in 0..3 {
            let got = pool.install(|| Everything::of(&grads));
            assert_eq!(got.measured, expected.measured, "{num_threads} threads");
            assert!(got == expected, "{num_threads} threads: other gradients or counts");
        }
    }
}

/// Cut into pieces for many threads, every element is still reached, once.
#[test]
fn large_lists_are_clipped_to_their_ends() {
    let grads = large_list();
    let Everything { measured, clipped, counted, limited: got } = Everything::of(&grads);
    for ((_, clip_coef), clipped) in measured.into_iter().zip(clipped) {
        assert_eq!(wrong_product(&grads, &clipped, clip_coef), None);
    }
    let outside = |grad: &Tensor| grad.values().into_iter().filter(|x| x.abs() > LIMIT).count() as u64;
    assert_eq!(counted, (grads.iter().map(outside).sum(), 0));
    for (index, (grad, got)) in grads.iter().zip(got).enumerate() {
        assert!(got.bits() == limited(grad, -LIMIT, LIMIT), "tensor {index}");
    }
}
