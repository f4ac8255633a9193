//! The device that a candle example trains on, its timeline, and clipping as it is written without this crate.

use candle_core::backprop::GradStore;
use candle_core::{Device, Var};

use crate::step_share::Timeline;

/// The first GPU.
///
/// # Errors
/// The program was built for CPU tensors only; there is no driver or no GPU.
pub fn gpu() -> anyhow::Result<Device> {
    #[cfg(feature = "candle-cuda")]
    {
        gradclip::cuda::context(0)?; // says better than candle what is missing
        Ok(Device::new_cuda(0)?)
    }
    #[cfg(not(feature = "candle-cuda"))]
    anyhow::bail!(
        "this program was built for the CPU alone. Build it with `--features candle-cuda`, which takes a CUDA toolkit"
    )
}

/// The clock for the CPU, and for a GPU the stream on which candle does its work.
#[cfg_attr(not(feature = "candle-cuda"), allow(unused_variables))]
pub fn timeline(device: &Device) -> Timeline {
    match device {
        #[cfg(feature = "candle-cuda")]
        Device::Cuda(device) => Timeline::Stream(device.cuda_stream()),
        _ => Timeline::Clock,
    }
}

/// Clips f32 gradients by global norm with candle's operations alone, and returns the norm: a sum, and a wait for it, for
/// each variable, then, if the norm is above the threshold, a product for each. The formula is PyTorch's.
pub fn clip_grad_norm(vars: &[Var], grads: &mut GradStore, max_norm: f64) -> candle_core::Result<f64> {
    let mut sum_of_squares = 0.0;
    for var in vars {
        if let Some(grad) = grads.get(var) {
            sum_of_squares += f64::from(grad.sqr()?.sum_all()?.to_scalar::<f32>()?);
        }
    }
    let total_norm = sum_of_squares.sqrt();
    if total_norm > max_norm {
        let clip_coef = max_norm / (total_norm + 1e-6);
        for var in vars {
            if let Some(grad) = grads.get(var) {
                let clipped = (grad * clip_coef)?;
                grads.insert(var, clipped);
            }
        }
    }
    Ok(total_norm)
}
