//! Norms over several ranks by NCCL, each rank a thread: the same bits as on the CPU, the cost, and what happens when a
//! call fails.

use crate::suite::data::{bits, tensor, Source, Tensor, DTYPES};
use crate::suite::device::OnDevice;
use crate::support::double::{self, Double};
use crate::support::world;
use cudarc::nccl::{Comm, Id};
use gradclip::cuda::{self, Clipper};
use gradclip::{cpu, ClipNorm, Copies, Dtype, Error, NonFinite, NormReport, NormType};

fn with_nccl(body: impl FnOnce(&Double)) {
    let Some(double) = double::lock() else { return };
    double.be_nccl();
    cuda::check_nccl().unwrap();
    body(&double);
    assert_eq!((double.violated_guards(), double.counters().faults), (0, 0));
    assert_eq!((double.live_allocations(), double.live_handles()), (0, 0));
}

/// Runs `rank` for each of `size` ranks, on the two devices of the double in turn.
fn ranks<R: Send>(size: usize, rank: impl Fn(usize, &mut Clipper, &Comm) -> R + Sync) -> Vec<R> {
    let id = Id::new().unwrap();
    world::run(size, |of| {
        let stream = cuda::context(of.rank % 2).unwrap().new_stream().unwrap();
        let comm = Comm::from_rank(stream.clone(), of.rank, size, id).unwrap();
        rank(of.rank, &mut Clipper::new(&stream).unwrap(), &comm)
    })
}

fn decided(report: &NormReport) -> (u64, u64, bool, bool, Option<usize>, Option<usize>) {
    let NormReport { total_norm, clip_coef, found_inf, written, first_nonfinite, first_nonfinite_rank, .. } = *report;
    (total_norm.to_bits(), clip_coef.to_bits(), found_inf, written, first_nonfinite, first_nonfinite_rank)
}

/// Four ranks with uneven lists of all types, one of them empty; replicated gradients; a NaN or an Inf on one rank.
#[test]
fn four_ranks_have_the_bits_of_the_cpu() {
    with_nccl(|double| {
        let mut source = Source::new(51);
        for norm_type in [NormType::L1, NormType::L2, NormType::Inf, NormType::P(0.5)] {
            for round in 0..6 {
                double.set_deferred(round % 2 == 1);
                double.set_reversed_order(round % 2 == 1);
                let mut lists: Vec<Vec<Tensor>> = (0..4)
                    .map(|rank| {
                        let count = [3, 0, 6, 1][rank];
                        (0..count).map(|i| source.tensor(DTYPES[(i + rank) % 4], [40, 9000, 0][i % 3], i % 2)).collect()
                    })
                    .collect();
                if round >= 4 {
                    let bad = [f64::NAN, f64::INFINITY][round % 2];
                    lists[2].push(tensor(Dtype::BF16, &[1.0, bad]));
                }
                let copies: Vec<Vec<u32>> =
                    lists.iter().map(|list| (0..list.len()).map(|i| (i * round % 3) as u32).collect()).collect();
                let policy = [NonFinite::Skip, NonFinite::Zero, NonFinite::Propagate][round % 3];
                let clip = ClipNorm::new(1e-3).norm_type(norm_type).nonfinite(policy);
                let expected = world::run(4, |mut rank| {
                    let mut list = lists[rank.rank].clone();
                    let copies = &copies[rank.rank];
                    (cpu::clip_grad_norm_sharded(&mut list, copies, clip, &mut rank).unwrap(), list)
                });
                let got = ranks(4, |rank, clipper, comm| {
                    let mut list = lists[rank].clone();
                    let mut device = OnDevice::upload(clipper.stream(), &list);
                    let pending = device
                        .with(&list, |grads| clipper.clip_grad_norm_sharded(grads, &copies[rank], clip, comm))
                        .unwrap();
                    let report = pending.wait().unwrap();
                    device.download(&mut list);
                    (report, list)
                });
                for (rank, (expected, got)) in expected.iter().zip(&got).enumerate() {
                    let what = format!("{norm_type:?}, round {round}, rank {rank}");
                    assert_eq!(decided(&got.0), decided(&expected.0), "{what}");
                    assert_eq!(got.0.total_norm.to_bits(), expected.0.total_norm.to_bits(), "{what}");
                    assert_eq!(bits(&got.1), bits(&expected.1), "{what}");
                }
            }
        }
    });
}

/// Launches and one collective: no copy to or from the host, no allocation, no wait.
#[test]
fn repeated_calls_only_launch() {
    with_nccl(|double| {
        for count in [1, 160, 161, 3000] {
            let list: Vec<Tensor> = (0..count).map(|i| tensor(Dtype::F32, &[i as f64, 1.0, -2.0])).collect();
            let shared: Vec<u32> = (0..count as u32).map(|i| i % 3).collect();
            ranks(1, |_, clipper, comm| {
                let mut device = OnDevice::upload(clipper.stream(), &list);
                device.with(&list, |grads| {
                    for (copies, launches) in [(Copies::One, 4), (Copies::Each(&shared), 5)] {
                        for norm_type in [NormType::L2, NormType::P(3.0)] {
                            let clip = ClipNorm::new(1.0).norm_type(norm_type);
                            let mut call = |measured: bool| {
                                double.reset_counters();
                                if measured {
                                    clipper.total_norm_sharded(grads, copies, norm_type, comm).unwrap();
                                } else {
                                    clipper.clip_grad_norm_sharded(grads, copies, clip, comm).unwrap();
                                }
                                (
                                    double.counters(),
                                    double.log().iter().filter(|name| **name == "ncclAllGather").count(),
                                )
                            };
                            let (first, _) = call(false);
                            assert_eq!((first.launches, first.syncs, first.dtoh_calls), (launches, 0, 0), "{count}");
                            for measured in [false, true] {
                                let (counters, gathered) = call(measured);
                                let launches = launches - u64::from(measured);
                                let others = [
                                    counters.htod_calls,
                                    counters.dtoh_calls,
                                    counters.dtod_calls,
                                    counters.memset_calls,
                                    counters.allocs,
                                    counters.frees,
                                    counters.pinned_allocs,
                                    counters.syncs,
                                    counters.module_loads,
                                ];
                                assert_eq!((counters.launches, gathered, others), (launches, 1, [0; 9]), "{count}");
                            }
                        }
                    }
                });
            });
        }
    });
}

/// Gradients are read once to measure; read and written once more to clip. What is exchanged is not their size.
#[test]
fn gradients_are_read_once_or_twice() {
    with_nccl(|double| {
        let list: Vec<Tensor> = DTYPES.iter().map(|&dtype| Source::new(3).tensor(dtype, 20_000, 0)).collect();
        let bytes: u64 = list.iter().map(|tensor| (tensor.values.numel() * tensor.values.dtype().size()) as u64).sum();
        for (max_norm, scaled) in [(1e6, 0), (1e-3, bytes)] {
            ranks(1, |_, clipper, comm| {
                let mut device = OnDevice::upload(clipper.stream(), &list);
                double.reset_counters();
                device.with(&list, |grads| {
                    clipper.clip_grad_norm_sharded(grads, &[2, 1, 1, 1], max_norm, comm).unwrap();
                });
            });
            let runs: Vec<_> =
                double.kernel_runs().into_iter().map(|run| (run.symbol, run.read, run.written)).collect();
            let expected = [
                ("norm_partials_l2", bytes, 0),
                ("weigh_partials", 0, 0),
                ("fold_partials", 0, 0),
                ("clip_coef_of_ranks", 0, 0),
                ("scale", scaled, scaled),
            ];
            assert_eq!(runs, expected.map(|(symbol, read, written)| (symbol.to_owned(), read, written)));
        }
    });
}

/// Each driver call, and the collective, fails once: a typed error, the gradients untouched unless the launch that
/// writes them has been made, and the next call works.
#[test]
fn every_call_fails_once() {
    const INTERNAL_ERROR: i32 = 3;
    with_nccl(|double| {
        let list = [tensor(Dtype::F32, &[3.0, 0.0]), tensor(Dtype::F64, &[4.0])];
        for index in 0.. {
            let delivered = ranks(1, |_, clipper, comm| {
                let mut device = OnDevice::upload(clipper.stream(), &list);
                let before = double.failures_delivered();
                double.fail(index, INTERNAL_ERROR);
                let result = device.with(&list, |grads| clipper.clip_grad_norm_sharded(grads, &[1, 1], 1.0, comm));
                let delivered = double.failures_delivered() > before;
                double.fail(u64::MAX >> 1, 0);
                let _ = clipper.stream().context().check_err(); // what cudarc has recorded of errors in destructors
                let mut after = list.to_vec();
                device.download(&mut after);
                match result {
                    Ok(pending) => assert_eq!(pending.wait().unwrap().total_norm, 5.0),
                    Err(error) => {
                        assert!(delivered, "{error}");
                        let known =
                            matches!(error, Error::Driver { .. } | Error::Exchange { .. } | Error::OutOfMemory { .. });
                        assert!(known, "{error}");
                        // Whole or not at all: the events of cudarc's tracking are recorded after the last launch.
                        let clipped = after[0].values.values()[0] == f64::from(0.6f32);
                        assert!(bits(&after) == bits(&list) || clipped, "call {index}: {error}");
                    }
                }
                device = OnDevice::upload(clipper.stream(), &list);
                let again = device.with(&list, |grads| clipper.clip_grad_norm_sharded(grads, &[1, 1], 1.0, comm));
                assert_eq!(again.unwrap().wait().unwrap().total_norm, 5.0, "after the failure of call {index}");
                delivered
            });
            if !delivered[0] {
                assert!(index > 10);
                break;
            }
        }
    });
}

#[test]
fn failures_of_nccl_are_errors() {
    const SYSTEM_ERROR: i32 = 2;
    with_nccl(|double| {
        let list = [tensor(Dtype::F32, &[3.0, 4.0])];
        // One rank's collective fails: the others' too, and nobody clips.
        let gate = std::sync::Barrier::new(3);
        let errors = ranks(3, |rank, clipper, comm| {
            let mut device = OnDevice::upload(clipper.stream(), &list);
            if rank == 0 {
                double.fail_named("ncclAllGather", 0, SYSTEM_ERROR);
            }
            gate.wait();
            let error = device
                .with(&list, |grads| clipper.clip_grad_norm_sharded(grads, Copies::One, 1.0, comm))
                .map(drop)
                .unwrap_err();
            let mut after = list.to_vec();
            device.download(&mut after);
            assert_eq!(bits(&after), bits(&list));
            error.to_string()
        });
        assert!(errors.iter().any(|error| error.contains("ncclSystemError")), "{errors:?}");
        assert!(errors.iter().all(|error| error.contains("ncclAllGather: nccl")), "{errors:?}");

        // A communicator of another stream.
        ranks(1, |_, clipper, comm| {
            let other = clipper.stream().context().new_stream().unwrap();
            let mut device = OnDevice::upload(&other, &list);
            let mut clipper = Clipper::new(&other).unwrap();
            let error = device
                .with(&list, |grads| clipper.clip_grad_norm_sharded(grads, Copies::One, 1.0, comm))
                .map(drop)
                .unwrap_err();
            assert!(matches!(&error, Error::Exchange { reason } if reason.contains("another stream")), "{error}");
        });

        double.fail_named("ncclGetUniqueId", 0, SYSTEM_ERROR);
        let error = Error::from(Id::new().unwrap_err());
        assert!(error.to_string().contains("ncclSystemError"), "{error}");
    });
}

/// A call over ranks in a captured graph: each replay measures, exchanges and clips.
#[test]
fn a_captured_call_is_replayed() {
    use cudarc::driver::sys::{CUgraphInstantiate_flags_enum, CUstreamCaptureMode};
    let Some(double) = double::lock() else { return };
    double.be_nccl();
    ranks(1, |_, clipper, comm| {
        let stream = clipper.stream().clone();
        // SAFETY: everything here is on one stream.
        unsafe { stream.context().disable_event_tracking() };
        let mut grads = [stream.clone_htod(&[3.0f32, 4.0]).unwrap()];
        let error = {
            stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL).unwrap();
            let error = clipper.clip_grad_norm_sharded(&mut grads, &[2], 1.0, comm).map(drop).unwrap_err();
            stream.end_capture(CUgraphInstantiate_flags_enum::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH).unwrap();
            error
        };
        assert!(matches!(error, Error::CaptureNeedsWarmup { .. }), "{error}");
        clipper.clip_grad_norm_sharded(&mut grads, &[2], 1e9, comm).unwrap();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL).unwrap();
        let pending = clipper.clip_grad_norm_sharded(&mut grads, &[2], 1.0, comm).unwrap();
        let graph = stream
            .end_capture(CUgraphInstantiate_flags_enum::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)
            .unwrap()
            .unwrap();
        assert_eq!(pending.wait().unwrap_err(), Error::ReportNotReady);
        for (values, norm) in [([3.0f32, 4.0], 12.5f64.sqrt()), ([6.0, 8.0], 50f64.sqrt())] {
            stream.memcpy_htod(&values, &mut grads[0]).unwrap();
            graph.launch().unwrap();
            assert_eq!(pending.wait().unwrap().total_norm, norm);
            let clipped = stream.clone_dtoh(&grads[0]).unwrap();
            assert!((f64::from(clipped[0]) - 3.0 / 12.5f64.sqrt()).abs() < 1e-6, "{clipped:?}");
        }
    });
    assert_eq!(double.violated_guards(), 0);
}
