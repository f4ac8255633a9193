//! The oracle of the other tests, against values worked out by hand and against `std`.
#![allow(clippy::unwrap_used)]

#[path = "support/exact.rs"]
mod exact;
#[path = "support/format.rs"]
mod format;
#[path = "support/tensor.rs"]
mod tensor;
#[path = "support/tolerance.rs"]
mod tolerance;

use exact::{norm, total_norm};
use format::{nearest, power_of_two, product, within_one_unit, Exact, Float, Format, DTYPES};
use gradclip::{Dtype, NormType};
use half::{bf16, f16};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tensor::Tensor;

const L1: NormType = NormType::L1;
const L2: NormType = NormType::L2;

#[test]
fn norms_that_are_exact() {
    assert_eq!(norm::<f32>(&[], L2), 0.0);
    assert_eq!(norm(&[0.0f32, -0.0], L2), 0.0);
    assert_eq!(norm(&[3.0f32, -4.0], L2), 5.0);
    assert_eq!(norm(&[3.0f64, -4.0], L1), 7.0);
    assert_eq!(norm(&[f16::from_f32(300.0), f16::from_f32(-400.0)], L2), 500.0);
    assert_eq!(norm(&[bf16::from_f32(3e30); 16], L2), 4.0 * bf16::from_f32(3e30).to_f64());
    // The ends of f64, whose squares are far outside it.
    assert_eq!(norm(&[f64::from_bits(1)], L2), f64::from_bits(1));
    assert_eq!(norm(&[f64::from_bits(1); 9], L2), f64::from_bits(3));
    assert_eq!(norm(&[f64::MAX], L2), f64::MAX);
    assert_eq!(norm(&[f64::MAX / 2.0; 4], L2), f64::MAX);
    assert_eq!(norm(&[f64::MAX, f64::MAX], L2), f64::INFINITY);
    assert_eq!(norm(&[f64::MAX, f64::MAX], L1), f64::INFINITY);
    assert_eq!(norm(&[f32::from_bits(1); 4], L2), 2f64.powi(-148));
}

#[test]
fn norms_that_are_rounded_once() {
    // sqrt(2), sqrt(3) and 0.1 added up, as any correctly rounded arithmetic has them.
    assert_eq!(norm(&[1.0f32; 2], L2), 2f64.sqrt());
    assert_eq!(norm(&[1.0f64; 3], L2), 3f64.sqrt());
    // 10 * 0.1 (which is 0.1 + 5.55e-18 in f64) is 1 + 5.55e-17: rounds to 1, where a loop gives 1 - 1.1e-16.
    assert_eq!(norm(&[0.1f64; 10], L1), 1.0);
    // 1 + 2^-53 is halfway, and goes to the even 1; any more goes up.
    let half_unit = 2f64.powi(-53);
    assert_eq!(norm(&[1.0, half_unit], L1), 1.0);
    assert_eq!(norm(&[1.0, half_unit, f64::from_bits(1)], L1), 1.0 + f64::EPSILON);
    assert_eq!(norm(&[1.0 + f64::EPSILON, half_unit], L1), 1.0 + 2.0 * f64::EPSILON);
    // (1 + 2^-53)^2 = 1 + 2^-52 + 2^-106: halfway again, for a root.
    let halfway = [1.0, 2f64.powi(-26), 2f64.powi(-53)];
    assert_eq!(norm(&halfway, L2), 1.0);
    assert_eq!(norm(&[1.0, 2f64.powi(-26), 2f64.powi(-53), f64::from_bits(1)], L2), 1.0 + f64::EPSILON);
    // Below the normal range: sqrt(2) of the smallest unit is nearer to 1 of it, sqrt(3) to 2.
    assert_eq!(norm(&[f64::from_bits(1); 2], L2), f64::from_bits(1));
    assert_eq!(norm(&[f64::from_bits(1); 3], L2), f64::from_bits(2));
    // Just below the overflow: half a unit above the largest f64 is beyond it.
    let below_half_a_unit = power_of_two(970 - 53);
    assert_eq!(norm(&[f64::MAX, below_half_a_unit], L1), f64::MAX);
    assert_eq!(norm(&[f64::MAX, power_of_two(970)], L1), f64::INFINITY);
}

#[test]
fn nothing_is_lost_beside_a_large_element() {
    // 2^72 has a last bit of 2^20 in f64: each of the 2^20 ones is far below it, and together they are that bit.
    let mut elements = vec![1.0f64; 1 << 20];
    elements.push(2f64.powi(36));
    assert_eq!(norm(&elements, L2), (2f64.powi(72) + 2f64.powi(20)).sqrt());
    assert_eq!(norm(&elements, L1), 2f64.powi(36) + 2f64.powi(20));
}

#[test]
fn bins_that_are_full_are_emptied() {
    // Squares of 106 bits fill 128 bits after 2^22 of them; 9 * 2^20 have an exact root.
    let x = 2.0 - 2f64.powi(-40);
    assert_eq!(norm(&vec![x; 9 << 20], L2), 3.0 * 1024.0 * x);
}

#[test]
fn lists_of_mixed_dtypes() {
    let list = [
        Tensor::F32(vec![2.0]),
        Tensor::F64(vec![]),
        Tensor::F16(vec![f16::from_f32(-4.0)]),
        Tensor::BF16(vec![bf16::from_f32(5.0)]),
        Tensor::F64(vec![6.0]),
    ];
    assert_eq!(total_norm(&list, L2), 9.0);
    assert_eq!(total_norm(&list, L1), 17.0);
    assert_eq!(total_norm(&list, NormType::Inf), 6.0);
    assert_eq!(total_norm(&[], L2), 0.0);
    assert_eq!(total_norm(&[Tensor::F32(vec![f32::NEG_INFINITY, 1.0])], L1), f64::INFINITY);
    assert!(total_norm(&[Tensor::F32(vec![f32::INFINITY, f32::NAN])], NormType::Inf).is_nan());
}

#[test]
fn rounding_of_a_double_is_that_of_the_processor() {
    let mut rng = SmallRng::seed_from_u64(1);
    for _ in 0..200_000 {
        let x = f64::from_bits(rng.random());
        // All exponents of f32, which a random pattern of f64 seldom has.
        let near = f64::from(f32::from_bits(rng.random())) * (1.0 + rng.random::<f64>() * f64::from(f32::EPSILON));
        for x in [x, near].into_iter().filter(|x| !x.is_nan()) {
            assert_eq!(nearest(Dtype::F32, x), u64::from((x as f32).to_bits()), "{x:e}");
            assert_eq!(nearest(Dtype::F64, x), x.to_bits());
        }
    }
}

#[test]
fn rounding_at_ties_and_ends() {
    let cases = [
        (Dtype::F16, 65519.99, 0x7bff),
        (Dtype::F16, 65520.0, 0x7c00),
        (Dtype::F16, -65520.0, 0xfc00),
        (Dtype::F16, 2f64.powi(-25), 0),
        (Dtype::F16, -(2f64.powi(-25)), 0x8000),
        (Dtype::F16, 2f64.powi(-25) + f64::MIN_POSITIVE, 0),
        (Dtype::F16, 2f64.powi(-25) * (1.0 + f64::EPSILON), 1),
        (Dtype::F16, 3.0 * 2f64.powi(-25), 2),
        (Dtype::F16, 1.0 + 2f64.powi(-11), 0x3c00),
        (Dtype::F16, 1.0 + 3.0 * 2f64.powi(-11), 0x3c02),
        // A tie in f16 that f32 would make of what is a little more: rounding twice goes wrong here.
        (Dtype::F16, 1.0 + 2f64.powi(-11) + 2f64.powi(-40), 0x3c01),
        (Dtype::BF16, 1.0 + 2f64.powi(-8), 0x3f80),
        (Dtype::BF16, 1.0 + 2f64.powi(-8) + 2f64.powi(-40), 0x3f81),
        (Dtype::BF16, f64::from(f32::MAX), 0x7f80),
        (Dtype::BF16, 2f64.powi(-134), 0),
        (Dtype::BF16, 3.0 * 2f64.powi(-134), 2),
        (Dtype::F32, 2f64.powi(-150), 0),
        (Dtype::F32, f64::MAX, 0x7f80_0000),
        (Dtype::F32, f64::from_bits(1), 0),
        (Dtype::F32, -0.0, 0x8000_0000),
    ];
    for (dtype, x, expected) in cases {
        assert_eq!(nearest(dtype, x), expected, "{x:e} in {dtype}");
    }
}

#[test]
fn every_half_is_the_value_that_half_says() {
    for bits in 0..=u16::MAX {
        let pairs = [
            (f16::from_bits(bits).wide(), f64::from(f16::from_bits(bits))),
            (bf16::from_bits(bits).wide(), f64::from(bf16::from_bits(bits))),
        ];
        for (ours, theirs) in pairs {
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{bits:#06x}");
        }
        for dtype in [Dtype::F16, Dtype::BF16] {
            let format = Format::of(dtype);
            if !format.is_nan(bits.into()) {
                assert_eq!(nearest(dtype, format.value(bits.into())), u64::from(bits));
            }
        }
    }
}

#[test]
fn products_are_exact() {
    let one_third = 1.0f64 / 3.0;
    let exact = product(Format::of(Dtype::F64), one_third.to_bits(), -one_third);
    let m = u128::from(one_third.to_bits() & ((1 << 52) - 1)) + (1 << 52);
    assert_eq!(exact, Exact { negative: true, mantissa: m * m, exponent: -108 });
    let mut rng = SmallRng::seed_from_u64(2);
    for _ in 0..100_000 {
        // A product of two f64 that the processor rounds the same way, subnormals and overflows included.
        let (x, c) = (f64::from_bits(rng.random()), f64::from_bits(rng.random()));
        if x.is_finite() && c.is_finite() {
            let exact = product(Format::of(Dtype::F64), x.to_bits(), c);
            assert_eq!(f64::from_bits(Format::of(Dtype::F64).nearest(&exact)), x * c, "{x:e} * {c:e}");
        }
    }
}

#[test]
fn one_unit_is_the_two_neighbours() {
    let format = Format::of(Dtype::F16);
    let accepted = |x: f64| {
        let exact = Format::of(Dtype::F64).decode(x.to_bits());
        (0..=u64::from(u16::MAX)).filter(|&bits| within_one_unit(format, &exact, bits)).collect::<Vec<_>>()
    };
    assert_eq!(accepted(1.0 + 2f64.powi(-30)), [0x3c00, 0x3c01]);
    assert_eq!(accepted(-1.0 - 2f64.powi(-30)), [0xbc00, 0xbc01]);
    assert_eq!(accepted(1.0), [0x3bff, 0x3c00, 0x3c01]);
    assert_eq!(accepted(2f64.powi(-40)), [0x0000, 0x0001, 0x8000]);
}

#[test]
fn units_and_steps() {
    assert_eq!(Format::of(Dtype::F32).unit(1.5), f64::from(f32::EPSILON));
    assert_eq!(Format::of(Dtype::F16).unit(0.0), 2f64.powi(-24));
    assert_eq!(Format::of(Dtype::F64).unit(f64::MAX), 2f64.powi(971));
    assert_eq!(Format::of(Dtype::BF16).steps_between(0x8001, 0x0001), 2);
    assert_eq!(Format::of(Dtype::BF16).steps_between(0x8000, 0x0000), 0);
    for dtype in DTYPES {
        let format = Format::of(dtype);
        assert_eq!(format.value(1), format.unit(0.0));
        assert_eq!(format.value(nearest(dtype, 1.0) + 1), 1.0 + format.epsilon());
    }
}

/// The tolerances derived for the tests are no looser than what is promised.
#[test]
fn tolerances_keep_the_promises() {
    for dtype in DTYPES {
        for norm_type in [L1, L2, NormType::Inf, NormType::P(0.5), NormType::P(10.7)] {
            let any_length = tolerance::norm_of(dtype, 1 << 34, norm_type);
            assert!(any_length <= tolerance::PROMISED_WORST_CASE, "{dtype} {norm_type:?}: {any_length:e}");
        }
    }
    for dtype in DTYPES {
        for p in [0.05, 0.5, 1.5, 100.0] {
            let one_terabyte = tolerance::norm_of(dtype, 1 << 37, NormType::P(p));
            assert!(one_terabyte <= tolerance::promised_on_normal_data(dtype), "{dtype} {p}: {one_terabyte:e}");
        }
    }
    for norm_type in [L1, L2] {
        for dtype in [Dtype::F16, Dtype::BF16] {
            let one_row = tolerance::norm_of(dtype, 256, norm_type);
            assert!(one_row <= tolerance::promised_on_normal_data(dtype), "{dtype} {norm_type:?}");
        }
        for dtype in [Dtype::F32, Dtype::F64] {
            let any_length = tolerance::norm_of(dtype, 1 << 34, norm_type);
            assert!(any_length <= tolerance::promised_on_normal_data(dtype), "{dtype} {norm_type:?}");
        }
    }
}
