//! The kernels, loaded into a context.

use super::driver::{driver_error, CurrentContext};
use crate::error::{Error, Result};
use crate::options::NormType;
use cudarc::driver::sys::{CUdevice_attribute, CUfunction, CUmodule, CUresult};
use cudarc::driver::{result, CudaContext, DriverError};
use std::ffi::CString;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

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
    norm_partials: ByNorm,
    pub clip_coef: CUfunction,
    pub clip_coef_p: CUfunction,
    pub clip_coef_rms: CUfunction,
    pub clip_coef_of_norm: CUfunction,
    pub scale: CUfunction,
    pub scale_any: CUfunction,
    pub clamp: CUfunction,
    pub clamp_counts: CUfunction,
    modules: Modules,
}

// SAFETY: the handles are the driver's, which takes them in any thread.
unsafe impl Send for Kernels {}
// SAFETY: as above; what changes is behind a lock or atomic.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// `context` must be current.
    pub(crate) fn load(context: &Arc<CudaContext>) -> Result<Self> {
        check_compute_capability(context)?;
        let modules = Modules::new(context);
        let norm_partials = modules.load("norm_partials")?;
        let clip_coef = modules.load("clip_coef")?;
        let scale = modules.load("scale")?;
        let clamp = modules.load("clamp")?;
        Ok(Self {
            norm_partials: modules.by_norm(norm_partials, "norm_partials")?,
            clip_coef: modules.function(clip_coef, "clip_coef")?,
            clip_coef_p: modules.function(clip_coef, "clip_coef_p")?,
            clip_coef_rms: modules.function(clip_coef, "clip_coef_rms")?,
            clip_coef_of_norm: modules.function(clip_coef, "clip_coef_of_norm")?,
            scale: modules.function(scale, "scale")?,
            scale_any: modules.function(scale, "scale_any")?,
            clamp: modules.function(clamp, "clamp")?,
            clamp_counts: modules.function(clamp, "clamp_counts")?,
            modules,
        })
    }

    /// Loads what a norm takes that most programs never ask for. The context must be current.
    pub(crate) fn prepare(&self, norm_type: NormType, capturing: bool) -> Result<()> {
        if self.norm_partials.lacks(norm_type) {
            let module = self.modules.load_late("norm_partials_p", capturing)?;
            self.norm_partials.add_p(self.modules.function(module, "norm_partials_p")?);
        }
        Ok(())
    }

    /// After [`prepare`](Self::prepare) for the same.
    pub(crate) fn norm_partials(&self, norm_type: NormType) -> Result<CUfunction> {
        self.norm_partials.of(norm_type)
    }

    /// Graphs may launch the kernels from now on, so they stay loaded: see `DeviceBuffer::leave_to_graphs`.
    pub(crate) fn leave_to_graphs(&self) {
        self.modules.leave_to_graphs();
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
        let modules = Modules::new(context);
        let scale_into = modules.load("scale_into")?;
        Ok(Self { scale_into: modules.function(scale_into, "scale_into")?, modules })
    }

    /// As [`Kernels::leave_to_graphs`].
    pub(crate) fn leave_to_graphs(&self) {
        self.modules.leave_to_graphs();
    }
}

/// The kernels of norms over several ranks. Loaded when they are first needed.
#[derive(Debug)]
pub(crate) struct ShardKernels {
    pub weigh_partials: CUfunction,
    fold_partials: CUfunction,
    fold_partials_p: CUfunction,
    clip_coef: CUfunction,
    clip_coef_p: CUfunction,
    modules: Modules,
}

// SAFETY: as for `Kernels`.
unsafe impl Send for ShardKernels {}

impl ShardKernels {
    /// `context` must be current.
    pub(crate) fn load(context: &Arc<CudaContext>) -> Result<Self> {
        let modules = Modules::new(context);
        let shards = modules.load("shards")?;
        let function = |symbol| modules.function(shards, symbol);
        Ok(Self {
            weigh_partials: function("weigh_partials")?,
            fold_partials: function("fold_partials")?,
            fold_partials_p: function("fold_partials_p")?,
            clip_coef: function("clip_coef_of_ranks")?,
            clip_coef_p: function("clip_coef_of_ranks_p")?,
            modules,
        })
    }

    pub(crate) fn fold_partials(&self, norm_type: NormType) -> CUfunction {
        if matches!(norm_type, NormType::P(_)) {
            self.fold_partials_p
        } else {
            self.fold_partials
        }
    }

    pub(crate) fn clip_coef(&self, norm_type: NormType) -> CUfunction {
        if matches!(norm_type, NormType::P(_)) {
            self.clip_coef_p
        } else {
            self.clip_coef
        }
    }

    /// As [`Kernels::leave_to_graphs`].
    pub(crate) fn leave_to_graphs(&self) {
        self.modules.leave_to_graphs();
    }
}

/// The kernels of calls with more than one norm. Loaded when they are first needed: their PTX is larger than that of all
/// others.
#[derive(Debug)]
pub(crate) struct ScopedKernels {
    partials: ByNorm,
    stats: ByNorm,
    coefs: CUfunction,
    coefs_p: OnceLock<CUfunction>,
    pub scale: CUfunction,
    modules: Modules,
}

// SAFETY: as for `Kernels`.
unsafe impl Send for ScopedKernels {}

/// Those of value clipping with a scope; the same.
#[derive(Debug)]
pub(crate) struct ScopedClampKernels {
    pub clamp: CUfunction,
    pub counts: CUfunction,
    modules: Modules,
}

// SAFETY: as for `Kernels`.
unsafe impl Send for ScopedClampKernels {}

impl ScopedClampKernels {
    /// `context` must be current.
    pub(crate) fn load(context: &Arc<CudaContext>) -> Result<Self> {
        let modules = Modules::new(context);
        let module = modules.load("scoped_clamp")?;
        Ok(Self {
            clamp: modules.function(module, "scoped_clamp")?,
            counts: modules.function(module, "scoped_clamp_counts")?,
            modules,
        })
    }

    /// As [`Kernels::leave_to_graphs`].
    pub(crate) fn leave_to_graphs(&self) {
        self.modules.leave_to_graphs();
    }
}

impl ScopedKernels {
    /// `context` must be current.
    pub(crate) fn load(context: &Arc<CudaContext>) -> Result<Self> {
        let modules = Modules::new(context);
        let scoped = modules.load("scoped")?;
        let stats = modules.load("scoped_stats")?;
        Ok(Self {
            partials: modules.by_norm(scoped, "scoped_partials")?,
            stats: modules.by_norm(stats, "scoped_stats")?,
            coefs: modules.function(scoped, "scoped_coefs")?,
            coefs_p: OnceLock::new(),
            scale: modules.function(scoped, "scoped_scale")?,
            modules,
        })
    }

    /// As [`Kernels::prepare`].
    pub(crate) fn prepare(&self, norm_type: NormType, capturing: bool) -> Result<()> {
        if self.partials.lacks(norm_type) {
            let module = self.modules.load_late("scoped_p", capturing)?;
            let [partials, stats, coefs] = ["scoped_partials_p", "scoped_stats_p", "scoped_coefs_p"];
            self.stats.add_p(self.modules.function(module, stats)?);
            let _ = self.coefs_p.set(self.modules.function(module, coefs)?);
            self.partials.add_p(self.modules.function(module, partials)?);
        }
        Ok(())
    }

    /// This and the next two: after [`prepare`](Self::prepare) for the same.
    pub(crate) fn partials(&self, norm_type: NormType) -> Result<CUfunction> {
        self.partials.of(norm_type)
    }

    pub(crate) fn stats(&self, norm_type: NormType) -> Result<CUfunction> {
        self.stats.of(norm_type)
    }

    pub(crate) fn coefs(&self, norm_type: NormType) -> Result<CUfunction> {
        match norm_type {
            NormType::P(_) => self.coefs_p.get().copied().ok_or(NOT_PREPARED),
            _ => Ok(self.coefs),
        }
    }

    /// As [`Kernels::leave_to_graphs`].
    pub(crate) fn leave_to_graphs(&self) {
        self.modules.leave_to_graphs();
    }
}

const NOT_PREPARED: Error = Error::CaptureNeedsWarmup { what: "the kernel for norms of any order" };

/// A kernel that there is one of for each kind of norm; for any order since it was first asked for.
#[derive(Debug)]
struct ByNorm {
    l1: CUfunction,
    l2: CUfunction,
    inf: CUfunction,
    p: OnceLock<CUfunction>,
}

impl ByNorm {
    fn lacks(&self, norm_type: NormType) -> bool {
        matches!(norm_type, NormType::P(_)) && self.p.get().is_none()
    }

    fn add_p(&self, function: CUfunction) {
        let _ = self.p.set(function); // of two threads that load it, one
    }

    fn of(&self, norm_type: NormType) -> Result<CUfunction> {
        match norm_type {
            NormType::L1 => Ok(self.l1),
            NormType::L2 | NormType::Rms => Ok(self.l2),
            NormType::Inf => Ok(self.inf),
            NormType::P(_) => self.p.get().copied().ok_or(NOT_PREPARED),
        }
    }
}

/// Loaded into the context, unloaded when dropped.
#[derive(Debug)]
struct Modules {
    context: Arc<CudaContext>,
    loaded: Mutex<Vec<CUmodule>>,
    captured: AtomicBool,
}

impl Modules {
    fn new(context: &Arc<CudaContext>) -> Self {
        Self { context: context.clone(), loaded: Mutex::default(), captured: AtomicBool::new(false) }
    }

    /// A function of a module that was loaded here.
    fn function(&self, module: CUmodule, symbol: &str) -> Result<CUfunction> {
        // Ours have no NUL in them.
        let symbol = CString::new(symbol).unwrap_or_default();
        // SAFETY: the module was loaded by `load`, and is unloaded no earlier than this value is dropped.
        unsafe { result::module::get_function(module, symbol) }.map_err(driver_error("cuModuleGetFunction"))
    }

    /// Of a kernel that there is one of for each kind of norm, without that for any order.
    fn by_norm(&self, module: CUmodule, stem: &str) -> Result<ByNorm> {
        let function = |norm: &str| self.function(module, &format!("{stem}_{norm}"));
        Ok(ByNorm { l1: function("l1")?, l2: function("l2")?, inf: function("inf")?, p: OnceLock::new() })
    }

    fn leave_to_graphs(&self) {
        self.captured.store(true, Ordering::Relaxed);
    }

    /// [`load`](Self::load), of what is not loaded with the rest.
    fn load_late(&self, stem: &str, capturing: bool) -> Result<CUmodule> {
        if capturing {
            return Err(NOT_PREPARED);
        }
        self.load(stem)
    }

    /// Tries each PTX we have of a stem: that of the local nvcc first, then the snapshot, which older drivers take too.
    fn load(&self, stem: &str) -> Result<CUmodule> {
        let candidates = MODULES.iter().find(|(name, _)| *name == stem).map_or(&[][..], |(_, texts)| texts);
        let mut last = Error::DriverTooOld { reason: format!("no PTX of {stem} is embedded") };
        for text in candidates {
            // PTX is text, so no NUL is in it.
            let image = CString::new(*text).unwrap_or_default();
            // SAFETY: a context is current; the image is PTX that ends with a NUL, and is alive during the call.
            match unsafe { result::module::load_data(image.as_ptr().cast()) } {
                Ok(module) => {
                    self.loaded.lock().unwrap_or_else(PoisonError::into_inner).push(module);
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
        if self.captured.load(Ordering::Relaxed) {
            return;
        }
        let Ok(_current) = CurrentContext::enter(&self.context) else { return };
        for &module in self.loaded.get_mut().unwrap_or_else(PoisonError::into_inner).iter() {
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
