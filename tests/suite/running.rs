//! Running norms: any way of cutting a list into calls gives the bits of one call over it, on both back ends.

use super::data::{bits, tensor, Source, Tensor, DTYPES};
use super::device::OnDevice;
use crate::backend::{with_clipper, LARGE};
use gradclip::cuda::{Clipper, DeviceGradMut, RawGrad, RunningNorm};
use gradclip::{cpu, ClipNorm, Dtype, Error, NonFinite, NormReport, NormType, Result};

const NORM_TYPES: [NormType; 5] = [NormType::L1, NormType::L2, NormType::Inf, NormType::P(0.5), NormType::Rms];

fn report_bits(report: &NormReport) -> (u64, u64, bool, Option<usize>) {
    (report.total_norm.to_bits(), report.clip_coef.to_bits(), report.written, report.first_nonfinite)
}

/// Ends of the parts that a list is cut into, some of them empty.
fn cuts(source: &mut Source, count: usize) -> Vec<usize> {
    let mut ends: Vec<usize> = (0..source.below(6)).map(|_| source.below(count + 1)).collect();
    ends.push(count);
    ends.sort_unstable();
    ends
}

fn on_cpu(norm: &mut cpu::RunningNorm, list: &mut [Tensor], ends: &[usize], clip: ClipNorm) -> Result<NormReport> {
    let mut first = 0;
    for &end in ends {
        norm.add(&list[first..end])?;
        first = end;
    }
    norm.clip(list, clip)
}

fn there(
    norm: &mut RunningNorm,
    grads: &mut [&mut dyn DeviceGradMut],
    ends: &[usize],
    clip: ClipNorm,
) -> Result<NormReport> {
    let mut first = 0;
    for &end in ends {
        norm.add(&grads[first..end])?;
        first = end;
    }
    norm.clip(grads, clip)?.wait()
}

/// One list, cut at several places by both back ends, against one call.
fn assert_same(
    clipper: &mut Clipper,
    norms: &mut (cpu::RunningNorm, RunningNorm),
    list: &[Tensor],
    ends: &[usize],
    clip: ClipNorm,
) {
    let mut whole = list.to_vec();
    let expected = cpu::clip_grad_norm(&mut whole, clip).unwrap();
    let mut clipped = list.to_vec();
    let report = on_cpu(&mut norms.0, &mut clipped, ends, clip).unwrap();
    assert_eq!(report_bits(&report), report_bits(&expected), "on the CPU, {clip:?}, cut at {ends:?}");
    assert_eq!(bits(&clipped), bits(&whole), "on the CPU, cut at {ends:?}");

    let mut clipped = list.to_vec();
    let mut device = OnDevice::upload(clipper.stream(), list);
    let report = device.with(list, |grads| there(&mut norms.1, grads, ends, clip)).unwrap();
    device.download(&mut clipped);
    assert_eq!(report_bits(&report), report_bits(&expected), "on the device, {clip:?}, cut at {ends:?}");
    assert_eq!(bits(&clipped), bits(&whole), "on the device, cut at {ends:?}");
}

#[test]
fn any_cut_gives_the_bits_of_one_call() {
    with_clipper(|clipper| {
        let mut source = Source::new(31);
        for norm_type in NORM_TYPES {
            let mut norms = (cpu::RunningNorm::new(norm_type).unwrap(), clipper.running_norm(norm_type).unwrap());
            for round in 0..12 {
                let mut list: Vec<Tensor> = (0..1 + source.below(7))
                    .map(|i| {
                        let dtype = DTYPES[source.below(4)];
                        let tile = 32 * 1024 / dtype.size();
                        let numel = [0, 1, 3, 40, tile / 8, tile + 5][source.below(6)];
                        source.tensor(dtype, numel, i % 3)
                    })
                    .collect();
                if round % 4 == 3 {
                    // Late, as f64 often is, and out of the usual range: scales where there were none.
                    list.push(tensor(Dtype::F64, &[1e-200, 3e-250]));
                    list.push(tensor(Dtype::F64, &[[1e200, f64::NAN, 1e-300][source.below(3)], 2.0]));
                }
                let policy = [NonFinite::Skip, NonFinite::Zero, NonFinite::Propagate][round % 3];
                let clip = ClipNorm::new(1e-3).norm_type(norm_type).nonfinite(policy);
                let ends = cuts(&mut source, list.len());
                assert_same(clipper, &mut norms, &list, &ends, clip);
                assert_same(clipper, &mut norms, &list, &ends, ClipNorm::new(1e30).norm_type(norm_type));
            }
        }
    });
}

/// More tiles than threads that fold them, more tensors than a kernel's parameters hold, partials that outgrow their
/// memory again and again.
#[test]
fn long_lists_in_many_calls() {
    with_clipper(|clipper| {
        let mut source = Source::new(32);
        let mut list: Vec<Tensor> = (0..1500).map(|i| source.tensor(DTYPES[i % 4], [1, 0, 17][i % 3], i % 2)).collect();
        list.push(source.tensor(Dtype::BF16, LARGE.bytes / 2 + 3, 1));
        let mut norms = (cpu::RunningNorm::new(NormType::L2).unwrap(), clipper.running_norm(NormType::L2).unwrap());
        let count = list.len();
        for ends in
            [vec![1, 2, 200, 700, 701, count], vec![300, count], (1..=count).step_by(97).chain([count]).collect()]
        {
            assert_same(clipper, &mut norms, &list, &ends, ClipNorm::new(0.01));
        }
    });
}

/// What is given to the clip has to be what was added, in the same order; otherwise nothing happens, and the norm can
/// still be used.
#[test]
fn another_list_is_refused() {
    with_clipper(|clipper| {
        let list = [tensor(Dtype::F32, &[3.0]), tensor(Dtype::F32, &[]), tensor(Dtype::F32, &[4.0, 0.0])];
        let mut device = OnDevice::upload(clipper.stream(), &list);
        let mut norm = clipper.running_norm(NormType::L2).unwrap();
        let mut on_host = cpu::RunningNorm::new(NormType::L2).unwrap();
        let mut clipped = list.to_vec();
        on_host.add(&clipped).unwrap();
        device.with(&list, |grads| {
            norm.add(&grads[..1]).unwrap();
            norm.add(&grads[1..]).unwrap();
            let differs = |error: Error, at: usize| match error {
                Error::OtherGradients { tensor, .. } => assert_eq!(tensor, at),
                other => panic!("{other}"),
            };
            differs(norm.clip(&mut grads[..2], 1.0).unwrap_err(), 2);
            differs(norm.clip(&mut grads[1..], 1.0).unwrap_err(), 0);
            differs(norm.clip(&mut grads[..0], 1.0).unwrap_err(), 0);
            grads.swap(0, 2);
            differs(norm.clip(grads, 1.0).unwrap_err(), 0);
            grads.swap(0, 2);
            let order = ClipNorm::new(1.0).norm_type(NormType::L1);
            let error = norm.clip(grads, order).unwrap_err();
            assert_eq!(error, Error::OtherNormType { running: NormType::L2, got: NormType::L1 });
            assert!(matches!(norm.clip(grads, -1.0).unwrap_err(), Error::InvalidThreshold { .. }));
        });
        let mut untouched = list.to_vec();
        device.download(&mut untouched);
        assert_eq!(bits(&untouched), bits(&list));
        assert!(matches!(on_host.clip(&mut clipped[..2], 1.0).unwrap_err(), Error::OtherGradients { tensor: 2, .. }));
        clipped.swap(0, 2);
        assert!(matches!(on_host.clip(&mut clipped, 1.0).unwrap_err(), Error::OtherGradients { tensor: 0, .. }));
        clipped.swap(0, 2);
        assert_eq!(on_host.clip(&mut clipped, 1.0).unwrap().total_norm, 5.0);

        let report = device.with(&list, |grads| norm.clip(grads, 1.0)).unwrap().wait().unwrap();
        assert_eq!((report.total_norm, report.clip_coef, report.written), (5.0, 0.2, true));
        device.download(&mut untouched);
        assert_eq!(bits(&untouched), bits(&clipped));
        for p in [0.0, -1.0, f64::NAN] {
            assert!(matches!(clipper.running_norm(NormType::P(p)).unwrap_err(), Error::InvalidNormType { .. }));
            assert!(matches!(cpu::RunningNorm::new(NormType::P(p)).unwrap_err(), Error::InvalidNormType { .. }));
        }
    });
}

#[test]
fn the_same_memory_in_two_calls_is_refused() {
    with_clipper(|clipper| {
        let stream = clipper.stream().clone();
        let slice = stream.clone_htod(&[3.0f32, 4.0, 5.0, 6.0]).unwrap();
        let part = |range: std::ops::Range<usize>| slice.slice(range);
        let mut norm = clipper.running_norm(NormType::L2).unwrap();
        norm.add(&[part(0..0), part(0..1)]).unwrap();
        norm.add(&[part(1..2)]).unwrap();
        let overlap = |first, second| Error::Overlap { first, second };
        assert_eq!(norm.add(&[part(3..4), part(1..3)]).unwrap_err(), overlap(2, 4));
        assert_eq!(norm.add(&[part(0..4)]).unwrap_err(), overlap(2, 3));
        assert_eq!(norm.add(&[part(2..4), part(3..4)]).unwrap_err(), overlap(3, 4));
        // SAFETY: deliberately wrong; the call must refuse it before any work is enqueued.
        let bad = unsafe { RawGrad::new(0x10, 1, Dtype::F32) };
        assert!(matches!(norm.add(&[bad]).unwrap_err(), Error::BadPointer { tensor: 3, .. }));
        assert_eq!(norm.total_norm().unwrap().wait().unwrap().total_norm, 5.0);
        norm.add(&[part(0..4)]).unwrap(); // another norm
        assert_eq!(norm.total_norm().unwrap().wait().unwrap().total_norm, 86f64.sqrt());
    });
}

/// What a user does with it besides: only measures, measures and then clips, gives up, adds nothing, drops it.
#[test]
fn a_norm_can_be_read_restarted_and_left() {
    with_clipper(|clipper| {
        let stream = clipper.stream().clone();
        let (mut a, mut b) = (stream.clone_htod(&[3.0f32]).unwrap(), stream.clone_htod(&[4.0f32]).unwrap());
        let mut norm = clipper.running_norm(NormType::L2).unwrap();
        assert_eq!(norm.total_norm().unwrap().wait().unwrap().total_norm, 0.0);
        let none: &mut [cudarc::driver::CudaSlice<f32>] = &mut [];
        assert_eq!(norm.clip(none, 1.0).unwrap().wait().unwrap().total_norm, 0.0);
        norm.add(&[&a]).unwrap();
        norm.restart();
        norm.add(&[&b]).unwrap();
        let first = norm.total_norm().unwrap();
        let report = norm.clip(&mut [&mut b], 2.0).unwrap();
        assert_eq!((first.wait().unwrap().total_norm, report.wait().unwrap().clip_coef), (4.0, 0.5));
        assert_eq!(stream.clone_dtoh(&b).unwrap(), [2.0]);

        norm.add(&[&a]).unwrap();
        drop(norm); // midway
        let report = clipper.clip_grad_norm(&mut [&mut a, &mut b], 1.0).unwrap().wait().unwrap();
        assert_eq!(report.total_norm, 13f64.sqrt());

        // With a clipper of its own that is gone.
        let mut norm = Clipper::new(&stream).unwrap().running_norm(NormType::P(3.0)).unwrap();
        norm.add(&[&a]).unwrap();
        let nan = stream.clone_htod(&[f32::NAN]).unwrap();
        norm.add(&[&nan]).unwrap();
        let report = norm.total_norm().unwrap().wait().unwrap();
        assert!(report.total_norm.is_nan() && report.first_nonfinite == Some(1));
        assert!(norm.device_bytes() >= 32 * 1024);

        let mut norm = cpu::RunningNorm::new(NormType::L2).unwrap();
        assert_eq!(norm.total_norm().unwrap().total_norm, 0.0);
        let (a, mut b) = ([3.0f32], [4.0f32]);
        norm.add(&[&a]).unwrap();
        norm.restart();
        norm.add(&[&b]).unwrap();
        assert_eq!(norm.total_norm().unwrap().total_norm, 4.0);
        assert_eq!(norm.clip(&mut [&mut b], 2.0).unwrap().clip_coef, 0.5);
    });
}

/// Not finite, and an error asked for: the norm can still be clipped by another policy.
#[test]
fn the_error_policy_leaves_the_norm_as_it_is() {
    with_clipper(|clipper| {
        let list = [tensor(Dtype::F32, &[3.0]), tensor(Dtype::F64, &[f64::INFINITY])];
        let mut norm = clipper.running_norm(NormType::L2).unwrap();
        let mut device = OnDevice::upload(clipper.stream(), &list);
        device.with(&list, |grads| {
            norm.add(grads).unwrap();
            let policy = |nonfinite| ClipNorm::new(1.0).nonfinite(nonfinite);
            let error = norm.clip(grads, policy(NonFinite::Error)).unwrap_err();
            assert_eq!(error, Error::NonFinite { total_norm: f64::INFINITY, tensor: Some(1) });
            assert!(norm.clip(grads, policy(NonFinite::Zero)).unwrap().wait().unwrap().written);
        });
        let mut cleared = list.to_vec();
        device.download(&mut cleared);
        assert_eq!(cleared.iter().map(|tensor| tensor.values.values()).collect::<Vec<_>>(), [[0.0], [0.0]]);
    });
}
