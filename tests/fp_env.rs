//! A caller that flushes subnormals to zero, or rounds another way, as a library built with -ffast-math leaves the
//! thread: our results are the same bits, and its setting is as before.
#![allow(clippy::unwrap_used)]
#![cfg(all(target_arch = "x86_64", not(miri)))]

#[path = "support/format.rs"]
mod format;
#[path = "support/tensor.rs"]
mod tensor;

use format::DTYPES;
use gradclip::{cpu, ClipNorm, ClipValue, Dtype, Error, NonFinite, NormReport, NormType, ValueReport};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::arch::asm;
use tensor::{bits_of, Tensor};

/// Flush to zero, denormals are zero, round down, round up; the bits of MXCSR (Intel SDM volume 1, 10.2.3).
const FTZ: u32 = 1 << 15;
const DAZ: u32 = 1 << 6;
const ROUND_DOWN: u32 = 1 << 13;
const ROUND_UP: u32 = 1 << 14;
const TOWARDS_ZERO: u32 = ROUND_DOWN | ROUND_UP;
/// All exceptions masked.
const MASKED: u32 = 0x1f80;
/// Everything but the sticky exception flags: what a caller sets, not what happens to it.
const CONTROL: u32 = !0x3f;

const SETTINGS: [u32; 5] =
    [MASKED | FTZ | DAZ, MASKED | FTZ, MASKED | ROUND_DOWN, MASKED | ROUND_UP, MASKED | TOWARDS_ZERO | FTZ | DAZ];

fn read_mxcsr() -> u32 {
    let mut mxcsr = 0u32;
    // SAFETY: stmxcsr writes four bytes to the address of a live u32.
    unsafe { asm!("stmxcsr [{}]", in(reg) &mut mxcsr, options(nostack, preserves_flags)) };
    mxcsr
}

fn write_mxcsr(mxcsr: u32) {
    // SAFETY: ldmxcsr reads four bytes of a live u32; only bits that every x86_64 processor has are set.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &mxcsr, options(nostack, preserves_flags)) };
}

/// Runs `call` under a setting, and says what the setting was afterwards. Through a pointer that the compiler cannot
/// see through, or it might move arithmetic in or out: to it, no instruction depends on MXCSR.
fn under<R>(setting: u32, call: &dyn Fn() -> R) -> (R, u32) {
    let call = std::hint::black_box(call);
    let before = read_mxcsr();
    write_mxcsr(setting);
    let result = call();
    let after = read_mxcsr();
    write_mxcsr(before);
    (result, after)
}

/// What a call answered, and the bits it left.
#[derive(Debug, PartialEq)]
struct Called<R> {
    answer: Result<R, Error>,
    bits: Vec<Vec<u64>>,
}

/// What all functions make of one list.
#[derive(Debug, PartialEq)]
struct Trace {
    measured: Vec<Result<NormReport, Error>>,
    clipped: Vec<Called<NormReport>>,
    out_of_place: Vec<Called<NormReport>>,
    limited: Vec<Called<ValueReport>>,
}

const NORM_TYPES: [NormType; 5] = [NormType::L1, NormType::L2, NormType::Inf, NormType::P(1.5), NormType::Rms];

/// All functions on one list, at thresholds that reach from one in which every product is subnormal to one in which
/// few are.
fn trace(grads: &[Tensor], thresholds: &[f64]) -> Trace {
    let measured = NORM_TYPES.map(|norm_type| cpu::total_norm(grads, norm_type)).to_vec();
    let mut clipped = Vec::new();
    let mut out_of_place = Vec::new();
    let mut limited = Vec::new();
    for &threshold in thresholds {
        for norm_type in NORM_TYPES {
            let source = grads;
            let mut grads = grads.to_vec();
            let clip = ClipNorm::new(threshold).norm_type(norm_type).nonfinite(NonFinite::Propagate);
            let answer = cpu::clip_grad_norm(&mut grads, clip);
            clipped.push(Called { answer, bits: bits_of(&grads) });
            // Out of place, to the same types and to f32.
            for to_f32 in [false, true] {
                let like = |grad: &Tensor| if to_f32 { Dtype::F32 } else { grad.dtype() };
                let mut outputs: Vec<Tensor> =
                    source.iter().map(|grad| Tensor::from_f64(like(grad), vec![0.0; grad.numel()])).collect();
                let answer = cpu::clip_grad_norm_into(source, &mut outputs, clip);
                out_of_place.push(Called { answer, bits: bits_of(&outputs) });
            }
        }
        let mut grads = grads.to_vec();
        let answer = cpu::clip_grad_value(&mut grads, ClipValue::new(threshold));
        limited.push(Called { answer, bits: bits_of(&grads) });
    }
    Trace { measured, clipped, out_of_place, limited }
}

/// Every subnormal and small normal exponent, and numbers that need rounding.
fn small_elements(dtype: Dtype, numel: usize, seed: u64) -> Tensor {
    let format = format::Format::of(dtype);
    let mut rng = SmallRng::seed_from_u64(seed);
    let highest = 4 << (format.precision - 1);
    let bits = (0..numel).map(|_| rng.random_range(0..highest) | if rng.random() { format.sign_bit() } else { 0 });
    Tensor::from_bits(dtype, bits)
}

fn plain_elements(dtype: Dtype, numel: usize, seed: u64) -> Tensor {
    let mut rng = SmallRng::seed_from_u64(seed);
    Tensor::from_f64(dtype, (0..numel).map(|_| rng.random_range(-1.0..1.0)))
}

/// Thresholds below the norm of each dtype's small elements, subnormal in it, in f32, in f64.
const SMALL: [f64; 7] = [1e-3, 1e-8, 1e-37, 1e-40, 3e-45, 1e-310, 5e-324];

fn same_bits_under_every_setting(grads: &[Tensor]) {
    let expected = trace(grads, &SMALL);
    for setting in SETTINGS {
        let (got, after) = under(setting, &|| trace(grads, &SMALL));
        assert_eq!(after & CONTROL, setting & CONTROL, "the setting {setting:#x} was changed");
        assert_same(&got, &expected, &format!("under {setting:#x}"));
    }
}

/// `assert_eq` would print megabytes.
fn assert_same(got: &Trace, expected: &Trace, when: &str) {
    assert_eq!(got.measured, expected.measured, "norms {when}");
    for (i, (got, expected)) in got.clipped.iter().zip(&expected.clipped).enumerate() {
        let (threshold, norm_type) = (SMALL[i / NORM_TYPES.len()], NORM_TYPES[i % NORM_TYPES.len()]);
        assert_eq!(got.answer, expected.answer, "clip_grad_norm {threshold:e} {norm_type:?} {when}");
        assert!(got.bits == expected.bits, "gradients clipped by norm {threshold:e} {norm_type:?} {when}");
    }
    for (i, (got, expected)) in got.out_of_place.iter().zip(&expected.out_of_place).enumerate() {
        let (threshold, norm_type) = (SMALL[i / 2 / NORM_TYPES.len()], NORM_TYPES[i / 2 % NORM_TYPES.len()]);
        assert_eq!(got.answer, expected.answer, "clip_grad_norm_into {threshold:e} {norm_type:?} {when}");
        assert!(got.bits == expected.bits, "outputs of {threshold:e} {norm_type:?} {when}");
    }
    for (i, (got, expected)) in got.limited.iter().zip(&expected.limited).enumerate() {
        assert_eq!(got.answer, expected.answer, "clip_grad_value {:e} {when}", SMALL[i]);
        assert!(got.bits == expected.bits, "gradients limited to {:e} {when}", SMALL[i]);
    }
}

/// The test itself: the settings do what they are for.
#[test]
fn the_settings_matter() {
    let opaque = std::hint::black_box::<f32>;
    let product = || opaque(opaque(f32::MIN_POSITIVE) * opaque(0.5));
    let subnormal_is_zero = || opaque(f32::from_bits(1)) == 0.0;
    assert!(product() > 0.0 && !subnormal_is_zero());
    assert_eq!(under(MASKED | FTZ, &product).0, 0.0);
    assert!(under(MASKED | FTZ | DAZ, &subnormal_is_zero).0);
    let third = || opaque(opaque(1.0) / opaque(3.0));
    assert!(under(MASKED | ROUND_DOWN, &third).0 < under(MASKED | ROUND_UP, &third).0);
}

#[test]
fn small_elements_of_each_dtype() {
    for dtype in DTYPES {
        same_bits_under_every_setting(&[small_elements(dtype, 700, 1)]);
    }
}

#[test]
fn a_norm_that_is_subnormal() {
    for numel in [1, 5] {
        let bits = (0..numel).map(|i| 1000 + i);
        same_bits_under_every_setting(&[Tensor::from_bits(Dtype::F64, bits)]);
    }
}

#[test]
fn plain_elements_of_each_dtype() {
    for dtype in DTYPES {
        same_bits_under_every_setting(&[plain_elements(dtype, 3000, 2)]);
    }
}

/// Large enough that all cores take part, and a list of all dtypes. The workers have the caller's setting themselves:
/// a thread starts with that of the one that made it.
#[test]
fn on_many_threads() {
    let list: Vec<Tensor> = DTYPES
        .into_iter()
        .zip(3..)
        .flat_map(|(dtype, seed)| [small_elements(dtype, 90_000, seed), plain_elements(dtype, 5_000, seed)])
        .collect();
    let thresholds = [1e-3, 1e-40, 1e-310];
    let expected = trace(&list, &thresholds);
    for setting in [MASKED | FTZ | DAZ, MASKED | ROUND_UP] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).start_handler(move |_| write_mxcsr(setting));
        let pool = pool.build().unwrap();
        // From a worker of the pool, and from a thread outside of it.
        let (got, after) = pool.install(|| (trace(&list, &thresholds), read_mxcsr()));
        assert_eq!(after & CONTROL, setting & CONTROL, "the setting {setting:#x} of a worker was changed");
        assert!(got == expected, "in a pool under {setting:#x}");
        let (got, after) = under(setting, &|| trace(&list, &thresholds));
        assert_eq!(after & CONTROL, setting & CONTROL, "the setting {setting:#x} was changed");
        assert!(got == expected, "from a thread under {setting:#x}");
        for worker in pool.broadcast(|_| read_mxcsr()) {
            assert_eq!(worker & CONTROL, setting & CONTROL, "the setting {setting:#x} of a worker was changed");
        }
    }
}

/// Thresholds are judged as numbers, also where the processor would take them for 0.
#[test]
fn thresholds_that_flush_to_zero() {
    let results = || {
        let mut grads = [[3.0f64, -4.0]];
        let negative = cpu::clip_grad_norm(&mut grads, -1e-310);
        let negative_value = cpu::clip_grad_value(&mut grads, -1e-310);
        let crossed = cpu::clip_grad_value(&mut grads, ClipValue::between(2e-310, 1e-310));
        let tiny = cpu::clip_grad_norm(&mut grads, 1e-310);
        (negative, negative_value, crossed, tiny, grads.map(|grad| grad.map(f64::to_bits)))
    };
    let expected = results();
    for setting in SETTINGS {
        let (got, _) = under(setting, &results);
        assert_eq!(got, expected, "under {setting:#x}");
    }
}
