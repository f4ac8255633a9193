//! Tests of the candle adapter on CUDA tensors, on the driver double and on a GPU alike.
#![allow(missing_docs)]

use crate::backend::with_device;
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use gradclip::candle::{
    clip_coef, clip_coef_by, clip_grad_norm, clip_grad_norm_by, clip_grad_value, clip_grad_value_by, clip_with_norm,
    norms_by, total_norm,
};
use gradclip::{ClipNorm, ClipValue, Error, NonFinite, NormType, Scope};

pub fn var() -> Var {
    Var::new(&[0.0f32], &Device::Cpu).unwrap()
}

/// A store in which each variable's gradient is the given tensor.
pub fn store(vars: &[Var], grads: &[Tensor]) -> GradStore {
    let mut store = var().sum_all().unwrap().backward().unwrap();
    for (var, grad) in vars.iter().zip(grads) {
        store.insert(var, grad.clone());
    }
    store
}

/// On the host first: the double runs our kernels and none of candle's, which convert.
pub fn tensor(values: &[f32], dtype: DType, device: &Device) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap().to_dtype(dtype).unwrap().to_device(device).unwrap()
}

pub fn values(store: &GradStore, var: &Var) -> Vec<f64> {
    let grad = store.get(var).unwrap().to_device(&Device::Cpu).unwrap();
    grad.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

#[test]
fn every_dtype_in_one_list() {
    with_device(|device| {
        let vars = [var(), var(), var(), var(), var()];
        let dtypes = [DType::F32, DType::F64, DType::F16, DType::BF16];
        let grads: Vec<Tensor> = dtypes.iter().map(|&dtype| tensor(&[2.0, -2.0], dtype, device)).collect();
        let mut grads = store(&vars, &grads); // the last variable has none
        let norm = 32f64.sqrt();
        let measured = total_norm(&vars, &grads, NormType::Inf).unwrap();
        let clipped = clip_grad_norm(&vars, &mut grads, norm / 2.0).unwrap();
        assert!(clipped.pending().is_some());
        assert_eq!(clipped.wait().unwrap().total_norm, norm);
        assert_eq!(measured.wait().unwrap().total_norm, 2.0);
        for var in &vars[..4] {
            assert_eq!(values(&grads, var), [1.0, -1.0]);
        }
        let clamped = clip_grad_value(&vars, &mut grads, 0.5).unwrap().wait().unwrap();
        assert_eq!((clamped.clipped, clamped.written), (8, true));
        assert_eq!(values(&grads, &vars[3]), [0.5, -0.5]);
    });
}

#[test]
fn cuda_and_cpu_tensors_give_the_same_bits() {
    with_device(|device| {
        let noise: Vec<f32> =
            (0..20_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 * 1e-7 - 0.8).collect();
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            let vars = [var(), var()];
            let parts = [&noise[..12_345], &noise[12_345..]];
            let make = |device: &Device| store(&vars, &parts.map(|part| tensor(part, dtype, device)));
            let (mut on_cpu, mut on_cuda) = (make(&Device::Cpu), make(device));
            let cpu = clip_grad_norm(&vars, &mut on_cpu, 1.0).unwrap().wait().unwrap();
            let cuda = clip_grad_norm(&vars, &mut on_cuda, 1.0).unwrap().wait().unwrap();
            assert_eq!(cpu, cuda, "{dtype:?}");
            for var in &vars {
                assert_eq!(values(&on_cpu, var), values(&on_cuda, var), "{dtype:?}");
            }
        }
    });
}

/// The norm of a call stays on the device for the next; a loss scale; the factor by its address.
#[test]
fn a_given_norm_and_the_coefficient_alone() {
    with_device(|device| {
        let vars = [var(), var()];
        let mut grads = store(&vars, &[tensor(&[3.0], DType::F32, device), tensor(&[4.0], DType::F16, device)]);
        let norm = total_norm(&vars, &grads, NormType::L2).unwrap();
        let clipped = clip_with_norm(&vars[..1], &mut grads, &norm, 2.5).unwrap().wait().unwrap();
        assert_eq!((clipped.total_norm, clipped.clip_coef), (5.0, 0.5));
        assert_eq!((values(&grads, &vars[0]), values(&grads, &vars[1])), (vec![1.5], vec![4.0]));
        let handed = clip_coef(&vars[1..], &grads, ClipNorm::new(0.5).loss_scale(2.0)).unwrap();
        assert_ne!(handed.pending().unwrap().multiplier_address(), 0);
        let report = handed.wait().unwrap();
        assert_eq!((report.total_norm, report.multiplier, report.written), (2.0, 0.125, false));
        assert_eq!(values(&grads, &vars[1]), [4.0]);
    });
}

#[test]
fn views_are_clipped_alone_and_shared_gradients_once() {
    with_device(|device| {
        let vars = [var(), var(), var()];
        let base = tensor(&[9.0, 3.0, 4.0, 9.0], DType::F32, device);
        let part = base.narrow(0, 1, 2).unwrap();
        let mut grads = store(&vars, &[part.clone(), part, tensor(&[12.0], DType::F32, device)]);
        let report = clip_grad_norm(&vars, &mut grads, 6.5).unwrap().wait().unwrap();
        assert_eq!(report.total_norm, 13.0);
        assert_eq!((values(&grads, &vars[1]), values(&grads, &vars[2])), (vec![1.5, 2.0], vec![6.0]));
        assert_eq!(base.to_device(&Device::Cpu).unwrap().to_vec1::<f32>().unwrap(), [9.0, 1.5, 2.0, 9.0]);
    });
}

#[test]
fn mixed_devices_and_other_dtypes_are_refused() {
    with_device(|device| {
        let vars = [var(), var(), var()];
        let on_cuda = tensor(&[30.0, 40.0], DType::F32, device);
        let on_cpu = tensor(&[1.0], DType::F32, &Device::Cpu);
        let mut grads = store(&vars[1..], &[on_cuda.clone(), on_cpu.clone()]);
        let mixed = Error::WrongDevice {
            tensor: 2,
            expected: "cuda:0, as the gradients before it".into(),
            got: "the CPU".into(),
        };
        assert_eq!(clip_grad_norm(&vars, &mut grads, 1.0).unwrap_err(), mixed);
        assert_eq!(clip_grad_value(&vars, &mut grads, 1.0).unwrap_err(), mixed);
        assert_eq!(total_norm(&vars, &grads, NormType::L2).unwrap_err(), mixed);
        let integer = Tensor::new(&[7u32], &Device::Cpu).unwrap().to_device(device).unwrap();
        let mut grads = store(&vars, &[on_cuda.clone(), integer]);
        let unsupported = Error::UnsupportedDtype { tensor: 1, got: "u32".into() };
        assert_eq!(clip_grad_norm(&vars, &mut grads, 1.0).unwrap_err(), unsupported);
        let mut grads = store(&vars, &[on_cuda.clone(), on_cuda.narrow(0, 1, 1).unwrap()]);
        let overlap = Error::Overlap { first: 0, second: 1 };
        assert_eq!(clip_grad_norm(&vars, &mut grads, 1.0).unwrap_err(), overlap);
        assert_eq!(on_cuda.to_device(&Device::Cpu).unwrap().to_vec1::<f32>().unwrap(), [30.0, 40.0]);
    });
}

#[test]
fn reports_name_the_variable() {
    with_device(|device| {
        let vars = [var(), var(), var()];
        let bad = tensor(&[1.0, f32::NAN], DType::F32, device);
        let mut grads = store(&[vars[0].clone(), vars[2].clone()], &[tensor(&[3.0], DType::F32, device), bad]);
        let report = clip_grad_norm(&vars, &mut grads, 1.0).unwrap().wait().unwrap();
        assert_eq!((report.first_nonfinite, report.written), (Some(2), false));
        let error = ClipNorm::new(1.0).nonfinite(NonFinite::Error);
        let error = clip_grad_norm(&vars, &mut grads, error).unwrap_err();
        assert!(matches!(error, Error::NonFinite { tensor: Some(2), .. }), "{error}");
        assert_eq!(values(&grads, &vars[0]), [3.0]);
    });
}

/// Each tensor, groups, rows: variables without gradient, shared ones, an empty one; the same report and bits as of CPU
/// tensors.
#[test]
fn scopes_on_cuda_tensors() {
    with_device(|device| {
        let vars = [var(), var(), var(), var(), var()];
        let parts: [&[f32]; 4] = [&[3.0, 4.0, 0.3, 0.4], &[f32::NAN, 0.0], &[1.0], &[30.0, -7.0, 0.0, 1.0, 2.0, 9.0]];
        let with = [vars[0].clone(), vars[2].clone(), vars[3].clone(), vars[4].clone()];
        let make = |device: &Device| {
            let grads: Vec<Tensor> = parts.iter().map(|part| tensor(part, DType::F32, device)).collect();
            let shaped = [
                grads[0].reshape((2, 2)).unwrap(),
                grads[1].clone(),
                grads[2].narrow(0, 1, 0).unwrap(),
                grads[3].reshape((3, 2)).unwrap(),
            ];
            store(&with, &shaped)
        };
        let max_norms = [Some(1.0), None, Some(0.5)];
        let scopes = [
            Scope::per_tensor().telemetry(),
            Scope::groups(&[0, 1, 0, 2, 2]).max_norms(&max_norms),
            Scope::rows(&[4, 9, 1, 0, 2]),
            Scope::leading_dimension().telemetry(),
            Scope::global(),
        ];
        for scope in scopes {
            let (mut on_cpu, mut on_cuda) = (make(&Device::Cpu), make(device));
            let expected = norms_by(&vars, &on_cpu, &scope, NormType::L1).unwrap().wait().unwrap();
            let measured = norms_by(&vars, &on_cuda, &scope, NormType::L1).unwrap().wait().unwrap();
            assert_eq!(format!("{measured:?}"), format!("{expected:?}"), "{scope:?}");
            let expected = clip_grad_norm_by(&vars, &mut on_cpu, &scope, 0.7).unwrap();
            let clipped = clip_grad_norm_by(&vars, &mut on_cuda, &scope, 0.7).unwrap();
            assert!(clipped.pending().is_some() && expected.pending().is_none());
            assert_eq!(format!("{:?}", clipped.wait()), format!("{:?}", expected.wait()), "{scope:?}");
            for var in [&vars[0], &vars[2], &vars[4]] {
                assert_eq!(format!("{:?}", values(&on_cuda, var)), format!("{:?}", values(&on_cpu, var)), "{scope:?}");
            }
        }
        let mut grads = make(device);
        let wrong = Error::UnevenRows { tensor: 4, numel: 6, rows: 4 };
        assert_eq!(clip_grad_norm_by(&vars, &mut grads, &Scope::rows(&[1, 1, 1, 0, 4]), 1.0).unwrap_err(), wrong);
        let clip = ClipNorm::new(1.0).nonfinite(NonFinite::Error);
        let error = clip_grad_norm_by(&vars, &mut grads, &Scope::per_tensor(), clip).unwrap_err();
        assert!(matches!(error, Error::NonFinite { tensor: Some(2), .. }), "{error}");
        assert_eq!(values(&grads, &vars[4])[0], 30.0);
    });
}

/// The factors of groups by their addresses, and the counts of a value clip: as of CPU tensors, for every dtype, a
/// variable without gradient, a shared one, an empty one.
#[test]
fn factors_and_counts_of_scopes_on_cuda_tensors() {
    with_device(|device| {
        let vars = [var(), var(), var(), var(), var(), var()];
        let with = [vars[0].clone(), vars[2].clone(), vars[3].clone(), vars[4].clone(), vars[5].clone()];
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            let make = |device: &Device| {
                let matrix = tensor(&[3.0, 4.0, 0.25, 0.5], dtype, device).reshape((2, 2)).unwrap();
                let bad = tensor(&[f32::NAN, f32::INFINITY, 1.0], DType::F32, device);
                let empty = tensor(&[1.0], dtype, device).narrow(0, 1, 0).unwrap();
                let long: Vec<f32> = (0..40_000).map(|i| (i % 97) as f32 * 0.03 - 1.0).collect();
                store(&with, &[matrix.clone(), bad, empty, tensor(&long, dtype, device), matrix])
            };
            for (scope, value) in [
                (Scope::per_tensor(), true),
                (Scope::groups(&[0, 1, 0, 2, 2, 1]), true),
                (Scope::leading_dimension(), true),
                (Scope::rows(&[4, 9, 1, 0, 50, 1]), true),
                (Scope::per_tensor().telemetry(), false),
            ] {
                let (mut on_cpu, mut on_cuda) = (make(&Device::Cpu), make(device));
                let clip = ClipNorm::new(0.7).loss_scale(4.0);
                let expected = clip_coef_by(&vars, &on_cpu, &scope, clip).unwrap().wait().unwrap();
                let handed = clip_coef_by(&vars, &on_cuda, &scope, clip).unwrap();
                let pending = handed.pending().unwrap();
                let groups = expected.groups.len();
                assert!(
                    pending.multiplier_f32_address(0).is_some() && pending.multiplier_address(groups - 1).is_some()
                );
                assert_eq!(pending.multiplier_address(groups), None);
                assert_eq!(format!("{:?}", handed.wait().unwrap()), format!("{expected:?}"), "{scope:?} {dtype:?}");
                assert_eq!(expected.num_written(), 0);
                assert_eq!(values(&on_cuda, &vars[0]), [3.0, 4.0, 0.25, 0.5]);
                if !value {
                    continue;
                }
                for clip in [ClipValue::new(100.0), ClipValue::between(-0.5, 0.375)] {
                    let expected = clip_grad_value_by(&vars, &mut on_cpu, &scope, clip).unwrap();
                    let clamped = clip_grad_value_by(&vars, &mut on_cuda, &scope, clip).unwrap();
                    assert!(clamped.pending().is_some() && expected.pending().is_none());
                    assert_eq!(clamped.wait().unwrap(), expected.wait().unwrap(), "{scope:?} {dtype:?}");
                    for var in &with {
                        let (cuda, cpu) = (values(&on_cuda, var), values(&on_cpu, var));
                        assert_eq!(format!("{cuda:?}"), format!("{cpu:?}"), "{scope:?} {dtype:?}");
                    }
                }
            }
        }
    });
}

#[test]
fn refused_scopes_leave_cuda_tensors_alone() {
    with_device(|device| {
        let vars = [var(), var(), var()];
        let on_cuda = tensor(&[30.0, f32::NAN], DType::F32, device);
        let with = [vars[0].clone(), vars[2].clone()];
        let mut grads = store(&with, &[tensor(&[30.0], DType::F32, device), on_cuda]);
        let wrong = Error::UnevenRows { tensor: 2, numel: 2, rows: 3 };
        let scope = Scope::rows(&[1, 1, 3]);
        assert_eq!(clip_coef_by(&vars, &grads, &scope, 1.0).unwrap_err(), wrong);
        assert_eq!(clip_grad_value_by(&vars, &mut grads, &scope, 1.0).unwrap_err(), wrong);
        let telemetry = Scope::per_tensor().telemetry();
        let wrong = Error::ScopeForNorms { option: "telemetry" };
        assert_eq!(clip_grad_value_by(&vars, &mut grads, &telemetry, 1.0).unwrap_err(), wrong);
        assert!(clip_grad_value_by(&vars, &mut grads, &Scope::global(), -1.0).is_err());
        assert!(clip_coef_by(&vars, &grads, &Scope::global(), -1.0).is_err());
        let clip = ClipNorm::new(1.0).nonfinite(NonFinite::Error);
        let error = clip_coef_by(&vars, &grads, &Scope::per_tensor(), clip).unwrap_err();
        assert!(matches!(error, Error::NonFinite { tensor: Some(2), .. }), "{error}");
        assert_eq!(values(&grads, &vars[0]), [30.0]);
    });
}
