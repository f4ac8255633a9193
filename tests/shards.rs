//! Norms over several ranks on the CPU: against exact arithmetic over the gradients of all ranks in one list, each
//! parameter once, and what every rank has to agree on.
#![allow(clippy::unwrap_used)]

mod support;

use gradclip::{cpu, AllGather, ClipNorm, Copies, Dtype, Error, NonFinite, NormPartial, NormReport, NormType};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use support::exact;
use support::tensor::{bits_of, Tensor};
use support::tolerance::{close, norm_over_ranks};
use support::world;

const NORM_TYPES: [NormType; 6] =
    [NormType::L1, NormType::L2, NormType::Inf, NormType::P(0.5), NormType::P(3.0), NormType::P(10.7)];
const DTYPES: [Dtype; 4] = [Dtype::F32, Dtype::F64, Dtype::F16, Dtype::BF16];

fn random(rng: &mut SmallRng, dtype: Dtype, numel: usize) -> Tensor {
    Tensor::from_f64(dtype, (0..numel).map(|_| rng.random_range(-1.0..1.0)).collect::<Vec<_>>())
}

fn partial(grads: &[Tensor], copies: Copies<'_>, norm_type: NormType) -> NormPartial {
    cpu::norm_partial(grads, copies, norm_type).unwrap()
}

fn merged(partials: &[NormPartial]) -> f64 {
    NormPartial::merge(partials).unwrap().total_norm().unwrap()
}

/// What must be the same on all ranks.
fn decided(report: &NormReport) -> (u64, u64, u64, bool, Option<usize>) {
    let NormReport { total_norm, clip_coef, multiplier, found_inf, first_nonfinite_rank, .. } = *report;
    (total_norm.to_bits(), clip_coef.to_bits(), multiplier.to_bits(), found_inf, first_nonfinite_rank)
}

/// A model of shards (on one rank each), of parameters that some ranks share, each counted by its shares or by its
/// owner, and ranks with nothing. The truth is that of each parameter once: Megatron filters duplicates and adds up the
/// p-th powers.
#[test]
fn each_parameter_counts_once() {
    let mut rng = SmallRng::seed_from_u64(1);
    for ranks in [1, 2, 3, 4, 7, 33] {
        for norm_type in NORM_TYPES {
            let mut all = Vec::new();
            let (mut lists, mut copies) = (vec![Vec::new(); ranks], vec![Vec::new(); ranks]);
            for parameter in 0..3 * ranks {
                let (dtype, numel) = (DTYPES[parameter % 4], [0, 1, 40, 9000][rng.random_range(0..4)]);
                let grad = random(&mut rng, dtype, numel);
                let holders = 1 + rng.random_range(0..ranks);
                let by_owner = parameter % 2 == 0;
                let first = rng.random_range(0..ranks);
                for (i, rank) in (first..first + holders).map(|rank| rank % ranks).enumerate() {
                    if ranks > 2 && rank == 1 {
                        // This rank has nothing: the others count what it would have.
                        continue;
                    }
                    let there = (first..first + holders).filter(|rank| ranks <= 2 || rank % ranks != 1).count();
                    let owner = (first..first + holders).position(|rank| ranks <= 2 || rank % ranks != 1).unwrap();
                    copies[rank].push(if by_owner { u32::from(i == owner) } else { there as u32 });
                    lists[rank].push(grad.clone());
                }
                if ranks <= 2 || (first..first + holders).any(|rank| rank % ranks != 1) {
                    all.push(grad);
                }
            }
            let truth = exact::total_norm(&all, norm_type);
            let partials: Vec<NormPartial> =
                lists.iter().zip(&copies).map(|(list, copies)| partial(list, copies.into(), norm_type)).collect();
            let got = merged(&partials);
            let allowed = norm_over_ranks(&all, norm_type, ranks);
            assert!(close(got, truth, allowed), "{ranks} ranks, {norm_type:?}: {got}, exactly {truth}");

            let max_norm = 0.37 * truth;
            let results = world::run(ranks, |mut rank| {
                let mut list = lists[rank.rank].clone();
                let clip = ClipNorm::new(max_norm).norm_type(norm_type);
                let report = cpu::clip_grad_norm_sharded(&mut list, &copies[rank.rank], clip, &mut rank).unwrap();
                (report, list)
            });
            for ((report, list), before) in results.iter().zip(&lists) {
                assert_eq!(report.total_norm.to_bits(), got.to_bits());
                assert_eq!(decided(report), decided(&results[0].0));
                // The same as measuring, exchanging and clipping in three calls.
                let mut alone = before.clone();
                cpu::clip_with_norm(&mut alone, got, max_norm).unwrap();
                assert_eq!(bits_of(&alone), bits_of(list), "{ranks} ranks, {norm_type:?}");
            }
        }
    }
}

/// Squares that overflow and that vanish, of all ranges of f64 and of the other types, on different ranks.
#[test]
fn ranks_of_different_magnitude() {
    let values = [
        (Dtype::F64, 1e200),
        (Dtype::F64, 3e-250),
        (Dtype::F32, 1e20),
        (Dtype::F16, 60000.0),
        (Dtype::F32, 1e-30),
        (Dtype::F64, f64::MAX / 8.0),
    ];
    for norm_type in NORM_TYPES {
        for ends in [1..2, 0..2, 1..5, 2..5, 3..5, 0..6] {
            let lists: Vec<[Tensor; 1]> =
                values[ends].iter().map(|&(dtype, x)| [Tensor::from_f64(dtype, [x, -x / 2.0])]).collect();
            let all: Vec<Tensor> = lists.concat();
            let truth = exact::total_norm(&all, norm_type);
            let partials: Vec<_> = lists.iter().map(|list| partial(list, Copies::One, norm_type)).collect();
            let allowed = norm_over_ranks(&all, norm_type, lists.len());
            assert!(close(merged(&partials), truth, allowed), "{norm_type:?}: {}, {truth}", merged(&partials));
            // Through their bytes; and merged by halves, as nodes and then ranks.
            let bytes: Vec<_> = partials.iter().map(NormPartial::to_bytes).collect();
            let read: Vec<_> = bytes.iter().map(|bytes| NormPartial::from_bytes(bytes).unwrap()).collect();
            assert_eq!((&read, merged(&read).to_bits()), (&partials, merged(&partials).to_bits()));
            let (low, high) = partials.split_at(partials.len() / 2);
            let halves: Vec<_> = [low, high]
                .iter()
                .filter(|half| !half.is_empty())
                .map(|half| NormPartial::merge(half).unwrap())
                .collect();
            assert!(close(merged(&halves), truth, 2.0 * allowed), "{norm_type:?}, by halves");
        }
    }
}

/// One rank is one process: the bits of the plain call. Ranks that have nothing change none.
#[test]
fn one_rank_is_the_plain_call() {
    let mut rng = SmallRng::seed_from_u64(2);
    for norm_type in NORM_TYPES {
        let list: Vec<Tensor> = (0..9).map(|i| random(&mut rng, DTYPES[i % 4], [3, 0, 20_000][i % 3])).collect();
        let expected = cpu::total_norm(&list, norm_type).unwrap().total_norm;
        let mine = partial(&list, Copies::One, norm_type);
        assert_eq!(mine, partial(&list, (&vec![1; 9]).into(), norm_type));
        let none = NormPartial::empty(norm_type).unwrap();
        assert_eq!(none, partial(&[], Copies::One, norm_type));
        assert_eq!(none, partial(&list, (&vec![0; 9]).into(), norm_type), "counted elsewhere");
        for others in 0..5 {
            let mut partials = vec![none; others];
            partials.push(mine);
            partials.extend([none; 2]);
            assert_eq!(merged(&partials).to_bits(), expected.to_bits());
        }
        assert_eq!(merged(&[none; 3]).to_bits(), 0);
    }
}

#[test]
fn what_one_rank_sees_all_decide_by() {
    for bad in [f64::NAN, f64::INFINITY] {
        for (policy, of_bad) in [(NonFinite::Skip, 3.0), (NonFinite::Zero, 0.0), (NonFinite::Propagate, f64::NAN)] {
            for counted in [1, 2, 0] {
                // Rank 2 has it, in its second gradient; also where another rank counts that one.
                let results = world::run(4, |mut rank| {
                    let mut list = vec![Tensor::from_f64(Dtype::F32, [3.0]), Tensor::from_f64(Dtype::BF16, [4.0, 1.0])];
                    if rank.rank == 2 {
                        list[1] = Tensor::from_f64(Dtype::BF16, [4.0, bad]);
                    }
                    if rank.rank == 3 {
                        list.clear();
                    }
                    let copies = vec![counted; list.len()];
                    let clip = ClipNorm::new(1.0).nonfinite(policy);
                    (cpu::clip_grad_norm_sharded(&mut list, &copies, clip, &mut rank).unwrap(), list)
                });
                for (rank, (report, list)) in results.iter().enumerate() {
                    assert_eq!(decided(report), decided(&results[0].0), "{policy:?}");
                    assert_eq!((report.found_inf, report.first_nonfinite_rank), (true, Some(2)));
                    assert_eq!(report.first_nonfinite, (rank == 2).then_some(1));
                    assert_eq!(report.written, policy != NonFinite::Skip);
                    if let Some(Tensor::F32(values)) = list.first() {
                        let expected = match policy {
                            NonFinite::Propagate if bad.is_infinite() => 0.0,
                            _ => of_bad,
                        };
                        assert_eq!(values[0].to_bits(), (expected as f32).to_bits(), "{policy:?}, {bad}");
                    }
                }
            }
        }
    }
    // The error policy: an error on every rank, and nothing touched.
    let results = world::run(3, |mut rank| {
        let mut list = [[3.0f32, if rank.rank == 1 { f32::INFINITY } else { 4.0 }]];
        let clip = ClipNorm::new(1.0).nonfinite(NonFinite::Error);
        let error = cpu::clip_grad_norm_sharded(&mut list, Copies::One, clip, &mut rank).unwrap_err();
        (error, list[0][0])
    });
    for (rank, (error, first)) in results.iter().enumerate() {
        assert_eq!(*error, Error::NonFinite { total_norm: f64::INFINITY, tensor: (rank == 1).then_some(0) });
        assert_eq!(*first, 3.0);
    }
}

/// A rank whose call is refused takes part in the exchange, so that nobody waits for ever, and nobody clips.
#[test]
fn a_rank_that_is_refused_is_an_error_on_all() {
    type Call = fn(&mut [[f32; 2]; 2], &mut world::Rank<'_>) -> gradclip::Result<NormReport>;
    type Expected = fn(&Error) -> bool;
    let calls: [(Call, Expected); 8] = [
        (
            |grads, rank| cpu::clip_grad_norm_sharded(grads, Copies::One, -1.0, rank),
            |error| matches!(error, Error::InvalidThreshold { name: "max_norm", .. }),
        ),
        (
            |grads, rank| cpu::clip_coef_sharded(grads, Copies::One, f64::NAN, rank),
            |error| matches!(error, Error::InvalidThreshold { name: "max_norm", .. }),
        ),
        (
            |grads, rank| cpu::clip_grad_norm_sharded(grads, &[1], 1.0, rank),
            |error| *error == Error::ScopeLength { what: "copies", expected: 2, got: 1 },
        ),
        (
            |grads, rank| {
                // SAFETY: never read at: the call refuses it.
                let clip = unsafe { ClipNorm::max_norm_at(16) };
                cpu::clip_grad_norm_sharded(grads, Copies::One, clip, rank)
            },
            |error| matches!(error, Error::ThresholdAddress { .. }),
        ),
        (
            |grads, rank| {
                let clip = ClipNorm::new(1.0).norm_type(NormType::P(-2.0));
                cpu::clip_grad_norm_sharded(grads, Copies::One, clip, rank)
            },
            |error| *error == Error::InvalidNormType { got: -2.0 },
        ),
        (
            |grads, rank| cpu::total_norm_sharded(&[&grads[0][..], &grads[0][1..]], Copies::One, NormType::L2, rank),
            |error| *error == Error::Overlap { first: 0, second: 1 },
        ),
        (
            |grads, rank| cpu::total_norm_sharded(grads, Copies::One, NormType::Rms, rank),
            |error| *error == Error::RmsOverRanks,
        ),
        (
            |grads, rank| cpu::total_norm_sharded(grads, Copies::One, NormType::P(f64::NAN), rank),
            |error| matches!(error, Error::InvalidNormType { .. }),
        ),
    ];
    for (number, (call, expected)) in calls.iter().enumerate() {
        let results = world::run(4, |mut rank| {
            let mut grads = [[3.0f32, 4.0], [0.0, 12.0]];
            let result = if rank.rank == 2 {
                call(&mut grads, &mut rank)
            } else {
                cpu::clip_grad_norm_sharded(&mut grads, Copies::One, 1.0, &mut rank)
            };
            assert_eq!(grads, [[3.0f32, 4.0], [0.0, 12.0]]);
            // Everybody has left the exchange: the next one works.
            let report = cpu::clip_grad_norm_sharded(&mut grads, Copies::One, 13.0, &mut rank).unwrap();
            assert_eq!(report.total_norm, 26.0);
            result.unwrap_err()
        });
        for (rank, error) in results.iter().enumerate() {
            if rank == 2 {
                assert!(expected(error), "call {number}: {error}");
            } else {
                assert!(matches!(error, Error::RankFailed { rank: 2, .. }), "call {number}, rank {rank}: {error}");
            }
        }
    }
    // Another order on one rank: all say which.
    let results = world::run(3, |mut rank| {
        let norm_type = if rank.rank == 1 { NormType::L1 } else { NormType::L2 };
        cpu::total_norm_sharded(&[[1.0f32]], Copies::One, norm_type, &mut rank).unwrap_err()
    });
    for error in results {
        assert!(matches!(error, Error::RankFailed { rank: 1, .. }) && error.to_string().contains("order"), "{error}");
    }
}

/// Engines that fail, that deliver nothing, and that have no ranks.
#[test]
fn engines_that_fail() {
    struct Engine {
        ranks: usize,
        fails: bool,
    }
    impl AllGather for Engine {
        type Error = String;
        fn world_size(&self) -> usize {
            self.ranks
        }
        fn all_gather(&mut self, _: &[u8], _: &mut [u8]) -> Result<(), String> {
            if self.fails {
                Err("no route to rank 3".into())
            } else {
                Ok(())
            }
        }
    }
    let mut grads = [[3.0f32, 4.0]];
    let mut call = |ranks, fails| {
        let error = cpu::clip_grad_norm_sharded(&mut grads, Copies::One, 1.0, &mut Engine { ranks, fails });
        assert_eq!(grads, [[3.0, 4.0]]);
        error.unwrap_err()
    };
    assert_eq!(call(2, true), Error::Exchange { reason: "no route to rank 3".into() });
    // Memory that nobody wrote is no partial.
    assert!(matches!(call(2, false), Error::RankFailed { rank: 0, .. }));
    for ranks in [0, usize::MAX] {
        assert!(matches!(call(ranks, false), Error::Exchange { .. }));
    }
    // The rank's own error comes first.
    let error = cpu::total_norm_sharded(&[[1f32]], &[1, 1], NormType::L2, &mut Engine { ranks: 1, fails: true });
    assert!(matches!(error, Err(Error::ScopeLength { .. })));
}

#[test]
fn the_bytes_are_as_documented() {
    let bytes = partial(&[Tensor::from_f64(Dtype::F32, [3.0, -4.0])], Copies::One, NormType::L2).to_bytes();
    let word = |x: f64| x.to_le_bytes();
    assert_eq!(bytes[..], [word(25.0), word(1.0), word(2.0), *b"gclipM_1"].concat());
    let halved = partial(&[Tensor::from_f64(Dtype::F16, [3.0])], (&[2]).into(), NormType::L2).to_bytes();
    assert_eq!(halved[..8], word(4.5));
    let high = partial(&[Tensor::from_f64(Dtype::F64, [2f64.powi(900)])], Copies::One, NormType::L2).to_bytes();
    assert_eq!(high[..16], [word(2f64.powi(600)), word(2f64.powi(600))].concat());
    let any = partial(&[Tensor::from_f64(Dtype::F64, [0.25, 0.5])], Copies::One, NormType::P(2.5)).to_bytes();
    assert_eq!(any[8..24], [word(0.5), word(2.5)].concat());
    let largest = partial(&[Tensor::from_f64(Dtype::BF16, [1.0, -7.0])], Copies::One, NormType::Inf).to_bytes();
    assert_eq!(largest[..24], [word(7.0), word(1.0), word(f64::INFINITY)].concat());
    assert_eq!(NormPartial::refused().to_bytes()[24..], *b"gclipR_1");
    let nan = partial(&[Tensor::from_f64(Dtype::F64, [f64::NAN, 1.0])], Copies::One, NormType::L1).to_bytes();
    assert_eq!(nan[..8], 0x7ff8_0000_0000_0000u64.to_le_bytes());

    let with = |sum: f64, scale: f64, order: f64| [word(sum), word(scale), word(order), *b"gclipM_1"].concat();
    for bytes in
        [with(0.0, 1.0, 2.0), with(f64::NAN, 1.0, 1.0), with(3.0, 5e-324, 0.5), with(2.0, 2f64.powi(-600), 1.0)]
    {
        assert_eq!(NormPartial::from_bytes(&bytes).unwrap().to_bytes()[..], bytes);
    }
    let none = [
        with(-1.0, 1.0, 2.0),
        with(-0.0, 1.0, 2.0),
        with(1.0, 2.0, 2.0),
        with(1.0, 0.0, 3.0),
        with(1.0, f64::INFINITY, 3.0),
        with(1.0, f64::NAN, 3.0),
        with(1.0, -1.0, 3.0),
        with(1.0, 2.0, f64::INFINITY),
        with(1.0, 1.0, 0.0),
        with(1.0, 1.0, f64::NAN),
        vec![0; 32],
        vec![0xff; 32],
        [&bytes[..24], b"gclipM_2"].concat(),
        bytes[..31].to_vec(),
        [&bytes[..], &[0]].concat(),
        vec![],
    ];
    for bytes in none {
        assert!(matches!(NormPartial::from_bytes(&bytes), Err(Error::InvalidPartial { .. })), "{bytes:?}");
    }
    assert!(matches!(NormPartial::merge(&[]), Err(Error::InvalidPartial { .. })));
    assert!(matches!(NormPartial::refused().total_norm(), Err(Error::InvalidPartial { .. })));
    assert!(matches!(NormPartial::empty(NormType::P(0.0)), Err(Error::InvalidNormType { .. })));
    let refused = [NormPartial::empty(NormType::L2).unwrap(), NormPartial::refused()];
    assert!(matches!(NormPartial::merge(&refused), Err(Error::RankFailed { rank: 1, .. })));
}

/// Copies that do not add up to whole parameters: still a number, whatever the order.
#[test]
fn shares_alone_have_a_norm() {
    for p in [5e-324, 1e-300, 1e-3, 0.5, 3.0, 1e300] {
        let share = partial(&[Tensor::from_f64(Dtype::F32, [2.0])], (&[4]).into(), NormType::P(p));
        let norm = share.total_norm().unwrap();
        let truth = 2.0 * 0.25f64.powf(1.0 / p);
        assert!(close(norm, truth, 1e-12) || (norm == 0.0 && truth < 1e-270), "p = {p}: {norm}, {truth}");
        assert!(close(merged(&[share; 4]), 2.0, 0.0), "p = {p}");
    }
}
