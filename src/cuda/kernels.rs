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
    pub clip_coef_of_norm: CUfunction,
    pub scale: CUfunction,
    pub scale_any: CUfunction,
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
        let mut modules = Modules::new(context);
        let norm_partials = modules.load("norm_partials")?;
        let clip_coef = modules.load("clip_coef")?;
        let scale = modules.load("scale")?;
        let clamp = modules.load("clamp")?;
        Ok(Self {
            norm_partials: modules.by_norm(norm_partials, "norm_partials")?,
            clip_coef: modules.function(clip_coef, "clip_coef")?,
            clip_coef_of_norm: modules.function(clip_coef, "clip_coef_of_norm")?,
            scale: modules.function(scale, "scale")?,
            scale_any: modules.function(scale, "scale_any")?,
            clamp: modules.function(clamp, "clamp")?,
            clamp_counts: modules.function(clamp, "clamp_counts")?,
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

/// The kernel of calls out of place. Loaded when it is first needed: a quarter of the PTX of the others.
#[derive(Debug)]
pub(crate) struct IntoKernel {
    pub scale_into: CUfunction,
    modules: Modules,
}

// SAFETY: as for `Kernels`.
unsafe impl Send for IntoKernel {}

impl IntoKernel {
    /// `context` must be current.
    pub(crate) fn load(context: &Arc<CudaContext>) -> Result<Self> {
        let mut modules = Modules::new(context);
        let scale_into = modules.load("scale_into")?;
        Ok(Self { scale_into: modules.function(scale_into, "scale_into")?, modules })
    }

    /// As [`Kernels::leave_to_graphs`].
    pub(crate) fn leave_to_graphs(&mut self) {
        self.modules.captured = true;
    }
}

/// The kernels of calls with more than one norm. Loaded when they are first needed: their PTX is larger than that of all
/// others.
#[derive(Debug)]
pub(crate) struct ScopedKernels {
    partials: [CUfunction; 3],
    stats: [CUfunction; 3],
    pub coefs: CUfunction,
    pub scale: CUfunction,
    modules: Modules,
}

// SAFETY: as for `Kernels`.
unsafe impl Send for ScopedKernels {}

impl ScopedKernels {
    /// `context` must be current.
    pub(crate) fn load(context: &Arc<CudaContext>) -> Result<Self> {
        let mut modules = Modules::new(context);
        let scoped = modules.load("scoped")?;
        let stats = modules.load("scoped_stats")?;
        Ok(Self {
            partials: modules.by_norm(scoped, "scoped_partials")?,
            stats: modules.by_norm(stats, "scoped_stats")?,
            coefs: modules.function(scoped, "scoped_coefs")?,
            scale: modules.function(scoped, "scoped_scale")?,
            modules,
        })
    }

    pub(crate) fn partials(&self, norm_type: NormType) -> CUfunction {
        self.partials[norm_type as usize]
    }

    pub(crate) fn stats(&self, norm_type: NormType) -> CUfunction {
        self.stats[norm_type as usize]
    }

    /// As [`Kernels::leave_to_graphs`].
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
    fn new(context: &Arc<CudaContext>) -> Self {
        Self { context: context.clone(), loaded: Vec::new(), captured: false }
    }

    /// A function of a module that was loaded here.
    fn function(&self, module: CUmodule, symbol: &str) -> Result<CUfunction> {
        // Ours have no NUL in them.
        let symbol = CString::new(symbol).unwrap_or_default();
        // SAFETY: the module was loaded by `load`, and is unloaded no earlier than this value is dropped.
        unsafe { result::module::get_function(module, symbol) }.map_err(driver_error("cuModuleGetFunction"))
    }

    /// Of a kernel that there is one of for each order of the norm.
    fn by_norm(&self, module: CUmodule, stem: &str) -> Result<[CUfunction; 3]> {
        let function = |norm: &str| self.function(module, &format!("{stem}_{norm}"));
        Ok([function("l1")?, function("l2")?, function("inf")?])
    }

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
