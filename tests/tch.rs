//! The tch adapter, on CPU tensors, and on a GPU where there is one (`GRADCLIP_REQUIRE_GPU=1`: it has to be there).
#![cfg(feature = "tch")]
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[cfg(all(feature = "cuda", target_os = "linux"))]
#[path = "tch_suite/loading.rs"]
mod loading;
mod support {
    pub mod format;
    pub mod lists;
    pub mod tensor;
    pub mod tolerance;
    #[cfg(all(feature = "cuda", target_os = "linux"))]
    #[allow(dead_code)] // of what it can build, one library
    pub mod toolchain;
}

use gradclip::{
    cpu, ClipNorm, ClipValue, Dtype, Error, NonFinite, NormReport, NormType, Scope, ScopedReport, ValueReport,
};
use std::panic::{catch_unwind, AssertUnwindSafe};
use support::tolerance;
use tch::nn::{self, ConvConfig, Module, OptimizerConfig};
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;
const KINDS: [Kind; 4] = [Kind::Float, Kind::Double, Kind::Half, Kind::BFloat16];

fn total_norm(params: &[Tensor], norm_type: NormType) -> Result<NormReport, Error> {
    gradclip::tch::total_norm(params, norm_type)?.wait()
}

fn clip_grad_norm(params: &[Tensor], clip: impl Into<ClipNorm>) -> Result<NormReport, Error> {
    gradclip::tch::clip_grad_norm(params, clip)?.wait()
}

fn clip_grad_value(params: &[Tensor], clip: impl Into<ClipValue>) -> Result<ValueReport, Error> {
    gradclip::tch::clip_grad_value(params, clip)?.wait()
}

fn tensor(values: &[f32]) -> Tensor {
    Tensor::from_slice(values)
}

/// A parameter whose gradient, of one element as yet, becomes that tensor: not a copy of it.
fn param(grad: &Tensor) -> Tensor {
    let kind = if KINDS.contains(&grad.kind()) { grad.kind() } else { Kind::Float };
    let param = Tensor::zeros([1], (kind, grad.device())).set_requires_grad(true);
    param.sum(kind).backward();
    param.grad().set_data(grad);
    param
}

fn params(grads: &[&[f32]]) -> Vec<Tensor> {
    grads.iter().map(|grad| param(&tensor(grad))).collect()
}

fn without_gradient() -> Tensor {
    tensor(&[7.0]).set_requires_grad(true)
}

/// Elements in the order of their indices.
fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.detach().to_kind(Kind::Double).reshape([-1])).unwrap()
}

fn grad(param: &Tensor) -> Vec<f64> {
    values(&param.grad())
}

fn all_grads(params: &[Tensor]) -> Vec<Vec<f64>> {
    params.iter().map(grad).collect()
}

/// Equal, or both NaN.
fn same(a: &[Vec<f64>], b: &[Vec<f64>]) -> bool {
    a.len() == b.len()
        && a.iter()
            .zip(b)
            .all(|(a, b)| a.len() == b.len() && a.iter().zip(b).all(|(x, y)| x == y || x.is_nan() && y.is_nan()))
}

#[test]
fn a_training_step() {
    let vars = nn::VarStore::new(CPU);
    let (weight, bias) =
        (vars.root().var("w", &[1], nn::Init::Const(3.0)), vars.root().var("b", &[1], nn::Init::Const(4.0)));
    let _unused = vars.root().var("unused", &[5], nn::Init::Const(1.0));
    let mut optimizer = nn::Sgd::default().build(&vars, 1.0).unwrap();
    let params = vars.trainable_variables();
    let loss = (weight.square() + bias.square()).sum(Kind::Float) * 0.5;
    optimizer.zero_grad();
    loss.backward();
    let before = weight.grad().data_ptr();
    assert_eq!(total_norm(&params, NormType::L1).unwrap().total_norm, 7.0);
    assert_eq!(grad(&weight), [3.0], "only measured");
    let report = clip_grad_norm(&params, 2.5).unwrap();
    assert_eq!((report.total_norm, report.clip_coef, report.written), (5.0, 0.5, true));
    assert_eq!((grad(&weight), grad(&bias)), (vec![1.5], vec![2.0]));
    let report = clip_grad_value(&params, 1.75).unwrap();
    assert_eq!((report.clipped, report.written, grad(&bias)), (1, true, vec![1.75]));
    assert_eq!(weight.grad().data_ptr(), before, "in place");
    optimizer.step();
    assert_eq!((values(&weight), values(&bias)), (vec![1.5], vec![2.25]), "the optimizer sees the clipped gradients");
    assert!(!clip_grad_norm(&params, 1e6).unwrap().written);
    // References, arrays of them, and a function that returns tch's own result.
    fn inside_tch(weight: &Tensor) -> tch::Result<f64> {
        Ok(gradclip::tch::clip_grad_norm(&[weight], 1.0)?.wait()?.total_norm)
    }
    assert_eq!(inside_tch(&weight).unwrap(), 1.5);
}

/// Every kind and many lengths, against the CPU path: which memory is taken, in which order, and all bits.
#[test]
fn the_same_bits_as_the_cpu_path() {
    use proptest::strategy::{Strategy, ValueTree};
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let lists = proptest::prop_oneof![support::lists::finite_lists(), support::lists::nonfinite_lists()];
    for _ in 0..300 {
        let mut list = support::lists::tensors(&lists.new_tree(&mut runner).unwrap().current());
        let params: Vec<Tensor> = list.iter().map(|tensor| param(&to_torch(tensor))).collect();
        for norm_type in [NormType::L1, NormType::L2, NormType::Inf] {
            let (got, expected) = (total_norm(&params, norm_type), gradclip::cpu::total_norm(&list, norm_type));
            assert_eq!(got.unwrap().total_norm.to_bits(), expected.unwrap().total_norm.to_bits());
        }
        let norm = gradclip::cpu::total_norm(&list, NormType::L2).unwrap().total_norm;
        let clip = ClipNorm::new(if norm.is_finite() { norm / 3.0 } else { 1.0 }).nonfinite(NonFinite::Propagate);
        let (got, expected) = (clip_grad_norm(&params, clip), gradclip::cpu::clip_grad_norm(&mut list, clip));
        assert_eq!(format!("{:?}", got.unwrap()), format!("{:?}", expected.unwrap()));
        let bits: Vec<Vec<u64>> = params.iter().map(|param| bits_of(&param.grad())).collect();
        assert_eq!(bits, support::tensor::bits_of(&list));
        let clip = ClipValue::between(-0.5, 0.25);
        let (got, expected) = (clip_grad_value(&params, clip), gradclip::cpu::clip_grad_value(&mut list, clip));
        assert_eq!(format!("{:?}", got.unwrap()), format!("{:?}", expected.unwrap()));
        let bits: Vec<Vec<u64>> = params.iter().map(|param| bits_of(&param.grad())).collect();
        assert_eq!(bits, support::tensor::bits_of(&list));
    }
}

fn to_torch(tensor: &support::tensor::Tensor) -> Tensor {
    let kind = KINDS[tensor.dtype() as usize];
    let bytes: Vec<u8> =
        tensor.bits().iter().flat_map(|bits| bits.to_le_bytes().into_iter().take(tensor.dtype().size())).collect();
    Tensor::from_data_size(&bytes, &[tensor.numel() as i64], kind)
}

fn bits_of(tensor: &Tensor) -> Vec<u64> {
    let (numel, size) = (tensor.numel(), tensor.kind().elt_size_in_bytes());
    let mut bytes = vec![0; numel * size];
    tensor.copy_data_u8(&mut bytes, numel);
    let widen = |bytes: &[u8]| bytes.iter().rev().fold(0, |bits, &byte| bits << 8 | u64::from(byte));
    bytes.chunks(size).map(widen).collect()
}

/// A small convolutional network with ordinary data, after `backward`. The same for the same seed.
fn network(seed: i64, kind: Kind) -> (nn::VarStore, nn::Optimizer) {
    tch::manual_seed(seed);
    let mut vars = nn::VarStore::new(CPU);
    let path = vars.root();
    let conv = nn::conv2d(&path / "conv", 3, 8, 3, ConvConfig::default());
    let norm = nn::layer_norm(&path / "norm", vec![6, 6], nn::LayerNormConfig::default());
    let linear = nn::linear(&path / "linear", 8 * 36, 10, nn::LinearConfig::default());
    let optimizer = nn::Sgd::default().build(&vars, 0.1).unwrap();
    if kind == Kind::Double {
        vars.double();
    }
    let images = Tensor::randn([4, 3, 8, 8], (kind, CPU));
    let labels = Tensor::randint(10, [4], (Kind::Int64, CPU));
    let hidden = norm.forward(&conv.forward(&images)).relu().flatten(1, -1);
    linear.forward(&hidden).cross_entropy_for_logits(&labels).backward();
    (vars, optimizer)
}

#[test]
fn like_tch_on_ordinary_gradients() {
    for (seed, kind) in [(1, Kind::Float), (2, Kind::Float), (3, Kind::Double)] {
        let ((theirs, optimizer), (ours, _)) = (network(seed, kind), network(seed, kind));
        let (theirs, ours) = (theirs.trainable_variables(), ours.trainable_variables());
        assert_eq!(theirs.len(), 6);
        assert!(same(&all_grads(&theirs), &all_grads(&ours)), "the same to begin with");
        let norm = total_norm(&ours, NormType::L2).unwrap().total_norm;
        for fraction in [2.0, 0.9, 0.25, 1e-3] {
            optimizer.clip_grad_norm(fraction * norm);
            clip_grad_norm(&ours, ClipNorm::new(fraction * norm).torch_compatible()).unwrap();
            let dtype = if kind == Kind::Double { Dtype::F64 } else { Dtype::F32 };
            let numel = ours.iter().map(Tensor::numel).max().unwrap();
            let tolerance = 4.0 * tolerance::peer_clip(dtype, numel, ours.len()); // after up to four clips
            for (theirs, ours) in all_grads(&theirs).iter().zip(all_grads(&ours)) {
                for (theirs, ours) in theirs.iter().zip(ours) {
                    assert!((theirs - ours).abs() <= tolerance * theirs.abs(), "{theirs} {ours} {fraction}");
                }
            }
        }
    }
    let ((theirs, optimizer), (ours, _)) = (network(4, Kind::Float), network(4, Kind::Float));
    let (theirs, ours) = (theirs.trainable_variables(), ours.trainable_variables());
    for value in [1.0, 0.01, 0.0] {
        optimizer.clip_grad_value(value);
        let report = clip_grad_value(&ours, value).unwrap();
        assert_eq!(report.written, value < 1.0);
        assert!(same(&all_grads(&theirs), &all_grads(&ours)), "to the bit");
    }
}

/// What becomes of gradients in tch's own clip: of parameters in a store, as it takes no others.
fn by_tch(grads: &[&[f32]], kind: Kind, clip: impl FnOnce(&nn::Optimizer)) -> Option<Vec<Vec<f64>>> {
    let mut vars = nn::VarStore::new(CPU);
    for (i, grad) in grads.iter().enumerate() {
        let _ = vars.root().var(&format!("{i}"), &[grad.len() as i64], nn::Init::Const(0.0));
    }
    let optimizer = nn::Sgd::default().build(&vars, 1.0).unwrap();
    match kind {
        Kind::Half => vars.half(),
        Kind::Double => vars.double(),
        _ => {}
    }
    let vars = vars.trainable_variables();
    for (var, grad) in vars.iter().zip(grads) {
        (var * tensor(grad).to_kind(kind)).sum(kind).backward();
    }
    // Where tch's own `no_grad` is left by a panic, it leaves gradients turned off.
    let _turns_them_on_again = tch::no_grad_guard();
    catch_unwind(AssertUnwindSafe(|| clip(&optimizer))).ok()?;
    Some(all_grads(&vars))
}

fn by_us(grads: &[&[f32]], kind: Kind, clip: ClipNorm) -> (NormReport, Vec<Vec<f64>>) {
    let params: Vec<Tensor> = grads.iter().map(|grad| param(&tensor(grad).to_kind(kind))).collect();
    let report = clip_grad_norm(&params, clip).unwrap();
    (report, all_grads(&params))
}

/// Gradients; max_norm; what tch's own clip makes of them, none if it panics; the norm we report, and what we make of
/// them by default.
type Edge<'a> = (&'a [&'a [f32]], f64, Option<&'a [&'a [f64]]>, f64, &'a [&'a [f64]]);

#[test]
fn edges_beside_tch() {
    const NAN: f64 = f64::NAN;
    const INF: f64 = f64::INFINITY;
    let root_half = f64::from(0.5f32.sqrt());
    let edges: &[Edge] = &[
        // The norm is exactly the threshold: tch's formula scales it all the same.
        (&[&[3.0, 4.0]], 5.0, Some(&[&[2.999_999_3, 3.999_999]]), 5.0, &[&[3.0, 4.0]]),
        (&[&[1.0, f32::NAN], &[2.0]], 1.0, Some(&[&[1.0, NAN], &[2.0]]), NAN, &[&[1.0, NAN], &[2.0]]),
        (&[&[1.0, f32::INFINITY], &[2.0]], 1.0, Some(&[&[0.0, NAN], &[0.0]]), INF, &[&[1.0, INF], &[2.0]]),
        (&[&[0.0, 0.0]], 1.0, Some(&[&[0.0, 0.0]]), 0.0, &[&[0.0, 0.0]]),
        (&[&[0.0, 0.0]], 0.0, Some(&[&[0.0, 0.0]]), 0.0, &[&[0.0, 0.0]]),
        (&[&[3.0, 4.0]], 0.0, Some(&[&[0.0, 0.0]]), 5.0, &[&[0.0, 0.0]]),
        (&[&[3.0, 4.0]], INF, Some(&[&[3.0, 4.0]]), 5.0, &[&[3.0, 4.0]]),
        // Finite, but their squares are not.
        (&[&[1e20], &[1e20]], 1.0, Some(&[&[0.0], &[0.0]]), 2e40f64.sqrt(), &[&[root_half], &[root_half]]),
        (&[], 1.0, None, 0.0, &[]),
        (&[&[], &[3.0], &[]], 1.0, Some(&[&[], &[0.999_999_67], &[]]), 3.0, &[&[], &[1.0], &[]]),
    ];
    let owned = |grads: &[&[f64]]| -> Vec<Vec<f64>> { grads.iter().map(|grad| grad.to_vec()).collect() };
    let near = |a: &[Vec<f64>], b: &[Vec<f64>]| {
        // One unit of f32 in the last place.
        let rounded = |x: &f64, y: &f64| (x - y).abs() <= f64::from(f32::EPSILON) * y.abs();
        a.len() == b.len()
            && a.iter()
                .zip(b)
                .all(|(a, b)| a.iter().zip(b).all(|(x, y)| x == y || x.is_nan() && y.is_nan() || rounded(x, y)))
    };
    for &(grads, max_norm, theirs, norm, ours) in edges {
        let got = by_tch(grads, Kind::Float, |optimizer| optimizer.clip_grad_norm(max_norm));
        assert_eq!(got.is_some(), theirs.is_some(), "tch on {grads:?}");
        if let (Some(got), Some(theirs)) = (got, theirs) {
            assert!(near(&got, &owned(theirs)), "tch on {grads:?}, {max_norm}: {got:?}");
        }
        let (report, got) = by_us(grads, Kind::Float, max_norm.into());
        assert!((report.total_norm / norm - 1.0).abs() < 1e-7 || report.total_norm.to_bits() == norm.to_bits());
        assert!(near(&got, &owned(ours)), "{grads:?}, {max_norm}: {got:?}");
        // As in tch where it has an answer, by the options that ask for it.
        if let Some(theirs) = theirs.filter(|_| norm.is_finite() && norm < 1e19) {
            let (_, got) = by_us(grads, Kind::Float, ClipNorm::new(max_norm).torch_compatible());
            assert!(near(&got, &owned(theirs)), "{grads:?}, {max_norm}: {got:?}");
        }
    }
    let (_, got) =
        by_us(&[&[1.0, f32::INFINITY], &[2.0]], Kind::Float, ClipNorm::new(1.0).nonfinite(NonFinite::Propagate));
    assert!(same(&got, &[vec![0.0, NAN], vec![0.0]]), "as tch: {got:?}");

    // Half overflows in tch: two norms of 60000 have none that it can hold. Nor have two elements in one tensor.
    for grads in [&[&[60000.0][..], &[60000.0]][..], &[&[60000.0, 60000.0]]] {
        let theirs = by_tch(grads, Kind::Half, |optimizer| optimizer.clip_grad_norm(1.0)).unwrap();
        assert!(theirs.iter().flatten().all(|&x| x == 0.0), "{theirs:?}");
        let (report, ours) = by_us(grads, Kind::Half, 1.0.into());
        assert_eq!(report.total_norm, 7.2e9f64.sqrt());
        assert!(ours.iter().flatten().all(|&x| x == f64::from(half::f16::from_f64(0.5f64.sqrt()))), "{ours:?}");
    }
    // No gradients at all: tch panics.
    let vars = nn::VarStore::new(CPU);
    let _unused = vars.root().var("unused", &[2], nn::Init::Const(0.0));
    let optimizer = nn::Sgd::default().build(&vars, 1.0).unwrap();
    let unused = vars.trainable_variables(); // after a panic of tch's, its lock is poisoned
    {
        let _turns_them_on_again = tch::no_grad_guard();
        assert!(catch_unwind(AssertUnwindSafe(|| optimizer.clip_grad_norm(1.0))).is_err());
    }
    let report = clip_grad_norm(&unused, 1.0).unwrap();
    assert_eq!((report.total_norm, report.written, report.first_nonfinite), (0.0, false, None));
    assert_eq!(clip_grad_value(&unused, 1.0).unwrap().clipped, 0);
    assert_eq!(total_norm(&[], NormType::Inf).unwrap().total_norm, 0.0);
    // A negative threshold turns gradients around there.
    let theirs = by_tch(&[&[3.0, 4.0]], Kind::Float, |optimizer| optimizer.clip_grad_norm(-1.0)).unwrap();
    assert!(theirs[0][0] < 0.0);
    // By value, to the bit.
    let grads: &[&[f32]] = &[&[1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.5, -7.0], &[], &[1e-40]];
    for value in [0.5, 0.0] {
        let theirs = by_tch(grads, Kind::Float, |optimizer| optimizer.clip_grad_value(value)).unwrap();
        let params = params(grads);
        let report = clip_grad_value(&params, value).unwrap();
        assert!(same(&theirs, &all_grads(&params)), "{theirs:?}");
        assert_eq!((report.nan, report.first_nonfinite), (1, Some(0)));
    }
}

#[test]
fn every_kind_and_mixtures() {
    let params: Vec<Tensor> = KINDS.iter().map(|&kind| param(&tensor(&[2.0, -2.0]).to_kind(kind))).collect();
    let report = clip_grad_norm(&params, 32f64.sqrt() / 2.0).unwrap();
    assert_eq!(report.total_norm, 32f64.sqrt());
    for (param, kind) in params.iter().zip(KINDS) {
        assert_eq!((grad(param), param.grad().kind()), (vec![1.0, -1.0], kind));
    }
    assert_eq!(clip_grad_value(&params, 0.5).unwrap().clipped, 8);
    assert!(params.iter().all(|param| grad(param) == [0.5, -0.5]));
}

/// Split, with a loss scale, and handed on: as on slices. A view with a gap too.
#[test]
fn a_given_norm_a_loss_scale_and_the_coefficient_alone() {
    use gradclip::tch::{clip_coef, clip_with_norm, total_norm};
    let gap = tensor(&[4.0, 9.0, 0.0, 9.0]).view([2, 2]).narrow(1, 0, 1);
    let list = [param(&tensor(&[3.0])), param(&gap)];
    let norm = total_norm(&list, NormType::L2).unwrap();
    assert!(clip_with_norm(&list, &norm, 2.5).unwrap().wait().unwrap().written);
    assert_eq!(all_grads(&list), [vec![1.5], vec![2.0, 0.0]]);
    assert!(clip_with_norm(&list, -1.0, 1.0).is_err());
    let clip = ClipNorm::new(f64::INFINITY).loss_scale(0.5);
    let report = clip_coef(&list, clip).unwrap().wait().unwrap();
    assert_eq!((report.total_norm, report.multiplier, report.written), (5.0, 2.0, false));
    assert_eq!(all_grads(&list), [vec![1.5], vec![2.0, 0.0]]);
    assert!(clip_grad_norm(&list, clip).unwrap().written);
    assert_eq!(all_grads(&list), [vec![3.0], vec![4.0, 0.0]]);
}

#[test]
fn only_those_with_a_gradient_frozen_or_not() {
    let (with, without, other) = (param(&tensor(&[3.0])), without_gradient(), param(&tensor(&[400.0])));
    let never = tensor(&[1.0]); // requires none
    let frozen = param(&tensor(&[4.0])).set_requires_grad(false); // has one from before
    let list = [without, with, never, frozen, Tensor::new()];
    let report = clip_grad_norm(&list, 2.5).unwrap();
    assert_eq!((report.total_norm, grad(&list[1]), grad(&list[3])), (5.0, vec![1.5], vec![2.0]));
    assert_eq!(grad(&other), [400.0]);
    assert!(!list[0].grad().defined());
}

/// Integers, whose squares add up without rounding in any order: so the norm does not depend on the order of memory.
fn integers(shape: &[i64]) -> Tensor {
    let numel: i64 = shape.iter().product();
    (Tensor::arange(numel, (Kind::Float, CPU)).remainder(7.0) - 3.0).view(shape)
}

/// Channels-last, transposed, permuted: as the gradients of parameters with such strides are.
#[test]
fn any_order_of_dimensions_is_clipped_in_place() {
    let channels_last = integers(&[4, 5, 5, 3]).permute([0, 3, 1, 2]);
    let transposed = integers(&[6, 9]).tr();
    let permuted = integers(&[2, 3, 4, 5]).permute([2, 0, 3, 1]).unsqueeze(1);
    for start in [channels_last, transposed, permuted] {
        let weight = start.detach().set_requires_grad(true);
        let coefficients = integers(&start.size()) * 2.0;
        (&weight * &coefficients).sum(Kind::Float).backward();
        assert!(!weight.grad().is_contiguous());
        assert_eq!(weight.grad().stride(), weight.stride());
        let (before, control) = (weight.grad().data_ptr(), param(&coefficients.copy()));
        assert_eq!(values(&weight.grad()), values(&coefficients));

        let list = [weight.shallow_clone(), param(&tensor(&[1.0]))];
        let reference = [control, param(&tensor(&[1.0]))];
        let norm = clip_grad_norm(&reference, 3.0).unwrap().total_norm;
        assert_eq!(clip_grad_norm(&list, 3.0).unwrap().total_norm, norm);
        assert_eq!(all_grads(&list), all_grads(&reference));
        let report = clip_grad_value(&list, ClipValue::between(-0.1, 0.2)).unwrap();
        assert_eq!(report, clip_grad_value(&reference, ClipValue::between(-0.1, 0.2)).unwrap());
        assert_eq!(all_grads(&list), all_grads(&reference));
        assert_eq!((weight.grad().data_ptr(), weight.grad().stride()), (before, weight.stride()), "in place");
    }
}

#[test]
fn views_with_gaps_keep_what_is_in_the_gaps() {
    let base = || Tensor::from_slice(&[3.0f32, 9.0, 4.0, 9.0]).view([2, 2]);
    type View = fn(&Tensor) -> Tensor;
    let views: [View; 3] =
        [|base| base.narrow(1, 0, 1), |base| base.tr().narrow(0, 0, 1), |base| base.view([4]).slice(0, 0, 4, 2)];
    for view in views {
        let base = base();
        let view = view(&base);
        assert!(!view.is_contiguous());
        let params = [without_gradient(), param(&view)];
        let address = params[1].grad().data_ptr();
        assert_eq!(total_norm(&params, NormType::L2).unwrap().total_norm, 5.0);
        assert!(!clip_grad_norm(&params, 6.0).unwrap().written);
        assert_eq!(clip_grad_norm(&params, 2.5).unwrap().total_norm, 5.0);
        assert_eq!(values(&base), [1.5, 9.0, 2.0, 9.0]);
        assert_eq!(clip_grad_value(&params, 1.75).unwrap().clipped, 1);
        assert_eq!(values(&base), [1.5, 9.0, 1.75, 9.0]);
        assert_eq!(params[1].grad().data_ptr(), address);
    }
    // Shared: once. Meeting another, with its ends: an error, though the elements of columns are not the same.
    let base = base();
    let columns =
        [param(&base.narrow(1, 0, 1)), param(&base.narrow(1, 0, 1)), without_gradient(), param(&base.narrow(1, 1, 1))];
    assert_eq!(total_norm(&columns[..2], NormType::L2).unwrap().total_norm, 5.0);
    assert_eq!(clip_grad_norm(&columns, 1.0).unwrap_err(), Error::Overlap { first: 0, second: 3 });
    assert_eq!(clip_grad_value(&columns, 1.0).unwrap_err(), Error::Overlap { first: 0, second: 3 });
    let inside = [param(&base.narrow(1, 0, 1)), param(&base.narrow(0, 0, 1))];
    assert_eq!(clip_grad_norm(&inside, 1.0).unwrap_err(), Error::Overlap { first: 0, second: 1 });
    // One element for many: scaled once or many times?
    let expanded = [without_gradient(), param(&tensor(&[3.0]).expand([4], false))];
    assert_eq!(clip_grad_norm(&expanded, 1.0).unwrap_err(), Error::Overlap { first: 1, second: 1 });
    assert_eq!(total_norm(&expanded, NormType::L2).unwrap_err(), Error::Overlap { first: 1, second: 1 });
    assert_eq!(values(&base), [3.0, 9.0, 4.0, 9.0]);
}

#[test]
fn a_contiguous_part_of_a_larger_tensor_is_clipped_alone() {
    let base = tensor(&[9.0, 3.0, 4.0, 9.0]);
    let params = [param(&base.narrow(0, 1, 2))];
    assert_eq!(clip_grad_norm(&params, 2.5).unwrap().total_norm, 5.0);
    assert_eq!(values(&base), [9.0, 1.5, 2.0, 9.0]);
}

#[test]
fn a_shared_gradient_is_counted_and_clipped_once() {
    let shared = tensor(&[3.0, 4.0]);
    let params = [param(&shared), param(&shared.view([2, 1])), param(&tensor(&[12.0]))];
    assert_eq!(clip_grad_norm(&params, 6.5).unwrap().total_norm, 13.0);
    assert_eq!((grad(&params[0]), grad(&params[1]), grad(&params[2])), (vec![1.5, 2.0], vec![1.5, 2.0], vec![6.0]));
    assert_eq!(clip_grad_value(&params, 1.75).unwrap().clipped, 2);
    assert_eq!(grad(&params[1]), [1.5, 1.75]);
    // The same parameter twice is the same gradient twice.
    let twice = [params[2].shallow_clone(), params[2].shallow_clone()];
    assert_eq!(total_norm(&twice, NormType::L2).unwrap().total_norm, 1.75);
    // A part of another gradient is not the same one, nor is one of another kind in the same memory.
    let shared = tensor(&[3.0, 4.0]);
    for other in [shared.narrow(0, 1, 1), shared.view_dtype(Kind::BFloat16), shared.view_dtype(Kind::Double)] {
        let params = [without_gradient(), param(&shared), param(&other)];
        let overlap = Error::Overlap { first: 1, second: 2 };
        assert_eq!(total_norm(&params, NormType::L2).unwrap_err(), overlap);
        assert_eq!(clip_grad_norm(&params, 1.0).unwrap_err(), overlap);
        assert_eq!(clip_grad_value(&params, 1.0).unwrap_err(), overlap);
        assert_eq!(values(&shared), [3.0, 4.0]);
    }
}

#[test]
fn other_kinds_and_layouts_are_errors_and_touch_nothing() {
    let good = tensor(&[30.0, 40.0]);
    let matrix = Tensor::eye(2, (Kind::Float, CPU));
    let table = Tensor::ones([4, 2], (Kind::Float, CPU)).set_requires_grad(true);
    let rows = Tensor::from_slice(&[1i64, 2]);
    Tensor::embedding(&table, &rows, -1, false, true).sum(Kind::Float).backward();
    assert!(table.grad().is_sparse());
    // Leaves of other layouts, whose gradients are of the same.
    let leaf = |matrix: Tensor| {
        let leaf = matrix.set_requires_grad(true);
        leaf.to_dense(None, false).sum(Kind::Float).backward();
        leaf
    };
    let (csr, mkldnn) = (leaf(matrix.to_sparse_csr(None)), leaf(matrix.to_mkldnn()));
    let cases = [
        (param(&tensor(&[1.0]).to_kind(Kind::Int64)), "Int64"),
        (param(&tensor(&[1.0]).to_kind(Kind::Float8e4m3fn)), "Float8e4m3fn"),
        (param(&tensor(&[1.0]).to_kind(Kind::ComplexFloat)), "ComplexFloat"),
        (table, "f32 in a sparse layout"),
        (csr, "f32 in a sparse layout"),
        (mkldnn, "f32 in a layout that is not strided"),
    ];
    for (bad, got) in cases {
        let list = [param(&good), without_gradient(), bad];
        let unsupported = Error::UnsupportedDtype { tensor: 2, got: got.into() };
        assert_eq!(clip_grad_norm(&list, 1.0).unwrap_err(), unsupported);
        assert_eq!(clip_grad_value(&list, 1.0).unwrap_err(), unsupported);
        assert_eq!(total_norm(&list, NormType::L2).unwrap_err(), unsupported);
    }
    // Zeros that are kept as no more than their shape.
    let list = [param(&good), param(&Tensor::internal_efficientzerotensor([3], (Kind::Float, CPU)))];
    assert_eq!(
        clip_grad_norm(&list, 1.0).unwrap_err(),
        Error::Framework("the gradient of parameter 1 has no memory".into())
    );
    let list = [param(&good)];
    let threshold = clip_grad_norm(&list, -1.0).unwrap_err();
    assert!(matches!(threshold, Error::InvalidThreshold { name: "max_norm", .. }));
    assert!(clip_grad_norm(&list, f64::NAN).is_err());
    assert!(matches!(clip_grad_value(&list, f64::NAN), Err(Error::InvalidThreshold { .. })));
    assert!(matches!(clip_grad_value(&list, ClipValue::between(2.0, 1.0)), Err(Error::InvalidBounds { .. })));
    assert_eq!(values(&good), [30.0, 40.0]);
    // As an error of tch's: the text is the same, and ours is inside.
    let framework = tch::TchError::from(threshold.clone());
    assert_eq!(framework.to_string(), threshold.to_string());
    let tch::TchError::Io(inside) = framework else { panic!("{framework:?}") };
    assert_eq!(inside.downcast::<Error>().unwrap(), threshold);
}

#[test]
fn policies_and_the_index_of_the_parameter() {
    for (policy, expected) in [
        (NonFinite::Skip, [f64::INFINITY, 3.0]),
        (NonFinite::Zero, [0.0, 0.0]),
        (NonFinite::Propagate, [f64::NAN, 0.0]),
    ] {
        let params = [param(&tensor(&[3.0])), without_gradient(), param(&tensor(&[f32::INFINITY]))];
        let report = clip_grad_norm(&params, ClipNorm::new(1.0).nonfinite(policy)).unwrap();
        assert_eq!((report.total_norm, report.first_nonfinite), (f64::INFINITY, Some(2)));
        assert!(same(&[grad(&params[2]), grad(&params[0])], &expected.map(|x| vec![x])), "{policy:?}");
    }
    let params = [without_gradient(), param(&tensor(&[1.0, f32::NAN]))];
    let error = clip_grad_norm(&params, ClipNorm::new(1.0).nonfinite(NonFinite::Error)).unwrap_err();
    assert!(matches!(error, Error::NonFinite { tensor: Some(1), .. }));
    let report = clip_grad_value(&params, 1.0).unwrap();
    assert_eq!((report.nan, report.first_nonfinite, report.written), (1, Some(1), false));
    assert_eq!(grad(&params[1])[0], 1.0);
}

/// Autograd keeps count of writes to tensors that it tracks, and refuses to go back through what has changed.
#[test]
fn autograd_notices_a_clip_of_a_gradient_that_it_tracks() {
    for (max_norm, expected) in [(10.0, [3.0, 4.0]), (2.5, [1.5, 2.0])] {
        let params = [param(&tensor(&[3.0, 4.0]))];
        let tracked = params[0].grad().set_requires_grad(true);
        let loss = tracked.square().sum(Kind::Float);
        let address = tracked.data_ptr();
        let report = clip_grad_norm(&params, max_norm).unwrap();
        assert_eq!((report.total_norm, grad(&params[0])), (5.0, expected.to_vec()));
        assert_eq!(params[0].grad().data_ptr(), address);
        match loss.f_backward() {
            Ok(()) => assert!(!report.written && grad(&tracked) == [6.0, 8.0]),
            Err(error) => assert!(report.written && error.to_string().contains("modified by an inplace operation")),
        }
    }
}

/// libtorch keeps the opposite, and a note that it is to be negated: of the imaginary part of a conjugate, for one.
#[test]
fn a_gradient_that_is_stored_negated() {
    let complex = Tensor::complex(&tensor(&[0.0, 0.0]), &tensor(&[3.0, -4.0]));
    let real = tensor(&[3.0, -4.0]);
    for (negated, stored) in [(complex.conj().imag(), complex.imag()), (real.internal_neg_view(), real)] {
        assert!(negated.is_neg());
        let params = [param(&negated)];
        assert_eq!(grad(&params[0]), [-3.0, 4.0]);
        assert_eq!(clip_grad_value(&params, ClipValue::between(-1.0, 2.0)).unwrap().clipped, 2);
        assert_eq!(grad(&params[0]), [-1.0, 2.0]);
        assert_eq!(values(&stored), [1.0, -2.0]);
    }
}

fn clip_grad_norm_by(params: &[Tensor], scope: &Scope<'_>, clip: impl Into<ClipNorm>) -> Result<ScopedReport, Error> {
    gradclip::tch::clip_grad_norm_by(params, scope, clip)?.wait()
}

fn norms_by(params: &[Tensor], scope: &Scope<'_>) -> Result<ScopedReport, Error> {
    gradclip::tch::norms_by(params, scope, NormType::L2)?.wait()
}

fn clip_coef_by(params: &[Tensor], scope: &Scope<'_>, clip: impl Into<ClipNorm>) -> Result<ScopedReport, Error> {
    gradclip::tch::clip_coef_by(params, scope, clip)?.wait()
}

fn clip_grad_value_by(
    params: &[Tensor],
    scope: &Scope<'_>,
    clip: impl Into<ClipValue>,
) -> Result<ScopedReport<ValueReport>, Error> {
    gradclip::tch::clip_grad_value_by(params, scope, clip)?.wait()
}

fn norms(report: &ScopedReport) -> Vec<f64> {
    report.groups.iter().map(|group| group.total_norm).collect()
}

/// Every parameter has its place in the lists of the scope and of the report, with a gradient or without.
#[test]
fn scopes_count_parameters() {
    let list =
        || [param(&tensor(&[3.0, 4.0])), without_gradient(), param(&tensor(&[f32::NAN, 0.0])), param(&tensor(&[30.0]))];
    let params = list();
    let report = clip_grad_norm_by(&params, &Scope::per_tensor().telemetry(), 1.0).unwrap();
    assert_eq!((norms(&report)[..2].to_vec(), norms(&report)[3]), (vec![5.0, 0.0], 30.0));
    assert_eq!(
        (report.groups[2].first_nonfinite, report.tensors[2].nonfinite, report.tensors[1].zeros),
        (Some(2), 1, 0)
    );
    assert_eq!((grad(&params[0]), grad(&params[3])), ([0.6f32, 0.8].map(f64::from).to_vec(), vec![1.0]));
    assert!(grad(&params[2])[0].is_nan());
    let (params, max_norms) = (list(), [Some(2.5), None, Some(3.0)]);
    let scope = Scope::groups(&[0, 1, 0, 2]).max_norms(&max_norms);
    let error = clip_grad_norm_by(&params, &scope, ClipNorm::new(1.0).nonfinite(NonFinite::Error)).unwrap_err();
    assert!(matches!(error, Error::NonFinite { tensor: Some(2), .. }), "{error}");
    let report = clip_grad_norm_by(&params, &scope, 1.0).unwrap();
    assert_eq!((norms(&report)[1..].to_vec(), report.groups[0].first_nonfinite), (vec![0.0, 30.0], Some(2)));
    assert_eq!((grad(&params[0]), grad(&params[3])), (vec![3.0, 4.0], vec![3.0]));
    for (scope, expected) in [
        (Scope::groups(&[0, 1, 0]), Error::ScopeLength { what: "groups", expected: 4, got: 3 }),
        (Scope::groups(&[0, 0, 0, 9]), Error::NoSuchGroup { tensor: 3, group: 9, groups: 4 }),
        (Scope::rows(&[1, 7, 1, 2]), Error::UnevenRows { tensor: 3, numel: 1, rows: 2 }),
    ] {
        assert_eq!(clip_grad_norm_by(&params, &scope, 1.0).unwrap_err(), expected);
        assert_eq!(norms_by(&params, &scope).unwrap_err(), expected);
    }
    let shared = tensor(&[3.0, 4.0]);
    let params = [without_gradient(), param(&shared), param(&shared.narrow(0, 1, 1))];
    assert_eq!(norms_by(&params, &Scope::per_tensor()).unwrap_err(), Error::Overlap { first: 1, second: 2 });
    let params = [without_gradient(), param(&shared), param(&shared)];
    let report = clip_grad_norm_by(&params, &Scope::per_tensor(), 2.5).unwrap();
    assert_eq!((norms(&report), values(&shared)), (vec![0.0, 5.0, 0.0], vec![1.5, 2.0]));
}

/// The slices along dimension 0, whatever the memory looks like: contiguous, transposed, channels-last, with gaps.
#[test]
fn rows_are_those_of_the_shape() {
    tch::manual_seed(5);
    let image = Tensor::randn([3, 4, 5, 2], (Kind::Float, CPU));
    let matrix = Tensor::randn([6, 4], (Kind::Float, CPU));
    let views: [fn(&Tensor, &Tensor) -> Tensor; 6] = [
        |_, matrix| matrix.copy(),
        |_, matrix| matrix.copy().transpose(0, 1),
        |image, _| image.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2]), // channels-last
        |image, _| image.copy().permute([2, 0, 1, 3]),
        |_, matrix| matrix.copy().narrow(1, 1, 2),
        |_, matrix| matrix.copy().narrow(0, 2, 1).transpose(0, 1),
    ];
    for view in views {
        for explicit in [false, true] {
            let grad = view(&image, &matrix);
            let slices: Vec<Vec<f64>> = (0..grad.size()[0]).map(|i| values(&grad.get(i))).collect();
            let norm = |slice: &[f64]| slice.iter().map(|x| x * x).sum::<f64>().sqrt();
            let params = [without_gradient(), param(&grad)];
            let (address, max_norm) = (params[1].grad().data_ptr(), norm(&slices[0]));
            let rows = [1, slices.len()];
            let scope = if explicit { Scope::rows(&rows) } else { Scope::leading_dimension() };
            let report = clip_grad_norm_by(&params, &scope, max_norm).unwrap();
            assert_eq!(report.groups.len(), 1 + slices.len());
            for (index, slice) in slices.iter().enumerate() {
                let group = &report.of_tensor(1).unwrap()[index];
                assert!((group.total_norm / norm(slice) - 1.0).abs() < 1e-9);
                let factor = if group.written { max_norm / norm(slice) } else { 1.0 };
                for (got, x) in values(&params[1].grad().get(index as i64)).iter().zip(slice) {
                    assert!((got - x * factor).abs() <= 1e-6 * x.abs(), "{got} {x} {factor}");
                }
            }
            assert_eq!(params[1].grad().data_ptr(), address);
        }
    }
    let empties = [
        param(&Tensor::zeros([0, 5], (Kind::Float, CPU))),
        param(&Tensor::zeros([5, 0], (Kind::Float, CPU))),
        param(&Tensor::from(2.0f32)),
        Tensor::zeros([2, 3], (Kind::Float, CPU)).set_requires_grad(true),
    ];
    let report = norms_by(&empties, &Scope::leading_dimension().telemetry()).unwrap();
    let rows: Vec<usize> = (0..4).map(|i| report.of_tensor(i).unwrap().len()).collect();
    assert_eq!((rows, norms(&report)), (vec![0, 5, 1, 2], vec![0.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0]));
}

/// A parameter of each sort: contiguous, without gradient, with NaN, of another kind and transposed, with gaps.
fn mixed() -> Vec<Tensor> {
    let transposed =
        Tensor::from_slice2(&[[30.0f32, 0.0, -0.5], [40.0, 1.0, 0.25]]).to_kind(Kind::Half).transpose(0, 1);
    let gaps = Tensor::from_slice2(&[[6.0f32, 9.0], [8.0, 9.0]]).narrow(1, 0, 1);
    vec![
        param(&tensor(&[3.0, 4.0])),
        without_gradient(),
        param(&tensor(&[f32::NAN, f32::NEG_INFINITY, 0.5])),
        param(&transposed),
        param(&gaps),
    ]
}

/// Those there are.
fn mixed_grads(params: &[Tensor]) -> Vec<Vec<f64>> {
    [0, 2, 3, 4].iter().map(|&index: &usize| grad(&params[index])).collect()
}

/// Each gradient of [`mixed`] in the order of its shape, as slices.
const BY_SHAPE: [&[f32]; 5] =
    [&[3.0, 4.0], &[], &[f32::NAN, f32::NEG_INFINITY, 0.5], &[30.0, 40.0, 0.0, 1.0, -0.5, 0.25], &[6.0, 8.0]];

#[test]
fn the_factor_of_each_group_alone() {
    let (params, max_norms) = (mixed(), [Some(2.5), None, Some(3.0)]);
    let before = mixed_grads(&params);
    let clip = ClipNorm::new(2.5).loss_scale(2.0);
    let rows_without = without_gradient().size().first().map_or(1, |&rows| rows as usize);
    let rows = [2, rows_without, 3, 3, 2];
    for clip in [ClipNorm::new(2.5), clip, clip.nonfinite(NonFinite::Zero), clip.nonfinite(NonFinite::Propagate)] {
        for (scope, explicit) in [
            (Scope::groups(&[0, 1, 0, 2, 0]).max_norms(&max_norms), None),
            (Scope::leading_dimension(), Some(Scope::rows(&rows))),
            (Scope::rows(&rows), None),
        ] {
            // f32 slices stand for the half: its values are exact in both.
            let expected = cpu::clip_coef_by(&BY_SHAPE, &explicit.unwrap_or(scope), clip).unwrap();
            let report = clip_coef_by(&params, &scope, clip).unwrap();
            assert_eq!(format!("{report:?}"), format!("{expected:?}"));
        }
    }
    let report = clip_coef_by(&params, &Scope::per_tensor().telemetry(), 2.5).unwrap();
    let multipliers: Vec<f64> = report.groups.iter().map(|group| group.multiplier).collect();
    assert_eq!((multipliers[..3].to_vec(), multipliers[4]), (vec![0.5, 1.0, 1.0], 0.25));
    assert_eq!((report.groups[2].first_nonfinite, report.num_written()), (Some(2), 0));

    let error = clip_coef_by(&params, &Scope::per_tensor(), ClipNorm::new(1.0).nonfinite(NonFinite::Error));
    assert!(matches!(error, Err(Error::NonFinite { tensor: Some(2), .. })), "{error:?}");
    let error = clip_coef_by(&params, &Scope::per_tensor(), -1.0);
    assert!(matches!(error, Err(Error::InvalidThreshold { .. })), "{error:?}");
    let wrong = Error::UnevenRows { tensor: 3, numel: 6, rows: 4 };
    assert_eq!(clip_coef_by(&params, &Scope::rows(&[1, 1, 1, 4, 1]), 1.0).unwrap_err(), wrong);
    assert!(same(&mixed_grads(&params), &before));
    // A gradient of two parameters counts as that of the first.
    let shared = tensor(&[3.0, 4.0]);
    let report = clip_coef_by(&[param(&shared), param(&shared)], &Scope::per_tensor(), 2.5).unwrap();
    assert_eq!((report.groups[0].multiplier, report.groups[1].multiplier), (0.5, 1.0));
}

#[test]
fn value_clips_count_for_each_group() {
    let rows_without = without_gradient().size().first().map_or(1, |&rows| rows as usize);
    let rows = [2, rows_without, 3, 3, 2];
    for (scope, explicit) in [
        (Scope::per_tensor(), None),
        (Scope::groups(&[1, 0, 1, 0, 0]), None),
        (Scope::global(), None),
        (Scope::leading_dimension(), Some(Scope::rows(&rows))),
        (Scope::rows(&rows), None),
    ] {
        for clip in [ClipValue::new(1.0), ClipValue::between(-5.0, 0.5), ClipValue::new(f64::INFINITY)] {
            let (params, mut on_slices) = (mixed(), BY_SHAPE.map(<[f32]>::to_vec));
            let addresses: Vec<_> = [0, 2, 3, 4].iter().map(|&index: &usize| params[index].grad().data_ptr()).collect();
            let expected = cpu::clip_grad_value_by(&mut on_slices, &explicit.unwrap_or(scope), clip).unwrap();
            assert_eq!(clip_grad_value_by(&params, &scope, clip).unwrap(), expected, "{scope:?} {clip:?}");
            for index in [0, 2, 3, 4] {
                let expected: Vec<f64> = on_slices[index].iter().copied().map(f64::from).collect();
                assert_eq!(format!("{:?}", grad(&params[index])), format!("{expected:?}"), "{scope:?} {clip:?}");
            }
            let after: Vec<_> = [0, 2, 3, 4].iter().map(|&index: &usize| params[index].grad().data_ptr()).collect();
            assert_eq!(after, addresses, "in place");
        }
    }
    let params = mixed();
    let before = mixed_grads(&params);
    let max_norms = [None; 5];
    for (scope, expected) in [
        (Scope::per_tensor().telemetry(), Error::ScopeForNorms { option: "telemetry" }),
        (Scope::per_tensor().max_norms(&max_norms), Error::ScopeForNorms { option: "max_norms" }),
        (Scope::groups(&[0, 1, 0]), Error::ScopeLength { what: "groups", expected: 5, got: 3 }),
        (Scope::rows(&[1, 7, 2, 2, 2]), Error::UnevenRows { tensor: 2, numel: 3, rows: 2 }),
    ] {
        assert_eq!(clip_grad_value_by(&params, &scope, 1.0).unwrap_err(), expected);
    }
    let error = clip_grad_value_by(&params, &Scope::per_tensor(), f64::NAN);
    assert!(matches!(error, Err(Error::InvalidThreshold { .. })), "{error:?}");
    assert!(same(&mixed_grads(&params), &before));
    let shared = tensor(&[3.0, 4.0]);
    let overlapping = [param(&shared), param(&shared.narrow(0, 1, 1))];
    let overlap = Error::Overlap { first: 0, second: 1 };
    assert_eq!(clip_grad_value_by(&overlapping, &Scope::per_tensor(), 1.0).unwrap_err(), overlap);
    assert_eq!(values(&shared), [3.0, 4.0]);
    let report = clip_grad_value_by(&[param(&shared), param(&shared)], &Scope::per_tensor(), 1.0).unwrap();
    assert_eq!((report.groups[0].clipped, report.groups[1].numel), (2, 0));
}

/// On a GPU: what the adapter adds to the CUDA back end, which has tests of its own.
#[cfg(all(feature = "cuda", unix))]
mod gpu {
    use super::*;
    use std::io::Write;
    use std::sync::OnceLock;
    use tch::no_grad;

    /// The first GPU, if libtorch has one.
    fn device() -> Option<Device> {
        static FOUND: OnceLock<Result<(), String>> = OnceLock::new();
        let found = FOUND.get_or_init(|| {
            // Loaded before the first test, where it is (tests/tch_suite/loading.rs).
            gradclip::tch::load_cuda().map_err(|error| error.to_string())?;
            if tch::Cuda::is_available() {
                Ok(())
            } else {
                Err("libtorch finds no GPU".into())
            }
        });
        if let Err(why) = found {
            let required = std::env::var_os("GRADCLIP_REQUIRE_GPU").is_some_and(|value| value == "1");
            assert!(!required, "GRADCLIP_REQUIRE_GPU=1, and libtorch can use none: {why}");
            static ONCE: std::sync::Once = std::sync::Once::new();
            ONCE.call_once(|| drop(writeln!(std::io::stderr(), "SKIPPED, all tests of tch on a GPU: {why}")));
            return None;
        }
        Some(Device::Cuda(0))
    }

    #[test]
    fn the_same_bits_as_on_the_cpu() {
        let Some(device) = device() else { return };
        tch::manual_seed(1);
        for count in [1, 40, 400] {
            let grads: Vec<Tensor> = (0..count)
                .map(|i| {
                    let grad = Tensor::randn([1 + i % 7, 3, 1 + 40 * (i % 11)], (Kind::Float, CPU));
                    let grad = grad.to_kind(KINDS[i as usize % 4]);
                    match i % 5 {
                        3 => grad.permute([2, 0, 1]),
                        4 => grad.narrow(1, 0, 2), // with gaps
                        _ => grad,
                    }
                })
                .collect();
            // A copy keeps the order of dimensions, and has no gaps.
            let mut theirs: Vec<Tensor> = grads.iter().map(|grad| param(&grad.to_device(device))).collect();
            let gaps = param(&Tensor::randn([9, 9], (Kind::Float, CPU)).to_device(device).narrow(1, 2, 3));
            let mut ours: Vec<Tensor> = theirs.iter().map(|theirs| param(&theirs.grad().to_device(CPU))).collect();
            ours.push(param(&gaps.grad().to_device(CPU)));
            theirs.push(gaps);
            let addresses: Vec<_> = theirs.iter().map(|param| param.grad().data_ptr()).collect();
            for clip in [ClipNorm::new(1e6), ClipNorm::new(2.0), ClipNorm::new(1.0).torch_compatible()] {
                let expected = clip_grad_norm(&ours, clip).unwrap();
                assert_eq!(clip_grad_norm(&theirs, clip).unwrap(), expected);
                assert_same(&theirs, &ours);
            }
            let expected = clip_grad_value(&ours, ClipValue::between(-1e-3, 2e-3)).unwrap();
            assert_eq!(clip_grad_value(&theirs, ClipValue::between(-1e-3, 2e-3)).unwrap(), expected);
            assert_same(&theirs, &ours);
            assert_eq!(theirs.iter().map(|param| param.grad().data_ptr()).collect::<Vec<_>>(), addresses, "in place");
        }
    }

    fn assert_same(theirs: &[Tensor], ours: &[Tensor]) {
        for (theirs, ours) in theirs.iter().zip(ours) {
            assert_eq!(bits_of(&theirs.grad().to_device(CPU).contiguous()), bits_of(&ours.grad().contiguous()));
        }
    }

    /// Nothing waits between the product that makes the gradients, the clip, and what reads them.
    #[test]
    fn in_the_order_of_libtorchs_stream() {
        let Some(device) = device() else { return };
        let left = Tensor::ones([4096, 4096], (Kind::Float, device)) / 4096.0;
        for _ in 0..20 {
            let weight = Tensor::zeros([4096, 4096], (Kind::Float, device)).set_requires_grad(true);
            let mut product = left.shallow_clone();
            for _ in 0..10 {
                product = product.matmul(&left); // 1 / 4096 everywhere
            }
            (&weight * product * 8192.0).sum(Kind::Float).backward(); // 2 everywhere: a norm of 8192
            let params = [weight.shallow_clone()];
            let clipped = gradclip::tch::clip_grad_norm(&params, 4096.0).unwrap();
            let after = no_grad(|| weight.grad() + 0.0);
            assert_eq!(clipped.wait().unwrap().total_norm, 8192.0);
            assert!(clipped.pending().is_some());
            assert_eq!((after.min().double_value(&[]), after.max().double_value(&[])), (1.0, 1.0));
        }
    }

    #[test]
    fn scopes_give_the_same_bits_as_on_the_cpu() {
        let Some(device) = device() else { return };
        tch::manual_seed(2);
        let grads = [
            Tensor::randn([40, 30], (Kind::Float, CPU)),
            Tensor::randn([7, 5], (Kind::Half, CPU)).transpose(0, 1),
            Tensor::randn([3, 9], (Kind::Double, CPU)),
        ];
        let scopes =
            [Scope::per_tensor().telemetry(), Scope::groups(&[0, 1, 1, 0]), Scope::leading_dimension().telemetry()];
        for scope in scopes {
            let [ours, theirs] = [CPU, device].map(|device| -> Vec<Tensor> {
                grads.iter().map(|grad| param(&grad.to_device(device))).chain([without_gradient()]).collect()
            });
            assert_eq!(norms_by(&theirs, &scope).unwrap(), norms_by(&ours, &scope).unwrap());
            let expected = clip_grad_norm_by(&ours, &scope, 2.0).unwrap();
            assert_eq!(clip_grad_norm_by(&theirs, &scope, 2.0).unwrap(), expected);
            assert_same(&theirs[..3], &ours[..3]);
            assert_eq!(clip_coef_by(&theirs, &scope, 1.0).unwrap(), clip_coef_by(&ours, &scope, 1.0).unwrap());
            let handed = gradclip::tch::clip_coef_by(&theirs, &scope, 1.0).unwrap();
            assert!(handed.pending().unwrap().multiplier_f32_address(0).is_some());
            let scope = if scope == Scope::groups(&[0, 1, 1, 0]) { scope } else { Scope::leading_dimension() };
            let expected = clip_grad_value_by(&ours, &scope, 0.01).unwrap();
            assert_eq!(clip_grad_value_by(&theirs, &scope, 0.01).unwrap(), expected);
            assert_same(&theirs[..3], &ours[..3]);
        }
    }

    #[test]
    fn gradients_on_the_cpu_and_on_a_gpu_are_refused() {
        let Some(device) = device() else { return };
        let list = [without_gradient(), param(&tensor(&[3.0])), param(&tensor(&[4.0]).to_device(device))];
        let error = clip_grad_norm(&list, 1.0).unwrap_err();
        assert!(matches!(error, Error::WrongDevice { tensor: 2, .. }), "{error}");
        assert_eq!((grad(&list[1]), grad(&list[2])), (vec![3.0], vec![4.0]));
    }

    #[test]
    fn policies_and_reports_by_the_index_of_the_parameter() {
        let Some(device) = device() else { return };
        let list = [
            without_gradient(),
            param(&tensor(&[3.0]).to_device(device)),
            param(&tensor(&[f32::NAN]).to_device(device)),
        ];
        assert_eq!(clip_grad_norm(&list, 1.0).unwrap().first_nonfinite, Some(2));
        let error = clip_grad_norm(&list, ClipNorm::new(1.0).nonfinite(NonFinite::Error)).unwrap_err();
        assert!(matches!(error, Error::NonFinite { tensor: Some(2), .. }), "{error}");
        assert_eq!(grad(&list[1]), [3.0]);
        clip_grad_norm(&list, ClipNorm::new(1.0).nonfinite(NonFinite::Zero)).unwrap();
        assert_eq!((grad(&list[1]), grad(&list[2])), (vec![0.0], vec![0.0]));
    }
}
