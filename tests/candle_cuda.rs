//! The candle adapter on CUDA tensors in the memory of the driver double: `scripts/candle_cuda.py test`.
#![cfg(feature = "candle-cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod candle_suite;
mod support;

mod backend {
    use crate::support::double;
    use candle_core::Device;

    /// Runs `body` with candle's device on the double; nothing may be written where it should not.
    pub fn with_device(body: impl FnOnce(&Device)) {
        let Some(double) = double::lock() else { return };
        {
            body(&Device::new_cuda(0).unwrap());
            gradclip::cuda::release_thread_clippers();
        }
        assert_eq!((double.violated_guards(), double.counters().faults), (0, 0));
    }
}

use candle_core::{DType, Device, Tensor, Var};
use candle_suite::{store, tensor, var};
use gradclip::candle::{clip_coef_by, clip_grad_norm, clip_grad_value, clip_grad_value_by, total_norm};
use gradclip::{Error, NormType, Scope};
use support::double;

/// After the first step: three launches and nothing else, for any number of variables, by what the driver saw.
#[test]
fn a_step_costs_what_the_documentation_says() {
    let Some(double) = double::lock() else { return };
    {
        let device = &Device::new_cuda(0).unwrap();
        for count in [1, 148, 500] {
            let vars: Vec<Var> = (0..count).map(|_| var()).collect();
            let grads: Vec<Tensor> = (0..count).map(|_| tensor(&[3.0, 4.0], DType::F32, device)).collect();
            let mut grads = store(&vars, &grads);
            let _ = clip_grad_norm(&vars, &mut grads, f64::INFINITY).unwrap();
            double.reset_counters();
            let clipped = clip_grad_norm(&vars, &mut grads, 1.0).unwrap();
            let counted = double.counters();
            assert_eq!((counted.launches, counted.syncs, counted.allocs, counted.htod_calls), (3, 0, 0, 0), "{count}");
            assert_eq!((counted.event_records, counted.event_waits), (0, 0), "{count}");
            let _ = clip_grad_value(&vars, &mut grads, 1.0).unwrap();
            let _ = total_norm(&vars, &grads, NormType::L2).unwrap();
            assert_eq!((double.counters().launches, double.counters().syncs), (3 + 2 + 2, 0), "{count}");
            assert!(clipped.wait().unwrap().written);
            let scope = Scope::per_tensor();
            for step in 0..2 {
                let _ = clip_coef_by(&vars, &grads, &scope, 1.0).unwrap();
                let _ = clip_grad_value_by(&vars, &mut grads, &scope, 1.0).unwrap();
                if step == 0 {
                    double.reset_counters();
                }
            }
            let counted = double.counters();
            assert_eq!((counted.launches, counted.syncs, counted.allocs, counted.htod_calls), (4, 0, 0, 0), "{count}");
        }
        gradclip::cuda::release_thread_clippers();
    }
}

/// The program is linked against the CUDA libraries and starts all the same; what is missing is an error.
#[test]
fn no_device_is_an_error_not_a_crash() {
    let Some(double) = double::lock() else { return };
    double.set_device_count(0);
    assert!(Device::new_cuda(0).is_err());
    assert_eq!(gradclip::cuda::context(0).unwrap_err(), Error::NoDevice { ordinal: 0, count: 0 });
    let vars = [var()];
    let mut grads = store(&vars, &[tensor(&[3.0, 4.0], DType::F32, &Device::Cpu)]);
    assert_eq!(clip_grad_norm(&vars, &mut grads, 1.0).unwrap().wait().unwrap().total_norm, 5.0);
}
