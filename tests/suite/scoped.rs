//! Norms of each tensor, group and row: the device against the CPU path, and both against lists of their own.

use super::data::{bits, tensor, Source, Tensor, Values, DTYPES};
use super::device::{clip_grad_norm_by as on_device, OnDevice};
use super::semantics::at;
use crate::backend::{with_clipper, LARGE};
use gradclip::cuda::{Clipper, PendingScoped};
use gradclip::{
    cpu, ClipNorm, ClipValue, Dtype, Error, NonFinite, NormReport, NormType, Scope, ScopedReport, TensorStats,
};

const NORM_TYPES: [NormType; 5] = [NormType::L1, NormType::L2, NormType::Inf, NormType::P(1.5), NormType::Rms];

fn group_bits(report: &NormReport) -> (u64, u64, u64, bool, Option<usize>) {
    let numbers = [report.total_norm, report.clip_coef, report.multiplier].map(f64::to_bits);
    (numbers[0], numbers[1], numbers[2], report.written, report.first_nonfinite)
}

fn stats_bits(stats: &TensorStats) -> (u64, u64, u64, u64, Option<u64>) {
    (stats.norm.to_bits(), stats.max_abs.to_bits(), stats.zeros, stats.nonfinite, stats.first_nonfinite)
}

/// Both back ends; the report.
pub fn assert_same(
    clipper: &mut Clipper,
    list: &[Tensor],
    scope: &Scope<'_>,
    clip: ClipNorm,
    what: &str,
) -> ScopedReport {
    let (mut on_cpu, mut there) = (list.to_vec(), list.to_vec());
    let report = cpu::clip_grad_norm_by(&mut on_cpu, scope, clip).unwrap();
    let got = on_device(clipper, &mut there, scope, clip).unwrap();
    let compare = |report: &ScopedReport| {
        let groups: Vec<_> = report.groups.iter().map(group_bits).collect();
        (groups, report.tensors.iter().map(stats_bits).collect::<Vec<_>>())
    };
    assert_eq!(compare(&got), compare(&report), "{what}");
    assert_eq!(bits(&there), bits(&on_cpu), "{what}");
    report
}

/// The same without and with telemetry; the report of the latter.
fn assert_parity(
    clipper: &mut Clipper,
    list: &[Tensor],
    scope: &Scope<'_>,
    clip: ClipNorm,
    what: &str,
) -> ScopedReport {
    assert_same(clipper, list, scope, clip, what);
    assert_same(clipper, list, &scope.telemetry(), clip, what)
}

/// The rows of a list, as a list.
fn rows_of(list: &[Tensor], rows: &[usize]) -> Vec<Tensor> {
    let rows_of_one = |(one, &rows): (&Tensor, &usize)| {
        let values = one.values.values();
        let dtype = one.values.dtype();
        let numel = values.len().checked_div(rows).unwrap_or(0);
        (0..rows).map(|row| tensor(dtype, &values[row * numel..][..numel])).collect::<Vec<_>>()
    };
    list.iter().zip(rows).flat_map(rows_of_one).collect()
}

fn mixed_list(source: &mut Source) -> Vec<Tensor> {
    let numels = [0, 1, 7, 40, 4096, 8192, 8200, 20_000];
    let one = |i: usize| source.tensor(DTYPES[i % 4], numels[i * 5 % 8], i % 3);
    (0..40).map(one).collect()
}

#[test]
fn each_tensor_has_the_norm_it_has_alone() {
    with_clipper(|clipper| {
        let list = mixed_list(&mut Source::new(21));
        for (norm_type, max_norm) in NORM_TYPES.into_iter().zip([1.0, 0.1, 0.02, 0.2, 0.01]) {
            let clip = ClipNorm::new(max_norm).norm_type(norm_type);
            let report = assert_parity(clipper, &list, &Scope::per_tensor(), clip, &format!("{norm_type:?}"));
            let mut clipped = list.clone();
            cpu::clip_grad_norm_by(&mut clipped, &Scope::per_tensor(), clip).unwrap();
            let mut written = 0;
            for (index, one) in list.iter().enumerate() {
                let mut alone = [one.clone()];
                let expected = cpu::clip_grad_norm(&mut alone, clip).unwrap();
                assert_eq!(group_bits(&report.groups[index]), group_bits(&expected), "{index}");
                assert_eq!(report.of_tensor(index).unwrap().len(), 1);
                assert_eq!(bits(&alone), bits(&clipped[index..=index]), "{index}");
                written += usize::from(expected.written);
            }
            assert_eq!(report.num_written(), written);
            assert!(written > 5 && written < 40, "{written}");
        }
    });
}

#[test]
fn groups_have_the_norm_of_a_list_of_their_tensors() {
    with_clipper(|clipper| {
        let list = mixed_list(&mut Source::new(22));
        let group_of: Vec<usize> = (0..list.len()).map(|i| [3, 0, 1, 3, 3][i % 5]).collect();
        let max_norms = [Some(0.25), None, Some(1e9), Some(0.0)];
        let scope = Scope::groups(&group_of).max_norms(&max_norms);
        let report = assert_parity(clipper, &list, &scope, ClipNorm::new(7.0), "groups");
        assert_eq!(report.groups.len(), 4);
        for (group, max_norm) in max_norms.iter().enumerate() {
            let members = || list.iter().zip(&group_of).filter(|(_, of)| **of == group).map(|(one, _)| one.clone());
            let mut alone: Vec<Tensor> = members().collect();
            let clip = ClipNorm::new(max_norm.unwrap_or(f64::INFINITY));
            let mut expected = cpu::clip_grad_norm(&mut alone, clip).unwrap();
            expected.first_nonfinite = None;
            assert_eq!(group_bits(&report.groups[group]), group_bits(&expected), "{group}");
        }
    });
}

#[test]
fn rows_have_the_norm_they_have_alone() {
    with_clipper(|clipper| {
        let mut source = Source::new(23);
        let mut list = Vec::new();
        let mut rows = Vec::new();
        for dtype in DTYPES {
            let tile = 32 * 1024 / dtype.size();
            for (count, row_numel) in
                [(1, 1), (7, 3), (33, 17), (5, tile), (3, 2 * tile + 5), (4, tile / 8 + 1), (2, 0)]
            {
                list.push(source.tensor(dtype, count * row_numel, list.len() % 2));
                rows.push(count);
            }
        }
        for (norm_type, max_norm) in NORM_TYPES.into_iter().zip([1.0, 0.05, 0.02, 0.1, 0.01]) {
            let clip = ClipNorm::new(max_norm).norm_type(norm_type);
            let report = assert_parity(clipper, &list, &Scope::rows(&rows), clip, &format!("{norm_type:?}"));
            let expected = cpu::norms_by(&rows_of(&list, &rows), &Scope::per_tensor(), norm_type).unwrap();
            let norms = |report: &ScopedReport| {
                report.groups.iter().map(|group| group.total_norm.to_bits()).collect::<Vec<_>>()
            };
            assert_eq!(norms(&report), norms(&expected));
            assert_eq!(report.of_tensor(1).unwrap().len(), 7);
            assert_eq!(report.of_tensor(1).unwrap(), &report.groups[1..8]);
            assert!(report.num_written() > 10 && report.num_written() < report.groups.len());
        }
    });
}

/// Groups of few tiles are folded by a warp, of more than 256 by a block, and the bits are those of the global norm.
#[test]
fn folds_of_every_size_have_the_bits_of_one_list() {
    with_clipper(|clipper| {
        let mut source = Source::new(24);
        for count in [1usize, 31, 33, 255, 256, 257, 1023, 1025, 2100] {
            let list: Vec<Tensor> = (0..count).map(|i| source.tensor(DTYPES[i % 4], 3, 0)).collect();
            for norm_type in NORM_TYPES {
                let global = cpu::total_norm(&list, norm_type).unwrap();
                let clip = ClipNorm::new(global.total_norm / 2.0).norm_type(norm_type);
                let report = assert_parity(clipper, &list, &Scope::global(), clip, &format!("{count} {norm_type:?}"));
                assert_eq!(report.groups[0].total_norm.to_bits(), global.total_norm.to_bits());
            }
        }
    });
}

#[test]
fn lists_of_every_length() {
    with_clipper(|clipper| {
        let mut source = Source::new(25);
        for count in [0, 1, 2, 32, 33, 161, LARGE.tensors] {
            let list: Vec<Tensor> =
                (0..count).map(|i| source.tensor(DTYPES[source_index(i)], [0, 1, 300][i % 3], i % 2)).collect();
            let report = assert_parity(clipper, &list, &Scope::per_tensor(), 0.01.into(), &format!("{count}"));
            assert_eq!(report.groups.len(), count);
            let scaled = ClipNorm::new(0.01).loss_scale(1024.0);
            assert_parity(clipper, &list, &Scope::global(), scaled, &format!("{count}, global, loss scale"));
        }
    });
}

fn source_index(i: usize) -> usize {
    (i * 7 + i / 3) % 4
}

/// What telemetry counts, against a plain count.
#[test]
fn telemetry_counts_what_is_there() {
    with_clipper(|clipper| {
        let mut source = Source::new(26);
        for dtype in DTYPES {
            let tile = 32 * 1024 / dtype.size();
            for numel in [1, 5, 100, tile / 8, tile + 3, 3 * tile] {
                let mut values: Vec<f64> = (0..numel).map(|_| source.bell()).collect();
                let mut sow = |values: &mut [f64], seeds: &[f64]| {
                    for _ in 0..numel / 7 {
                        values[source.below(numel)] = seeds[source.below(seeds.len())];
                    }
                };
                sow(&mut values, &[0.0, -0.0]);
                let finite = values.clone();
                sow(&mut values, &[f64::NAN, f64::INFINITY, f64::NEG_INFINITY]);
                for (values, offset) in [(&finite, 0), (&values, 0), (&values, 1)] {
                    let values = Values::from_f64(dtype, values.iter().copied());
                    let rounded = values.values();
                    let list = [source.tensor(Dtype::F32, 9, 0), Tensor { values, offset }];
                    let clip = ClipNorm::new(1.0).nonfinite(NonFinite::Skip);
                    let report = {
                        let mut there = list.to_vec();
                        assert_parity(clipper, &list, &Scope::per_tensor(), clip, "telemetry");
                        on_device(clipper, &mut there, &Scope::per_tensor().telemetry(), clip).unwrap()
                    };
                    let got = report.tensors[1];
                    let finite = rounded.iter().filter(|x| x.is_finite());
                    assert_eq!(got.max_abs, finite.fold(0.0, |max: f64, x| max.max(x.abs())));
                    assert_eq!(got.zeros, rounded.iter().filter(|x| **x == 0.0).count() as u64);
                    assert_eq!(got.nonfinite, rounded.iter().filter(|x| !x.is_finite()).count() as u64);
                    assert_eq!(got.first_nonfinite, rounded.iter().position(|x| !x.is_finite()).map(|i| i as u64));
                    let alone = cpu::total_norm(&list[1..], NormType::L2).unwrap().total_norm;
                    assert_eq!(got.norm.to_bits(), alone.to_bits());
                }
            }
            // Rows that do not fill their tiles: the element's index goes through the whole tensor.
            let (rows, row_numel) = (5, tile + 7);
            let mut values: Vec<f64> = (0..rows * row_numel).map(|_| source.bell()).collect();
            values[3 * row_numel + tile + 2] = f64::NAN;
            let list = [tensor(dtype, &values)];
            let mut there = list.to_vec();
            let report = on_device(clipper, &mut there, &Scope::rows(&[rows]).telemetry(), 1.0.into()).unwrap();
            assert_eq!(report.tensors[0].first_nonfinite, Some((3 * row_numel + tile + 2) as u64));
            assert_eq!(report.groups[3].first_nonfinite, Some(0));
            assert_parity(clipper, &list, &Scope::rows(&[rows]), 1.0.into(), "rows");
        }
    });
}

#[test]
fn one_bad_group_leaves_the_others_alone() {
    with_clipper(|clipper| {
        let list = [
            tensor(Dtype::F32, &[3.0, 4.0]),
            tensor(Dtype::F32, &[f64::NAN, 1.0]),
            tensor(Dtype::F32, &[f64::INFINITY]),
            tensor(Dtype::F32, &[6.0, 8.0]),
        ];
        for (policy, second) in
            [(NonFinite::Skip, [f64::NAN, 1.0]), (NonFinite::Zero, [0.0, 0.0]), (NonFinite::Propagate, [f64::NAN; 2])]
        {
            let clip = ClipNorm::new(1.0).nonfinite(policy);
            let report = assert_parity(clipper, &list, &Scope::per_tensor(), clip, &format!("{policy:?}"));
            let mut there = list.to_vec();
            on_device(clipper, &mut there, &Scope::per_tensor(), clip).unwrap();
            assert_eq!(bits(&there[3..]), bits(&[tensor(Dtype::F32, &[0.6, 0.8])]), "{policy:?}");
            assert_eq!(bits(&there[1..2]), bits(&[tensor(Dtype::F32, &second)]), "{policy:?}");
            assert_eq!(report.groups[1].first_nonfinite, Some(1));
            assert!(!report.is_finite());
        }
        let mut there = list.to_vec();
        let clip = ClipNorm::new(1.0).nonfinite(NonFinite::Error);
        let error = on_device(clipper, &mut there, &Scope::per_tensor(), clip).unwrap_err();
        assert!(matches!(error, Error::NonFinite { tensor: Some(1), .. }), "{error}");
        assert_eq!(bits(&there), bits(&list));
    });
}

#[test]
fn a_scope_that_does_not_fit_touches_nothing() {
    with_clipper(|clipper| {
        let list = [tensor(Dtype::F32, &[3.0, 4.0]), tensor(Dtype::F32, &[3.0, 4.0, 5.0])];
        let negative = [Some(1.0), Some(-1.0)];
        let refused = [
            Scope::groups(&[0]),
            Scope::groups(&[0, 5]),
            Scope::rows(&[2, 2]),
            Scope::leading_dimension(),
            Scope::per_tensor().max_norms(&negative),
        ];
        for scope in refused {
            let (mut on_cpu, mut there) = (list.to_vec(), list.to_vec());
            let error = cpu::clip_grad_norm_by(&mut on_cpu, &scope, 1.0).unwrap_err();
            // NaN-free, so equal errors compare equal.
            assert_eq!(on_device(clipper, &mut there, &scope, 1.0.into()).unwrap_err(), error);
            assert_eq!((bits(&there), bits(&on_cpu)), (bits(&list), bits(&list)), "{scope:?}");
        }
        assert!(on_device(clipper, &mut list.to_vec(), &Scope::per_tensor(), ClipNorm::new(-1.0)).is_err());
    });
}

#[test]
fn only_the_last_scoped_call_can_be_read() {
    with_clipper(|clipper| {
        let list = [tensor(Dtype::F32, &[3.0, 4.0])];
        let mut device = OnDevice::upload(clipper.stream(), &list);
        device.with(&list, |grads| {
            let first = clipper.clip_grad_norm_by(grads, &Scope::per_tensor(), 10.0).unwrap();
            assert_eq!(first.wait().unwrap().groups[0].total_norm, 5.0);
            assert_eq!(first.wait().unwrap().groups[0].total_norm, 5.0);
            clipper.clip_grad_norm(grads, 1.0).unwrap(); // of another kind
            assert_eq!(first.wait().unwrap().groups[0].total_norm, 5.0);
            let second = clipper.norms_by(grads, &Scope::global(), NormType::L1).unwrap();
            assert_eq!(first.wait(), Err(Error::ReportExpired));
            assert!((second.wait().unwrap().groups[0].total_norm - 1.4).abs() < 1e-6);
        });
    });
}

/// A loss scale goes from every group, also from one that is only measured; telemetry is of what was there.
#[test]
fn a_loss_scale_in_every_group() {
    with_clipper(|clipper| {
        let list = [tensor(Dtype::F32, &[3.0, 4.0]), tensor(Dtype::F64, &[30.0]), tensor(Dtype::F16, &[0.5])];
        let max_norms = [Some(0.5), None, Some(9.0)];
        let scope = Scope::per_tensor().max_norms(&max_norms);
        let report = assert_parity(clipper, &list, &scope, ClipNorm::new(1.0).loss_scale(2.0), "loss scale");
        assert_eq!(report.groups.iter().map(|group| group.total_norm).collect::<Vec<_>>(), [2.5, 15.0, 0.25]);
        assert_eq!((report.num_written(), report.tensors[1].norm, report.tensors[1].max_abs), (3, 30.0, 30.0));
        let mut there = list.to_vec();
        on_device(clipper, &mut there, &scope, ClipNorm::new(1.0).loss_scale(2.0)).unwrap();
        let expected = [tensor(Dtype::F32, &[0.3, 0.4]), tensor(Dtype::F64, &[15.0]), tensor(Dtype::F16, &[0.25])];
        assert_eq!(bits(&there), bits(&expected));
    });
}

/// What clips can be measured: the number of groups is that of the thresholds, whatever these are.
#[test]
fn measuring_has_the_groups_of_clipping() {
    with_clipper(|clipper| {
        let list = [tensor(Dtype::F32, &[3.0, 4.0]), tensor(Dtype::F32, &[2.0])];
        let thresholds = [Some(1.0), Some(-1.0), None, Some(f64::NAN), None];
        let scope = Scope::groups(&[3, 0]).max_norms(&thresholds);
        let mut device = OnDevice::upload(clipper.stream(), &list);
        let report = device.with(&list, |grads| clipper.norms_by(grads, &scope, NormType::L2)).unwrap().wait().unwrap();
        assert_eq!(report, cpu::norms_by(&list, &scope, NormType::L2).unwrap());
        assert_eq!(report.groups.iter().map(|group| group.total_norm).collect::<Vec<_>>(), [2.0, 0.0, 0.0, 5.0, 0.0]);
        assert_eq!(report.of_tensor(0).unwrap(), &report.groups[3..4]);
    });
}

/// The root mean square, by its formula from the exact L2 norm; each edge that has a value of its own.
#[test]
fn root_mean_squares() {
    with_clipper(|clipper| {
        let list = [
            tensor(Dtype::F32, &[3.0, 4.0, 0.0, 0.0]),
            tensor(Dtype::F16, &[]),
            tensor(Dtype::F64, &[f64::MAX, f64::MAX, -f64::MAX]), // whose L2 norm is beyond f64
            tensor(Dtype::F64, &[5e-324, 5e-324]),
            tensor(Dtype::F32, &[0.0, -0.0]),
            tensor(Dtype::BF16, &[f64::NAN, 1.0]),
            tensor(Dtype::F16, &[f64::INFINITY, 1.0]),
            tensor(Dtype::F16, &[60000.0; 5]),
        ];
        let clip = ClipNorm::new(1.0).norm_type(NormType::Rms);
        let report = assert_parity(clipper, &list, &Scope::per_tensor(), clip, "rms");
        let got: Vec<f64> = report.groups.iter().map(|group| group.total_norm).collect();
        let expected = [2.5, 0.0, f64::MAX, 5e-324, 0.0, f64::NAN, f64::INFINITY, 60000.0];
        for (got, expected) in got.iter().zip(expected) {
            let close = (got - expected).abs() <= 1e-15 * expected || got.to_bits() == expected.to_bits();
            assert!(close, "{got:e}, not {expected:e}");
        }
        let written: Vec<bool> = report.groups.iter().map(|group| group.written).collect();
        assert_eq!(written, [true, false, true, false, false, false, false, true]);
        // Exactly at the threshold nothing is written.
        let at_threshold = assert_parity(
            clipper,
            &list[..1],
            &Scope::per_tensor(),
            ClipNorm::new(2.5).norm_type(NormType::Rms),
            "rms at the threshold",
        );
        assert_eq!(at_threshold.num_written(), 0);
        // The mean is over what has the norm: all of a group, one row, the tensor of the telemetry.
        let rows = [tensor(Dtype::F32, &[3.0, 4.0, 0.0, 0.0]), tensor(Dtype::F32, &[2.0, 2.0])];
        let by_row = assert_parity(clipper, &rows, &Scope::rows(&[2, 1]), clip, "rms of rows");
        let norms = |report: &ScopedReport| report.groups.iter().map(|group| group.total_norm).collect::<Vec<_>>();
        assert_eq!(norms(&by_row), [12.5f64.sqrt(), 0.0, 2.0]);
        let seen = cpu::norms_by(&rows, &Scope::rows(&[2, 1]).telemetry(), NormType::Rms).unwrap();
        assert_eq!(seen.tensors.iter().map(|tensor| tensor.norm).collect::<Vec<_>>(), [2.5, 2.0]);
        let together = assert_parity(clipper, &rows, &Scope::groups(&[0, 0]), clip, "rms of a group");
        assert_eq!(norms(&together), [(33.0f64 / 6.0).sqrt()]);
        assert_eq!(cpu::total_norm(&rows, NormType::Rms).unwrap().total_norm, (33.0f64 / 6.0).sqrt());
    });
}

/// What an optimizer's kernel finds, against the report; nothing is written.
#[test]
fn multipliers_of_groups_by_device_address() {
    with_clipper(|clipper| {
        let list = [
            tensor(Dtype::F32, &[3.0, 4.0]),
            tensor(Dtype::F16, &[0.5]),
            tensor(Dtype::F32, &[f64::NAN]),
            tensor(Dtype::F32, &[f64::INFINITY]),
        ];
        for policy in [NonFinite::Skip, NonFinite::Zero, NonFinite::Propagate] {
            let clip = ClipNorm::new(1.0).loss_scale(2.0).nonfinite(policy);
            for scope in [Scope::per_tensor(), Scope::per_tensor().telemetry(), Scope::groups(&[1, 0, 3, 1])] {
                let expected = cpu::clip_coef_by(&list, &scope, clip).unwrap();
                let clipped = cpu::clip_grad_norm_by(&mut list.to_vec(), &scope, clip).unwrap();
                let mut device = OnDevice::upload(clipper.stream(), &list);
                let pending = device.with(&list, |grads| clipper.clip_coef_by(grads, &scope, clip)).unwrap();
                let report = pending.wait().unwrap();
                let compare = |report: &ScopedReport| report.groups.iter().map(group_bits).collect::<Vec<_>>();
                assert_eq!(compare(&report), compare(&expected));
                assert_eq!(report.num_written(), 0);
                let step = PendingScoped::ADDRESS_STEP;
                for (index, group) in report.groups.iter().enumerate() {
                    assert_eq!(group.multiplier.to_bits(), clipped.groups[index].multiplier.to_bits(), "{index}");
                    let first = pending.multiplier_address(0).unwrap() + index as u64 * step;
                    assert_eq!(pending.multiplier_address(index), Some(first));
                    let doubles = [pending.multiplier_address(index), pending.total_norm_address(index)]
                        .into_iter()
                        .chain([pending.clip_coef_address(index)])
                        .map(|address| at::<f64>(clipper, address.unwrap()).to_bits())
                        .collect::<Vec<_>>();
                    let reported = [group.multiplier, group.total_norm, group.clip_coef].map(f64::to_bits);
                    assert_eq!(doubles, reported, "{index} {policy:?}");
                    let single: f32 = at(clipper, pending.multiplier_f32_address(index).unwrap());
                    assert_eq!(single.to_bits(), (group.multiplier as f32).to_bits(), "{index} {policy:?}");
                    let found_inf: f32 = at(clipper, pending.found_inf_address(index).unwrap());
                    assert_eq!(found_inf == 1.0, group.found_inf, "{index} {policy:?}");
                }
                assert_eq!(pending.multiplier_address(report.groups.len()), None);
                let mut after = list.to_vec();
                device.download(&mut after);
                assert_eq!(bits(&after), bits(&list), "clip_coef_by writes nothing");
            }
        }
        let error = cpu::clip_coef_by(&list, &Scope::per_tensor(), ClipNorm::new(1.0).nonfinite(NonFinite::Error));
        let mut device = OnDevice::upload(clipper.stream(), &list);
        let clip = ClipNorm::new(1.0).nonfinite(NonFinite::Error);
        let got = device.with(&list, |grads| clipper.clip_coef_by(grads, &Scope::per_tensor(), clip)).unwrap_err();
        assert_eq!(format!("{got:?}"), format!("{:?}", error.unwrap_err()));
    });
}

/// Counts of each group: both back ends, and each group against a list of its tensors or rows alone.
#[test]
fn clipped_fractions_of_each_group() {
    with_clipper(|clipper| {
        let mut source = Source::new(27);
        let mut list = mixed_list(&mut source);
        let (nan, inf) = (f64::NAN, f64::INFINITY);
        list.push(tensor(Dtype::F32, &[nan, 1.0, -inf, 0.0, 0.5, inf]));
        list.push(tensor(Dtype::F16, &[0.0, nan]));
        list.extend((0..700).map(|i| source.tensor(DTYPES[i % 4], 3, i % 2)));
        let group_of: Vec<usize> = (0..list.len()).map(|i| [3, 0, 1, 3, 3][i % 5]).collect();
        let rows: Vec<usize> = list.iter().map(|one| [4, 2, 1][one.values.numel() % 3]).collect();
        let rows: Vec<usize> =
            rows.iter().zip(&list).map(|(&rows, one)| if one.values.numel() % rows == 0 { rows } else { 1 }).collect();
        for clip in [ClipValue::new(0.01), ClipValue::between(-1e-3, 0.02), ClipValue::new(9.0), ClipValue::new(0.0)] {
            let mut plain = list.clone();
            let all = cpu::clip_grad_value(&mut plain, clip).unwrap();
            for scope in [Scope::global(), Scope::per_tensor(), Scope::groups(&group_of), Scope::rows(&rows)] {
                let (mut on_cpu, mut there) = (list.clone(), list.clone());
                let report = cpu::clip_grad_value_by(&mut on_cpu, &scope, clip).unwrap();
                let mut device = OnDevice::upload(clipper.stream(), &there);
                let pending = device.with(&list, |grads| clipper.clip_grad_value_by(grads, &scope, clip)).unwrap();
                assert_eq!(pending.wait().unwrap(), report, "{scope:?}");
                device.download(&mut there);
                assert_eq!(bits(&on_cpu), bits(&plain), "{scope:?}");
                assert_eq!(bits(&there), bits(&plain), "{scope:?}");
                let sum = |of: fn(&gradclip::ValueReport) -> u64| report.groups.iter().map(of).sum::<u64>();
                assert_eq!(
                    (sum(|group| group.clipped), sum(|group| group.nan), sum(|group| group.numel)),
                    (all.clipped, all.nan, all.numel)
                );
            }
            let of_each = cpu::clip_grad_value_by(&mut list.clone(), &Scope::per_tensor(), clip).unwrap();
            for (index, (one, group)) in list.iter().zip(&of_each.groups).enumerate() {
                let mut alone = [one.clone()];
                let mut expected = cpu::clip_grad_value(&mut alone, clip).unwrap();
                expected.first_nonfinite = expected.first_nonfinite.map(|_| index);
                assert_eq!(*group, expected, "{index}");
                let changed = one.values.bits().iter().zip(alone[0].values.bits()).filter(|(a, b)| **a != *b).count();
                let fraction = changed as f64 / one.values.numel().max(1) as f64;
                assert_eq!(group.clipped_fraction(), fraction, "{index}");
            }
        }
        let by_row = cpu::clip_grad_value_by(&mut list.clone(), &Scope::rows(&rows), 0.01).unwrap();
        let mut parts = rows_of(&list, &rows);
        let expected = cpu::clip_grad_value_by(&mut parts, &Scope::per_tensor(), 0.01).unwrap();
        let counts = |report: &ScopedReport<gradclip::ValueReport>| {
            report.groups.iter().map(|group| (group.clipped, group.nan, group.numel)).collect::<Vec<_>>()
        };
        assert_eq!(counts(&by_row), counts(&expected));
    });
}

#[test]
fn value_clipping_with_a_scope_of_norms_is_refused() {
    with_clipper(|clipper| {
        let list = [tensor(Dtype::F32, &[3.0, 4.0])];
        let thresholds = [Some(1.0)];
        for (scope, clip, expected) in [
            (Scope::per_tensor().telemetry(), 1.0, Error::ScopeForNorms { option: "telemetry" }),
            (Scope::per_tensor().max_norms(&thresholds), 1.0, Error::ScopeForNorms { option: "max_norms" }),
            (Scope::rows(&[3]), 1.0, Error::UnevenRows { tensor: 0, numel: 2, rows: 3 }),
            (
                Scope::per_tensor(),
                -1.0,
                Error::InvalidThreshold { name: "clip_value", expected: "zero or positive", got: -1.0 },
            ),
        ] {
            let mut on_cpu = list.to_vec();
            assert_eq!(cpu::clip_grad_value_by(&mut on_cpu, &scope, clip).unwrap_err(), expected);
            let mut device = OnDevice::upload(clipper.stream(), &list);
            let call = device.with(&list, |grads| clipper.clip_grad_value_by(grads, &scope, clip).map(drop));
            assert_eq!(call.unwrap_err(), expected);
            let mut after = list.to_vec();
            device.download(&mut after);
            assert_eq!((bits(&after), bits(&on_cpu)), (bits(&list), bits(&list)));
        }
    });
}
