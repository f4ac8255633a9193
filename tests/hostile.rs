//! Hostile input on the CPU path: odd thresholds in every combination, gradients that lie or panic, callers with odd
//! floating-point environments and thread pools. Errors where there should be, and nothing worse.
#![allow(clippy::unwrap_used, missing_docs)]

use gradclip::cpu::{self, AsGrad, AsGradMut, Grad, GradMut};
use gradclip::{ClipNorm, ClipValue, Error, NonFinite, NormReport, NormType, Scope};
use half::{bf16, f16};
use std::panic::{catch_unwind, AssertUnwindSafe};

const NORMS: [NormType; 3] = [NormType::L1, NormType::L2, NormType::Inf];
const POLICIES: [NonFinite; 4] = [NonFinite::Skip, NonFinite::Zero, NonFinite::Propagate, NonFinite::Error];

#[test]
fn thresholds_all_combinations_never_panic_and_bad_ones_touch_nothing() {
    let odd = [
        f64::NAN,
        -f64::NAN,
        -0.0,
        0.0,
        -1.0,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::MIN_POSITIVE,
        5e-324,
        -5e-324,
        f64::MAX,
        -f64::MAX,
        1.0,
        1e-300,
        1e300,
    ];
    let lists: Vec<Vec<f64>> = vec![
        vec![],
        vec![0.0],
        vec![-0.0],
        vec![5e-324, -5e-324],
        vec![f64::MAX, f64::MAX],
        vec![3.0, 4.0],
        vec![f64::NAN],
        vec![-f64::NAN],
        vec![f64::INFINITY, 1.0],
        vec![1e200, 1e-200, 1.0],
        vec![f64::MIN_POSITIVE; 9],
        vec![f64::MAX; 5000],
    ];
    for list in &lists {
        let f32s: Vec<f32> = list.iter().map(|x| *x as f32).collect();
        let f16s: Vec<f16> = list.iter().map(|x| f16::from_f64(*x)).collect();
        let bf16s: Vec<bf16> = list.iter().map(|x| bf16::from_f64(*x)).collect();
        for max_norm in odd {
            for eps in odd {
                for norm in NORMS {
                    for policy in POLICIES {
                        let clip = ClipNorm::new(max_norm).eps(eps).norm_type(norm).nonfinite(policy);
                        let (mut a, mut b, mut c, mut d) = (list.clone(), f32s.clone(), f16s.clone(), bf16s.clone());
                        let result = {
                            let mut grads: [&mut dyn AsGradMut; 4] = [&mut a, &mut b, &mut c, &mut d];
                            cpu::clip_grad_norm(&mut grads, clip)
                        };
                        let untouched = a.iter().map(|x| x.to_bits()).eq(list.iter().map(|x| x.to_bits()))
                            && b.iter().map(|x| x.to_bits()).eq(f32s.iter().map(|x| x.to_bits()))
                            && c.iter().map(|x| x.to_bits()).eq(f16s.iter().map(|x| x.to_bits()))
                            && d.iter().map(|x| x.to_bits()).eq(bf16s.iter().map(|x| x.to_bits()));
                        let bad = max_norm.is_nan() || max_norm < 0.0 || !eps.is_finite() || eps < 0.0;
                        if bad {
                            assert!(matches!(result, Err(Error::InvalidThreshold { .. })), "{clip:?} {result:?}");
                        }
                        match &result {
                            Err(_) => assert!(untouched, "{clip:?}"),
                            Ok(report) if !report.written => assert!(untouched && report.clip_coef == 1.0, "{clip:?}"),
                            Ok(report) => {
                                if report.total_norm.is_finite() {
                                    assert!((0.0..1.0).contains(&report.clip_coef), "{clip:?} {report:?}");
                                    assert!(a.iter().all(|x| x.is_finite()), "{clip:?}");
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Loss scales and given norms, odd ones in every combination: refused with nothing touched, or a report that keeps to
/// the formula.
#[test]
fn loss_scales_and_given_norms_all_combinations() {
    let odd = [
        f64::NAN,
        -f64::NAN,
        0.0,
        -0.0,
        -1.0,
        1.0,
        3.0,
        65536.0,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::MIN_POSITIVE,
        5e-324,
        f64::MAX,
        1e-300,
        1e300,
    ];
    let lists: [&[f32]; 5] =
        [&[], &[0.0, -0.0], &[3.0, 4.0], &[f32::MAX, f32::MIN_POSITIVE, 1e-45], &[f32::NAN, f32::INFINITY, -1.0]];
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for list in lists {
        for loss_scale in odd {
            for max_norm in odd {
                for policy in POLICIES {
                    let clip = ClipNorm::new(max_norm).loss_scale(loss_scale).nonfinite(policy);
                    let bad = max_norm.is_nan() || max_norm < 0.0 || !loss_scale.is_normal() || loss_scale < 0.0;
                    let mut grads = [list.to_vec()];
                    let handed = cpu::clip_coef(&grads, clip);
                    let clipped = cpu::clip_grad_norm(&mut grads, clip);
                    // But for what was written, the same; NaN, too.
                    let without_written =
                        |result: &Result<_, _>| format!("{result:?}").replace("written: true", "written: false");
                    assert_eq!(without_written(&clipped), format!("{handed:?}"), "{clip:?}");
                    judge(&clip, bad, max_norm, loss_scale, clipped, bits(&grads[0]) == bits(list));
                    for total_norm in odd {
                        let mut grads = [list.to_vec()];
                        let given = cpu::clip_with_norm(&mut grads, total_norm, clip);
                        let untouched = bits(&grads[0]) == bits(list);
                        judge(&clip, bad || total_norm < 0.0, max_norm, loss_scale, given, untouched);
                    }
                }
            }
        }
    }
}

fn judge(clip: &ClipNorm, bad: bool, max_norm: f64, scale: f64, result: Result<NormReport, Error>, untouched: bool) {
    let report = match result {
        Err(error) => {
            assert!(untouched, "{clip:?}");
            assert_eq!(matches!(error, Error::InvalidThreshold { .. }), bad, "{clip:?}: {error}");
            return;
        }
        Ok(report) => report,
    };
    assert!(!bad, "{clip:?}");
    assert_eq!(report.found_inf, !report.total_norm.is_finite(), "{clip:?}");
    assert_eq!(report.written, report.multiplier != 1.0, "{clip:?} {report:?}");
    assert!(report.written || untouched, "{clip:?} {report:?}");
    if !report.found_inf {
        assert!((0.0..=1.0).contains(&report.clip_coef), "{clip:?} {report:?}");
        assert_eq!(report.multiplier, report.clip_coef / scale, "{clip:?} {report:?}");
        assert_eq!(report.clip_coef < 1.0, report.total_norm > max_norm, "{clip:?} {report:?}");
    }
}

#[test]
fn bounds_all_combinations() {
    let odd = [
        f64::NAN,
        -0.0,
        0.0,
        -1.0,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::MIN_POSITIVE,
        5e-324,
        -5e-324,
        f64::MAX,
        -f64::MAX,
        1.0,
        1e-10,
        1e10,
        65504.0,
        65519.9,
        65520.0,
        3.4e38,
    ];
    for lo in odd {
        for hi in odd {
            let values = [
                0.0,
                -0.0,
                1.0,
                -1.0,
                70000.0,
                1e-9,
                -1e-9,
                f64::INFINITY,
                f64::NEG_INFINITY,
                f64::NAN,
                5e-324,
                f64::MAX,
            ];
            let mut a = values.to_vec();
            let mut b: Vec<f32> = values.iter().map(|x| *x as f32).collect();
            let mut c: Vec<f16> = values.iter().map(|x| f16::from_f64(*x)).collect();
            let mut d: Vec<bf16> = values.iter().map(|x| bf16::from_f64(*x)).collect();
            let before = (a.clone(), b.clone(), c.clone(), d.clone());
            let result = {
                let mut grads: [&mut dyn AsGradMut; 4] = [&mut a, &mut b, &mut c, &mut d];
                cpu::clip_grad_value(&mut grads, ClipValue::between(lo, hi))
            };
            if lo.is_nan() || hi.is_nan() || lo > hi || lo == f64::INFINITY || hi == f64::NEG_INFINITY {
                assert!(matches!(result, Err(Error::InvalidBounds { .. })));
                assert!(a.iter().map(|x| x.to_bits()).eq(before.0.iter().map(|x| x.to_bits())));
            } else {
                let report = result.unwrap();
                assert_eq!((report.nan, report.first_nonfinite), (4, Some(0)), "{lo} {hi}");
                for (x, was) in a.iter().zip(&before.0) {
                    if was.is_nan() {
                        assert_eq!(x.to_bits(), was.to_bits());
                    } else {
                        assert!(*x >= lo && *x <= hi, "{lo} {hi}: {was} -> {x}");
                    }
                }
                // A finite bound stays finite.
                if hi.is_finite() && lo.is_finite() {
                    assert!(b.iter().all(|x| x.is_nan() || x.is_finite()));
                    assert!(c.iter().all(|x| x.is_nan() || x.is_finite()), "{lo} {hi} {c:?}");
                    assert!(d.iter().all(|x| x.is_nan() || x.is_finite()));
                }
            }
        }
    }
}

/// Bounds that are both the same infinity would make finite gradients infinite.
#[test]
fn bounds_that_make_everything_infinite_are_refused() {
    let mut grads = [[1.0f32, -2.0]];
    let result = cpu::clip_grad_value(&mut grads, ClipValue::between(f64::INFINITY, f64::INFINITY));
    assert!(result.is_err(), "{result:?} {grads:?}");
}

/// A list of zero-sized gradients can be longer than memory.
#[test]
fn a_list_longer_than_memory_is_an_error() {
    let mut grads = vec![[0f32; 0]; usize::MAX];
    assert!(matches!(cpu::clip_grad_norm(&mut grads, 1.0), Err(Error::OutOfMemory { .. })));
    assert!(matches!(cpu::clip_grad_value(&mut grads, 1.0), Err(Error::OutOfMemory { .. })));
    assert!(matches!(cpu::total_norm(&grads, NormType::L2), Err(Error::OutOfMemory { .. })));
}

#[test]
fn many_tensors() {
    let mut grads: Vec<Vec<f32>> = (0..200_000).map(|i| if i % 3 == 0 { vec![] } else { vec![1.0] }).collect();
    let n = grads.iter().filter(|g| !g.is_empty()).count() as f64;
    let report = cpu::clip_grad_norm(&mut grads, 1.0).unwrap();
    assert!((report.total_norm - n.sqrt()).abs() < 1e-9);
    grads[199_999] = vec![f32::NAN];
    assert_eq!(cpu::clip_grad_norm(&mut grads, 1.0).unwrap().first_nonfinite, Some(199_999));
    assert_eq!(cpu::clip_grad_value(&mut grads, 1.0).unwrap().first_nonfinite, Some(199_999));
    let all: Vec<Vec<bf16>> = vec![vec![]; 200_000];
    assert_eq!(cpu::total_norm(&all, NormType::L2).unwrap().total_norm, 0.0);
}

#[test]
fn overlaps_by_one_byte_adjacent_and_empty_inside() {
    let base = [0u64; 8];
    let bytes: &[u8] = bytemuck::cast_slice(&base);
    let f = |a: usize, n: usize| -> &[f32] { bytemuck::cast_slice(&bytes[a..a + 4 * n]) };
    let h = |a: usize, n: usize| -> &[f16] { bytemuck::cast_slice(&bytes[a..a + 2 * n]) };
    // adjacent
    cpu::total_norm(&[Grad::from(f(0, 2)), Grad::from(h(8, 3)), Grad::from(f(16, 1))], NormType::L2).unwrap();
    // the last two bytes of one
    let error = cpu::total_norm(&[Grad::from(f(4, 2)), Grad::from(h(10, 1))], NormType::L2).unwrap_err();
    assert_eq!(error, Error::Overlap { first: 0, second: 1 });
    // empties inside
    cpu::total_norm(
        &[Grad::from(h(2, 0)), Grad::from(f(0, 8)), Grad::from(f(4, 0)), Grad::from(h(30, 0))],
        NormType::L2,
    )
    .unwrap();
    let error =
        cpu::total_norm(&[Grad::from(f(0, 1)), Grad::from(f(0, 8)), Grad::from(f(4, 1))], NormType::L2).unwrap_err();
    assert!(matches!(error, Error::Overlap { .. }));
}

/// Another slice at each call, of another type, longer or shorter.
struct Liar {
    a: Vec<f32>,
    b: Vec<f64>,
    calls: std::cell::Cell<usize>,
}
impl AsGrad for Liar {
    fn as_grad(&self) -> Grad<'_> {
        self.calls.set(self.calls.get() + 1);
        if self.calls.get() % 2 == 1 {
            Grad::F32(&self.a)
        } else {
            Grad::F64(&self.b)
        }
    }
}
impl AsGradMut for Liar {
    fn as_grad_mut(&mut self) -> GradMut<'_> {
        GradMut::F64(&mut self.b)
    }
}

#[test]
fn liars_get_nonsense_but_nothing_worse() {
    for (a, b) in [(3, 1_000_000), (1_000_000, 3), (0, 100_000), (100_000, 0)] {
        let make = || Liar { a: vec![3.0; a], b: vec![f64::NAN; b], calls: Default::default() };
        for _ in 0..3 {
            let mut grads = [make(), make()];
            let _ = cpu::clip_grad_norm(&mut grads, 1.0);
            let _ = cpu::clip_grad_value(&mut grads, 1.0);
            let _ = cpu::total_norm(&grads, NormType::L1);
        }
    }
}

/// Out of place too: as outputs, as gradients, and as both.
#[test]
fn liars_out_of_place_get_nonsense_but_nothing_worse() {
    for (a, b) in [(3, 1_000_000), (1_000_000, 3), (0, 100_000), (100_000, 0)] {
        let make = || Liar { a: vec![3.0; a], b: vec![2.0; b], calls: Default::default() };
        for numel in [a, b] {
            let _ = cpu::clip_grad_norm_into(&[make()], &mut [vec![0f32; numel]], 1.0);
            let _ = cpu::clip_grad_norm_into(&[vec![1f64; numel]], &mut [make()], 1.0);
            let (grads, mut outputs) = ([make(), make()], [make(), make()]);
            for _ in 0..3 {
                let _ = cpu::clip_grad_norm_into(&grads, &mut outputs, 1.0);
            }
        }
    }
}

/// Lists of different lengths, of no size, longer than memory.
#[test]
fn odd_lists_out_of_place() {
    let none: [[f32; 0]; 0] = [];
    let report = cpu::clip_grad_norm_into(&none, &mut none.clone(), 1.0).unwrap();
    assert_eq!((report.total_norm, report.clip_coef), (0.0, 1.0));
    let long = vec![[0f32; 0]; usize::MAX];
    let error = cpu::clip_grad_norm_into(&long, &mut none.clone(), 1.0).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { .. }));
    let error = cpu::clip_grad_norm_into(&none, &mut [[0f32; 0]; 5], 1.0).unwrap_err();
    assert_eq!(error, Error::OutputCount { gradients: 0, outputs: 5 });
    // Thresholds are checked before the lists, gradients before outputs.
    let error = cpu::clip_grad_norm_into(&[[1f32]], &mut none.clone(), -1.0).unwrap_err();
    assert!(matches!(error, Error::InvalidThreshold { .. }));
    let twice = [1f32, 2.0];
    let error = cpu::clip_grad_norm_into(&[&twice, &twice], &mut none.clone(), 1.0).unwrap_err();
    assert_eq!(error, Error::Overlap { first: 0, second: 1 });
}

/// Panics when it is asked for, if told so.
struct Panics(Vec<f32>, bool);
impl AsGrad for Panics {
    fn as_grad(&self) -> Grad<'_> {
        assert!(!self.1);
        Grad::F32(&self.0)
    }
}
/// The same, only for writing.
struct PanicsMut(Vec<f32>, bool);
impl AsGrad for PanicsMut {
    fn as_grad(&self) -> Grad<'_> {
        Grad::F32(&self.0)
    }
}
impl AsGradMut for PanicsMut {
    fn as_grad_mut(&mut self) -> GradMut<'_> {
        assert!(!self.1);
        GradMut::F32(&mut self.0)
    }
}

#[cfg(target_arch = "x86_64")]
fn mxcsr() -> u32 {
    let mut x = 0u32;
    // SAFETY: writes four bytes to the pointer, that of a live u32.
    unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &mut x, options(nostack, preserves_flags)) };
    x & !0x3f
}
#[cfg(target_arch = "x86_64")]
fn set_mxcsr(x: u32) {
    // SAFETY: reads four bytes from the pointer, that of a live u32, and no reserved bit is set in them.
    unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &x, options(nostack, preserves_flags)) };
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_panicking_gradient_leaves_the_list_and_the_environment() {
    let before = mxcsr();
    for setting in [0x9fc0u32, 0x3f80, 0x5f80, 0x7f80] {
        set_mxcsr(setting);
        let mut grads = [PanicsMut(vec![30.0; 100], false), PanicsMut(vec![40.0], true)];
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        let r = catch_unwind(AssertUnwindSafe(|| cpu::clip_grad_norm(&mut grads, 1.0).is_ok()));
        let r2 = catch_unwind(AssertUnwindSafe(|| cpu::clip_grad_value(&mut grads, 1.0).is_ok()));
        let r3 = catch_unwind(AssertUnwindSafe(|| {
            cpu::total_norm(&[Panics(vec![], false), Panics(vec![], true)], NormType::L2).is_ok()
        }));
        let now = mxcsr();
        let r4 = catch_unwind(AssertUnwindSafe(|| {
            cpu::clip_grad_norm_into(&[[1f32; 100], [2.0; 100]], &mut grads, 1.0).is_ok()
        }));
        assert!(r4.is_err());
        let _ = cpu::clip_grad_norm_into(&[[1.0f32]], &mut [[0f32]], -1.0);
        let _ = cpu::clip_grad_norm(&mut [[1.0f32]], -1.0);
        let _ = cpu::clip_grad_norm(&mut [[f32::NAN]], ClipNorm::new(1.0).nonfinite(NonFinite::Error));
        let _ = cpu::clip_grad_value(&mut [[1.0f32]], f64::NAN);
        let now2 = mxcsr();
        set_mxcsr(before);
        std::panic::set_hook(hook);
        assert!(r.is_err() && r2.is_err() && r3.is_err());
        assert_eq!((now, now2), (setting, setting));
        assert!(grads[0].0.iter().all(|x| *x == 30.0));
    }
}

/// Other work that a rayon worker takes up while it waits for ours keeps the environment of its thread.
#[cfg(target_arch = "x86_64")]
#[test]
fn jobs_taken_up_while_waiting_keep_their_environment() {
    const SETTING: u32 = 0x9fc0; // FTZ, DAZ
    let pool = rayon::ThreadPoolBuilder::new().num_threads(8).start_handler(|_| set_mxcsr(SETTING)).build().unwrap();
    let (wrong, total) = (std::sync::atomic::AtomicUsize::new(0), std::sync::atomic::AtomicUsize::new(0));
    let clipping = std::sync::atomic::AtomicUsize::new(usize::MAX);
    let grads: Vec<Vec<f32>> = (0..8).map(|_| vec![1e-3; 1 << 20]).collect();
    pool.install(|| {
        for _ in 0..10 {
            rayon::join(
                || {
                    for _ in 0..20 {
                        clipping.store(rayon::current_thread_index().unwrap(), std::sync::atomic::Ordering::SeqCst);
                        cpu::total_norm(&grads, NormType::L2).unwrap();
                        clipping.store(usize::MAX, std::sync::atomic::Ordering::SeqCst);
                    }
                },
                || {
                    rayon::scope(|s| {
                        for _ in 0..3000 {
                            s.spawn(|_| {
                                if clipping.load(std::sync::atomic::Ordering::SeqCst)
                                    == rayon::current_thread_index().unwrap()
                                {
                                    total.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                                }
                                if mxcsr() != SETTING {
                                    wrong.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                                }
                                std::hint::black_box((0..100_000u64).map(std::hint::black_box).sum::<u64>());
                            });
                        }
                    })
                },
            );
        }
    });
    println!("{} jobs ran inside of ours", total.into_inner()); // may be none
    assert_eq!(wrong.into_inner(), 0, "jobs of the caller that ran in our environment");
}

#[test]
fn pools_of_one_thread_nested_and_many_threads() {
    let list = || vec![vec![1.0f32; 300_000], vec![2.0; 70_000]];
    let expected = cpu::total_norm(&list(), NormType::L2).unwrap().total_norm;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let got = pool.install(|| cpu::clip_grad_norm(&mut list(), 1.0).unwrap().total_norm);
    assert_eq!(got, expected);
    let other = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    let got =
        other.install(|| pool.install(|| other.install(|| cpu::clip_grad_norm(&mut list(), 1.0).unwrap().total_norm)));
    assert_eq!(got, expected);
    std::thread::scope(|s| {
        for _ in 0..32 {
            s.spawn(|| {
                for _ in 0..10 {
                    assert_eq!(cpu::clip_grad_norm(&mut list(), 1.0).unwrap().total_norm, expected);
                }
            });
        }
    });
    use rayon::prelude::*;
    let all: Vec<f64> =
        (0..64).into_par_iter().map(|_| cpu::clip_grad_norm(&mut list(), 1.0).unwrap().total_norm).collect();
    assert!(all.iter().all(|n| *n == expected));
}

#[test]
fn values_at_the_edges() {
    let n = |g: &[f64]| cpu::total_norm(&[g], NormType::L2).unwrap().total_norm;
    // norm overflows f64, all finite
    let report = cpu::clip_grad_norm(&mut [[f64::MAX, f64::MAX]], 1.0).unwrap();
    assert_eq!((report.total_norm, report.first_nonfinite, report.written), (f64::INFINITY, None, false));
    assert_eq!(n(&[f64::MAX]), f64::MAX);
    assert_eq!(n(&[5e-324]), 5e-324);
    assert_eq!(n(&[5e-324, -5e-324]), 5e-324);
    assert_eq!(n(&[3e-324; 0]), 0.0);
    // mixtures: a tiny f64 with f16, in separate tensors
    let (mut a, mut b, mut c) = (vec![1e-200; 10], vec![f16::from_f32(6e-8); 3], vec![1e250f64]);
    let mut grads: [&mut dyn AsGradMut; 3] = [&mut a, &mut b, &mut c];
    let report = cpu::clip_grad_norm(&mut grads, 1.0).unwrap();
    assert_eq!(report.total_norm, 1e250);
    assert_eq!(c[0], 1.0);
    let (mut a, mut b) = (vec![1e-200; 10], vec![f16::from_bits(1); 1]);
    let mut grads: [&mut dyn AsGradMut; 2] = [&mut a, &mut b];
    assert_eq!(cpu::clip_grad_norm(&mut grads, 1e-9).unwrap().total_norm, 2f64.powi(-24));
    // all subnormal f32
    let report = cpu::clip_grad_norm(&mut [[f32::from_bits(1); 4]], f64::from(f32::from_bits(1))).unwrap();
    assert_eq!(report.total_norm, 2.0 * f64::from(f32::from_bits(1)));
    let r = cpu::total_norm(&[[f32::MAX; 100]], NormType::L2).unwrap().total_norm;
    assert!((r / (f64::from(f32::MAX) * 10.0) - 1.0).abs() < 1e-15);
    // NaN payloads
    for bits in [0x7f80_0001u32, 0xff80_0001, 0x7fc1_2345, 0xffff_ffff] {
        let mut grads = [[1.0f32, f32::from_bits(bits)]];
        let report = cpu::clip_grad_norm(&mut grads, 1.0).unwrap();
        assert_eq!(
            (report.total_norm.to_bits(), report.written, grads[0][1].to_bits()),
            (f64::NAN.to_bits(), false, bits)
        );
        let report = cpu::clip_grad_value(&mut grads, 0.5).unwrap();
        assert_eq!((report.nan, grads[0][1].to_bits(), grads[0][0]), (1, bits, 0.5));
    }
    // equal, one ulp above, below
    for (max, written) in
        [(5.0, false), (f64::from_bits(5f64.to_bits() - 1), true), (f64::from_bits(5f64.to_bits() + 1), false)]
    {
        let mut g = [[3.0f64, 4.0]];
        let report = cpu::clip_grad_norm(&mut g, max).unwrap();
        assert_eq!((report.written, report.clip_coef < 1.0), (written, written));
    }
}

#[test]
fn norm_plus_eps_beyond_f64() {
    let mut g = [[1e308f64]];
    let report = cpu::clip_grad_norm(&mut g, ClipNorm::new(1e308).eps(1e308)).unwrap();
    assert!((g[0][0] / 0.5e308 - 1.0).abs() < 1e-12, "{report:?} {g:?}");
}

/// All exceptions unmasked by the caller: a trap would end the process.
#[cfg(target_arch = "x86_64")]
#[test]
fn unmasked_exceptions_do_not_trap() {
    let before = mxcsr();
    let big = vec![1.0e-3f32; 1 << 20];
    let (mut a, mut b, mut c, mut d) = (
        vec![1e300, 1e-320, 0.1],
        vec![f32::MAX, 1e-45, 0.3],
        vec![f16::from_bits(1), f16::MAX],
        vec![bf16::MAX, bf16::from_bits(1)],
    );
    let mut e = big.clone();
    set_mxcsr(0);
    for max in [0.1, 1e-310, -1e-310, 0.0, f64::NAN] {
        for norm in NORMS {
            let mut grads: [&mut dyn AsGradMut; 5] = [&mut a, &mut b, &mut c, &mut d, &mut e];
            let _ = cpu::clip_grad_norm(
                &mut grads,
                ClipNorm::new(max).eps(1e-6).norm_type(norm).nonfinite(NonFinite::Propagate),
            );
            let mut wide = vec![0f32; 3];
            let _ = cpu::clip_grad_norm_into(&[vec![1e300, 1e-320, 0.1]], &mut [&mut wide], max);
            let _ = cpu::clip_grad_value(&mut grads, ClipValue::between(-max, max));
            let _ = cpu::clip_grad_value(&mut grads, max);
        }
    }
    let now = mxcsr();
    set_mxcsr(before);
    assert_eq!(now, 0);
}

/// Thresholds of groups, in every combination with those of the call: as good or bad as in a call of their own.
#[test]
fn thresholds_of_groups_all_combinations() {
    let odd = [
        f64::NAN,
        f64::from_bits(0x7ff8_0000_0000_0001), // what stands for the threshold of the call, inside
        f64::from_bits(0x7ff0_0000_0000_0001),
        -0.0,
        0.0,
        -1.0,
        5e-324,
        -5e-324,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::MAX,
        1.0,
    ];
    let lists: [&[f64]; 5] = [&[], &[3.0, -4.0], &[5e-324, -0.0], &[f64::NAN, 1.0], &[f64::MAX, f64::MAX]];
    for of_call in odd {
        for of_group in odd.map(Some).into_iter().chain([None]) {
            for policy in POLICIES {
                let clip = |max_norm: f64| ClipNorm::new(max_norm).nonfinite(policy);
                let mut grads: Vec<Vec<f64>> = lists.iter().map(|list| list.to_vec()).collect();
                let max_norms = [of_group; 5];
                let result =
                    cpu::clip_grad_norm_by(&mut grads, &Scope::per_tensor().max_norms(&max_norms), clip(of_call));
                let own = of_group.unwrap_or(f64::INFINITY);
                let bad = |threshold: f64| threshold.is_nan() || threshold < 0.0;
                let mut alone: Vec<Vec<f64>> = lists.iter().map(|list| list.to_vec()).collect();
                if bad(of_call) || bad(own) {
                    assert!(matches!(result, Err(Error::InvalidThreshold { name: "max_norm", .. })), "{result:?}");
                } else if policy == NonFinite::Error {
                    assert!(matches!(result, Err(Error::NonFinite { tensor: Some(3), .. })), "{result:?}");
                } else {
                    let report = result.unwrap();
                    for (index, one) in alone.iter_mut().enumerate() {
                        let mut expected = cpu::clip_grad_norm(std::slice::from_mut(one), clip(own)).unwrap();
                        expected.first_nonfinite = expected.first_nonfinite.map(|_| index);
                        assert_eq!(format!("{:?}", report.groups[index]), format!("{expected:?}"));
                    }
                }
                let bits = |lists: &[Vec<f64>]| -> Vec<Vec<u64>> {
                    lists.iter().map(|list| list.iter().map(|x| x.to_bits()).collect()).collect()
                };
                assert_eq!(bits(&grads), bits(&alone), "{of_call} {of_group:?} {policy:?}");
            }
        }
    }
}

/// A negative subnormal is negative, also where the caller's thread takes it for zero; and a trap would end the process.
#[cfg(target_arch = "x86_64")]
#[test]
fn thresholds_of_groups_in_odd_environments() {
    let before = mxcsr();
    for setting in [0x9fc0u32, 0] {
        for (max_norm, good) in [(-5e-324, false), (5e-324, true), (f64::from_bits(0x7ff0_0000_0000_0001), false)] {
            let mut grads = [[3.0f32, 4.0]];
            let max_norms = [Some(max_norm)];
            set_mxcsr(setting);
            let scope = Scope::per_tensor().max_norms(&max_norms).telemetry();
            let result = cpu::clip_grad_norm_by(&mut grads, &scope, 1.0).is_ok();
            let now = mxcsr();
            set_mxcsr(before);
            assert_eq!((result, now), (good, setting), "{max_norm:e}");
            assert_eq!(grads, if good { [[0.0, 0.0]] } else { [[3.0, 4.0]] });
        }
    }
}

#[test]
fn scopes_of_odd_sizes() {
    let mut grads = [vec![3.0f32, 4.0], vec![], vec![1.0; 6]];
    let mut refused = |scope: Scope<'_>| {
        let error = cpu::clip_grad_norm_by(&mut grads, &scope, 0.1).unwrap_err();
        assert_eq!(grads, [vec![3.0f32, 4.0], vec![], vec![1.0; 6]], "{scope:?}");
        error
    };
    let group = usize::MAX;
    assert_eq!(refused(Scope::groups(&[0, group, 0])), Error::NoSuchGroup { tensor: 1, group, groups: 3 });
    assert_eq!(refused(Scope::groups(&[0, 0, 3])), Error::NoSuchGroup { tensor: 2, group: 3, groups: 3 });
    assert_eq!(
        refused(Scope::groups(&[0, 0, 0]).max_norms(&[])),
        Error::NoSuchGroup { tensor: 0, group: 0, groups: 0 }
    );
    for rows in [usize::MAX, usize::MAX / 2 + 1, 1 << 32, 1 << 31] {
        assert_eq!(refused(Scope::rows(&[rows, 0, 1])), Error::UnevenRows { tensor: 0, numel: 2, rows });
        assert_eq!(refused(Scope::rows(&[1, rows, 1])), Error::TooLarge { tensor: 1, numel: 0 });
        assert_eq!(refused(Scope::rows(&[0, rows, 1])), Error::UnevenRows { tensor: 0, numel: 2, rows: 0 });
    }
    let lists: [&[usize]; 4] = [&[], &[1], &[0, 0], &[1, 1, 1, 1]];
    for list in lists {
        assert!(matches!(refused(Scope::groups(list)), Error::ScopeLength { what: "groups", expected: 3, .. }));
        assert!(matches!(refused(Scope::rows(list)), Error::ScopeLength { what: "rows", expected: 3, .. }));
    }
    for count in [0, 2, 4, 1000] {
        let max_norms = vec![None; count];
        assert!(matches!(refused(Scope::per_tensor().max_norms(&max_norms)), Error::ScopeLength { expected: 3, .. }));
        assert!(matches!(
            refused(Scope::rows(&[2, 5, 6]).max_norms(&max_norms)),
            Error::ScopeLength { expected: 13, .. }
        ));
        assert!(matches!(refused(Scope::global().max_norms(&max_norms)), Error::ScopeLength { expected: 1, .. }));
    }
    // Errors of the list come first, and of nothing there is nothing to refuse.
    let flat = [1.0f32; 8];
    let overlapping = [&flat[0..4], &flat[3..8]];
    let error = cpu::norms_by(&overlapping, &Scope::rows(&[9, 9]), NormType::L2).unwrap_err();
    assert_eq!(error, Error::Overlap { first: 0, second: 1 });
    let nothing: [Vec<f32>; 0] = [];
    for scope in [Scope::global(), Scope::per_tensor(), Scope::groups(&[]), Scope::rows(&[])] {
        let report = cpu::norms_by(&nothing, &scope.telemetry(), NormType::L2).unwrap();
        assert_eq!(
            (report.groups.len(), report.num_written(), report.of_tensor(0)),
            (usize::from(scope == Scope::global()), 0, None)
        );
    }
}

#[test]
fn many_tensors_groups_and_rows() {
    let count = 100_000;
    let list = || -> Vec<Vec<f32>> { (0..count).map(|i| vec![1.0; i % 3]).collect() };
    let group_of: Vec<usize> = (0..count).map(|i| (i * 7) % 1000).collect();
    let rows: Vec<usize> = (0..count).map(|i| i % 3).collect();
    for scope in [Scope::per_tensor(), Scope::groups(&group_of), Scope::rows(&rows)] {
        let mut grads = list();
        let report = cpu::clip_grad_norm_by(&mut grads, &scope.telemetry(), 0.5).unwrap();
        let squares: f64 = report.groups.iter().map(|group| group.total_norm * group.total_norm).sum();
        assert!((squares - 99_999.0).abs() < 1e-6, "{squares}");
        assert!(report.groups.iter().all(|group| group.written == (group.total_norm > 0.0)));
        assert_eq!(report.tensors[count - 1].max_abs, if (count - 1) % 3 == 0 { 0.0 } else { 1.0 });
        grads[count - 2] = vec![f32::NAN; (count - 2) % 3];
        assert!(report.of_tensor(count - 2).is_some());
        let report = cpu::norms_by(&grads, &scope, NormType::L2).unwrap();
        let bad: Vec<_> = report.groups.iter().filter_map(|group| group.first_nonfinite).collect();
        assert!(bad.iter().all(|&tensor| tensor == count - 2) && !bad.is_empty(), "{bad:?}");
    }
}

/// What lies about its length between two looks gets nonsense.
#[test]
fn liars_in_scopes() {
    for (a, b) in [(6, 1_000_002), (1_000_002, 6), (0, 100_000), (100_002, 0), (6, 7), (6, 1)] {
        let make = || Liar { a: vec![3.0; a], b: vec![7.0; b], calls: Default::default() };
        for scope in [Scope::per_tensor(), Scope::groups(&[1, 0]), Scope::rows(&[3, 2]), Scope::rows(&[6, 0])] {
            let mut grads = [make(), make()];
            let _ = cpu::clip_grad_norm_by(&mut grads, &scope.telemetry(), 1.0);
            let _ = cpu::norms_by(&grads, &scope, NormType::L1);
        }
    }
}
