//! Large lists, which many threads share: the same bits whatever their number, and nothing left out.
#![allow(clippy::unwrap_used)]

#[path = "support/format.rs"]
mod format;
#[path = "support/lists.rs"]
mod lists;
#[path = "support/naive.rs"]
mod naive;
#[path = "support/tensor.rs"]
mod tensor;

use format::DTYPES;
use gradclip::{cpu, ClipNorm, NormType, Scope};
use lists::{Content, Spec};
use naive::{limited, wrong_product};
use tensor::Tensor;

/// What the functions say of a list, and what they make of it.
#[derive(PartialEq)]
struct Everything {
    measured: Vec<(u64, f64)>,
    clipped: Vec<Vec<Tensor>>,
    counted: (u64, u64),
    limited: Vec<Tensor>,
    /// With the L2 norm, out of place.
    into: Vec<Tensor>,
    by_tensor: (Vec<u64>, Vec<Tensor>),
}

impl Everything {
    fn of(grads: &[Tensor]) -> Self {
        let (mut measured, mut clipped) = (Vec::new(), Vec::new());
        for norm_type in [NormType::L1, NormType::L2, NormType::Inf, NormType::P(3.0), NormType::Rms] {
            let mut grads = grads.to_vec();
            let report = cpu::clip_grad_norm(&mut grads, ClipNorm::new(LIMIT).norm_type(norm_type)).unwrap();
            measured.push((report.total_norm.to_bits(), report.clip_coef));
            clipped.push(grads);
        }
        let mut limited = grads.to_vec();
        let report = cpu::clip_grad_value(&mut limited, LIMIT).unwrap();
        let mut into = grads.to_vec();
        cpu::clip_grad_norm_into(grads, &mut into, LIMIT).unwrap();
        let mut by_tensor = grads.to_vec();
        let scoped = cpu::clip_grad_norm_by(&mut by_tensor, &Scope::per_tensor(), LIMIT).unwrap();
        let norms = scoped.groups.iter().map(|report| report.total_norm.to_bits()).collect();
        let counted = (report.clipped, report.nan);
        Self { measured, clipped, counted, limited, into, by_tensor: (norms, by_tensor) }
    }
}

const LIMIT: f64 = 0.37;

/// Tensors of many tasks, of one, and of parts of one: large enough that work is handed out at all. Much of it f64, whose
/// sums use all their bits, so that another order of adding them shows.
fn large_list() -> Vec<Tensor> {
    let numels = [500_000, 400_000, 0, 120_001, 65_536, 1000, 300_000, 3, 9000, 70_000];
    let specs = numels.into_iter().zip(DTYPES.into_iter().cycle()).zip(0..);
    specs.map(|((numel, dtype), seed)| Spec { dtype, numel, content: Content::Moderate, seed }.tensor()).collect()
}

#[test]
fn the_number_of_threads_does_not_show() {
    let grads = large_list();
    let expected = Everything::of(&grads);
    for num_threads in [1, 2, 3, 7] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(num_threads).build().unwrap();
        for _ in 0..3 {
            let got = pool.install(|| Everything::of(&grads));
            assert_eq!(got.measured, expected.measured, "{num_threads} threads");
            assert!(got == expected, "{num_threads} threads: other gradients or counts");
        }
    }
}

/// Cut into pieces for many threads, every element is still reached, once.
#[test]
fn large_lists_are_clipped_to_their_ends() {
    let grads = large_list();
    let Everything { measured, clipped, counted, limited: got, into, by_tensor } = Everything::of(&grads);
    assert!(into == clipped[1], "out of place, the product is another");
    for ((_, clip_coef), clipped) in measured.into_iter().zip(clipped) {
        assert_eq!(wrong_product(&grads, &clipped, clip_coef), None);
    }
    for ((grad, norm), clipped) in grads.iter().zip(by_tensor.0).zip(by_tensor.1) {
        let alone = cpu::total_norm(std::slice::from_ref(grad), NormType::L2).unwrap().total_norm;
        assert_eq!(norm, alone.to_bits());
        let clip_coef = (LIMIT / alone).min(1.0);
        assert_eq!(wrong_product(std::slice::from_ref(grad), &[clipped], clip_coef), None);
    }
    let mut outside = 0;
    for (index, (grad, got)) in grads.iter().zip(got).enumerate() {
        let expected = limited(grad, -LIMIT, LIMIT);
        outside += grad.bits().iter().zip(&expected).filter(|(x, y)| x != y).count() as u64;
        assert!(got.bits() == expected, "tensor {index}");
    }
    assert_eq!(counted, (outside, 0));
}
