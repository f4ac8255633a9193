//! The kernels, loaded into a context.

use super::driver::{driver_error, CurrentContext};
use crate::error::{Error, Result};
use crate::options::NormType;
use cudarc::driver::sys::{CUdevice_attribute, CUfunction, CUmodule, CUresult};
use cudarc::driver::{result, CudaContext, DriverError};
use std::ffi::CString;
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
    norm_partials: [CUfunction; 3],
    pub clip_coef: CUfunction,
    pub scale: CUfunction,
    pub scale_into: CUfunction,
    pub clamp: CUfunction,
    pub clamp_counts: CUfunction,
    modules: Modules,
}

// SAFETY: the handles are the driver's, which takes them in any thread.
unsafe impl Send for Kernels {}

impl Kernels {
    /// `context` must be current.
    pub(crate) fn load(context: &Arc<CudaContext>) -> Result<Self> {
        check_compute_capability(context)?;
        let mut modules = Modules { context: context.clone(), loaded: Vec::new(), captured: false };
        let norm_partials = modules.load("norm_partials")?;
        let clip_coef = modules.load("clip_coef")?;
        let scale = modules.load("scale")?;
        let scale_into = modules.load("scale_into")?;
        let clamp = modules.load("clamp")?;
        let function = |module: CUmodule, symbol: &str| {
            // Ours have no NUL in them.
            let symbol = CString::new(symbol).unwrap_or_default();
            // SAFETY: the module was loaded above.
            unsafe { result::module::get_function(module, symbol) }.map_err(driver_error("cuModuleGetFunction"))
        };
        Ok(Self {
            norm_partials: [
                function(norm_partials, "norm_partials_l1")?,
                function(norm_partials, "norm_partials_l2")?,
                function(norm_partials, "norm_partials_inf")?,
            ],
            clip_coef: function(clip_coef, "clip_coef")?,
            scale: function(scale, "scale")?,
            scale_into: function(scale_into, "scale_into")?,
            clamp: function(clamp, "clamp")?,
            clamp_counts: function(clamp, "clamp_counts")?,
            modules,
        })
    }

    pub(crate) fn norm_partials(&self, norm_type: NormType) -> CUfunction {
        self.norm_partials[norm_type as usize]
    }

    /// Graphs may launch the kernels from now on, so they stay loaded: see `DeviceBuffer::leave_to_graphs`.
    pub(crate) fn leave_to_graphs(&mut self) {
        self.modules.captured = true;
    }
}

/// Loaded into the context, unloaded when dropped.
#[derive(Debug)]
struct Modules {
    context: Arc<CudaContext>,
    loaded: Vec<CUmodule>,
    captured: bool,
}

impl Modules {
    /// Tries each PTX we have of a stem: that of the local nvcc first, then the snapshot, which older drivers take too.
    fn load(&mut self, stem: &str) -> Result<CUmodule> {
        let candidates = MODULES.iter().find(|(name, _)| *name == stem).map_or(&[][..], |(_, texts)| texts);
        let mut last = Error::DriverTooOld { reason: format!("no PTX of {stem} is embedded") };
        for text in candidates {
            // PTX is text, so no NUL is in it.
            let image = CString::new(*text).unwrap_or_default();
            // SAFETY: a context is current; the image is PTX that ends with a NUL, and is alive during the call.
            match unsafe { result::module::load_data(image.as_ptr().cast()) } {
                Ok(module) => {
                    self.loaded.push(module);
                    return Ok(module);
                }
                Err(error) => last = load_error(stem, text, error),
            }
        }
        Err(last)
    }
}

impl Drop for Modules {
    fn drop(&mut self) {
        if self.captured {
            return;
        }
        let Ok(_current) = CurrentContext::enter(&self.context) else { return };
        for &module in &self.loaded {
            // SAFETY: loaded above, unloaded once; its functions go with the value that holds both.
            let _ = unsafe { result::module::unload(module) };
        }
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
