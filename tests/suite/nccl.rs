//! One rank of NCCL has the bits of the plain call. On a GPU this is the real library; more ranks take more GPUs.

use super::data::{bits, Source, Tensor, DTYPES};
use super::device::OnDevice;
use crate::backend::with_nccl;
use cudarc::nccl::{Comm, Id};
use gradclip::{cpu, ClipNorm, Copies, NormType};

#[test]
fn one_rank_has_the_bits_of_the_plain_call() {
    with_nccl(|clipper| {
        let comm = Comm::from_rank(clipper.stream().clone(), 0, 1, Id::new().unwrap()).unwrap();
        let mut source = Source::new(71);
        let list: Vec<Tensor> = (0..200).map(|i| source.tensor(DTYPES[i % 4], [3, 9000, 0][i % 3], i % 2)).collect();
        for norm_type in [NormType::L2, NormType::Inf, NormType::P(3.0)] {
            let clip = ClipNorm::new(0.01).norm_type(norm_type);
            let mut expected = list.clone();
            let plain = cpu::clip_grad_norm(&mut expected, clip).unwrap();
            let mut got = list.clone();
            let mut device = OnDevice::upload(clipper.stream(), &list);
            let pending =
                device.with(&list, |grads| clipper.clip_grad_norm_sharded(grads, Copies::One, clip, &comm)).unwrap();
            let report = pending.wait().unwrap();
            device.download(&mut got);
            let numbers = |report: &gradclip::NormReport| [report.total_norm, report.clip_coef].map(f64::to_bits);
            assert_eq!((numbers(&report), report.written), (numbers(&plain), true), "{norm_type:?}");
            assert_eq!(bits(&got), bits(&expected), "{norm_type:?}");
        }
    });
}
