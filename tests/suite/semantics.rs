//! What a user meets: the rows of the semantics table, errors, reports.

use super::data::{bits, tensor, Tensor};
use super::device::{self, OnDevice};
use crate::backend::with_clipper;
use cudarc::driver::DevicePtr;
use gradclip::cuda::{DeviceGradMut, RawGrad};
use gradclip::{ClipNorm, ClipValue, Dtype, Error, NonFinite, NormType, TotalNorm};

fn clip(list: &mut [Tensor], clip: ClipNorm, clipper: &mut gradclip::cuda::Clipper) -> gradclip::NormReport {
    device::clip_grad_norm(clipper, list, clip).unwrap()
}

#[test]
fn three_and_four() {
    with_clipper(|clipper| {
        let mut list = [tensor(Dtype::F32, &[3.0]), tensor(Dtype::BF16, &[4.0])];
        let report = clip(&mut list, ClipNorm::new(1.0), clipper);
        assert_eq!((report.total_norm, report.clip_coef, report.written), (5.0, 0.2, true));
        assert_eq!(list[0].values.values(), [f64::from(0.6f32)]);
        assert_eq!(list[1].values.values(), [half::bf16::from_f64(0.8).to_f64()]);
    });
}

#[test]
fn within_the_threshold_nothing_is_written() {
    with_clipper(|clipper| {
        let mut list = [tensor(Dtype::F32, &[3.0, -0.0, 1e-45]), tensor(Dtype::F64, &[4.0])];
        let before = bits(&list);
        for max_norm in [5.0, 6.0, f64::INFINITY] {
            let report = clip(&mut list, ClipNorm::new(max_norm), clipper);
            assert_eq!((report.total_norm, report.clip_coef, report.written), (5.0, 1.0, false));
            assert_eq!(bits(&list), before);
        }
        let torch = clip(&mut list, ClipNorm::new(5.0).torch_compatible(), clipper);
        assert!(torch.written && torch.clip_coef == 5.0 / 5.000001);
    });
}

#[test]
fn zero_threshold_and_zero_norm() {
    with_clipper(|clipper| {
        let mut list = [tensor(Dtype::F16, &[3.0, -4.0])];
        assert_eq!(clip(&mut list, ClipNorm::new(0.0), clipper).clip_coef, 0.0);
        assert_eq!(list[0].values.values(), [0.0, 0.0]);
        for max_norm in [0.0, 1.0] {
            let report = clip(&mut list, ClipNorm::new(max_norm), clipper);
            assert_eq!((report.total_norm, report.written), (0.0, false));
        }
    });
}

#[test]
fn bad_thresholds_and_bounds_touch_nothing() {
    with_clipper(|clipper| {
        let mut list = [tensor(Dtype::F32, &[3.0, 4.0])];
        let before = bits(&list);
        let bad = [
            ClipNorm::new(-1.0),
            ClipNorm::new(f64::NAN),
            ClipNorm::new(1.0).eps(-1e-9),
            ClipNorm::new(1.0).eps(f64::NAN),
            ClipNorm::new(1.0).eps(f64::INFINITY),
        ];
        for clip in bad {
            let error = device::clip_grad_norm(clipper, &mut list, clip).unwrap_err();
            assert!(matches!(error, Error::InvalidThreshold { .. }), "{error}");
        }
        for value in [-0.5, f64::NAN] {
            let error = device::clip_grad_value(clipper, &mut list, ClipValue::new(value)).unwrap_err();
            assert!(matches!(error, Error::InvalidThreshold { name: "clip_value", .. }), "{error}");
        }
        for (lo, hi) in [(1.0, 0.5), (f64::NAN, 1.0), (0.0, f64::NAN)] {
            let error = device::clip_grad_value(clipper, &mut list, ClipValue::between(lo, hi)).unwrap_err();
            assert!(matches!(error, Error::InvalidBounds { .. }), "{error}");
        }
        assert_eq!(bits(&list), before);
    });
}

#[test]
fn orders_that_are_none_touch_nothing() {
    with_clipper(|clipper| {
        let mut list = [tensor(Dtype::F32, &[3.0, 4.0])];
        let before = bits(&list);
        for p in [0.0, -0.0, -1.0, f64::NEG_INFINITY, -5e-324, f64::NAN] {
            let clip = ClipNorm::new(1.0).norm_type(NormType::P(p));
            let errors = [
                device::clip_grad_norm(clipper, &mut list, clip).unwrap_err(),
                device::total_norm(clipper, &list, NormType::P(p)).unwrap_err(),
                gradclip::cpu::clip_grad_norm(&mut list, clip).unwrap_err(),
                gradclip::cpu::total_norm(&list, NormType::P(p)).unwrap_err(),
            ];
            for error in errors {
                assert!(matches!(error, Error::InvalidNormType { got } if got.to_bits() == p.to_bits()), "{error}");
                assert!(error.to_string().contains("must be positive"), "{error}");
            }
        }
        assert_eq!(bits(&list), before);
    });
}

/// Every element is finite, and the norm is not: the policy decides, and no tensor is to blame.
#[test]
fn a_norm_that_overflows_by_its_order() {
    with_clipper(|clipper| {
        let ones = [tensor(Dtype::F16, &[1.0; 1300])];
        let order = |nonfinite| ClipNorm::new(1.0).norm_type(NormType::P(0.01)).nonfinite(nonfinite);
        let mut list = ones.clone();
        let report = clip(&mut list, order(NonFinite::Skip), clipper);
        assert_eq!((report.total_norm, report.written, report.first_nonfinite), (f64::INFINITY, false, None));
        let error = device::clip_grad_norm(clipper, &mut list, order(NonFinite::Error)).unwrap_err();
        assert_eq!(error, Error::NonFinite { total_norm: f64::INFINITY, tensor: None });
        assert_eq!(bits(&list), bits(&ones));
        assert!(clip(&mut list, order(NonFinite::Zero), clipper).written);
        assert_eq!(list[0].values.values(), [0.0; 1300]);
        let finite = [tensor(Dtype::F16, &[1.0; 1200])];
        let norm = device::total_norm(clipper, &finite, NormType::P(0.01)).unwrap().total_norm;
        assert!((norm.ln() / (100.0 * 1200f64.ln()) - 1.0).abs() < 1e-13, "{norm:e}");
    });
}

#[test]
fn the_error_policy_waits_and_names_the_tensor() {
    with_clipper(|clipper| {
        let mut list = [tensor(Dtype::F32, &[3.0]), tensor(Dtype::F64, &[1.0, f64::INFINITY])];
        let before = bits(&list);
        let policy = ClipNorm::new(1.0).nonfinite(NonFinite::Error);
        let error = device::clip_grad_norm(clipper, &mut list, policy).unwrap_err();
        assert_eq!(error, Error::NonFinite { total_norm: f64::INFINITY, tensor: Some(1) });
        assert_eq!(bits(&list), before);
        list[1] = tensor(Dtype::F64, &[4.0]);
        assert_eq!(clip(&mut list, policy, clipper).total_norm, 5.0);
    });
}

#[test]
fn the_same_memory_twice_is_refused() {
    with_clipper(|clipper| {
        let stream = clipper.stream().clone();
        let slice = stream.clone_htod(&[3.0f32, 4.0, 5.0, 6.0]).unwrap();
        let (left, right, all) = (slice.slice(0..3), slice.slice(2..4), slice.as_view());
        let overlap = |first, second| Error::Overlap { first, second };
        let mut norm = |list: &[_]| clipper.total_norm(list, NormType::L2).map(|pending| pending.wait().unwrap());
        assert_eq!(norm(&[left.slice(0..3), right.slice(0..2)]).unwrap_err(), overlap(0, 1));
        assert_eq!(norm(&[all.slice(0..0), all.slice(0..4), all.slice(1..2)]).unwrap_err(), overlap(1, 2));
        assert_eq!(norm(&[all.slice(0..2), all.slice(2..4)]).unwrap().total_norm, 86f64.sqrt());
    });
}

#[test]
fn raw_pointers() {
    with_clipper(|clipper| {
        let stream = clipper.stream().clone();
        let mut list = [tensor(Dtype::F32, &[9.0, 3.0, 4.0, 9.0])];
        let device = OnDevice::upload(&stream, &list);
        let address = device.address(0);
        // SAFETY: elements 1 and 2 of the allocation above, which outlives the calls.
        let mut grad = unsafe { RawGrad::new(address + 4, 2, Dtype::F32) };
        let mut one: [&mut dyn DeviceGradMut; 1] = [&mut grad];
        assert_eq!(clipper.clip_grad_norm(&mut one, 2.5).unwrap().wait().unwrap().total_norm, 5.0);
        device.download(&mut list);
        assert_eq!(list[0].values.values(), [9.0, 1.5, 2.0, 9.0]);

        let on_host = [0f32; 4];
        let bad =
            [(on_host.as_ptr() as u64, 4, "host"), (address + 4, 1 << 40, "followed by"), (0x10, 1, "host or freed")];
        for (address, numel, why) in bad {
            // SAFETY: deliberately wrong; the call must refuse it before any work is enqueued.
            let grad = unsafe { RawGrad::new(address, numel, Dtype::F32) };
            let error = clipper.total_norm(&[grad], NormType::L2).unwrap_err();
            assert!(
                matches!(&error, Error::BadPointer { tensor: 0, .. }) && error.to_string().contains(why),
                "{error}"
            );
        }
        // SAFETY: as above.
        let odd = unsafe { RawGrad::new(address + 2, 1, Dtype::F32) };
        assert!(matches!(clipper.total_norm(&[odd], NormType::L2).unwrap_err(), Error::Misaligned { tensor: 0, .. }));
    });
}

#[test]
fn slices_views_and_references_in_one_line() {
    with_clipper(|clipper| {
        let stream = clipper.stream().clone();
        let mut weight = stream.clone_htod(&[3.0f32, 0.0]).unwrap();
        let mut bias = stream.clone_htod(&[4.0f32]).unwrap();
        let report = clipper.clip_grad_norm(&mut [&mut weight, &mut bias], 1.0).unwrap().wait().unwrap();
        assert_eq!(report.total_norm, 5.0);
        assert_eq!(stream.clone_dtoh(&bias).unwrap(), [0.8]);

        let mut owned = [weight, bias];
        let report = gradclip::cuda::clip_grad_value(&stream, &mut owned, 0.7).unwrap().wait().unwrap();
        assert_eq!((report.clipped, report.nan), (1, 0));
        let [weight, bias] = owned;
        assert_eq!(stream.clone_dtoh(&bias).unwrap(), [0.7]);
        let norm = gradclip::cuda::total_norm(&stream, &[&weight, &bias], NormType::Inf).unwrap().wait().unwrap();
        assert_eq!(norm.total_norm, f64::from(0.7f32));
        gradclip::cuda::release_thread_clippers();
    });
}

#[test]
fn reports_can_be_read_late_but_not_forever() {
    with_clipper(|clipper| {
        let stream = clipper.stream().clone();
        let mut grads = [stream.clone_htod(&[3.0f32, 4.0]).unwrap()];
        let first = clipper.clip_grad_norm(&mut grads, 2.5).unwrap();
        let second = clipper.clip_grad_norm(&mut grads, 2.0).unwrap();
        assert_eq!(second.wait().unwrap().total_norm, 2.5);
        assert_eq!(first.wait().unwrap().total_norm, 5.0);
        for _ in 0..gradclip::REPORTS_KEPT - 2 {
            clipper.total_norm(&grads, NormType::L2).unwrap();
        }
        assert!(first.wait().is_ok());
        clipper.total_norm(&grads, NormType::L2).unwrap();
        assert_eq!(first.wait().unwrap_err(), Error::ReportExpired);
        assert!(second.wait().is_ok());
    });
}

/// The addresses handed out hold the norm and the coefficient.
#[test]
fn norm_and_coefficient_by_device_address() {
    with_clipper(|clipper| {
        let stream = clipper.stream().clone();
        let mut grads = [stream.clone_htod(&[3.0f32, 4.0]).unwrap()];
        let pending = clipper.clip_grad_norm(&mut grads, 1.0).unwrap();
        for (address, expected) in [(pending.total_norm_address(), 5.0), (pending.clip_coef_address(), 0.2)] {
            // SAFETY: an f64 on the device, alive with the clipper; leaked below, so not freed twice.
            let value = unsafe { stream.upgrade_device_ptr::<f64>(address, 1) };
            assert_eq!(stream.clone_dtoh(&value).unwrap(), [expected]);
            value.leak();
        }
    });
}

/// The threshold where the device finds it: as good as by value, another one at each call, and harmless where the host
/// would have refused it.
#[test]
fn a_threshold_by_device_address() {
    with_clipper(|clipper| {
        let stream = clipper.stream().clone();
        let mut threshold = stream.clone_htod(&[0.0f64]).unwrap();
        let address = threshold.device_ptr(&stream).0;
        // SAFETY: `threshold` outlives the clipper's work, and is written in the order of the stream only.
        let on_device = || unsafe { ClipNorm::max_norm_at(address) };
        for nonfinite in [NonFinite::Skip, NonFinite::Zero, NonFinite::Propagate] {
            for values in [[3.0, 4.0], [3.0, f64::NAN], [f64::INFINITY, 1.0]] {
                for max_norm in [1.0, 0.0, 5.0, 7.0, f64::INFINITY, 1e-310] {
                    stream.memcpy_htod(&[max_norm], &mut threshold).unwrap();
                    let (mut a, mut b) = ([tensor(Dtype::F32, &values)], [tensor(Dtype::F32, &values)]);
                    let by_address = clip(&mut a, on_device().nonfinite(nonfinite), clipper);
                    let by_value = clip(&mut b, ClipNorm::new(max_norm).nonfinite(nonfinite), clipper);
                    assert_eq!(format!("{by_address:?}"), format!("{by_value:?}"), "{max_norm}"); // NaN, too
                    assert_eq!(bits(&a), bits(&b), "{max_norm} {nonfinite:?} {values:?}");
                }
            }
        }
        for refused_by_value in [-1.0, -0.0, f64::NAN, f64::NEG_INFINITY] {
            stream.memcpy_htod(&[refused_by_value], &mut threshold).unwrap();
            let mut list = [tensor(Dtype::F32, &[3.0, 4.0])];
            let report = clip(&mut list, on_device().norm_type(NormType::L1), clipper);
            let clears = refused_by_value == 0.0;
            assert_eq!((report.total_norm, report.written), (7.0, clears), "{refused_by_value}");
        }
        // SAFETY: refused before anything is read.
        let bad = unsafe { ClipNorm::max_norm_at(address + 4) };
        let mut list = [tensor(Dtype::F32, &[3.0, 4.0])];
        let error = device::clip_grad_norm(clipper, &mut list, bad).unwrap_err();
        assert!(matches!(error, Error::ThresholdAddress { .. }), "{error}");
        let error = gradclip::cpu::clip_grad_norm(&mut [[3.0f32]], on_device()).unwrap_err();
        assert!(matches!(error, Error::ThresholdAddress { .. }), "{error}");
        assert_eq!(list[0].values.values(), [3.0, 4.0]);
    });
}

/// Reads what lies at a device address.
pub fn at<T: cudarc::driver::DeviceRepr>(clipper: &gradclip::cuda::Clipper, address: u64) -> T {
    let stream = clipper.stream();
    // SAFETY: a value of this type on the device, alive with the clipper; leaked below, so not freed twice.
    let value = unsafe { stream.upgrade_device_ptr::<T>(address, 1) };
    let copy = stream.clone_dtoh(&value).unwrap().remove(0);
    value.leak();
    copy
}

/// A norm that stays on the device between two calls, in a number, and at an address: the same. Only what is given counts,
/// not what is in the list.
#[test]
fn a_given_norm() {
    with_clipper(|clipper| {
        let stream = clipper.stream().clone();
        let mut grads = [stream.clone_htod(&[3.0f32, 4.0]).unwrap()];
        let norm = clipper.total_norm(&grads, NormType::L2).unwrap();
        let value = stream.clone_htod(&[5.0f64]).unwrap();
        // SAFETY: `value` outlives the clipper's work, and nothing writes it.
        let by_address = unsafe { TotalNorm::at(value.device_ptr(&stream).0) };
        for total_norm in [TotalNorm::from(&norm), by_address, 5.0.into(), 5.0f32.into()] {
            stream.memcpy_htod(&[3.0f32, 4.0], &mut grads[0]).unwrap();
            let within = clipper.clip_with_norm(&mut grads, total_norm, 5.0).unwrap().wait().unwrap();
            assert_eq!((within.total_norm, within.written), (5.0, false));
            assert_eq!(stream.clone_dtoh(&grads[0]).unwrap(), [3.0, 4.0]);
            let report = clipper.clip_with_norm(&mut grads, total_norm, 2.5).unwrap().wait().unwrap();
            assert_eq!((report.total_norm, report.clip_coef, report.multiplier), (5.0, 0.5, 0.5));
            assert_eq!((report.written, report.found_inf, report.first_nonfinite), (true, false, None));
            assert_eq!(stream.clone_dtoh(&grads[0]).unwrap(), [1.5, 2.0]);
        }
        for address in [0, value.device_ptr(&stream).0 + 4] {
            // SAFETY: refused before anything is read.
            let nowhere = unsafe { TotalNorm::at(address) };
            let error = clipper.clip_with_norm(&mut grads, nowhere, 1.0).unwrap_err();
            assert!(matches!(error, Error::ThresholdAddress { name: "total_norm", .. }), "{error}");
        }
        assert_eq!(stream.clone_dtoh(&grads[0]).unwrap(), [1.5, 2.0]);
    });
}

/// A finite norm of other gradients, over a list with NaN and Inf: multiplied like all. A norm that is not finite: the
/// policy. A negative one: refused, and on the device NaN.
#[test]
fn a_given_norm_beside_nan_and_inf() {
    with_clipper(|clipper| {
        for dtype in super::data::DTYPES {
            let list =
                || [tensor(dtype, &[2.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0]), tensor(dtype, &[8.0])];
            let mut scaled = list();
            let report = device::clip_with_norm(clipper, &mut scaled, 4.0, ClipNorm::new(1.0)).unwrap();
            assert_eq!((report.found_inf, report.first_nonfinite, report.written), (false, None, true));
            assert_eq!(scaled[1].values.values(), [2.0]);
            let values = scaled[0].values.values();
            assert!(values[1].is_nan() && values[4].to_bits() == (-0.0f64).to_bits());
            assert_eq!([values[0], values[2], values[3]], [0.5, f64::INFINITY, f64::NEG_INFINITY]);
            for (total_norm, policy, expected) in [
                (f64::NAN, NonFinite::Skip, 8.0),
                (f64::INFINITY, NonFinite::Zero, 0.0),
                (f64::INFINITY, NonFinite::Propagate, 0.0),
            ] {
                let mut list = list();
                let clip = ClipNorm::new(1.0).nonfinite(policy);
                let report = device::clip_with_norm(clipper, &mut list, total_norm, clip).unwrap();
                assert_eq!((report.found_inf, report.written), (true, policy != NonFinite::Skip));
                assert_eq!(list[1].values.values(), [expected], "{total_norm} {policy:?}");
            }
            let mut untouched = list();
            let waits = ClipNorm::new(1.0).nonfinite(NonFinite::Error);
            let error = device::clip_with_norm(clipper, &mut untouched, f64::INFINITY, waits).unwrap_err();
            assert_eq!(error, Error::NonFinite { total_norm: f64::INFINITY, tensor: None });
            let error = device::clip_with_norm(clipper, &mut untouched, -1.0, ClipNorm::new(1.0)).unwrap_err();
            assert_eq!(
                error,
                Error::InvalidThreshold { name: "total_norm", expected: "zero, positive, or not finite", got: -1.0 }
            );
            assert_eq!(bits(&untouched), bits(&list()));
        }
        let stream = clipper.stream().clone();
        let negative = stream.clone_htod(&[-1.0f64]).unwrap();
        let mut list = [tensor(Dtype::F32, &[8.0])];
        // SAFETY: `negative` outlives the call.
        let total_norm = unsafe { TotalNorm::at(negative.device_ptr(&stream).0) };
        let report = device::clip_with_norm(clipper, &mut list, total_norm, ClipNorm::new(1.0)).unwrap();
        assert!(report.total_norm.is_nan() && report.found_inf && !report.written);
    });
}

/// Reports that have expired, or belong to another clipper, are refused before they are read.
#[test]
fn a_given_norm_that_is_out_of_reach() {
    with_clipper(|clipper| {
        let stream = clipper.stream().clone();
        let mut grads = [stream.clone_htod(&[3.0f32, 4.0]).unwrap()];
        let oldest = clipper.total_norm(&grads, NormType::L2).unwrap();
        for _ in 0..gradclip::REPORTS_KEPT - 1 {
            clipper.total_norm(&grads, NormType::L2).unwrap();
        }
        // This call takes the slot that it reads.
        assert_eq!(clipper.clip_with_norm(&mut grads, &oldest, 2.5).unwrap().wait().unwrap().total_norm, 5.0);
        assert_eq!(stream.clone_dtoh(&grads[0]).unwrap(), [1.5, 2.0]);
        assert_eq!(clipper.clip_with_norm(&mut grads, &oldest, 1.0).unwrap_err(), Error::ReportExpired);
        let mut other = gradclip::cuda::Clipper::new(&stream).unwrap();
        let foreign = other.total_norm(&grads, NormType::L2).unwrap();
        let error = clipper.clip_with_norm(&mut grads, &foreign, 1.0).unwrap_err();
        assert!(matches!(error, Error::NormOutOfReach { .. }), "{error}");
        assert_eq!(stream.clone_dtoh(&grads[0]).unwrap(), [1.5, 2.0]);
    });
}

#[test]
fn a_loss_scale() {
    with_clipper(|clipper| {
        let mut list = [tensor(Dtype::F16, &[3072.0, -0.0]), tensor(Dtype::F32, &[-4096.0])];
        let scaled = bits(&list);
        let report = clip(&mut list, ClipNorm::new(10.0).loss_scale(1024.0), clipper);
        assert_eq!((report.total_norm, report.clip_coef, report.multiplier), (5.0, 1.0, 1.0 / 1024.0));
        assert_eq!((report.written, report.found_inf), (true, false));
        assert_eq!((list[0].values.values(), list[1].values.values()), (vec![3.0, -0.0], vec![-4.0]));
        // A loss scale of 1 is none.
        let before = bits(&list);
        assert!(!clip(&mut list, ClipNorm::new(10.0).loss_scale(1.0), clipper).written);
        assert_eq!(bits(&list), before);
        // An overflow: the scale stays in, or all becomes 0, also where nothing would be clipped.
        for (policy, max_norm) in [(NonFinite::Skip, 1.0), (NonFinite::Zero, 1.0), (NonFinite::Zero, f64::INFINITY)] {
            let mut list = [tensor(Dtype::F16, &[3072.0, -0.0]), tensor(Dtype::F32, &[f64::INFINITY])];
            let before = bits(&list);
            let clip_norm = ClipNorm::new(max_norm).loss_scale(1024.0).nonfinite(policy);
            let report = clip(&mut list, clip_norm, clipper);
            assert_eq!((report.found_inf, report.first_nonfinite), (true, Some(1)));
            let expected = if policy == NonFinite::Zero { vec![vec![0, 0], vec![0]] } else { before };
            assert_eq!(bits(&list), expected);
        }
        for bad in [0.0, -2.0, f64::NAN, f64::INFINITY, 1e-310] {
            let error = device::clip_grad_norm(clipper, &mut list, ClipNorm::new(1.0).loss_scale(bad)).unwrap_err();
            assert!(matches!(error, Error::InvalidThreshold { name: "loss_scale", .. }), "{error}");
        }
        assert_ne!(bits(&list), scaled);
        assert_eq!(bits(&list), before);
    });
}

/// The loss scale where the device finds it: as good as by value; one that is none is an overflow.
#[test]
fn a_loss_scale_by_device_address() {
    with_clipper(|clipper| {
        let stream = clipper.stream().clone();
        let mut scale = stream.clone_htod(&[1.0f32]).unwrap();
        let address = scale.device_ptr(&stream).0;
        // SAFETY: `scale` outlives the clipper's work, and is written in the order of the stream only.
        let on_device = |max_norm| unsafe { ClipNorm::new(max_norm).loss_scale_at(address) };
        for policy in [NonFinite::Skip, NonFinite::Zero, NonFinite::Propagate] {
            for values in [[3.0, 4.0], [3.0, f64::NAN], [f64::INFINITY, 1.0]] {
                for loss_scale in [1.0f32, 65536.0, 0.1, 3.0e38] {
                    stream.memcpy_htod(&[loss_scale], &mut scale).unwrap();
                    for max_norm in [1e-5, 1.0, f64::INFINITY] {
                        let (mut a, mut b) = ([tensor(Dtype::F32, &values)], [tensor(Dtype::F32, &values)]);
                        let by_value = ClipNorm::new(max_norm).loss_scale(loss_scale.into()).nonfinite(policy);
                        let by_address = clip(&mut a, on_device(max_norm).nonfinite(policy), clipper);
                        let by_value = clip(&mut b, by_value, clipper);
                        assert_eq!(format!("{by_address:?}"), format!("{by_value:?}"), "{loss_scale}"); // NaN, too
                        assert_eq!(bits(&a), bits(&b), "{loss_scale} {max_norm} {policy:?} {values:?}");
                    }
                }
            }
            for bad in [0.0, -1.0, f32::NAN, f32::INFINITY, -0.0] {
                stream.memcpy_htod(&[bad], &mut scale).unwrap();
                for max_norm in [1.0, f64::INFINITY] {
                    let mut list = [tensor(Dtype::F32, &[3.0, 4.0])];
                    let report = clip(&mut list, on_device(max_norm).nonfinite(policy), clipper);
                    assert!(report.total_norm.is_nan() && report.found_inf, "{report:?}");
                    assert_eq!((report.first_nonfinite, report.written), (None, policy != NonFinite::Skip));
                    let values = list[0].values.values();
                    match policy {
                        NonFinite::Skip => assert_eq!(values, [3.0, 4.0]),
                        NonFinite::Zero => assert_eq!(values, [0.0, 0.0]),
                        _ => assert!(values.iter().all(|x| x.is_nan())),
                    }
                }
            }
        }
        // SAFETY: refused before anything is read.
        let bad = unsafe { ClipNorm::new(1.0).loss_scale_at(address + 2) };
        let mut list = [tensor(Dtype::F32, &[3.0, 4.0])];
        let error = device::clip_grad_norm(clipper, &mut list, bad).unwrap_err();
        assert!(matches!(error, Error::ThresholdAddress { name: "loss_scale", .. }), "{error}");
        let error = gradclip::cpu::clip_grad_norm(&mut [[3.0f32]], on_device(1.0)).unwrap_err();
        assert!(matches!(error, Error::ThresholdAddress { name: "loss_scale", .. }), "{error}");
        let error = gradclip::cpu::clip_with_norm(&mut [[3.0f32]], 1.0, on_device(1.0)).unwrap_err();
        assert!(matches!(error, Error::ThresholdAddress { name: "loss_scale", .. }), "{error}");
    });
}

/// What an optimizer finds on the device by each policy, in its own type.
#[test]
fn the_multiplier_and_found_inf_by_device_address() {
    with_clipper(|clipper| {
        let stream = clipper.stream().clone();
        let nan = f64::NAN;
        for (second, policy, multiplier, found_inf) in [
            (4.0f32, NonFinite::Skip, 0.2 / 1000.0, 0.0f32),
            (f32::NAN, NonFinite::Skip, 1.0, 1.0),
            (f32::INFINITY, NonFinite::Zero, 0.0, 1.0),
            (f32::INFINITY, NonFinite::Propagate, 0.0, 1.0),
            (f32::NAN, NonFinite::Propagate, nan, 1.0),
        ] {
            let grads = [stream.clone_htod(&[3000.0f32, 1000.0 * second]).unwrap()];
            let clip = ClipNorm::new(1.0).loss_scale(1000.0).nonfinite(policy);
            let pending = clipper.clip_coef(&grads, clip).unwrap();
            let same = |a: f64, b: f64| a == b || (a.is_nan() && b.is_nan());
            assert!(same(at(clipper, pending.multiplier_address()), multiplier), "{second} {policy:?}");
            let single: f32 = at(clipper, pending.multiplier_f32_address());
            assert!(same(single.into(), f64::from(multiplier as f32)), "{second} {policy:?}");
            assert_eq!(at::<f32>(clipper, pending.found_inf_address()), found_inf, "{second} {policy:?}");
            let report = pending.wait().unwrap();
            assert!(same(report.multiplier, multiplier) && !report.written, "{report:?}");
            assert_eq!((report.found_inf, stream.clone_dtoh(&grads[0]).unwrap()[0]), (found_inf == 1.0, 3000.0));
        }
        let bad = [stream.clone_htod(&[f32::NAN]).unwrap()];
        let waits = ClipNorm::new(1.0).nonfinite(NonFinite::Error);
        assert!(matches!(clipper.clip_coef(&bad, waits).unwrap_err(), Error::NonFinite { tensor: Some(0), .. }));
    });
}

#[test]
fn workspace_stays_within_what_is_documented() {
    with_clipper(|clipper| {
        let reports = clipper.device_bytes();
        assert_eq!(reports, 36 * 1024);
        let list: Vec<Tensor> = (0..500).map(|i| tensor([Dtype::F32, Dtype::F64][i % 2], &[1.0; 20])).collect();
        device::total_norm(clipper, &list, NormType::L2).unwrap();
        let used = clipper.device_bytes() - reports;
        assert!(used > 0 && used <= 500 * (32 + 16), "{used} bytes");
        assert!(clipper.pinned_bytes() <= 500 * 32);
        device::total_norm(clipper, &list[..100], NormType::L2).unwrap();
        assert_eq!(clipper.device_bytes() - reports, used);
    });
}
