//! The candle adapter on CPU tensors.
#![cfg(feature = "candle")]
#![allow(clippy::unwrap_used, missing_docs)]

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Storage, Tensor, Var};
use gradclip::{cpu, ClipNorm, ClipValue, Error, NonFinite, NormReport, NormType, Scope, ScopedReport, ValueReport};

fn total_norm(vars: &[Var], grads: &GradStore, norm_type: NormType) -> Result<NormReport, Error> {
    gradclip::candle::total_norm(vars, grads, norm_type)?.wait()
}

fn clip_grad_norm(vars: &[Var], grads: &mut GradStore, clip: impl Into<ClipNorm>) -> Result<NormReport, Error> {
    gradclip::candle::clip_grad_norm(vars, grads, clip)?.wait()
}

fn clip_grad_value(vars: &[Var], grads: &mut GradStore, clip: impl Into<ClipValue>) -> Result<ValueReport, Error> {
    gradclip::candle::clip_grad_value(vars, grads, clip)?.wait()
}

fn norms_by(vars: &[Var], grads: &GradStore, scope: &Scope<'_>) -> Result<ScopedReport, Error> {
    gradclip::candle::norms_by(vars, grads, scope, NormType::L2)?.wait()
}

fn clip_grad_norm_by(
    vars: &[Var],
    grads: &mut GradStore,
    scope: &Scope<'_>,
    clip: impl Into<ClipNorm>,
) -> Result<ScopedReport, Error> {
    gradclip::candle::clip_grad_norm_by(vars, grads, scope, clip)?.wait()
}

fn clip_coef_by(
    vars: &[Var],
    grads: &GradStore,
    scope: &Scope<'_>,
    clip: impl Into<ClipNorm>,
) -> Result<ScopedReport, Error> {
    gradclip::candle::clip_coef_by(vars, grads, scope, clip)?.wait()
}

fn clip_grad_value_by(
    vars: &[Var],
    grads: &mut GradStore,
    scope: &Scope<'_>,
    clip: impl Into<ClipValue>,
) -> Result<ScopedReport<ValueReport>, Error> {
    gradclip::candle::clip_grad_value_by(vars, grads, scope, clip)?.wait()
}

fn multipliers(report: &ScopedReport) -> Vec<f64> {
    report.groups.iter().map(|group| group.multiplier).collect()
}

fn norms(report: &ScopedReport) -> Vec<f64> {
    report.groups.iter().map(|group| group.total_norm).collect()
}

fn var(values: &[f32]) -> Var {
    Var::new(values, &Device::Cpu).unwrap()
}

/// A store in which each variable's gradient is the given tensor.
fn store(vars: &[Var], grads: &[Tensor]) -> GradStore {
    let mut store = var(&[1.0]).sum_all().unwrap().backward().unwrap();
    for (var, grad) in vars.iter().zip(grads) {
        store.insert(var, grad.clone());
    }
    store
}

fn tensor(values: &[f32]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap()
}

fn values(store: &GradStore, var: &Var) -> Vec<f64> {
    store.get(var).unwrap().flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

fn storage_address(tensor: &Tensor) -> usize {
    std::ptr::from_ref::<Storage>(&tensor.storage_and_layout().0) as usize
}

#[test]
fn a_training_step() {
    let (weight, bias) = (var(&[3.0]), var(&[4.0]));
    let vars = [weight.clone(), bias.clone()];
    let loss = ((weight.sqr().unwrap() + bias.sqr().unwrap()).unwrap() * 0.5).unwrap().sum_all().unwrap();
    let mut grads = loss.backward().unwrap();
    let before = storage_address(grads.get(&weight).unwrap());
    assert_eq!(total_norm(&vars, &grads, NormType::L1).unwrap().total_norm, 7.0);
    let report = clip_grad_norm(&vars, &mut grads, 2.5).unwrap();
    assert_eq!((report.total_norm, report.clip_coef, report.written), (5.0, 0.5, true));
    assert_eq!((values(&grads, &weight), values(&grads, &bias)), (vec![1.5], vec![2.0]));
    assert_eq!(storage_address(grads.get(&weight).unwrap()), before, "in place");
    let report = clip_grad_value(&vars, &mut grads, 1.75).unwrap();
    assert_eq!((report.clipped, values(&grads, &bias)), (1, vec![1.75]));
}

/// Split, with a loss scale, and handed on: as on slices.
#[test]
fn a_given_norm_a_loss_scale_and_the_coefficient_alone() {
    use gradclip::candle::{clip_coef, clip_with_norm, total_norm};
    let (weight, bias, view) = (var(&[0.0]), var(&[0.0]), var(&[0.0]));
    let vars = [weight.clone(), bias.clone(), view];
    let transposed = tensor(&[0.0, 0.0, 0.0, 0.0]).reshape((2, 2)).unwrap().t().unwrap();
    let mut grads = store(&vars, &[tensor(&[3.0]), tensor(&[4.0]), transposed]);
    let norm = total_norm(&vars, &grads, NormType::L2).unwrap();
    let report = clip_with_norm(&vars[..1], &mut grads, &norm, 2.5).unwrap().wait().unwrap();
    assert_eq!((report.total_norm, report.clip_coef, report.written), (5.0, 0.5, true));
    let report = clip_with_norm(&vars[1..], &mut grads, 8.0, 4.0).unwrap().wait().unwrap();
    assert_eq!((report.total_norm, report.clip_coef), (8.0, 0.5));
    assert_eq!((values(&grads, &weight), values(&grads, &bias)), (vec![1.5], vec![2.0]));
    assert!(clip_with_norm(&vars, &mut grads, -1.0, 1.0).is_err());
    // SAFETY: refused, as the gradients are on the CPU.
    let on_a_gpu = unsafe { gradclip::TotalNorm::at(64) };
    assert!(matches!(clip_with_norm(&vars, &mut grads, on_a_gpu, 1.0), Err(Error::ThresholdAddress { .. })));

    let clip = ClipNorm::new(f64::INFINITY).loss_scale(0.5);
    let report = clip_coef(&vars, &grads, clip).unwrap().wait().unwrap();
    assert_eq!((report.total_norm, report.multiplier, report.written), (5.0, 2.0, false));
    assert_eq!(values(&grads, &weight), [1.5]);
    assert!(clip_grad_norm(&vars, &mut grads, clip).unwrap().written);
    assert_eq!((values(&grads, &weight), values(&grads, &bias)), (vec![3.0], vec![4.0]));
}

#[test]
fn every_dtype_and_mixtures() {
    let vars = [var(&[0.0]), var(&[0.0]), var(&[0.0]), var(&[0.0])];
    let dtypes = [DType::F32, DType::F64, DType::F16, DType::BF16];
    let grads: Vec<Tensor> = dtypes.iter().map(|&dtype| tensor(&[2.0, -2.0]).to_dtype(dtype).unwrap()).collect();
    let mut grads = store(&vars, &grads);
    let report = clip_grad_norm(&vars, &mut grads, 32f64.sqrt() / 2.0).unwrap();
    assert_eq!(report.total_norm, 32f64.sqrt());
    for var in &vars {
        assert_eq!(values(&grads, var), [1.0, -1.0]);
    }
}

#[test]
fn only_the_given_variables_and_only_those_with_a_gradient() {
    let (with, without, other) = (var(&[0.0]), var(&[0.0]), var(&[0.0]));
    let mut grads = store(&[with.clone(), other.clone()], &[tensor(&[3.0]), tensor(&[400.0])]);
    let report = clip_grad_norm(&[without.clone(), with.clone()], &mut grads, 1.0).unwrap();
    assert_eq!(report.total_norm, 3.0);
    assert_eq!((values(&grads, &with), values(&grads, &other)), (vec![1.0], vec![400.0]));
    assert!(grads.get(&without).is_none());
    assert_eq!(clip_grad_norm(&[], &mut grads, 1.0).unwrap().total_norm, 0.0);
}

#[test]
fn views_that_are_not_contiguous_are_replaced() {
    let weight = var(&[0.0]);
    let base = Tensor::new(&[[3.0f32, 9.0], [4.0, 9.0]], &Device::Cpu).unwrap();
    let column = base.t().unwrap().narrow(0, 0, 1).unwrap();
    let transposed = base.t().unwrap();
    for (grad, norm) in [(column, 5.0), (transposed, (9.0 + 16.0 + 162f64).sqrt())] {
        let expected: Vec<f64> = grad.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap();
        let mut grads = store(std::slice::from_ref(&weight), &[grad]);
        let report = clip_grad_norm(std::slice::from_ref(&weight), &mut grads, norm / 2.0).unwrap();
        assert!((report.total_norm / norm - 1.0).abs() < 1e-12);
        for (got, x) in values(&grads, &weight).iter().zip(&expected) {
            assert!((got - x / 2.0).abs() < 1e-6);
        }
    }
    assert_eq!(base.to_vec2::<f32>().unwrap(), [[3.0, 9.0], [4.0, 9.0]], "the memory behind the view is untouched");
}

#[test]
fn a_shared_view_that_is_not_contiguous_is_replaced_for_both() {
    let vars = [var(&[0.0]), var(&[0.0])];
    let base = Tensor::new(&[[3.0f32, 0.0], [4.0, 0.0]], &Device::Cpu).unwrap();
    let column = base.t().unwrap().narrow(0, 0, 1).unwrap().t().unwrap();
    assert!(!column.is_contiguous());
    let mut grads = store(&vars, &[column.clone(), column]);
    assert_eq!(clip_grad_norm(&vars, &mut grads, 2.5).unwrap().total_norm, 5.0, "counted once");
    assert_eq!((values(&grads, &vars[0]), values(&grads, &vars[1])), (vec![1.5, 2.0], vec![1.5, 2.0]));
    assert_eq!(storage_address(grads.get(&vars[0]).unwrap()), storage_address(grads.get(&vars[1]).unwrap()));
}

#[test]
fn a_contiguous_part_of_a_larger_storage_is_clipped_alone() {
    let weight = var(&[0.0]);
    let base = tensor(&[9.0, 3.0, 4.0, 9.0]);
    let mut grads = store(std::slice::from_ref(&weight), &[base.narrow(0, 1, 2).unwrap()]);
    clip_grad_norm(std::slice::from_ref(&weight), &mut grads, 2.5).unwrap();
    assert_eq!(values(&grads, &weight), [1.5, 2.0]);
    assert_eq!(base.to_vec1::<f32>().unwrap(), [9.0, 1.5, 2.0, 9.0]);
}

#[test]
fn a_shared_gradient_is_counted_and_clipped_once() {
    let vars = [var(&[0.0]), var(&[0.0]), var(&[0.0])];
    let shared = tensor(&[3.0, 4.0]);
    for verb in [0, 1] {
        let shared = shared.copy().unwrap();
        let mut grads = store(&vars, &[shared.clone(), shared.clone(), tensor(&[12.0])]);
        if verb == 0 {
            assert_eq!(clip_grad_norm(&vars, &mut grads, 6.5).unwrap().total_norm, 13.0);
            assert_eq!(values(&grads, &vars[1]), [1.5, 2.0]);
        } else {
            assert_eq!(clip_grad_value(&vars, &mut grads, 3.5).unwrap().clipped, 2);
            assert_eq!(values(&grads, &vars[1]), [3.0, 3.5]);
        }
    }
    // A part of another gradient is not the same one: refused, by the numbers of the variables.
    let mut grads = store(&vars[1..], &[shared.clone(), shared.narrow(0, 1, 1).unwrap()]);
    let error = clip_grad_norm(&vars, &mut grads, 1.0).unwrap_err();
    assert_eq!(error, Error::Overlap { first: 1, second: 2 });
    assert_eq!(clip_grad_value(&vars, &mut grads, 1.0).unwrap_err(), Error::Overlap { first: 1, second: 2 });
    assert_eq!(shared.to_vec1::<f32>().unwrap(), [3.0, 4.0]);
}

#[test]
fn bad_input_touches_nothing() {
    let vars = [var(&[0.0]), var(&[0.0]), var(&[0.0])];
    let good = tensor(&[30.0, 40.0]);
    let integer = Tensor::new(&[7u32], &Device::Cpu).unwrap();
    let mut grads = store(&[vars[0].clone(), vars[2].clone()], &[good.clone(), integer]);
    let unsupported = Error::UnsupportedDtype { tensor: 2, got: "u32".into() };
    assert_eq!(clip_grad_norm(&vars, &mut grads, 1.0).unwrap_err(), unsupported);
    assert_eq!(clip_grad_value(&vars, &mut grads, 1.0).unwrap_err(), unsupported);
    assert_eq!(total_norm(&vars, &grads, NormType::L2).unwrap_err(), unsupported);
    let threshold = clip_grad_norm(&vars[..1], &mut grads, -1.0).unwrap_err();
    assert!(matches!(threshold, Error::InvalidThreshold { name: "max_norm", .. }));
    assert!(clip_grad_value(&vars[..1], &mut grads, ClipValue::between(2.0, 1.0)).is_err());
    assert_eq!(good.to_vec1::<f32>().unwrap(), [30.0, 40.0]);
    // As an error of candle's, for `?` in its functions.
    let framework: candle_core::Error = threshold.into();
    assert!(framework.to_string().contains("max_norm"));
}

#[test]
fn policies_and_the_index_of_the_variable() {
    let vars = [var(&[0.0]), var(&[0.0]), var(&[0.0])];
    for (policy, expected) in [
        (NonFinite::Skip, [f64::INFINITY, 3.0]),
        (NonFinite::Zero, [0.0, 0.0]),
        (NonFinite::Propagate, [f64::NAN, 0.0]),
    ] {
        let mut grads = store(&[vars[2].clone(), vars[0].clone()], &[tensor(&[f32::INFINITY]), tensor(&[3.0])]);
        let report = clip_grad_norm(&vars, &mut grads, ClipNorm::new(1.0).nonfinite(policy)).unwrap();
        assert_eq!((report.total_norm, report.first_nonfinite), (f64::INFINITY, Some(2)));
        let got = [values(&grads, &vars[2])[0], values(&grads, &vars[0])[0]];
        assert!(got.iter().zip(expected).all(|(a, b)| *a == b || a.is_nan() && b.is_nan()), "{policy:?}: {got:?}");
    }
    let mut grads = store(&vars[1..2], &[tensor(&[f32::NAN])]);
    let error = clip_grad_norm(&vars, &mut grads, ClipNorm::new(1.0).nonfinite(NonFinite::Error)).unwrap_err();
    assert!(matches!(error, Error::NonFinite { tensor: Some(1), .. }));
    let report = clip_grad_value(&vars, &mut grads, 1.0).unwrap();
    assert_eq!((report.nan, report.first_nonfinite, report.written), (1, Some(1), false));
}

#[test]
fn empty_gradients_of_any_shape() {
    // From a backward pass: candle refuses operations in place on a gradient of this shape.
    let (empty, full) = (Var::zeros((5, 0), DType::F32, &Device::Cpu).unwrap(), var(&[3.0, 4.0]));
    let loss = (empty.sum_all().unwrap() + (full.sqr().unwrap() * 0.5).unwrap().sum_all().unwrap()).unwrap();
    for vars in [[full.clone(), empty.clone()], [empty.clone(), full.clone()]] {
        let mut grads = loss.backward().unwrap();
        assert_eq!(clip_grad_norm(&vars, &mut grads, 2.5).unwrap().total_norm, 5.0);
        assert_eq!(clip_grad_value(&vars, &mut grads, 1.75).unwrap().clipped, 1);
        assert_eq!(values(&grads, &full), [1.5, 1.75]);
    }
    // Views that start where their storage ends, or behind it.
    let base = Tensor::ones((4, 6), DType::F32, &Device::Cpu).unwrap();
    let views = [
        base.narrow(0, 4, 0).unwrap(),
        base.narrow(1, 6, 0).unwrap(),
        base.narrow(0, 4, 0).unwrap().narrow(1, 3, 3).unwrap(),
        base.narrow(0, 4, 0).unwrap().narrow(1, 6, 0).unwrap(),
        base.t().unwrap().narrow(0, 6, 0).unwrap(),
    ];
    for view in views {
        let vars = [var(&[0.0]), var(&[0.0])];
        let mut grads = store(&vars, &[view, tensor(&[3.0, 4.0])]);
        assert_eq!(total_norm(&vars, &grads, NormType::L2).unwrap().total_norm, 5.0);
        assert_eq!(clip_grad_norm(&vars, &mut grads, 2.5).unwrap().total_norm, 5.0);
        assert_eq!(clip_grad_value(&vars, &mut grads, 1.75).unwrap().clipped, 1);
    }
}

#[test]
fn a_variable_listed_twice_counts_once() {
    let weight = var(&[0.0]);
    let base = Tensor::new(&[[3.0f32, 9.0], [4.0, 9.0]], &Device::Cpu).unwrap();
    for grad in [tensor(&[3.0, 4.0]), base.narrow(1, 0, 1).unwrap()] {
        let mut grads = store(std::slice::from_ref(&weight), &[grad]);
        let report = clip_grad_norm(&[weight.clone(), weight.clone()], &mut grads, 2.5).unwrap();
        assert_eq!((report.total_norm, values(&grads, &weight)), (5.0, vec![1.5, 2.0]));
    }
}

#[test]
fn every_other_dtype_is_refused() {
    let vars = [var(&[0.0]), var(&[0.0])];
    for dtype in [DType::U8, DType::U32, DType::I64, DType::I32, DType::I16, DType::F8E4M3] {
        let mut grads = store(&vars, &[tensor(&[30.0]), Tensor::zeros(3, dtype, &Device::Cpu).unwrap()]);
        let refused = Error::UnsupportedDtype { tensor: 1, got: dtype.as_str().into() };
        assert_eq!(clip_grad_norm(&vars, &mut grads, 1.0).unwrap_err(), refused);
        assert_eq!(clip_grad_value(&vars, &mut grads, 1.0).unwrap_err(), refused);
        assert_eq!(values(&grads, &vars[0]), [30.0]);
    }
}

/// Whether `work` ends. The limit is there only to have a message instead of a hang.
fn ends(work: impl FnOnce() + Send + 'static) -> bool {
    let (done, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        work();
        done.send(()).unwrap();
    });
    wait.recv_timeout(std::time::Duration::from_secs(120)).is_ok()
}

/// Gradients that are parts of one flat buffer, clipped from two threads: each reads while the other wants to write.
#[test]
fn two_threads_on_parts_of_one_storage() {
    assert!(ends(|| {
        let flat = Tensor::ones(8 * 2000, DType::F32, &Device::Cpu).unwrap();
        let parts: Vec<Tensor> = (0..2000).map(|i| flat.narrow(0, 8 * i, 8).unwrap()).collect();
        std::thread::scope(|scope| {
            for half in parts.chunks(1000) {
                scope.spawn(move || {
                    let vars: Vec<Var> = half.iter().map(|_| var(&[0.0])).collect();
                    let mut grads = store(&vars, half);
                    for i in 0..100 {
                        clip_grad_norm(&vars, &mut grads, if i % 2 == 0 { 0.5 } else { 0.4 }).unwrap();
                        clip_grad_value(&vars, &mut grads, 0.3).unwrap();
                    }
                });
            }
        });
    }));
}

/// In one rayon pool, one job clips and others read the same gradient: a worker that waits for its own work must not
/// take up one of those, which would wait for the lock that it holds.
#[test]
fn reading_a_gradient_in_the_pool_that_clips_it() {
    assert!(ends(|| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(8).build().unwrap();
        let vars = [var(&[0.0])];
        let grad = Tensor::ones(1 << 20, DType::F32, &Device::Cpu).unwrap();
        let mut grads = store(&vars, std::slice::from_ref(&grad));
        let read = || drop(std::hint::black_box(grad.narrow(0, 0, 1).unwrap().to_vec1::<f32>().unwrap()));
        pool.install(|| {
            for i in 0..40 {
                let clip = || {
                    for j in 1..10 {
                        clip_grad_norm(&vars, &mut grads, 10.0 / f64::from(i * 10 + j)).unwrap();
                    }
                };
                rayon::join(clip, || rayon::scope(|scope| (0..2000).for_each(|_| scope.spawn(|_| read()))));
            }
        });
    }));
}

/// Every variable has its place in the lists of the scope and of the report, with a gradient or without.
#[test]
fn scopes_count_variables() {
    let vars = [var(&[0.0]), var(&[0.0; 3]), var(&[0.0]), var(&[0.0])];
    let with = [vars[0].clone(), vars[2].clone(), vars[3].clone()];
    let make = || store(&with, &[tensor(&[3.0, 4.0]), tensor(&[f32::NAN, 0.0]), tensor(&[30.0])]);
    let mut grads = make();
    let report = clip_grad_norm_by(&vars, &mut grads, &Scope::per_tensor().telemetry(), 1.0).unwrap();
    assert_eq!((norms(&report)[..2].to_vec(), norms(&report)[3]), (vec![5.0, 0.0], 30.0));
    assert_eq!((report.groups[2].first_nonfinite, report.tensors[2].nonfinite), (Some(2), 1));
    assert_eq!((report.tensors[1].norm, report.tensors[1].zeros, report.tensors[2].zeros), (0.0, 0, 1));
    assert_eq!(
        (values(&grads, &vars[0]), values(&grads, &vars[3])),
        ([0.6f32, 0.8].map(f64::from).to_vec(), vec![1.0])
    );
    assert!(values(&grads, &vars[2])[0].is_nan());
    // The second group has only the variable without gradient.
    let mut grads = make();
    let max_norms = [Some(2.5), None, Some(3.0)];
    let scope = Scope::groups(&[0, 1, 0, 2]).max_norms(&max_norms);
    let error =
        clip_grad_norm_by(&vars, &mut grads, &scope, ClipNorm::new(1.0).nonfinite(NonFinite::Error)).unwrap_err();
    assert!(matches!(error, Error::NonFinite { tensor: Some(2), .. }), "{error}");
    let report = clip_grad_norm_by(&vars, &mut grads, &scope, 1.0).unwrap();
    assert_eq!((norms(&report)[1..].to_vec(), report.groups[0].first_nonfinite), (vec![0.0, 30.0], Some(2)));
    assert_eq!((values(&grads, &vars[0]), values(&grads, &vars[3])), (vec![3.0, 4.0], vec![3.0]));
    assert_eq!(norms_by(&vars, &grads, &Scope::groups(&[0, 3, 3, 3])).unwrap().groups.len(), 4);
    // Errors by the numbers of the variables.
    for (scope, expected) in [
        (Scope::groups(&[0, 1, 0]), Error::ScopeLength { what: "groups", expected: 4, got: 3 }),
        (Scope::groups(&[0, 0, 0, 9]), Error::NoSuchGroup { tensor: 3, group: 9, groups: 4 }),
        (Scope::rows(&[1, 7, 1, 2]), Error::UnevenRows { tensor: 3, numel: 1, rows: 2 }),
    ] {
        assert_eq!(clip_grad_norm_by(&vars, &mut grads, &scope, 1.0).unwrap_err(), expected);
        assert_eq!(norms_by(&vars, &grads, &scope).unwrap_err(), expected);
    }
    assert!(clip_grad_norm_by(&vars, &mut grads, &Scope::global(), -1.0).is_err());
    let shared = tensor(&[3.0, 4.0]);
    let mut grads = store(&vars[1..], &[shared.clone(), shared.narrow(0, 1, 1).unwrap()]);
    let overlap = Error::Overlap { first: 1, second: 2 };
    assert_eq!(clip_grad_norm_by(&vars, &mut grads, &Scope::per_tensor(), 1.0).unwrap_err(), overlap);
    // A gradient of two variables counts as that of the first.
    let mut grads = store(&vars[1..], &[shared.clone(), shared.clone()]);
    let report = clip_grad_norm_by(&vars, &mut grads, &Scope::per_tensor(), 2.5).unwrap();
    assert_eq!((norms(&report), shared.to_vec1::<f32>().unwrap()), (vec![0.0, 5.0, 0.0, 0.0], vec![1.5, 2.0]));
    assert_eq!(clip_grad_norm_by(&[], &mut grads, &Scope::per_tensor(), 1.0).unwrap().groups, []);
}

#[test]
fn rows_by_the_shapes_of_the_gradients() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let matrix = Tensor::new(&[[3.0f32, 4.0], [0.3, 0.4], [6.0, 8.0]], &Device::Cpu).unwrap();
    let scalar = Tensor::new(5.0f32, &Device::Cpu).unwrap();
    let without = Var::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
    let vars = [var(&[0.0]), var(&[0.0]), var(&[0.0]), var(&[0.0]), without];
    let mut grads = store(&vars, &[matrix.clone(), scalar, zeros(&[0, 5]), zeros(&[5, 0])]);
    let scope = Scope::leading_dimension().telemetry();
    let report = clip_grad_norm_by(&vars, &mut grads, &scope, 1.0).unwrap();
    assert_eq!(report.groups.len(), 3 + 1 + 5 + 2);
    let rows: Vec<usize> = (0..5).map(|i| report.of_tensor(i).unwrap().len()).collect();
    assert_eq!(rows, [3, 1, 0, 5, 2]);
    let written: Vec<bool> = report.groups.iter().map(|group| group.written).collect();
    assert_eq!(written[..4], [true, false, true, true]);
    assert_eq!(report.num_written(), 3);
    let expected = [0.6f32, 0.8, 0.3, 0.4, 0.6, 0.8];
    assert_eq!(values(&grads, &vars[0]), expected.map(f64::from));
    assert_eq!(values(&grads, &vars[1]), [1.0]);
    assert_eq!(report.tensors[0].max_abs, 8.0);
    // Not contiguous: its rows are those of its shape, not of its memory.
    let mut grads = store(&vars[..1], &[matrix.t().unwrap()]);
    let expected: Vec<f64> =
        values(&grads, &vars[0]).chunks(3).map(|row| row.iter().map(|x| x * x).sum::<f64>().sqrt()).collect();
    let report = clip_grad_norm_by(&vars[..1], &mut grads, &scope, 0.5).unwrap();
    for (got, expected) in norms(&report).iter().zip(&expected) {
        assert!((got / expected - 1.0).abs() < 1e-12);
    }
    let clipped = norms_by(&vars[..1], &grads, &Scope::leading_dimension()).unwrap();
    assert!(norms(&clipped).iter().all(|norm| (norm - 0.5).abs() < 1e-6), "{clipped:?}");
}

/// Of each tensor, group and row, with and without a gradient: what slices have, and the store is what it was.
#[test]
fn the_factor_of_each_group_alone() {
    let vars = [var(&[0.0]), var(&[0.0; 3]), var(&[0.0]), var(&[0.0])];
    let with = [vars[0].clone(), vars[2].clone(), vars[3].clone()];
    let transposed = Tensor::new(&[[30.0f32, 0.0], [40.0, 1.0]], &Device::Cpu).unwrap().t().unwrap();
    let grads = store(&with, &[tensor(&[3.0, 4.0]), tensor(&[f32::NAN, 0.0]), transposed]);
    let slices: [&[f32]; 4] = [&[3.0, 4.0], &[], &[f32::NAN, 0.0], &[30.0, 40.0, 0.0, 1.0]];
    let places = |grads: &GradStore| [&vars[0], &vars[2], &vars[3]].map(|var| storage_address(grads.get(var).unwrap()));
    let (before, max_norms) = (places(&grads), [Some(2.5), None, Some(3.0)]);
    let clip = ClipNorm::new(2.5).loss_scale(2.0);
    for clip in [ClipNorm::new(2.5), clip, clip.nonfinite(NonFinite::Zero), clip.nonfinite(NonFinite::Propagate)] {
        for (scope, explicit) in [
            (Scope::per_tensor().telemetry(), None),
            (Scope::groups(&[0, 1, 0, 2]).max_norms(&max_norms), None),
            (Scope::global(), None),
            (Scope::leading_dimension(), Some(Scope::rows(&[2, 3, 2, 2]))),
        ] {
            let expected = cpu::clip_coef_by(&slices, &explicit.unwrap_or(scope), clip).unwrap();
            let report = clip_coef_by(&vars, &grads, &scope, clip).unwrap();
            assert_eq!(format!("{report:?}"), format!("{expected:?}"));
            assert_eq!(report.num_written(), 0);
        }
    }
    assert_eq!((places(&grads), values(&grads, &vars[0])), (before, vec![3.0, 4.0]));
    assert_eq!(values(&grads, &vars[3]), [30.0, 40.0, 0.0, 1.0]);
    let report = clip_coef_by(&vars, &grads, &Scope::per_tensor(), 2.5).unwrap();
    assert_eq!(multipliers(&report)[..3], [0.5, 1.0, 1.0]);
    assert_eq!(report.groups[2].first_nonfinite, Some(2));

    let error = ClipNorm::new(1.0).nonfinite(NonFinite::Error);
    let error = clip_coef_by(&vars, &grads, &Scope::per_tensor(), error).unwrap_err();
    assert!(matches!(error, Error::NonFinite { tensor: Some(2), .. }), "{error}");
    let error = clip_coef_by(&vars, &grads, &Scope::per_tensor(), -1.0).unwrap_err();
    assert!(matches!(error, Error::InvalidThreshold { .. }), "{error}");
    let wrong = Error::UnevenRows { tensor: 3, numel: 4, rows: 3 };
    assert_eq!(clip_coef_by(&vars, &grads, &Scope::rows(&[1, 7, 1, 3]), 1.0).unwrap_err(), wrong);
    assert_eq!(clip_coef_by(&[], &grads, &Scope::per_tensor(), 1.0).unwrap().groups, []);
    // A gradient of two variables counts as that of the first.
    let shared = tensor(&[3.0, 4.0]);
    let grads = store(&vars[1..], &[shared.clone(), shared.clone()]);
    assert_eq!(multipliers(&clip_coef_by(&vars, &grads, &Scope::per_tensor(), 2.5).unwrap()), [1.0, 0.5, 1.0, 1.0]);
}

#[test]
fn value_clips_count_for_each_group() {
    let vars = [var(&[0.0]), var(&[0.0; 3]), var(&[0.0]), var(&[0.0])];
    let with = [vars[0].clone(), vars[2].clone(), vars[3].clone()];
    let view = Tensor::new(&[[9.0f32, 0.5], [9.0, -3.0]], &Device::Cpu).unwrap().narrow(1, 1, 1).unwrap();
    let make = || store(&with, &[tensor(&[0.25, 4.0]), tensor(&[f32::NAN, f32::NEG_INFINITY, 0.0]), view.clone()]);
    let slices: [&[f32]; 4] = [&[0.25, 4.0], &[], &[f32::NAN, f32::NEG_INFINITY, 0.0], &[0.5, -3.0]];
    for (scope, explicit) in [
        (Scope::per_tensor(), None),
        (Scope::groups(&[1, 0, 1, 0]), None),
        (Scope::global(), None),
        (Scope::leading_dimension(), Some(Scope::rows(&[2, 3, 3, 2]))),
    ] {
        for clip in [ClipValue::new(1.0), ClipValue::between(-5.0, 0.5), ClipValue::new(f64::INFINITY)] {
            let (mut grads, mut on_slices) = (make(), slices.map(<[f32]>::to_vec));
            let expected = cpu::clip_grad_value_by(&mut on_slices, &explicit.unwrap_or(scope), clip).unwrap();
            assert_eq!(clip_grad_value_by(&vars, &mut grads, &scope, clip).unwrap(), expected, "{scope:?} {clip:?}");
            for index in [0, 2, 3] {
                let expected: Vec<f64> = on_slices[index].iter().copied().map(f64::from).collect();
                assert_eq!(format!("{:?}", values(&grads, &vars[index])), format!("{expected:?}"), "{scope:?}");
            }
            let kept = storage_address(grads.get(&vars[3]).unwrap()) == storage_address(&view);
            assert_eq!(kept, expected.num_written() == 0, "a copy of the view only where something was written");
        }
    }
    let mut grads = make();
    let report = clip_grad_value_by(&vars, &mut grads, &Scope::per_tensor(), 1.0).unwrap();
    let counts: Vec<_> = report.groups.iter().map(|group| (group.clipped, group.nan, group.numel)).collect();
    assert_eq!(counts, [(1, 0, 2), (0, 0, 0), (1, 1, 3), (1, 0, 2)]);
    assert_eq!((report.groups[2].first_nonfinite, report.groups[3].clipped_fraction()), (Some(2), 0.5));
    assert_eq!(view.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [0.5, -3.0], "the tensor behind the view");

    let mut grads = make();
    let max_norms = [None; 4];
    for (scope, expected) in [
        (Scope::per_tensor().telemetry(), Error::ScopeForNorms { option: "telemetry" }),
        (Scope::per_tensor().max_norms(&max_norms), Error::ScopeForNorms { option: "max_norms" }),
        (Scope::groups(&[0, 1, 0]), Error::ScopeLength { what: "groups", expected: 4, got: 3 }),
        (Scope::rows(&[1, 7, 2, 2]), Error::UnevenRows { tensor: 2, numel: 3, rows: 2 }),
    ] {
        assert_eq!(clip_grad_value_by(&vars, &mut grads, &scope, 1.0).unwrap_err(), expected);
    }
    let error = clip_grad_value_by(&vars, &mut grads, &Scope::per_tensor(), f64::NAN).unwrap_err();
    assert!(matches!(error, Error::InvalidThreshold { .. }), "{error}");
    grads.insert(&vars[1], Tensor::zeros(3, DType::U8, &Device::Cpu).unwrap());
    let refused = Error::UnsupportedDtype { tensor: 1, got: "u8".into() };
    assert_eq!(clip_grad_value_by(&vars, &mut grads, &Scope::per_tensor(), 1.0).unwrap_err(), refused);
    let whole = tensor(&[3.0, 4.0]);
    let mut overlapping = store(&vars[1..], &[whole.clone(), whole.narrow(0, 1, 1).unwrap()]);
    let overlap = Error::Overlap { first: 1, second: 2 };
    assert_eq!(clip_grad_value_by(&vars, &mut overlapping, &Scope::per_tensor(), 1.0).unwrap_err(), overlap);
    assert_eq!((values(&grads, &vars[0]), whole.to_vec1::<f32>().unwrap()), (vec![0.25, 4.0], vec![3.0, 4.0]));
    // A gradient of two variables counts as that of the first.
    let mut grads = store(&vars[1..], &[whole.clone(), whole.clone()]);
    let report = clip_grad_value_by(&vars, &mut grads, &Scope::per_tensor(), 1.0).unwrap();
    assert_eq!(report.groups.iter().map(|group| group.clipped).collect::<Vec<_>>(), [0, 2, 0, 0]);
    assert_eq!(clip_grad_value_by(&[], &mut grads, &Scope::per_tensor(), 1.0).unwrap().groups, []);
}

/// More than one thread takes, of every dtype.
#[test]
fn large_gradients_by_row_as_on_slices() {
    let noise: Vec<f32> = (0..600_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 * 1e-7 - 0.8).collect();
    let vars = [var(&[0.0]), var(&[0.0])];
    let of = |dtype| Tensor::new(&noise[..], &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        let make = || store(&vars, &[of(dtype).reshape((300, 2000)).unwrap(), tensor(&[0.1])]);
        let (scope, mut grads) = (Scope::leading_dimension(), make());
        let mut rounded = values(&grads, &vars[0]);
        let outside = |row: &[f64]| row.iter().filter(|x| x.abs() > 0.5).count() as u64;
        let expected: Vec<u64> = rounded.chunks(2000).map(outside).chain([0]).collect();
        let coefs = clip_coef_by(&vars, &grads, &scope, 20.0).unwrap();
        let report = clip_grad_value_by(&vars, &mut grads, &scope, 0.5).unwrap();
        assert_eq!(report.groups.iter().map(|row| row.clipped).collect::<Vec<_>>(), expected, "{dtype:?}");
        rounded.iter_mut().for_each(|x| *x = x.clamp(-0.5, 0.5));
        assert_eq!(values(&grads, &vars[0]), rounded, "{dtype:?}");
        let mut grads = make();
        let clipped = clip_grad_norm_by(&vars, &mut grads, &scope, 20.0).unwrap();
        assert_eq!((multipliers(&coefs), norms(&coefs)), (multipliers(&clipped), norms(&clipped)), "{dtype:?}");
        assert!(clipped.num_written() > 0);
    }
}

/// Jobs that write the same gradients, in the pool in which many small ones are measured under their locks.
#[test]
fn writing_small_gradients_in_the_pool_that_measures_them() {
    assert!(ends(|| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
        let vars: Vec<Var> = (0..200).map(|_| var(&[0.0])).collect();
        let flat = Tensor::ones(8 * 200, DType::F32, &Device::Cpu).unwrap();
        let parts: Vec<Tensor> = (0..200).map(|i| flat.narrow(0, 8 * i, 8).unwrap()).collect();
        let grads = store(&vars, &parts);
        let write = || {
            let mut one = store(&vars[..1], &parts[..1]);
            clip_grad_value_by(&vars[..1], &mut one, &Scope::per_tensor(), 2.0).unwrap();
        };
        pool.install(|| {
            for _ in 0..300 {
                let measure = || {
                    total_norm(&vars, &grads, NormType::L2).unwrap();
                    clip_coef_by(&vars, &grads, &Scope::leading_dimension(), 1.0).unwrap();
                };
                rayon::join(measure, || rayon::scope(|scope| (0..50).for_each(|_| scope.spawn(|_| write()))));
            }
        });
    }));
}
