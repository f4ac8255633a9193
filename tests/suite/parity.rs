//! The device against the CPU path, bit for bit: reports and gradients.

use super::data::{bits, tensor, Source, Tensor, Values, DTYPES};
use super::device;
use crate::backend::{with_clipper, LARGE};
use gradclip::cuda::Clipper;
use gradclip::{cpu, ClipNorm, ClipValue, Dtype, NonFinite, NormReport, NormType};

const NORM_TYPES: [NormType; 7] =
    [NormType::L1, NormType::L2, NormType::Inf, NormType::P(0.5), NormType::P(3.0), NormType::P(10.7), NormType::Rms];
const FURTHER_ORDERS: [f64; 8] = [5e-324, 1e-3, 0.01, 1.5, 4.0, 100.0, 1e300, f64::MAX];

/// A report with NaN made comparable.
fn report_bits(report: &NormReport) -> ([u64; 3], [bool; 2], Option<usize>) {
    let numbers = [report.total_norm, report.clip_coef, report.multiplier].map(f64::to_bits);
    (numbers, [report.found_inf, report.written], report.first_nonfinite)
}

pub fn assert_norm_parity(clipper: &mut Clipper, list: &[Tensor], clip: ClipNorm, what: &str) -> NormReport {
    let (mut on_cpu, mut on_device) = (list.to_vec(), list.to_vec());
    let expected = cpu::clip_grad_norm(&mut on_cpu, clip).unwrap();
    let got = device::clip_grad_norm(clipper, &mut on_device, clip).unwrap();
    assert_eq!(report_bits(&got), report_bits(&expected), "{what}: {got:?} on the device, {expected:?} on the CPU");
    assert_eq!(bits(&on_device), bits(&on_cpu), "{what}");
    expected
}

/// Clips by a norm that is given.
pub fn assert_given_parity(clipper: &mut Clipper, list: &[Tensor], total_norm: f64, clip: ClipNorm, what: &str) {
    let (mut on_cpu, mut on_device) = (list.to_vec(), list.to_vec());
    let expected = cpu::clip_with_norm(&mut on_cpu, total_norm, clip).unwrap();
    let got = device::clip_with_norm(clipper, &mut on_device, total_norm, clip).unwrap();
    assert_eq!(report_bits(&got), report_bits(&expected), "{what}: {got:?} on the device, {expected:?} on the CPU");
    assert_eq!(bits(&on_device), bits(&on_cpu), "{what}");
}

pub fn assert_value_parity(clipper: &mut Clipper, list: &[Tensor], clip: ClipValue, what: &str) {
    let (mut on_cpu, mut on_device) = (list.to_vec(), list.to_vec());
    let expected = cpu::clip_grad_value(&mut on_cpu, clip).unwrap();
    let got = device::clip_grad_value(clipper, &mut on_device, clip).unwrap();
    assert_eq!(got, expected, "{what}");
    assert_eq!(bits(&on_device), bits(&on_cpu), "{what}");
}

/// Every norm, measured, clipped by half and clipped hard; and clamped.
fn assert_parity(clipper: &mut Clipper, list: &[Tensor], what: &str) {
    for norm_type in NORM_TYPES {
        let expected = cpu::total_norm(list, norm_type).unwrap();
        let got = device::total_norm(clipper, list, norm_type).unwrap();
        assert_eq!(report_bits(&got), report_bits(&expected), "{what}: {norm_type:?}");
        for fraction in [0.5, 1e-25] {
            let clip = ClipNorm::new(fraction * expected.total_norm).norm_type(norm_type);
            if expected.total_norm.is_finite() {
                assert_norm_parity(clipper, list, clip, &format!("{what}: {norm_type:?} x {fraction}"));
            }
        }
    }
    assert_value_parity(clipper, list, ClipValue::new(0.01), &format!("{what}: value"));
}

/// Numbers of elements around every border of packs, rows, segments and tiles.
fn border_sizes(dtype: Dtype) -> Vec<usize> {
    let tile = 32 * 1024 / dtype.size();
    let (pack, row, segment) = (tile / 2048, tile / 64, tile / 8);
    let mut sizes = vec![0, 1, 2, 3];
    for border in [pack, 2 * pack, row, segment, 2 * segment, tile, 2 * tile] {
        sizes.extend([border - 1, border, border + 1]);
    }
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

#[test]
fn sizes_around_every_border() {
    with_clipper(|clipper| {
        let mut source = Source::new(1);
        for dtype in DTYPES {
            for numel in border_sizes(dtype) {
                let list = [source.tensor(dtype, numel, 0)];
                assert_parity(clipper, &list, &format!("{dtype} x {numel}"));
            }
        }
    });
}

#[test]
fn every_alignment() {
    with_clipper(|clipper| {
        let mut source = Source::new(2);
        for dtype in DTYPES {
            let tile = 32 * 1024 / dtype.size();
            for offset in 0..=16 / dtype.size() {
                for numel in [1, 5, 40, tile / 8 + 3, 2 * tile + 17] {
                    let list = [source.tensor(dtype, numel, offset)];
                    assert_parity(clipper, &list, &format!("{dtype} x {numel}, {offset} off"));
                }
            }
        }
    });
}

#[test]
fn empties_anywhere() {
    with_clipper(|clipper| {
        let mut source = Source::new(3);
        let mut full = |numel| source.tensor(Dtype::F32, numel, 0);
        let empty = || tensor(Dtype::BF16, &[]);
        let lists = [
            vec![],
            vec![empty()],
            vec![empty(), empty(), full(5)],
            vec![full(5), empty()],
            vec![full(9000), empty(), empty(), full(3), empty(), full(1)],
        ];
        for (index, list) in lists.iter().enumerate() {
            assert_parity(clipper, list, &format!("list {index}"));
        }
    });
}

#[test]
fn mixed_dtypes_in_lists_of_every_length() {
    with_clipper(|clipper| {
        let mut source = Source::new(4);
        // Around the 160 tensors that travel in the parameters, and more tiles than threads fold them.
        for count in [2, 3, 31, 159, 160, 161, 162, 1000, LARGE.tensors] {
            let list: Vec<Tensor> = (0..count)
                .map(|i| {
                    let numel = [0, 1, 7, 64, 300][source.below(5)];
                    let dtype = DTYPES[(i + source.below(2)) % 4];
                    source.tensor(dtype, numel, i % 3)
                })
                .collect();
            assert_parity(clipper, &list, &format!("{count} tensors"));
        }
    });
}

#[test]
fn large_tensors() {
    with_clipper(|clipper| {
        let mut source = Source::new(5);
        for dtype in DTYPES {
            let list = [source.tensor(dtype, LARGE.bytes / dtype.size() + 5, 1), source.tensor(dtype, 100, 0)];
            for norm_type in NORM_TYPES {
                let clip = ClipNorm::new(1e-3).norm_type(norm_type);
                assert_norm_parity(clipper, &list, clip, &format!("{dtype} {norm_type:?}"));
            }
            assert_value_parity(clipper, &list, ClipValue::between(-0.01, 0.02), &dtype.to_string());
        }
    });
}

/// Values whose squares leave the range, of every size, and mixtures: the sums are redone in f64 then.
#[test]
fn values_out_of_range() {
    with_clipper(|clipper| {
        let mut source = Source::new(6);
        let exponents: [(Dtype, &[i32]); 4] = [
            (Dtype::F32, &[-149, -140, -126, -100, -60, -46, -45, -30, 0, 50, 63, 64, 100, 126]),
            (Dtype::F64, &[-1074, -1022, -600, -511, -500, -451, -449, 0, 449, 451, 500, 512, 600, 1000, 1022]),
            (Dtype::F16, &[-24, -14, -10, 0, 10, 14]),
            (Dtype::BF16, &[-133, -126, -80, -47, -45, 0, 63, 64, 110, 126]),
        ];
        for (dtype, exponents) in exponents {
            for &low in exponents {
                for &high in exponents {
                    let numel = 32 * 1024 / dtype.size() / 8 + 40;
                    let mut value = |exponent: i32| {
                        let half = exponent / 2;
                        (1.0 + source.bell().abs() / 4.0) * 2f64.powi(half) * 2f64.powi(exponent - half)
                    };
                    let values: Vec<f64> =
                        (0..numel).map(|i| if i % 97 == 3 { value(high) } else { -value(low) }).collect();
                    let list = [tensor(dtype, &values)];
                    for norm_type in [NormType::L1, NormType::L2, NormType::P(0.7), NormType::P(100.0)] {
                        let what = format!("{dtype}: 2^{low} and 2^{high}, {norm_type:?}");
                        for max_norm in [0.0, 1e-40, 1.0, 1e30] {
                            let clip = ClipNorm::new(max_norm).norm_type(norm_type);
                            assert_norm_parity(clipper, &list, clip, &what);
                        }
                    }
                }
            }
        }
    });
}

/// Orders from the smallest to the largest, over values that their powers would lose at once.
#[test]
fn norms_of_any_order() {
    with_clipper(|clipper| {
        let mut source = Source::new(8);
        for dtype in DTYPES {
            let tile = 32 * 1024 / dtype.size();
            let mut decades = source.tensor(dtype, 2 * tile + 77, 1);
            let format = decades.values.values();
            let spread = |(i, x): (usize, f64)| x * 10f64.powi(i as i32 % 9 - 4) * if i % 5 == 0 { 0.0 } else { 1.0 };
            decades.values = Values::from_f64(dtype, format.into_iter().enumerate().map(spread).collect::<Vec<_>>());
            let lists = [
                vec![decades],
                vec![tensor(dtype, &[-3.0])],
                vec![tensor(dtype, &[0.0; 40])],
                vec![tensor(dtype, &[1.5; 2000]), tensor(dtype, &[]), source.tensor(dtype, 3, 2)],
            ];
            for list in &lists {
                for p in FURTHER_ORDERS {
                    let norm_type = NormType::P(p);
                    let what = format!("{dtype}, {} elements, p = {p:e}", list[0].values.numel());
                    for nonfinite in [NonFinite::Skip, NonFinite::Zero] {
                        let clip = ClipNorm::new(1e-3).norm_type(norm_type).nonfinite(nonfinite);
                        assert_norm_parity(clipper, list, clip, &what);
                    }
                }
                // The norms that have a name, by their order.
                for (p, named) in [(1.0, NormType::L1), (2.0, NormType::L2), (f64::INFINITY, NormType::Inf)] {
                    let by_order = device::total_norm(clipper, list, NormType::P(p)).unwrap();
                    let by_name = cpu::total_norm(list, named).unwrap();
                    assert_eq!(report_bits(&by_order), report_bits(&by_name), "p = {p}");
                }
            }
        }
    });
}

/// Norms and thresholds at both ends of f64, with every policy: the same report or error, and the same bits.
#[test]
fn extremes_agree_with_the_cpu() {
    let lists = [
        vec![tensor(Dtype::F64, &[1e300])],
        vec![tensor(Dtype::F64, &[f64::MAX, f64::MAX])],
        vec![tensor(Dtype::F64, &[5e-324]), tensor(Dtype::F16, &[6e-8])],
        vec![tensor(Dtype::F64, &[1e250]), tensor(Dtype::F64, &[1e-250]), tensor(Dtype::BF16, &[1e-40])],
        vec![tensor(Dtype::F32, &[1e-45; 5])],
    ];
    let thresholds = [0.0, -0.0, 5e-324, 1e-300, 1e-20, f64::MIN_POSITIVE, 1.0, f64::MAX, f64::INFINITY];
    let policies = [NonFinite::Skip, NonFinite::Zero, NonFinite::Propagate, NonFinite::Error];
    with_clipper(|clipper| {
        for list in &lists {
            for max_norm in thresholds {
                for eps in [0.0, -0.0, 5e-324, 1e-6, f64::MAX] {
                    for policy in policies {
                        let clip = ClipNorm::new(max_norm).eps(eps).nonfinite(policy);
                        let clip = if policy == NonFinite::Zero { clip.norm_type(NormType::P(0.6)) } else { clip };
                        let (mut on_cpu, mut on_device) = (list.clone(), list.clone());
                        let expected = cpu::clip_grad_norm(&mut on_cpu, clip);
                        let got = device::clip_grad_norm(clipper, &mut on_device, clip);
                        assert_eq!(format!("{got:?}"), format!("{expected:?}"), "{clip:?}"); // NaN, too
                        assert_eq!(bits(&on_device), bits(&on_cpu), "{clip:?}");
                    }
                }
            }
        }
    });
}

#[test]
fn specials_at_every_place_and_by_every_policy() {
    with_clipper(|clipper| {
        let mut source = Source::new(7);
        for dtype in DTYPES {
            let tile = 32 * 1024 / dtype.size();
            for special in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                for place in [0, 1, tile / 2 + 11, tile, tile + 2] {
                    let mut list =
                        vec![source.tensor(dtype, 10, 0), tensor(dtype, &[]), source.tensor(dtype, tile + 3, 1)];
                    let mut values = list[2].values.values();
                    values[place] = special;
                    list[2].values = Values::from_f64(dtype, values);
                    for policy in [NonFinite::Skip, NonFinite::Zero, NonFinite::Propagate] {
                        for norm_type in NORM_TYPES {
                            let what = format!("{dtype}: {special} at {place}, {policy:?}, {norm_type:?}");
                            let clip = ClipNorm::new(0.5).norm_type(norm_type).nonfinite(policy);
                            let report = assert_norm_parity(clipper, &list, clip, &what);
                            assert_eq!(report.first_nonfinite, Some(2), "{what}");
                        }
                    }
                    assert_value_parity(clipper, &list, ClipValue::new(0.001), "value");
                    assert_value_parity(clipper, &list, ClipValue::between(f64::NEG_INFINITY, 0.001), "value");
                }
            }
        }
    });
}

/// Every f16 and bf16, and as many f32 around the borders, through the scale and the clamp.
#[test]
fn all_bit_patterns() {
    with_clipper(|clipper| {
        let all: Vec<u16> = (0..=u16::MAX).collect();
        let f16s = Values::F16(all.iter().map(|&b| half::f16::from_bits(b)).filter(|x| x.is_finite()).collect());
        let bf16s = Values::BF16(all.iter().map(|&b| half::bf16::from_bits(b)).filter(|x| x.is_finite()).collect());
        let f32s = Values::F32(
            all.iter().map(|&b| f32::from_bits(u32::from(b) << 16 | 0x8001)).filter(|x| x.is_finite()).collect(),
        );
        for values in [f16s, bf16s, f32s] {
            let list = [Tensor { values, offset: 0 }];
            let norm = cpu::total_norm(&list, NormType::L2).unwrap().total_norm;
            for coef in [0.999, 0.5, 1.0 / 3.0, 1e-3, 2f64.powi(-59), 2f64.powi(-60), 2f64.powi(-61), 1e-30, 1e-300] {
                assert_norm_parity(clipper, &list, ClipNorm::new(norm * coef), &format!("coef {coef:e}"));
            }
            for bound in [0.0, 1e-7, 0.1, 1.0, 300.0, 1e30] {
                assert_value_parity(clipper, &list, ClipValue::new(bound), &format!("bound {bound:e}"));
            }
        }
    });
}

/// Loss scales on both sides of 1 and at both ends of f64, with thresholds that clip, do not, and only unscale, and every
/// policy; and the same without a write.
#[test]
fn loss_scales_agree_with_the_cpu() {
    with_clipper(|clipper| {
        let mut source = Source::new(8);
        let scales = [1.0, 65536.0, 3.0, 0.3, 1e-7, 2f64.powi(-60), 2f64.powi(-61), 1e-200, 1e18, 2f64.powi(61), 1e200];
        for dtype in DTYPES {
            let good = vec![source.tensor(dtype, 700, 1), tensor(dtype, &[]), tensor(Dtype::F16, &[-0.0, 6e-8])];
            for special in [0.0, f64::NAN, f64::NEG_INFINITY] {
                let mut list = good.clone();
                list.push(tensor(dtype, &[1.0, special, 2.0]));
                let norm = cpu::total_norm(&list, NormType::L2).unwrap().total_norm;
                let norm = if norm.is_finite() { norm } else { 1.0 };
                let policies = [NonFinite::Skip, NonFinite::Zero, NonFinite::Propagate];
                let policies = if special == 0.0 { &policies[..1] } else { &policies };
                for scale in scales.into_iter().chain([f64::MIN_POSITIVE, f64::MAX]) {
                    for max_norm in [norm / scale / 3.0, norm / scale * 3.0, 0.0, f64::INFINITY] {
                        for &policy in policies {
                            let clip = ClipNorm::new(max_norm).loss_scale(scale).nonfinite(policy);
                            let what = format!("{dtype}, {special}: {clip:?}");
                            let mut written = assert_norm_parity(clipper, &list, clip, &what);
                            let expected = cpu::clip_coef(&list, clip).unwrap();
                            let got = device::clip_coef(clipper, &list, clip).unwrap();
                            assert_eq!(report_bits(&got), report_bits(&expected), "{what}");
                            written.written = false;
                            assert_eq!(report_bits(&got), report_bits(&written), "{what}");
                            assert_given_parity(clipper, &list, norm, clip, &what);
                        }
                    }
                }
            }
        }
    });
}

/// Every f16 and bf16, NaN and Inf too, and as many f32 and f64: through the scale that looks at each element.
#[test]
fn all_bit_patterns_by_a_given_norm() {
    with_clipper(|clipper| {
        let all: Vec<u64> = (0..=u64::from(u16::MAX)).collect();
        let lists = [
            Values::from_bits(Dtype::F16, all.iter().copied()),
            Values::from_bits(Dtype::BF16, all.iter().copied()),
            Values::from_bits(Dtype::F32, all.iter().map(|&b| b << 16 | 0x8001)),
            Values::from_bits(Dtype::F64, all.iter().map(|&b| b << 48 | 0x8001)),
        ];
        for values in lists {
            let list = [Tensor { values, offset: 1 }];
            for total_norm in [0.5, 1.0, 3.0, 1e5, 2f64.powi(60), 2f64.powi(61), 1e300, f64::INFINITY, f64::NAN] {
                let policies = [NonFinite::Skip, NonFinite::Zero, NonFinite::Propagate];
                for &policy in if total_norm.is_finite() { &policies[..1] } else { &policies } {
                    for (max_norm, scale) in [(1.0, 1.0), (0.0, 1.0), (1.0, 1e-3)] {
                        let clip = ClipNorm::new(max_norm).loss_scale(scale).nonfinite(policy);
                        assert_given_parity(clipper, &list, total_norm, clip, &format!("{total_norm}: {clip:?}"));
                    }
                }
            }
        }
    });
}
