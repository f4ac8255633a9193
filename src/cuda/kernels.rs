//! The kernels, loaded into a context.

use super::driver::driver_error;
use crate::error::{Error, Result};
use crate::options::NormType;
use cudarc::driver::sys::{CUdevice_attribute, CUresult};
use cudarc::driver::{CudaContext, CudaFunction, DriverError};
use cudarc::nvrtc::Ptx;
use std::sync::Arc;

include!(concat!(env!("OUT_DIR"), "/ptx.rs"));

/// Oldest GPU the kernels are built for.
const OLDEST_COMPUTE_CAPABILITY: (i32, i32) = (7, 5);

/// What compiled the PTX that is tried first: `snapshot`, or an nvcc with its version.
#[must_use]
pub fn compiler() -> &'static str {
    COMPILER
}

/// One function for each symbol of `kernels/`.
#[derive(Debug)]
pub(crate) struct Kernels {
    norm_partials: [CudaFunction; 3],
    pub clip_coef: CudaFunction,
    pub scale: CudaFunction,
    pub clamp: CudaFunction,
    pub clamp_counts: CudaFunction,
}

impl Kernels {
    pub(crate) fn load(context: &Arc<CudaContext>) -> Result<Self> {
        check_compute_capability(context)?;
        let module = |stem: &str| load_module(context, stem);
        let norm_partials = module("norm_partials")?;
        let clip_coef = module("clip_coef")?;
        let scale = module("scale")?;
        let clamp = module("clamp")?;
        let function = |module: &Arc<cudarc::driver::CudaModule>, symbol: &str| {
            module.load_function(symbol).map_err(driver_error("cuModuleGetFunction"))
        };
        Ok(Self {
            norm_partials: [
                function(&norm_partials, "norm_partials_l1")?,
                function(&norm_partials, "norm_partials_l2")?,
                function(&norm_partials, "norm_partials_inf")?,
            ],
            clip_coef: function(&clip_coef, "clip_coef")?,
            scale: function(&scale, "scale")?,
            clamp: function(&clamp, "clamp")?,
            clamp_counts: function(&clamp, "clamp_counts")?,
        })
    }

    pub(crate) fn norm_partials(&self, norm_type: NormType) -> &CudaFunction {
        &self.norm_partials[norm_type as usize]
    }
}

fn check_compute_capability(context: &CudaContext) -> Result<()> {
    let attribute = |which| context.attribute(which).map_err(driver_error("cuDeviceGetAttribute"));
    let major = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    if (major, minor) < OLDEST_COMPUTE_CAPABILITY {
        return Err(Error::GpuTooOld { major, minor });
    }
    Ok(())
}

/// Tries each PTX we have of a stem: that of the local nvcc first, then the snapshot, which older drivers take too.
fn load_module(context: &Arc<CudaContext>, stem: &str) -> Result<Arc<cudarc::driver::CudaModule>> {
    let candidates = MODULES.iter().find(|(name, _)| *name == stem).map_or(&[][..], |(_, texts)| texts);
    let mut last = Error::DriverTooOld { reason: format!("no PTX of {stem} is embedded") };
    for text in candidates {
        match context.load_module(Ptx::from_src(*text)) {
            Ok(module) => return Ok(module),
            Err(error) => last = load_error(stem, text, error),
        }
    }
    Err(last)
}

fn load_error(stem: &str, ptx: &str, error: DriverError) -> Error {
    match error.0 {
        CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION | CUresult::CUDA_ERROR_INVALID_PTX => {
            let version = ptx.lines().find_map(|line| line.strip_prefix(".version ")).unwrap_or("?");
            Error::DriverTooOld { reason: format!("it refuses {stem} in PTX {version} ({:?})", error.0) }
        }
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory { what: "kernels", bytes: ptx.len() },
        _ => driver_error("cuModuleLoadData")(error),
    }
}
