//! The kernels themselves, compiled as C++ into a program of their own, against the CPU path bit for bit. Each gradient
//! is a heap block of exactly its size, so that the address sanitizer sees one byte too many; the thread sanitizer sees
//! a missing barrier. `GRADCLIP_HOST_SANITIZER` = `address,undefined` or `thread` chooses; by default none.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "suite/data.rs"]
mod data;
mod support;

use data::{bits, Source, Tensor, Values, DTYPES};
use gradclip::{
    cpu, AllGather, ClipNorm, ClipValue, Copies, Dtype, Error, NonFinite, NormPartial, NormReport, NormType,
};
use gradclip::{Scope, TensorStats};
use support::runner::{self, Case, Operation, Runner};

fn runner_tensor(tensor: &Tensor) -> runner::Tensor {
    let dtype = match tensor.values {
        Values::F32(_) => runner::Dtype::F32,
        Values::F64(_) => runner::Dtype::F64,
        Values::F16(_) => runner::Dtype::F16,
        Values::BF16(_) => runner::Dtype::BF16,
    };
    let size = dtype.size();
    let data = tensor.values.bits().iter().flat_map(|bits| bits.to_le_bytes()[..size].to_vec()).collect();
    runner::Tensor { dtype, misalign: (tensor.offset * size % 16) as u32, rows: 1, copies: 1, data }
}

fn bits_of(tensor: &runner::Tensor, bytes: &[u8]) -> Vec<u64> {
    let widen = |element: &[u8]| element.iter().rev().fold(0, |bits, &byte| bits << 8 | u64::from(byte));
    bytes.chunks(tensor.dtype.size()).map(widen).collect()
}

/// Lists with every border, alignment and special value, small enough for the sanitizers.
fn lists() -> Vec<Vec<Tensor>> {
    let mut source = Source::new(11);
    let mut lists = vec![vec![], vec![source.tensor(Dtype::F32, 0, 0)]];
    for dtype in DTYPES {
        let tile = 32 * 1024 / dtype.size();
        let pack = tile / 2048;
        let sizes = [1, pack - 1, pack, pack + 1, tile / 8 - 1, tile / 8, tile / 8 + 1, tile - 1, tile + 1, 2 * tile];
        let mut list = Vec::new();
        for (i, numel) in sizes.into_iter().enumerate() {
            list.push(source.tensor(dtype, numel, i % pack));
            if i % 4 == 0 {
                list.push(source.tensor(DTYPES[i % 3], 0, 0));
            }
        }
        lists.push(list);
        // A misaligned tensor with several segments: the realigned loads go up to its very ends.
        lists.push((1..=pack).map(|offset| source.tensor(dtype, 3 * tile / 8 + offset, offset)).collect());
        // Out of range, NaN and Inf.
        for special in [1e-30, 1e30, f64::NAN, f64::INFINITY, 0.0] {
            let mut tensor = source.tensor(dtype, tile / 4 + 5, 1);
            let mut values = tensor.values.values();
            if special == 0.0 {
                values.fill(0.0);
            }
            values[tile / 8 + 1] = special;
            tensor.values = Values::from_f64(dtype, values);
            lists.push(vec![source.tensor(Dtype::F32, 3, 0), tensor]);
        }
    }
    lists
}

struct Expected {
    norm: u64,
    coef: u64,
    multiplier: u64,
    found_inf: bool,
    tensors: Vec<Vec<u64>>,
    clipped: u64,
    nan: u64,
}

fn expected_of(report: &NormReport, tensors: &[Tensor]) -> Expected {
    Expected {
        norm: report.total_norm.to_bits(),
        coef: report.clip_coef.to_bits(),
        multiplier: report.multiplier.to_bits(),
        found_inf: report.found_inf,
        tensors: bits(tensors),
        clipped: 0,
        nan: 0,
    }
}

#[test]
fn kernels_and_cpu_path_agree() {
    let Some(runner) = Runner::from_env() else { return };
    let mut cases = Vec::new();
    let mut expected = Vec::new();
    let mut names = Vec::new();
    for (index, list) in lists().into_iter().enumerate() {
        let tensors: Vec<_> = list.iter().map(runner_tensor).collect();
        let orders = [NormType::L1, NormType::L2, NormType::Inf, NormType::P(1.5), NormType::P(0.01), NormType::Rms];
        for (variant, norm_type) in orders.into_iter().enumerate() {
            let policy = [NonFinite::Skip, NonFinite::Zero, NonFinite::Propagate][(index + variant) % 3];
            let loss_scale = [1.0, 1024.0, 0.3][index % 3];
            let clip = ClipNorm::new(1e-3).norm_type(norm_type).loss_scale(loss_scale).nonfinite(policy);
            let mut clipped = list.clone();
            let report = cpu::clip_grad_norm(&mut clipped, clip).unwrap();
            cases.push(Case {
                tensors: tensors.clone(),
                operation: Operation::ClipNorm {
                    max_norm: 1e-3,
                    eps: 0.0,
                    loss_scale,
                    norm_type,
                    nonfinite: ((index + variant) % 3) as u32,
                },
                table_in_memory: variant == 1,
                with_scales: true,
                blocks: 1 + 2 * (index as u32 % 2),
                reversed: (index + variant) % 2 == 1,
            });
            expected.push(expected_of(&report, &clipped));
            names.push(format!("list {index}, {norm_type:?}, {policy:?}"));
        }
        // By a norm that has nothing to do with the list.
        let (total_norm, max_norm) = ([0.7, 3.0, f64::INFINITY][index % 3], 1.0);
        let loss_scale = [1.0, 0.3][index % 2];
        let mut given = list.clone();
        let clip = ClipNorm::new(max_norm).loss_scale(loss_scale).nonfinite(NonFinite::Propagate);
        let report = cpu::clip_with_norm(&mut given, total_norm, clip).unwrap();
        cases.push(Case {
            tensors: tensors.clone(),
            operation: Operation::ClipWithNorm { total_norm, max_norm, loss_scale, nonfinite: 2 },
            table_in_memory: index % 2 == 1,
            with_scales: false,
            blocks: 2,
            reversed: index % 2 == 0,
        });
        expected.push(expected_of(&report, &given));
        names.push(format!("list {index}, given norm {total_norm}"));
        // A bound that every dtype holds, so that the case needs no rounding of its own.
        let bound = 0.0078125;
        let mut clamped = list.clone();
        let report = cpu::clip_grad_value(&mut clamped, ClipValue::new(bound)).unwrap();
        cases.push(Case {
            tensors,
            operation: Operation::ClipValue { lo: -bound as f32, hi: bound as f32 },
            table_in_memory: index % 2 == 0,
            with_scales: false,
            blocks: 2,
            reversed: index % 2 == 1,
        });
        expected.push(Expected {
            norm: 0f64.to_bits(),
            coef: 1f64.to_bits(),
            multiplier: 1f64.to_bits(),
            found_inf: report.first_nonfinite.is_some(),
            tensors: bits(&clamped),
            clipped: report.clipped,
            nan: report.nan,
        });
        names.push(format!("list {index}, value"));
    }
    let outcomes = runner.run(&cases);
    assert_eq!(outcomes.len(), expected.len());
    for (((outcome, case), expected), what) in outcomes.iter().zip(&cases).zip(&expected).zip(&names) {
        assert_eq!(outcome.report.total_norm.to_bits(), expected.norm, "{what}: norm");
        assert_eq!(outcome.report.clip_coef.to_bits(), expected.coef, "{what}: coefficient");
        assert_eq!(outcome.report.multiplier.to_bits(), expected.multiplier, "{what}: multiplier");
        let nearest = (f64::from_bits(expected.multiplier) as f32).to_bits();
        assert_eq!(outcome.report.multiplier_f32.to_bits(), nearest, "{what}: multiplier in f32");
        assert_eq!(outcome.report.found_inf, f32::from(u8::from(expected.found_inf)), "{what}: found_inf");
        assert_eq!(
            (outcome.report.clipped_elements, outcome.report.nan_elements),
            (expected.clipped, expected.nan),
            "{what}"
        );
        let tensors: Vec<_> =
            case.tensors.iter().zip(&outcome.tensors).map(|(tensor, bytes)| bits_of(tensor, bytes)).collect();
        assert_eq!(tensors, expected.tensors, "{what}: gradients");
    }
}

/// Out of place: every pair of types, outputs at every alignment beside gradients at every alignment, each a heap block of
/// its size.
#[test]
fn kernels_and_cpu_path_agree_out_of_place() {
    let Some(runner) = Runner::from_env() else { return };
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for (index, list) in lists().into_iter().enumerate() {
        for to_f32 in [false, true] {
            let nonfinite = (index + index / 3 + usize::from(to_f32)) % 3;
            let policy = [NonFinite::Skip, NonFinite::Zero, NonFinite::Propagate][nonfinite];
            // Clipped, not clipped, and by less than f32 splits.
            let max_norm = [1e-3, 1e30, 1e-25][index % 3];
            let dtype_of = |tensor: &Tensor| if to_f32 { Dtype::F32 } else { tensor.values.dtype() };
            let stale = |tensor: &Tensor| {
                let bits = vec![u64::from_ne_bytes([runner::STALE; 8]); tensor.values.numel()];
                Values::from_bits(dtype_of(tensor), bits)
            };
            let mut outputs: Vec<Values> = list.iter().map(stale).collect();
            let loss_scale = [1.0, 1024.0][index / 2 % 2];
            let clip = ClipNorm::new(max_norm).nonfinite(policy).loss_scale(loss_scale);
            cpu::clip_grad_norm_into(&list, &mut outputs, clip).unwrap();
            cases.push(Case {
                tensors: list.iter().map(runner_tensor).collect(),
                operation: Operation::ClipNormInto {
                    max_norm,
                    loss_scale,
                    nonfinite: nonfinite as u32,
                    to_f32,
                    misalign: index,
                },
                table_in_memory: to_f32,
                with_scales: true,
                blocks: 1 + index as u32 % 3,
                reversed: index % 2 == 1,
            });
            expected.push(outputs.iter().map(Values::bits).collect::<Vec<_>>());
        }
    }
    for (index, (outcome, case)) in runner.run(&cases).iter().zip(&cases).enumerate() {
        let output_bits = |(i, bytes): (usize, &Vec<u8>)| {
            let dtype = case.output(i).unwrap().0;
            bits_of(&runner::Tensor { dtype, misalign: 0, rows: 0, copies: 0, data: vec![] }, bytes)
        };
        let outputs: Vec<_> = outcome.outputs.iter().enumerate().map(output_bits).collect();
        assert_eq!(outputs, expected[index], "case {index}: {:?}", case.operation);
        let before = case.tensors.iter().map(|tensor| &tensor.data);
        assert!(outcome.tensors.iter().eq(before), "case {index}: a gradient was written");
    }
}

/// Rows of odd lengths that share packs with their neighbours, rows of more than a tile, more rows than a warp folds,
/// and no rows at all, with NaN and Inf among them.
fn lists_of_rows() -> Vec<Vec<(Tensor, usize)>> {
    let mut source = Source::new(12);
    let mut lists = vec![vec![], vec![(source.tensor(Dtype::F32, 0, 0), 0), (source.tensor(Dtype::F16, 0, 0), 3)]];
    for dtype in DTYPES {
        let tile = 32 * 1024 / dtype.size();
        let shapes = [(7, 3), (0, 0), (1, 5), (3, tile / 8 + 3), (2, tile + 1), (4, 0), (5, tile / 2048 + 1)];
        let mut list: Vec<_> = shapes
            .into_iter()
            .enumerate()
            .map(|(i, (rows, numel))| (source.tensor(dtype, rows * numel, i % 4), rows))
            .collect();
        // Behind the first row, segment and lane; a row of nothing but zeros, and one out of range.
        let tiny = if dtype == Dtype::F64 { 1e-200 } else { 1e-30 };
        for (one, special) in [(0, f64::NAN), (3, f64::INFINITY), (4, f64::NAN), (2, 0.0), (6, tiny)] {
            let mut values = list[one].0.values.values();
            let place = values.len() * 7 / 10;
            values[place] = special;
            if special.is_finite() {
                values.fill(special);
                values[0] = special / 2.0;
            }
            list[one].0.values = Values::from_f64(dtype, values);
        }
        lists.push(list);
        lists.push(vec![(source.tensor(dtype, 900, 1), 300), (source.tensor(DTYPES[1], 40, 0), 40)]);
        lists.push(vec![(source.tensor(dtype, 400, 0), 200)]);
    }
    lists
}

#[test]
fn scoped_kernels_and_cpu_path_agree() {
    let Some(runner) = Runner::from_env() else { return };
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for (index, list) in lists_of_rows().into_iter().enumerate() {
        let (list, rows): (Vec<Tensor>, Vec<usize>) = list.into_iter().unzip();
        let mut tensors: Vec<_> = list.iter().map(runner_tensor).collect();
        tensors.iter_mut().zip(&rows).for_each(|(tensor, &rows)| tensor.rows = rows as u64);
        for variant in 0..10 {
            let orders = [NormType::L1, NormType::L2, NormType::Inf, NormType::P(2.5), NormType::Rms];
            let (one_group, norm_type) = (variant % 2 == 1, orders[variant / 2]);
            let stats = (index + variant / 2) % 2 == 0;
            let policy = [NonFinite::Skip, NonFinite::Zero, NonFinite::Propagate][(index + variant) % 3];
            let clip = ClipNorm::new(2e-2).norm_type(norm_type).nonfinite(policy);
            let scope = if one_group { Scope::global() } else { Scope::rows(&rows) };
            let scope = if stats { scope.telemetry() } else { scope };
            let mut clipped = list.clone();
            let report = cpu::clip_grad_norm_by(&mut clipped, &scope, clip).unwrap();
            cases.push(Case {
                tensors: tensors.clone(),
                operation: Operation::ScopedNorm {
                    max_norm: 2e-2,
                    norm_type,
                    nonfinite: ((index + variant) % 3) as u32,
                    one_group,
                    stats,
                },
                table_in_memory: true,
                with_scales: true,
                blocks: 1 + variant as u32,
                reversed: (index + variant / 3) % 2 == 1,
            });
            expected.push((report, bits(&clipped), format!("list {index}, {clip:?}, one group: {one_group}")));
        }
    }
    assert!(expected.iter().any(|(report, ..)| (1..report.groups.len()).contains(&report.num_written())));
    for ((outcome, case), (report, tensors, what)) in runner.run(&cases).iter().zip(&cases).zip(&expected) {
        let groups: Vec<_> =
            outcome.groups.iter().map(|group| (group.total_norm.to_bits(), group.clip_coef.to_bits())).collect();
        let on_cpu: Vec<_> =
            report.groups.iter().map(|group| (group.total_norm.to_bits(), group.clip_coef.to_bits())).collect();
        assert_eq!(groups, on_cpu, "{what}: norms");
        let stats: Vec<TensorStats> = outcome.stats.iter().map(|&slot| slot.into()).collect();
        assert_eq!(format!("{stats:?}"), format!("{:?}", report.tensors), "{what}: telemetry");
        let got: Vec<_> =
            case.tensors.iter().zip(&outcome.tensors).map(|(tensor, bytes)| bits_of(tensor, bytes)).collect();
        assert_eq!(&got, tensors, "{what}: gradients");
    }
}

/// More tiles than twice the threads that fold them, so that a thread has several; in three places a NaN, two of them
/// the same thread's.
fn many_tiles() -> Vec<Tensor> {
    let mut source = Source::new(14);
    let mut list: Vec<_> = (0..2100).map(|i| source.tensor(DTYPES[i % 4], 1 + i % 3, i % 2)).collect();
    for bad in [1500, 1024 + 700, 700] {
        list[bad].values = Values::from_f64(list[bad].values.dtype(), [f64::NAN]);
    }
    list
}

/// Value clipping with counts of each row, or of all.
#[test]
fn scoped_clamp_and_cpu_path_agree() {
    let Some(runner) = Runner::from_env() else { return };
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    let mut lists = lists_of_rows();
    lists.push(many_tiles().into_iter().map(|tensor| (tensor, 1)).collect());
    // Two rows of so many tiles that a block folds them, one after the other; the first has NaN in two of its tiles.
    let mut values = vec![0.5; 2 * 257 * 4096];
    (values[200 * 4096], values[256 * 4096], values[300 * 4096]) = (f64::NAN, f64::NAN, 0.0);
    lists.push(vec![(Tensor { values: Values::F64(values), offset: 0 }, 2)]);
    for (index, list) in lists.into_iter().enumerate() {
        let (list, rows): (Vec<Tensor>, Vec<usize>) = list.into_iter().unzip();
        let mut tensors: Vec<_> = list.iter().map(runner_tensor).collect();
        tensors.iter_mut().zip(&rows).for_each(|(tensor, &rows)| tensor.rows = rows as u64);
        for one_group in [false, true] {
            let (lo, hi) = (-0.0078125, 0.015625);
            let scope = if one_group { Scope::global() } else { Scope::rows(&rows) };
            let mut clamped = list.clone();
            let clip = ClipValue::between(lo.into(), hi.into());
            let report = cpu::clip_grad_value_by(&mut clamped, &scope, clip).unwrap();
            cases.push(Case {
                tensors: tensors.clone(),
                operation: Operation::ScopedValue { lo, hi, one_group },
                table_in_memory: true,
                with_scales: false,
                blocks: 1 + index as u32 % 3,
                reversed: index % 2 == 1,
            });
            expected.push((report, bits(&clamped), format!("list {index}, one group: {one_group}")));
        }
    }
    assert!(expected.iter().any(|(report, ..)| report.groups.iter().any(|group| group.nan > 0)));
    for ((outcome, case), (report, tensors, what)) in runner.run(&cases).iter().zip(&cases).zip(&expected) {
        let groups = outcome.groups.iter().map(|group| (group.clipped_elements, group.nan_elements, group.found_inf));
        let on_cpu = report.groups.iter().map(|group| {
            let found_inf = f32::from(u8::from(group.first_nonfinite.is_some()));
            (group.clipped, group.nan, found_inf)
        });
        assert_eq!(groups.collect::<Vec<_>>(), on_cpu.collect::<Vec<_>>(), "{what}: counts");
        let got: Vec<_> =
            case.tensors.iter().zip(&outcome.tensors).map(|(tensor, bytes)| bits_of(tensor, bytes)).collect();
        assert_eq!(&got, tensors, "{what}: gradients");
    }
}

/// The tensor that has the tile.
fn tensor_of(case: &Case, tile: u64) -> Option<usize> {
    let tiles = case.tensors.iter().map(|tensor| tensor.data.len().div_ceil(32 * 1024) as u64);
    let ends = tiles.scan(0, |end, tiles| {
        *end += tiles;
        Some(*end)
    });
    ends.into_iter().position(|end| tile < end)
}

/// The first of several ranks, whose partials are there already.
struct FirstOf<'a>(&'a [[u8; NormPartial::BYTES]]);

impl AllGather for FirstOf<'_> {
    type Error = std::convert::Infallible;
    fn world_size(&self) -> usize {
        1 + self.0.len()
    }
    fn all_gather(&mut self, mine: &[u8], all: &mut [u8]) -> Result<(), Self::Error> {
        all.copy_from_slice(&[mine, self.0.as_flattened()].concat());
        Ok(())
    }
}

/// Norms over several ranks: none besides this one, more than the block has threads, ranks with a NaN, of another order,
/// refused, and with bytes that are no partial.
#[test]
fn kernels_of_shards_and_cpu_path_agree() {
    let Some(runner) = Runner::from_env() else { return };
    let mut source = Source::new(13);
    let orders = [NormType::L1, NormType::L2, NormType::Inf, NormType::P(1.5), NormType::P(0.01)];
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    let one_value = Tensor { values: Values::F32(vec![3.0]), offset: 0 };
    let special = [many_tiles(), vec![one_value.clone()], vec![one_value]];
    let num_special = special.len();
    for (index, list) in special.into_iter().chain(lists()).enumerate() {
        for (variant, norm_type) in orders.into_iter().enumerate() {
            let partial_of = |list: &[Tensor], norm_type| cpu::norm_partial(list, Copies::One, norm_type).unwrap();
            let alone = (1..num_special).contains(&index);
            let mut others: Vec<_> = (0..if alone { 0 } else { [0, 1, 5, 2100][(index + variant) % 4] })
                .map(|_| partial_of(&[source.tensor(Dtype::F64, 3, 0)], norm_type).to_bytes())
                .collect();
            let of_nan = partial_of(&[Tensor { values: Values::F32(vec![f32::NAN]), offset: 0 }], norm_type).to_bytes();
            for from_end in [2, 2 + 1024] {
                match others.len().checked_sub(from_end) {
                    Some(place) if (index + variant) / 4 % 2 == 0 => others[place] = of_nan, // both of the same thread
                    _ => {}
                }
            }
            if let Some(last) = others.last_mut() {
                match (index + variant) / 4 % 6 {
                    0 => *last = NormPartial::refused().to_bytes(),
                    1 => *last = partial_of(&list, NormType::P(7.0)).to_bytes(),
                    2 => last.fill(0),
                    3 => *last = of_nan,
                    _ => {}
                }
            }
            // Of a list that is nobody's, a third of one element, and all the others.
            let copies: Vec<u32> = match index {
                1 => vec![0],
                2 => vec![3],
                _ => (0..list.len()).map(|i| ((i + index) % 4) as u32).collect(),
            };
            let policy = [NonFinite::Skip, NonFinite::Zero, NonFinite::Propagate][(index + variant) % 3];
            let clip = ClipNorm::new(1e-3).norm_type(norm_type).nonfinite(policy);
            let mut clipped = list.clone();
            let report = cpu::clip_grad_norm_sharded(&mut clipped, &copies, clip, &mut FirstOf(&others));
            let mut tensors: Vec<_> = list.iter().map(runner_tensor).collect();
            tensors.iter_mut().zip(&copies).for_each(|(tensor, &copies)| tensor.copies = copies);
            cases.push(Case {
                tensors,
                operation: Operation::Sharded {
                    max_norm: 1e-3,
                    norm_type,
                    nonfinite: ((index + variant) % 3) as u32,
                    others,
                },
                table_in_memory: index % 2 == 0,
                with_scales: true,
                blocks: 1 + index as u32 % 3,
                reversed: (index + variant) % 2 == 1,
            });
            let mine = cpu::norm_partial(&list, &copies, norm_type).unwrap().to_bytes();
            expected.push((report, mine, bits(&clipped), format!("list {index}, {norm_type:?}, {policy:?}")));
        }
    }
    let failed = |report: &Result<NormReport, Error>| matches!(report, Err(Error::RankFailed { .. }));
    assert!(expected.iter().any(|(report, ..)| failed(report)));
    for ((outcome, case), (report, partial, tensors, what)) in runner.run(&cases).iter().zip(&cases).zip(&expected) {
        assert_eq!(outcome.partial.as_ref(), Some(partial), "{what}: the partial");
        let got = outcome.report;
        match report {
            Ok(report) => {
                let norms = [got.total_norm, got.clip_coef, got.multiplier].map(f64::to_bits);
                let on_cpu = [report.total_norm, report.clip_coef, report.multiplier].map(f64::to_bits);
                assert_eq!(norms, on_cpu, "{what}: norm");
                let rank = report.first_nonfinite_rank.map_or(u32::MAX, |rank| rank as u32);
                assert_eq!(got.rank, rank, "{what}: rank");
                assert_eq!(tensor_of(case, got.first_bad_tile), report.first_nonfinite, "{what}: first bad tensor");
            }
            Err(error) => {
                let Error::RankFailed { rank, reason } = error else { panic!("{what}: {error}") };
                assert_eq!((got.rank & 0x3fff_ffff) as usize, *rank, "{what}: rank");
                let flags = if reason.contains("order") { 1 } else { 2 };
                assert_eq!((got.found_inf, got.rank >> 30), (1.0, flags), "{what}");
            }
        }
        let got: Vec<_> =
            case.tensors.iter().zip(&outcome.tensors).map(|(tensor, bytes)| bits_of(tensor, bytes)).collect();
        assert_eq!(&got, tensors, "{what}: gradients");
    }
}
