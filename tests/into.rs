//! Clipping out of place against exact arithmetic: each output is the product, rounded to the type of the output.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "support/format.rs"]
mod format;
#[path = "support/lists.rs"]
mod lists;
#[path = "support/tensor.rs"]
mod tensor;

use format::{power_of_two, product, within_one_unit, Format};
use gradclip::cpu::{self, AsGrad, AsGradMut};
use gradclip::{ClipNorm, Dtype, NonFinite, NormReport, NormType};
use half::{bf16, f16};
use lists::{Content, Spec};
use tensor::Tensor;

const PAIRS: [(Dtype, Dtype); 7] = [
    (Dtype::F32, Dtype::F32),
    (Dtype::F64, Dtype::F64),
    (Dtype::F16, Dtype::F16),
    (Dtype::BF16, Dtype::BF16),
    (Dtype::F64, Dtype::F32),
    (Dtype::F16, Dtype::F32),
    (Dtype::BF16, Dtype::F32),
];

/// What `grads` become in outputs of type `to`, which held NaNs before.
fn into(grads: &[Tensor], to: &[Dtype], clip: ClipNorm) -> (Vec<Tensor>, NormReport) {
    let before: Vec<_> = grads.iter().map(Tensor::bits).collect();
    let stale = |(grad, to): (&Tensor, &Dtype)| Tensor::from_f64(*to, vec![f64::NAN; grad.numel()]);
    let mut outputs: Vec<Tensor> = grads.iter().zip(to).map(stale).collect();
    let report = cpu::clip_grad_norm_into(grads, &mut outputs, clip).unwrap();
    assert!(grads.iter().map(Tensor::bits).eq(before), "a gradient was written");
    (outputs, report)
}

/// How many of the outputs are the product rounded to nearest; all are within one unit of it, with its sign.
fn check(grads: &[Tensor], outputs: &[Tensor], coef: f64) -> (usize, usize) {
    let (mut nearest, mut all) = (0, 0);
    for (grad, output) in grads.iter().zip(outputs) {
        let (from, to) = (grad.format(), output.format());
        for (x, got) in grad.bits().into_iter().zip(output.bits()) {
            let exact = product(from, x, coef);
            let what = || {
                format!("{:e} * {coef:e}, {} to {}: {:e}", from.value(x), grad.dtype(), output.dtype(), to.value(got))
            };
            assert!(within_one_unit(to, &exact, got), "{}", what());
            assert_eq!(got & to.sign_bit() != 0, x & from.sign_bit() != 0, "{}: the sign is lost", what());
            nearest += usize::from(got == to.nearest(&exact));
            all += 1;
        }
    }
    (nearest, all)
}

const COEFS: [f64; 11] = [0.999999, 0.75, 1.0 / 3.0, 0.1, 1e-3, 6e-8, 1e-18, 1e-20, 3.3e-30, 1e-40, 1e-80];

#[test]
fn products_of_any_elements() {
    for (pair, (from, to)) in PAIRS.into_iter().enumerate() {
        for (kind, content) in
            [Content::Moderate, Content::AnyFinite, Content::Tiny, Content::Huge].into_iter().enumerate()
        {
            let seed = (10 * pair + kind) as u64;
            let numels = [1, 15, 16, 17, 2047, 2049, 4100];
            let spec =
                |(i, &numel): (usize, &usize)| Spec { dtype: from, numel, content, seed: seed + 1000 * i as u64 };
            let grads: Vec<Tensor> = numels.iter().enumerate().map(spec).map(|spec| spec.tensor()).collect();
            let norm = cpu::total_norm(&grads, NormType::Inf).unwrap().total_norm;
            // Below 2^-102 the second part of the product is subnormal, and the sum may be a unit off (docs/numerics.md).
            let least = if matches!(content, Content::Tiny) { 0.8 } else { 0.98 };
            for coef in COEFS {
                let clip = ClipNorm::new(norm * coef).norm_type(NormType::Inf);
                let (outputs, report) = into(&grads, &[to; 7], clip);
                let (nearest, all) = check(&grads, &outputs, report.clip_coef);
                assert!(
                    nearest as f64 > least * all as f64,
                    "{from} to {to} * {coef:e}: {nearest} of {all} to nearest"
                );
            }
            // Not clipped: x itself, in the other type.
            let (outputs, report) = into(&grads, &[to; 7], ClipNorm::new(norm));
            assert!(report.written || !report.total_norm.is_finite());
            if report.clip_coef == 1.0 && report.written {
                let (nearest, all) = check(&grads, &outputs, 1.0);
                assert_eq!(nearest, all, "{from} to {to}");
            }
        }
    }
}

/// Over tens of thousands of elements, in tasks on all cores.
#[test]
fn every_16_bit_pattern_and_large_lists() {
    for (from, least) in [(Dtype::F16, 0.9999), (Dtype::BF16, 0.99)] {
        let format = Format::of(from);
        let all = || (0..=u64::from(u16::MAX)).filter(|&bits| format.is_finite(bits));
        let grads: Vec<Tensor> = (0..5).map(|_| Tensor::from_bits(from, all())).collect();
        let norm = cpu::total_norm(&grads, NormType::Inf).unwrap().total_norm;
        for coef in COEFS {
            let clip = ClipNorm::new(norm * coef).norm_type(NormType::Inf);
            let (outputs, report) = into(&grads, &[Dtype::F32; 5], clip);
            let (nearest, all) = check(&grads, &outputs, report.clip_coef);
            // The f32 product has 47 bits of the coefficient: as good as exact, but for bf16 below 2^-102 (as above).
            assert!(nearest as f64 > least * all as f64, "{from} * {coef:e}: {nearest} of {all} to nearest");
        }
        let (outputs, report) = into(&grads, &[Dtype::F32; 5], ClipNorm::new(f64::INFINITY));
        assert_eq!((report.clip_coef, report.written), (1.0, true));
        assert_eq!(outputs[4].values(), grads[4].values());
    }
}

#[test]
fn powers_of_two_are_rounded_to_nearest_even() {
    for (from, to) in PAIRS {
        let grads = [Spec { dtype: from, numel: 3000, content: Content::AnyFinite, seed: 5 }.tensor()];
        let norm = cpu::total_norm(&grads, NormType::Inf).unwrap().total_norm;
        for exponent in [1, 2, 10, 30, 59, 60, 61, 100, 127, 149, 150, 200] {
            let coef = power_of_two(-exponent);
            let (outputs, report) = into(&grads, &[to], ClipNorm::new(norm * coef).norm_type(NormType::Inf));
            if report.clip_coef == coef {
                let (nearest, all) = check(&grads, &outputs, coef);
                assert_eq!(nearest, all, "{from} to {to} * 2^-{exponent}");
            }
        }
    }
}

/// Why master gradients are f32: in place the product is rounded to the bits of the gradient.
#[test]
fn what_f32_keeps_and_f16_and_bf16_lose() {
    let small = f16::from_f32(1e-4);
    let grads = [vec![f16::from_f32(60000.0), small]];
    let (mut master, mut in_place) = ([vec![0f32; 2]], grads.clone());
    let report = cpu::clip_grad_norm_into(&grads, &mut master, 1.0).unwrap();
    assert_eq!(cpu::clip_grad_norm(&mut in_place, 1.0).unwrap(), report);
    assert_eq!(in_place[0][1], f16::ZERO);
    assert!((f64::from(master[0][1]) / (small.to_f64() * report.clip_coef) - 1.0).abs() < 1e-7);

    let grads = [vec![bf16::from_f32(1.0); 3]];
    let (mut master, mut in_place) = ([vec![0f32; 3]], grads.clone());
    cpu::clip_grad_norm_into(&grads, &mut master, 1.0).unwrap();
    cpu::clip_grad_norm(&mut in_place, 1.0).unwrap();
    let exact = 1.0 / 3f64.sqrt();
    let (off, off_in_place) = (f64::from(master[0][0]) / exact - 1.0, in_place[0][0].to_f64() / exact - 1.0);
    assert!(off.abs() < 1e-7 && off_in_place.abs() > 1e-3, "{off:e} {off_in_place:e}");
}

/// A loss scale is removed in the product that clips: no rounding in between.
#[test]
fn unscaled_in_the_same_product() {
    for (from, to) in PAIRS {
        for (loss_scale, seed) in [(65536.0, 1), (1024.0, 2), (3.0, 3), (0.25, 4)] {
            let grads = [Spec { dtype: from, numel: 4100, content: Content::Moderate, seed }.tensor()];
            for max_norm in [1e-3, 1e9] {
                let (outputs, report) = into(&grads, &[to], ClipNorm::new(max_norm).loss_scale(loss_scale));
                assert_eq!(report.multiplier, report.clip_coef / loss_scale);
                let (nearest, all) = check(&grads, &outputs, report.multiplier);
                assert!(nearest as f64 > 0.98 * all as f64, "{from} to {to} / {loss_scale}: {nearest} of {all}");
            }
        }
    }
    // What a GradScaler does to f16: 2^-16 of a scaled gradient is below half of f16's smallest number.
    let grads = [vec![f16::from_f32(0.001), f16::from_f32(1.0)]];
    let mut master = [vec![0f32; 2]];
    let report = cpu::clip_grad_norm_into(&grads, &mut master, ClipNorm::new(1.0).loss_scale(65536.0)).unwrap();
    assert_eq!((report.clip_coef, report.multiplier), (1.0, 1.0 / 65536.0));
    assert_eq!(master[0], [grads[0][0].to_f32() / 65536.0, 1.0 / 65536.0]);
    assert_eq!(f16::from_f32(master[0][0]), f16::ZERO);
}

/// The norm after clipping is the threshold, closer than gradients of the first type could have it.
#[test]
fn mixed_lists_have_one_norm() {
    let (a, b, c, d) =
        (vec![2f32; 1000], vec![f16::from_f32(3.0); 500], vec![bf16::from_f32(-5.0); 77], vec![0.125f64; 9]);
    let grads: [&dyn AsGrad; 4] = [&a, &b, &c, &d];
    let (mut p, mut q, mut r, mut s) = (vec![0f32; 1000], vec![0f32; 500], vec![0f32; 77], vec![0f64; 9]);
    let mut outputs: [&mut dyn AsGradMut; 4] = [&mut p, &mut q, &mut r, &mut s];
    let report = cpu::clip_grad_norm_into(&grads, &mut outputs, 1.0).unwrap();
    assert_eq!(report.total_norm, (4.0 * 1000.0 + 9.0 * 500.0 + 25.0 * 77.0 + 9.0 / 64.0f64).sqrt());
    let norm = cpu::total_norm(&outputs, NormType::L2).unwrap().total_norm;
    assert!((norm - 1.0).abs() < 1e-7, "{norm}");
}

#[test]
fn a_wide_f64_becomes_infinite_in_f32() {
    let grads = [vec![1e300, -1e39, 3.4e38, -1e-50, 1e-46]];
    let mut outputs = [vec![0f32; 5]];
    let report = cpu::clip_grad_norm_into(&grads, &mut outputs, f64::INFINITY).unwrap();
    assert!(report.written);
    assert_eq!(outputs[0][..3], [f32::INFINITY, f32::NEG_INFINITY, 3.4e38]);
    assert_eq!(outputs[0][3].to_bits(), (-0f32).to_bits());
    assert_eq!(outputs[0][4], 0.0);
}

#[test]
fn a_skipped_norm_leaves_the_outputs() {
    let grads = [vec![bf16::NAN, bf16::ONE]];
    let mut outputs = [vec![7f32, 8.0]];
    let report = cpu::clip_grad_norm_into(&grads, &mut outputs, 1.0).unwrap();
    assert_eq!((report.written, report.first_nonfinite, &outputs[0][..]), (false, Some(0), &[7.0, 8.0][..]));
    let zero = ClipNorm::new(1.0).nonfinite(NonFinite::Zero);
    assert!(cpu::clip_grad_norm_into(&grads, &mut outputs, zero).unwrap().written);
    assert_eq!(outputs, [[0.0, 0.0]]);
}
