//! Norms over several ranks: every rank on the device gets the bits of the CPU path, and so of every other rank.

use super::data::{bits, tensor, Source, Tensor, DTYPES};
use super::device::OnDevice;
use crate::backend::with_clipper;
use crate::support::world::{self, Rank};
use gradclip::cuda::{Clipper, DeviceAllGather, DeviceGradMut, RawGrad};
use gradclip::{cpu, ClipNorm, Copies, Dtype, Error, NonFinite, NormPartial, NormReport, NormType, Result};
use std::cell::RefCell;

const NORM_TYPES: [NormType; 5] = [NormType::L1, NormType::L2, NormType::Inf, NormType::P(0.5), NormType::P(3.0)];

/// Ranks that remember what they were given to send.
struct Recording<'w> {
    rank: Rank<'w>,
    sent: RefCell<Vec<u8>>,
}

// SAFETY: as that of the rank, which it calls.
unsafe impl DeviceAllGather for Recording<'_> {
    type Error = &'static str;

    fn world_size(&self) -> usize {
        self.rank.size()
    }

    unsafe fn all_gather(
        &self,
        stream: &std::sync::Arc<cudarc::driver::CudaStream>,
        mine: u64,
        all: u64,
        bytes: usize,
    ) -> std::result::Result<(), &'static str> {
        let mut sent = vec![0; bytes];
        // SAFETY: the address is that of so many bytes.
        unsafe { cudarc::driver::result::memcpy_dtoh_async(&mut sent, mine, stream.cu_stream()) }.unwrap();
        stream.synchronize().unwrap();
        *self.sent.borrow_mut() = sent;
        // SAFETY: passed on.
        unsafe { self.rank.all_gather(stream, mine, all, bytes) }
    }
}

/// What a rank reports, and its gradients after the call.
type Outcome = (Result<NormReport>, Vec<Tensor>);

/// What one call has, of all ranks.
pub struct Case<'a> {
    pub lists: &'a [Vec<Tensor>],
    pub copies: &'a [Vec<u32>],
    pub clip: ClipNorm,
}

impl Case<'_> {
    fn on_cpu(&self) -> Vec<Outcome> {
        world::run(self.lists.len(), |mut rank| {
            let mut list = self.lists[rank.rank].clone();
            let copies = &self.copies[rank.rank];
            let handed = cpu::clip_coef_sharded(&list, copies, self.clip, &mut rank);
            let report = cpu::clip_grad_norm_sharded(&mut list, copies, self.clip, &mut rank);
            assert_eq!(text(&handed), text(&not_written(&report)), "handed over, on the CPU");
            (report, list)
        })
    }

    /// Each rank on a stream of its own.
    fn on_device(&self, clipper: &Clipper, norm_type: NormType) -> Vec<Outcome> {
        let context = clipper.stream().context().clone();
        world::run(self.lists.len(), |rank| {
            let list = &self.lists[rank.rank];
            let copies = &self.copies[rank.rank];
            let stream = context.new_stream().unwrap();
            let mut clipper = Clipper::new(&stream).unwrap();
            let mut device = OnDevice::upload(&stream, list);
            let recording = Recording { rank, sent: RefCell::default() };
            let measured = device
                .with(list, |grads| clipper.total_norm_sharded(grads, copies, norm_type, &recording))
                .and_then(|pending| pending.wait());
            if let Ok(partial) = cpu::norm_partial(list, copies, norm_type) {
                assert_eq!(*recording.sent.borrow(), partial.to_bytes(), "the partial of rank {}", recording.rank.rank);
            }
            let handed = device
                .with(list, |grads| clipper.clip_coef_sharded(grads, copies, self.clip, &recording))
                .and_then(|pending| pending.wait());
            let mut after = list.clone();
            device.download(&mut after);
            assert_eq!(bits(&after), bits(list), "clip_coef_sharded writes nothing");
            let report = device
                .with(list, |grads| clipper.clip_grad_norm_sharded(grads, copies, self.clip, &recording))
                .and_then(|pending| pending.wait());
            assert_eq!(text(&handed), text(&not_written(&report)), "handed over");
            if let (Ok(measured), Ok(report)) = (measured, &report) {
                let scale = self.clip.loss_scale(1.0) != self.clip;
                assert!(scale || measured.total_norm.to_bits() == report.total_norm.to_bits());
                assert_eq!((measured.clip_coef, measured.written), (1.0, false));
            }
            let mut after = list.clone();
            device.download(&mut after);
            (report, after)
        })
    }

    pub fn assert_same(&self, clipper: &Clipper, norm_type: NormType, what: &str) {
        let (expected, got) = (self.on_cpu(), self.on_device(clipper, norm_type));
        for (rank, ((expected, expected_list), (report, list))) in expected.iter().zip(&got).enumerate() {
            assert_eq!(text(report), text(expected), "rank {rank}, {what}");
            assert_eq!(bits(list), bits(expected_list), "rank {rank}, {what}");
        }
    }
}

fn not_written(report: &Result<NormReport>) -> Result<NormReport> {
    report.clone().map(|mut report| {
        report.written = false;
        report
    })
}

/// With every bit: of errors and of reports.
fn text(report: &Result<NormReport>) -> String {
    match report {
        Ok(report) => {
            let bits = [report.total_norm, report.clip_coef, report.multiplier].map(f64::to_bits);
            let (nonfinite, rank) = (report.first_nonfinite, report.first_nonfinite_rank);
            format!("{bits:x?} {} {} {nonfinite:?} {rank:?}", report.found_inf, report.written)
        }
        Err(error) => error.to_string(),
    }
}

/// All norms, types and policies; empty ranks, uneven lists, values out of the usual range and none, copies.
#[test]
fn every_rank_has_the_bits_of_the_cpu() {
    with_clipper(|clipper| {
        let mut source = Source::new(41);
        for norm_type in NORM_TYPES {
            for round in 0..8 {
                let ranks = [1, 2, 4, 5][round % 4];
                let mut list_of = |rank: usize| -> Vec<Tensor> {
                    if rank == 2 {
                        return Vec::new();
                    }
                    let mut list: Vec<Tensor> = (0..1 + source.below(5))
                        .map(|i| {
                            let dtype = DTYPES[source.below(4)];
                            let tile = 32 * 1024 / dtype.size();
                            let numel = [0, 1, 3, 40, tile / 8, tile + 5][source.below(6)];
                            source.tensor(dtype, numel, i % 3)
                        })
                        .collect();
                    if round >= 4 && rank == 1 {
                        list.push(tensor(Dtype::F64, &[1e-200, 3e-250]));
                        list.push(tensor(Dtype::F64, &[[1e200, f64::NAN, f64::INFINITY][source.below(3)], 2.0]));
                    }
                    list
                };
                let lists: Vec<Vec<Tensor>> = (0..ranks).map(&mut list_of).collect();
                let copies: Vec<Vec<u32>> = lists
                    .iter()
                    .map(|list| list.iter().map(|_| if round % 2 == 0 { 1 } else { source.below(4) as u32 }).collect())
                    .collect();
                let policy = [NonFinite::Skip, NonFinite::Zero, NonFinite::Propagate, NonFinite::Error][round % 4];
                let clip = ClipNorm::new(1e-3).norm_type(norm_type).nonfinite(policy);
                let clip = if round % 3 == 2 { clip.loss_scale(512.0) } else { clip };
                let what = format!("{norm_type:?}, round {round}");
                Case { lists: &lists, copies: &copies, clip }.assert_same(clipper, norm_type, &what);
                let loose = ClipNorm::new(1e30).norm_type(norm_type);
                Case { lists: &lists, copies: &copies, clip: loose }.assert_same(clipper, norm_type, &what);
            }
        }
    });
}

/// More tiles than threads that fold them, and more tensors than the parameters of a kernel hold.
#[test]
fn long_lists() {
    with_clipper(|clipper| {
        let mut source = Source::new(42);
        let mut long: Vec<Tensor> = (0..1300).map(|i| source.tensor(DTYPES[i % 4], [1, 0, 17][i % 3], i % 2)).collect();
        long.push(source.tensor(Dtype::BF16, 9 * 16 * 1024 + 3, 1));
        let lists = [long, vec![source.tensor(Dtype::F64, 5000, 0)]];
        let copies = [(0..1301).map(|i| i % 4).collect(), vec![1]];
        for norm_type in [NormType::L2, NormType::P(1.5)] {
            let clip = ClipNorm::new(0.01).norm_type(norm_type);
            Case { lists: &lists, copies: &copies, clip }.assert_same(clipper, norm_type, "long");
        }
    });
}

/// One rank is a plain call.
#[test]
fn one_rank_has_the_bits_of_the_plain_call() {
    with_clipper(|clipper| {
        let mut source = Source::new(43);
        let list: Vec<Tensor> = (0..7).map(|i| source.tensor(DTYPES[i % 4], [3, 9000, 0][i % 3], i % 2)).collect();
        for norm_type in NORM_TYPES {
            let clip = ClipNorm::new(0.01).norm_type(norm_type);
            let mut expected = list.clone();
            let plain = cpu::clip_grad_norm(&mut expected, clip).unwrap();
            let case = Case { lists: std::slice::from_ref(&list), copies: &[vec![1; 7]], clip };
            let (report, got) = case.on_device(clipper, norm_type).remove(0);
            assert_eq!(text(&report), text(&Ok(plain)));
            assert_eq!(bits(&got), bits(&expected));
        }
    });
}

/// A rank that cannot take part: its own error there, an error that names it elsewhere, nothing written anywhere;
/// without reading the report an optimizer finds `found_inf`. The next call works.
#[test]
fn a_rank_that_is_refused_is_an_error_on_all() {
    with_clipper(|clipper| {
        let context = clipper.stream().context().clone();
        for wrong in ["threshold", "coefficient", "copies", "pointer", "overlap", "order", "mean", "other order"] {
            let results = world::run(3, |rank| {
                let list = [tensor(Dtype::F32, &[3.0, 4.0]), tensor(Dtype::F64, &[12.0])];
                let stream = context.new_stream().unwrap();
                let mut clipper = Clipper::new(&stream).unwrap();
                let mut device = OnDevice::upload(&stream, &list);
                let address = device.address(0);
                let clip = ClipNorm::new(1.0).nonfinite(NonFinite::Propagate);
                let mut found_inf = None;
                let result = device.with(&list, |grads| {
                    // SAFETY: the first is that of the tensor.
                    let good = || unsafe { RawGrad::new(address, 2, Dtype::F32) };
                    // SAFETY: deliberately wrong; the call must refuse it before any work is enqueued.
                    let bad = unsafe { RawGrad::new(0x10, 1, Dtype::F32) };
                    let pending = match wrong {
                        "other order" if rank.rank == 1 => {
                            clipper.clip_grad_norm_sharded(grads, Copies::One, clip.norm_type(NormType::L1), &rank)
                        }
                        _ if rank.rank != 1 => clipper.clip_grad_norm_sharded(grads, Copies::One, clip, &rank),
                        "threshold" => clipper.clip_grad_norm_sharded(grads, Copies::One, -1.0, &rank),
                        "copies" => clipper.clip_grad_norm_sharded(grads, &[1], clip, &rank),
                        "coefficient" => clipper.clip_coef_sharded(grads, Copies::One, -1.0, &rank),
                        "pointer" => clipper.clip_grad_norm_sharded(&mut [good(), bad], Copies::One, clip, &rank),
                        "mean" => clipper.total_norm_sharded(grads, Copies::One, NormType::Rms, &rank),
                        "overlap" => clipper.clip_grad_norm_sharded(&mut [good(), good()], Copies::One, clip, &rank),
                        _ => clipper.total_norm_sharded(grads, Copies::One, NormType::P(-1.0), &rank),
                    };
                    let pending = pending?;
                    found_inf = Some(read_f32(&stream, pending.found_inf_address()));
                    pending.wait()
                });
                let mut after = list.to_vec();
                device.download(&mut after);
                assert_eq!(bits(&after), bits(&list), "{wrong}");
                let again = device
                    .with(&list, |grads| clipper.clip_grad_norm_sharded(grads, Copies::One, 1.0, &rank))
                    .and_then(|pending| pending.wait());
                assert_eq!(again.unwrap().total_norm, (3.0f64 * 169.0).sqrt(), "{wrong}");
                (result.unwrap_err(), found_inf)
            });
            for (rank, (error, found_inf)) in results.into_iter().enumerate() {
                if rank == 1 && wrong != "other order" {
                    let own = match wrong {
                        "threshold" | "coefficient" => matches!(error, Error::InvalidThreshold { .. }),
                        "copies" => error == Error::ScopeLength { what: "copies", expected: 2, got: 1 },
                        "pointer" => matches!(error, Error::BadPointer { tensor: 1, .. }),
                        "mean" => error == Error::RmsOverRanks,
                        "overlap" => error == Error::Overlap { first: 0, second: 1 },
                        _ => error == Error::InvalidNormType { got: -1.0 },
                    };
                    assert!(own, "{wrong}: {error}");
                    continue;
                }
                assert!(matches!(error, Error::RankFailed { rank: 1, .. }), "{wrong}: {error}");
                assert_eq!(error.to_string().contains("order"), wrong == "other order", "{error}");
                assert_eq!(found_inf, Some(1.0), "{wrong}");
            }
        }
    });
}

fn read_f32(stream: &std::sync::Arc<cudarc::driver::CudaStream>, address: u64) -> f32 {
    let mut host = [0f32];
    // SAFETY: the address is that of an f32 in the report of a call on this stream.
    unsafe { cudarc::driver::result::memcpy_dtoh_async(&mut host, address, stream.cu_stream()) }.unwrap();
    stream.synchronize().unwrap();
    host[0]
}

/// An engine that fails, after the exchange and before it; nothing is clipped.
#[test]
fn an_engine_that_fails_is_an_error() {
    struct Nowhere(usize);
    // SAFETY: it never says that it has done anything.
    unsafe impl DeviceAllGather for Nowhere {
        type Error = &'static str;
        fn world_size(&self) -> usize {
            self.0
        }
        unsafe fn all_gather(
            &self,
            _: &std::sync::Arc<cudarc::driver::CudaStream>,
            _: u64,
            _: u64,
            bytes: usize,
        ) -> std::result::Result<(), &'static str> {
            assert_eq!(bytes, NormPartial::BYTES);
            Err("no route to rank 3")
        }
    }
    with_clipper(|clipper| {
        let list = [tensor(Dtype::F32, &[3.0, 4.0])];
        let mut device = OnDevice::upload(clipper.stream(), &list);
        for ranks in [2, 0, usize::MAX] {
            let call = |grads: &mut [&mut dyn DeviceGradMut]| {
                clipper.clip_grad_norm_sharded(grads, Copies::One, 1.0, &Nowhere(ranks))
            };
            let error = device.with(&list, call).unwrap_err();
            match ranks {
                2 => assert_eq!(error, Error::Exchange { reason: "no route to rank 3".into() }),
                _ => assert!(matches!(error, Error::Exchange { .. })),
            }
        }
        let mut after = list.to_vec();
        device.download(&mut after);
        assert_eq!(bits(&after), bits(&list));
        let report = device.with(&list, |grads| clipper.clip_grad_norm(grads, 1.0)).unwrap().wait().unwrap();
        assert_eq!((report.total_norm, report.first_nonfinite_rank), (5.0, None));
    });
}
