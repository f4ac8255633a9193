//! Clipping out of place: the device against the CPU path bit for bit, gradients and surroundings untouched, and what is
//! refused.

use super::data::{bits, tensor, Source, Tensor, Values, DTYPES};
use super::device::{self, OnDevice};
use crate::backend::{with_clipper, LARGE};
use cudarc::driver::DevicePtr;
use gradclip::cpu::{self, AsGrad, AsGradMut, Grad, GradMut};
use gradclip::cuda::{Clipper, RawGrad};
use gradclip::{ClipNorm, Dtype, Error, NonFinite, NormReport, NormType, Result};
use std::ops::Range;

/// The types that gradients can be clipped from and to.
pub const PAIRS: [(Dtype, Dtype); 7] = [
    (Dtype::F32, Dtype::F32),
    (Dtype::F64, Dtype::F64),
    (Dtype::F16, Dtype::F16),
    (Dtype::BF16, Dtype::BF16),
    (Dtype::F64, Dtype::F32),
    (Dtype::F16, Dtype::F32),
    (Dtype::BF16, Dtype::F32),
];

/// Elements before and after an output, in one allocation with it: a multiple of 16 bytes in every type.
const AROUND: usize = 16;
const STALE: f64 = -96.0; // in every type

/// An output, and what surrounds it.
#[derive(Clone, Debug)]
pub struct Output {
    whole: Tensor,
    part: Range<usize>,
}

impl Output {
    pub fn new(dtype: Dtype, numel: usize, offset: usize) -> Self {
        let begin = AROUND + offset;
        let whole = tensor(dtype, &vec![STALE; begin + numel + AROUND]);
        Self { whole, part: begin..begin + numel }
    }

    fn bits(&self) -> Vec<u64> {
        self.whole.values.bits()[self.part.clone()].to_vec()
    }

    fn surroundings_are_stale(&self) -> bool {
        let values = self.whole.values.values();
        values[..self.part.start].iter().chain(&values[self.part.end..]).all(|&x| x == STALE)
    }
}

impl AsGrad for Output {
    fn as_grad(&self) -> Grad<'_> {
        self.whole.values.part(self.part.clone())
    }
}

impl AsGradMut for Output {
    fn as_grad_mut(&mut self) -> GradMut<'_> {
        self.whole.values.part_mut(self.part.clone())
    }
}

/// The call, in the shape of that on the CPU. The gradients are as they were, to the bit.
fn into_on_device(
    clipper: &mut Clipper,
    grads: &[Tensor],
    outputs: &mut [Output],
    clip: ClipNorm,
) -> Result<NormReport> {
    let (wholes, parts): (Vec<_>, Vec<_>) = outputs.iter().map(|out| (out.whole.clone(), out.part.clone())).unzip();
    let mut device = OnDevice::upload(clipper.stream(), grads);
    let mut out_device = OnDevice::upload(clipper.stream(), &wholes);
    let report = device.with(grads, |grads| {
        out_device.with_parts(&parts, |outputs| clipper.clip_grad_norm_into(grads, outputs, clip)?.wait())
    });
    let (mut after, mut wholes) = (grads.to_vec(), wholes);
    device.download(&mut after);
    assert_eq!(bits(&after), bits(grads), "a gradient was written");
    out_device.download(&mut wholes);
    for (output, whole) in outputs.iter_mut().zip(wholes) {
        output.whole = whole;
    }
    report
}

fn of_report(report: &NormReport) -> (u64, u64, Option<usize>) {
    (report.total_norm.to_bits(), report.clip_coef.to_bits(), report.first_nonfinite)
}

pub fn assert_parity(
    clipper: &mut Clipper,
    grads: &[Tensor],
    outputs: &[Output],
    clip: ClipNorm,
    what: &str,
) -> NormReport {
    let (mut on_cpu, mut on_device) = (outputs.to_vec(), outputs.to_vec());
    let expected = cpu::clip_grad_norm_into(grads, &mut on_cpu, clip).unwrap();
    let got = into_on_device(clipper, grads, &mut on_device, clip).unwrap();
    assert_eq!(
        (of_report(&got), got.written),
        (of_report(&expected), expected.written),
        "{what}: {got:?} {expected:?}"
    );
    // What is in place in the same call: norm and coefficient, and gradients of the same type.
    let mut in_place = grads.to_vec();
    let report = device::clip_grad_norm(clipper, &mut in_place, clip).unwrap();
    assert_eq!(of_report(&got), of_report(&report), "{what}");
    for (i, (on_device, on_cpu)) in on_device.iter().zip(&on_cpu).enumerate() {
        assert_eq!(on_device.bits(), on_cpu.bits(), "{what}: output {i}");
        assert!(on_device.surroundings_are_stale() && on_cpu.surroundings_are_stale(), "{what}: around output {i}");
        if !got.written {
            assert_eq!(on_device.bits(), outputs[i].bits(), "{what}: output {i}");
        } else if grads[i].values.dtype() == on_device.whole.values.dtype() && report.total_norm.is_finite() {
            assert_eq!(on_device.bits(), in_place[i].values.bits(), "{what}: output {i}");
        }
    }
    expected
}

/// Clipped by half, not clipped, and by so much that f32 cannot hold the coefficient.
fn assert_parity_of_all(clipper: &mut Clipper, grads: &[Tensor], outputs: &[Output], what: &str) {
    let norm = cpu::total_norm(grads, NormType::L2).unwrap().total_norm;
    for fraction in [0.5, 1.0, 1e-25] {
        let clip = ClipNorm::new(fraction * norm);
        let report = assert_parity(clipper, grads, outputs, clip, &format!("{what} x {fraction}"));
        assert!(report.written && (fraction == 1.0 || norm == 0.0) == (report.clip_coef == 1.0), "{what}: {report:?}");
    }
}

#[test]
fn every_pair_of_types_at_every_border() {
    with_clipper(|clipper| {
        let mut source = Source::new(21);
        for (from, to) in PAIRS {
            let tile = 32 * 1024 / from.size();
            let mut sizes = vec![0, 1, 2, 3];
            for border in [tile / 2048, tile / 1024, tile / 64, tile / 16, tile / 8, tile, 2 * tile] {
                sizes.extend([border - 1, border, border + 1]);
            }
            let grads: Vec<Tensor> = sizes.iter().map(|&numel| source.tensor(from, numel, 0)).collect();
            let outputs: Vec<Output> = sizes.iter().map(|&numel| Output::new(to, numel, 0)).collect();
            assert_parity_of_all(clipper, &grads, &outputs, &format!("{from} to {to}"));
        }
    });
}

/// Of every pair of types, in lists longer than the parameters hold.
#[test]
fn every_relative_alignment() {
    with_clipper(|clipper| {
        let mut source = Source::new(22);
        for (from, to) in PAIRS {
            let (mut grads, mut outputs) = (Vec::new(), Vec::new());
            for offset in 0..16 / from.size() {
                for out_offset in 0..16 / to.size() {
                    // The last one has three tiles, whose ends are not those of the tensor.
                    let whole = if (offset + out_offset) % 4 == 1 { 2 * 32 * 1024 / from.size() + 5 } else { 700 };
                    for numel in [1, 5, 16, 31, 300, whole] {
                        grads.push(source.tensor(from, numel, offset));
                        outputs.push(Output::new(to, numel, out_offset));
                    }
                }
            }
            assert_parity_of_all(clipper, &grads, &outputs, &format!("{from} to {to}"));
        }
    });
}

#[test]
fn mixed_pairs_and_empties_in_lists_of_every_length() {
    with_clipper(|clipper| {
        let mut source = Source::new(23);
        for count in [0, 1, 31, 159, 160, 161, 500, 3000] {
            let mut grads = Vec::new();
            let mut outputs = Vec::new();
            for i in 0..count {
                let (from, to) = PAIRS[(i + source.below(2)) % 7];
                let numel = [0, 1, 7, 64, 300][source.below(5)];
                grads.push(source.tensor(from, numel, i % 3));
                outputs.push(Output::new(to, numel, source.below(3)));
            }
            assert_parity_of_all(clipper, &grads, &outputs, &format!("{count} tensors"));
        }
    });
}

#[test]
fn specials_by_every_policy() {
    with_clipper(|clipper| {
        let mut source = Source::new(24);
        for (from, to) in PAIRS {
            for special in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                let mut grads = [source.tensor(from, 10, 0), tensor(from, &[]), source.tensor(from, 50, 1)];
                let mut values = grads[2].values.values();
                values[37] = special;
                values[3] = -0.0;
                grads[2].values = Values::from_f64(from, values);
                let outputs = [Output::new(to, 10, 1), Output::new(to, 0, 0), Output::new(to, 50, 0)];
                for policy in [NonFinite::Skip, NonFinite::Zero, NonFinite::Propagate] {
                    for max_norm in [0.5, 0.0, f64::INFINITY] {
                        let what = format!("{from} to {to}, {special}, {policy:?}, {max_norm}");
                        let clip = ClipNorm::new(max_norm).nonfinite(policy);
                        let report = assert_parity(clipper, &grads, &outputs, clip, &what);
                        assert_eq!(report.written, policy != NonFinite::Skip, "{what}");
                        assert_eq!(report.first_nonfinite, Some(2), "{what}");
                        let mut got = outputs.to_vec();
                        into_on_device(clipper, &grads, &mut got, clip).unwrap();
                        let got: Vec<f64> = Values::from_bits(to, got[2].bits()).values();
                        match (policy, max_norm) {
                            (NonFinite::Skip, _) => assert!(got.iter().all(|&x| x == STALE), "{what}"),
                            (_, f64::INFINITY) => assert!(got[37].to_bits() == special.to_bits(), "{what}"),
                            (NonFinite::Zero, _) => assert!(got.iter().all(|x| x.to_bits() == 0), "{what}"),
                            _ if special.is_nan() => assert!(got.iter().all(|x| x.is_nan()), "{what}"),
                            _ => assert!(got[37].is_nan() && got[0] == 0.0 && got[3].is_sign_negative(), "{what}"),
                        }
                    }
                }
                let clip = ClipNorm::new(0.5).nonfinite(NonFinite::Error);
                let mut got = outputs.to_vec();
                let error = into_on_device(clipper, &grads, &mut got, clip).unwrap_err();
                let on_cpu = cpu::clip_grad_norm_into(&grads, &mut outputs.to_vec(), clip).unwrap_err();
                assert_eq!(format!("{error:?}"), format!("{on_cpu:?}"));
                assert!(matches!(error, Error::NonFinite { tensor: Some(2), .. }));
                assert!(got.iter().zip(&outputs).all(|(got, was)| got.bits() == was.bits()));
            }
        }
    });
}

/// A loss scale comes off in the same product, also one that makes the gradients larger.
#[test]
fn loss_scales() {
    with_clipper(|clipper| {
        let mut source = Source::new(26);
        for (from, to) in PAIRS {
            let grads = [source.tensor(from, 3000, 1), source.tensor(from, 17, 0)];
            let outputs = [Output::new(to, 3000, 0), Output::new(to, 17, 1)];
            let norm = cpu::total_norm(&grads, NormType::L2).unwrap().total_norm;
            for loss_scale in [65536.0, 3.0, 0.5, 1e-30, 1e30] {
                for fraction in [0.5, 2.0, f64::INFINITY] {
                    let clip = ClipNorm::new(fraction * norm / loss_scale).loss_scale(loss_scale);
                    let what = format!("{from} to {to}, loss scale {loss_scale}, {fraction}");
                    let report = assert_parity(clipper, &grads, &outputs, clip, &what);
                    assert!(report.written && report.multiplier == report.clip_coef / loss_scale, "{what}");
                }
            }
            // Not finite: as without one, but what Propagate writes under an infinite threshold is unscaled.
            let mut bad = grads.clone();
            bad[1] = tensor(from, &[f64::INFINITY; 17]);
            for policy in [NonFinite::Skip, NonFinite::Zero, NonFinite::Propagate] {
                for max_norm in [0.5, f64::INFINITY] {
                    let clip = ClipNorm::new(max_norm).loss_scale(1024.0).nonfinite(policy);
                    let report = assert_parity(clipper, &bad, &outputs, clip, &format!("{from} to {to}, {policy:?}"));
                    assert_eq!(report.written, policy != NonFinite::Skip);
                }
            }
        }
    });
}

/// Every finite f16 and bf16, and f64 around the borders of f32.
#[test]
fn all_bit_patterns() {
    with_clipper(|clipper| {
        let all = || 0..=u64::from(u16::MAX);
        let wide = (0..=u64::from(u16::MAX)).map(|b| {
            let exponent = 1023 - 151 + b % 300;
            (b & 1) << 63 | exponent << 52 | (b.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 12 & !0x3ff) | b >> 6
        });
        let lists = [
            Values::from_bits(Dtype::F16, all().filter(|&b| b & 0x7c00 != 0x7c00)),
            Values::from_bits(Dtype::BF16, all().filter(|&b| b & 0x7f80 != 0x7f80)),
            Values::from_bits(Dtype::F64, wide),
        ];
        for values in lists {
            let outputs = [Output::new(Dtype::F32, values.numel(), 0)];
            let grads = [Tensor { values, offset: 0 }];
            let norm = cpu::total_norm(&grads, NormType::L2).unwrap().total_norm;
            for coef in [2.0, 0.999, 1.0 / 3.0, 1e-3, 2f64.powi(-59), 2f64.powi(-60), 2f64.powi(-61), 1e-30, 1e-300] {
                assert_parity(clipper, &grads, &outputs, ClipNorm::new(norm * coef), &format!("coef {coef:e}"));
            }
        }
    });
}

#[test]
fn large_tensors() {
    with_clipper(|clipper| {
        let mut source = Source::new(25);
        for (from, to) in PAIRS {
            let numel = LARGE.bytes / from.size() + 5;
            let grads = [source.tensor(from, numel, 1), source.tensor(from, 100, 0)];
            for offset in [0, 1] {
                let outputs = [Output::new(to, numel, offset), Output::new(to, 100, 0)];
                assert_parity(clipper, &grads, &outputs, ClipNorm::new(1e-3), &format!("{from} to {to}, {offset}"));
            }
        }
    });
}

/// The same error on the device and on the CPU, with nothing written.
#[test]
fn outputs_that_do_not_fit_are_refused() {
    with_clipper(|clipper| {
        let refuse = |clipper: &mut Clipper, grads: &[Tensor], outputs: &[Output], expected: Error| {
            let (mut on_cpu, mut on_device) = (outputs.to_vec(), outputs.to_vec());
            assert_eq!(cpu::clip_grad_norm_into(grads, &mut on_cpu, 1.0).unwrap_err(), expected);
            let error = into_on_device(clipper, grads, &mut on_device, ClipNorm::new(1.0)).unwrap_err();
            assert_eq!(error, expected);
            for (was, now) in outputs.iter().zip(on_device.iter().zip(&on_cpu)) {
                assert_eq!((was.bits(), was.bits()), (now.0.bits(), now.1.bits()), "{expected}");
            }
        };
        let grads = [tensor(Dtype::F32, &[3.0]), tensor(Dtype::F32, &[4.0, 0.0])];
        let out = |numel| Output::new(Dtype::F32, numel, 0);
        let count = |outputs| Error::OutputCount { gradients: 2, outputs };
        refuse(clipper, &grads, &[], count(0));
        refuse(clipper, &grads, &[out(1)], count(1));
        refuse(clipper, &grads, &[out(1), out(2), out(0)], count(3));
        for output in [0, 1, 3] {
            let expected = Error::OutputNumel { tensor: 1, gradient: 2, output };
            refuse(clipper, &grads, &[out(1), out(output as usize)], expected);
        }
        for from in DTYPES {
            for to in DTYPES {
                let (grads, outputs) = ([tensor(from, &[3.0, 4.0])], [Output::new(to, 2, 0)]);
                if PAIRS.contains(&(from, to)) {
                    assert_parity(clipper, &grads, &outputs, ClipNorm::new(1.0), &format!("{from} to {to}"));
                } else {
                    refuse(clipper, &grads, &outputs, Error::OutputDtype { tensor: 0, gradient: from, output: to });
                }
            }
        }
        // After all that the good list works, and after it one with other gradients and the same outputs does not.
        assert_parity(clipper, &grads, &[out(1), out(2)], ClipNorm::new(1.0), "a good list");
    });
}

fn raw(address: u64, numel: usize, dtype: Dtype) -> RawGrad {
    // SAFETY: parts of allocations that outlive their calls, or refused before any work.
    unsafe { RawGrad::new(address, numel, dtype) }
}

#[test]
fn memory_that_is_shared_or_bad_is_refused() {
    with_clipper(|clipper| {
        let stream = clipper.stream().clone();
        let memory = stream.clone_htod(&[1.0f32; 64]).unwrap();
        let at = memory.device_ptr(&stream).0;
        let f32s = |offset: u64, numel| raw(at + 4 * offset, numel, Dtype::F32);
        let f16s = |offset: u64, numel| raw(at + 4 * offset, numel, Dtype::F16);
        let mut into = |grads: &[RawGrad], outputs: &mut [RawGrad]| {
            clipper.clip_grad_norm_into(grads, outputs, 0.5).map(|pending| pending.wait().unwrap().written)
        };
        let shared = |output, gradient| Err(Error::OutputOverlapsGradient { output, gradient });
        let outputs_error = |error| Err(Error::Outputs(Box::new(error)));
        // The same memory; one byte of it; a gradient inside an output of another gradient.
        assert_eq!(into(&[f32s(0, 4)], &mut [f32s(0, 4)]), shared(0, 0));
        assert_eq!(into(&[f32s(0, 4)], &mut [f32s(3, 4)]), shared(0, 0));
        assert_eq!(into(&[f16s(4, 2)], &mut [f32s(3, 2)]), shared(0, 0));
        assert_eq!(into(&[f32s(8, 2), f16s(2, 1)], &mut [f32s(32, 2), f32s(2, 1)]), shared(1, 1));
        assert_eq!(into(&[f16s(20, 16), f32s(8, 1)], &mut [f32s(0, 16), f32s(63, 1)]), shared(0, 1));
        // Outputs among themselves, and gradients as ever.
        let overlap = Error::Overlap { first: 0, second: 1 };
        assert_eq!(into(&[f32s(0, 2), f32s(2, 2)], &mut [f32s(8, 2), f32s(9, 2)]), outputs_error(overlap.clone()));
        assert_eq!(into(&[f32s(0, 2), f32s(1, 2)], &mut [f32s(8, 2), f32s(16, 2)]), Err(overlap));
        // Neighbours that touch, and empties anywhere.
        assert_eq!(into(&[f32s(4, 4), f32s(5, 0)], &mut [f32s(8, 4), f32s(9, 0)]), Ok(true));
        assert_eq!(into(&[f32s(4, 4), f32s(9, 0)], &mut [f32s(0, 4), f32s(5, 0)]), Ok(true));
        // The same outputs for gradients that they lie in.
        assert_eq!(into(&[f32s(0, 4), f32s(9, 0)], &mut [f32s(0, 4), f32s(5, 0)]), shared(0, 0));
        // The same two lists after another call has taken the plan of the gradients.
        assert_eq!(into(&[f32s(4, 4)], &mut [f32s(0, 4)]), Ok(true));
        assert_eq!(into(&[f32s(0, 4)], &mut [f32s(0, 4)]), shared(0, 0));
        clipper.clip_grad_norm(&mut [f32s(0, 4)], 1.0).unwrap();
        let mut into = |grads: &[RawGrad], outputs: &mut [RawGrad]| {
            clipper.clip_grad_norm_into(grads, outputs, 0.5).map(|pending| pending.wait().unwrap().written)
        };
        assert_eq!(into(&[f32s(0, 4)], &mut [f32s(0, 4)]), shared(0, 0));

        let misaligned = Error::Misaligned { tensor: 0, dtype: Dtype::F32, address: at + 2 };
        assert_eq!(into(&[f32s(8, 1)], &mut [raw(at + 2, 1, Dtype::F32)]), outputs_error(misaligned));
        let on_host = [0f32; 4];
        for (address, numel) in [(on_host.as_ptr() as u64, 4), (at, 65), (0x10, 1)] {
            let grads = stream.clone_htod(&vec![1.0f32; numel]).unwrap();
            let error =
                clipper.clip_grad_norm_into(&[&grads], &mut [raw(address, numel, Dtype::F32)], 1.0).unwrap_err();
            let Error::Outputs(inner) = &error else { panic!("{error}") };
            assert!(matches!(**inner, Error::BadPointer { tensor: 0, .. }), "{error}");
            assert!(error.to_string().starts_with("outputs: tensor 0: "), "{error}");
        }
        // Gradients behind plain references, outputs as slices, in one line.
        let grads = stream.clone_htod(&[half::bf16::from_f32(3.0), half::bf16::from_f32(4.0)]).unwrap();
        let mut output = stream.alloc_zeros::<f32>(2).unwrap();
        let pending = gradclip::cuda::clip_grad_norm_into(&stream, &[&grads], &mut [&mut output], 1.0).unwrap();
        assert_eq!(pending.wait().unwrap().total_norm, 5.0);
        assert_eq!(stream.clone_dtoh(&output).unwrap(), [0.6, 0.8]);
        gradclip::cuda::release_thread_clippers();
    });
}

/// The pinned and device memory of the table of outputs is counted.
#[test]
fn tables_of_outputs_stay_within_what_is_documented() {
    with_clipper(|clipper| {
        let reports = clipper.device_bytes();
        let mut use_of = |count: usize| {
            let grads: Vec<Tensor> = (0..count).map(|_| tensor(Dtype::F32, &[1.0; 20])).collect();
            let mut outputs: Vec<Output> = (0..count).map(|_| Output::new(Dtype::F32, 20, 0)).collect();
            into_on_device(clipper, &grads, &mut outputs, ClipNorm::new(1.0)).unwrap();
            (clipper.device_bytes() - reports, clipper.pinned_bytes())
        };
        assert_eq!(use_of(100), (100 * (8 + 16), 100 * 16));
        let (device, pinned) = use_of(500);
        assert!(device <= 500 * (8 + 16 + 32) && pinned <= 500 * 40, "{device} {pinned}");
    });
}
