//! The kernels of a context: one lazy table, which all of its clippers share.
//!
//! A module holds one kernel, because the driver compiles a whole module at its first load. So a call compiles what it
//! launches, and nothing else ([decision 0011](../../docs/decisions/0011-loading.md)).

use super::driver::{context_id, driver_error, driver_version, CurrentContext, KeepsContext, RelaxedCapture};
use super::kernel::Kernel;
use crate::error::{Error, Result};
use cudarc::driver::sys::{CUdevice_attribute, CUfunction, CUmodule, CUresult};
use cudarc::driver::{result, CudaContext, DriverError};
use std::ffi::CString;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

include!(concat!(env!("OUT_DIR"), "/ptx.rs"));

/// Oldest GPU the kernels are built for.
const OLDEST_COMPUTE_CAPABILITY: (i32, i32) = (7, 5);

/// What compiled the PTX that is tried first: `snapshot`, or an nvcc with its version.
#[must_use]
pub fn compiler() -> &'static str {
    COMPILER
}

/// The kernels that are loaded into a context. The last clipper of the context unloads them, except those that captured
/// graphs launch.
#[derive(Debug)]
pub(crate) struct Kernels {
    context: Arc<CudaContext>,
    /// Of the context. A context that is made where another one was has the same address, and another id.
    id: u64,
    slots: [Slot; Kernel::COUNT],
}

#[derive(Debug, Default)]
struct Slot {
    loaded: OnceLock<Loaded>,
    /// Held while the kernel is loaded, so that two threads do not load it twice.
    loading: Mutex<()>,
    /// Whether a graph may launch the kernel.
    captured: AtomicBool,
}

#[derive(Clone, Copy, Debug)]
struct Loaded {
    module: CUmodule,
    function: CUfunction,
}

// SAFETY: the handles are the driver's, which takes them in any thread.
unsafe impl Send for Loaded {}
// SAFETY: as above; nothing changes behind a shared reference.
unsafe impl Sync for Loaded {}

/// What is known of a context that has clippers, or graphs that were captured from them.
struct Known {
    id: u64,
    kernels: Weak<KeepsContext<Kernels>>,
    /// Launched by graphs, and so loaded until the context goes, of which nobody tells. An id is never used again, so an
    /// entry of a context that is gone costs its few bytes and is never found.
    captured: Vec<(Kernel, Loaded)>,
}

fn contexts() -> MutexGuard<'static, Vec<Known>> {
    static CONTEXTS: Mutex<Vec<Known>> = Mutex::new(Vec::new());
    CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Kernels {
    /// The table of `context`, which must be current. Loads nothing.
    pub(crate) fn of(context: &Arc<CudaContext>) -> Result<Arc<KeepsContext<Self>>> {
        check_compute_capability(context)?;
        check_driver_version()?;
        let id = context_id(context)?;
        let mut contexts = contexts();
        contexts.retain(|known| known.kernels.strong_count() > 0 || !known.captured.is_empty());
        let index = contexts.iter().position(|known| known.id == id).unwrap_or_else(|| {
            contexts.push(Known { id, kernels: Weak::new(), captured: Vec::new() });
            contexts.len() - 1
        });
        let known = &mut contexts[index];
        if let Some(kernels) = known.kernels.upgrade() {
            return Ok(kernels);
        }
        let slots = std::array::from_fn(|_| Slot::default());
        for &(kernel, loaded) in &known.captured {
            let slot: &Slot = &slots[kernel as usize];
            slot.captured.store(true, Ordering::Relaxed);
            let _ = slot.loaded.set(loaded); // each kernel is there once
        }
        let kernels = Arc::new(KeepsContext::new(Self { context: context.clone(), id, slots }));
        known.kernels = Arc::downgrade(&kernels);
        Ok(kernels)
    }

    /// Loads those of a call's kernels that are not loaded yet. The context must be current.
    ///
    /// A captured call loads nothing, which the driver would not allow. The kernels it launches stay loaded as long as
    /// the context: see `DeviceBuffer::leave_to_graphs`.
    #[inline]
    pub(crate) fn prepare(&self, wanted: &[Kernel], capturing: bool) -> Result<()> {
        for &kernel in wanted {
            let slot = &self.slots[kernel as usize];
            if slot.loaded.get().is_none() {
                slot.load(kernel, capturing)?;
            }
            if capturing && !slot.captured.load(Ordering::Relaxed) {
                self.leave_to_graphs(kernel);
            }
        }
        Ok(())
    }

    /// At once and not when the table goes: the next table may be made before this one's `drop` gets the lock.
    #[cold]
    fn leave_to_graphs(&self, kernel: Kernel) {
        let slot = &self.slots[kernel as usize];
        let mut contexts = contexts();
        let known = contexts.iter_mut().find(|known| known.id == self.id); // there, as long as the table is
        if let (Some(known), Some(loaded)) = (known, slot.loaded.get()) {
            if !slot.captured.swap(true, Ordering::Relaxed) {
                known.captured.push((kernel, *loaded));
            }
        }
    }

    /// After [`prepare`](Self::prepare) for the same kernel.
    #[inline]
    pub(crate) fn get(&self, kernel: Kernel) -> Result<CUfunction> {
        match self.slots[kernel as usize].loaded.get() {
            Some(loaded) => Ok(loaded.function),
            None => Err(NOT_LOADED),
        }
    }
}

impl Slot {
    #[cold]
    fn load(&self, kernel: Kernel, capturing: bool) -> Result<()> {
        if capturing {
            return Err(NOT_LOADED);
        }
        let _one_at_a_time = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if self.loaded.get().is_none() {
            let _relaxed = RelaxedCapture::enter()?;
            let loaded = Loaded::new(kernel)?;
            let _ = self.loaded.set(loaded); // it is empty: nobody else holds the lock
        }
        Ok(())
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        let unused = self.slots.iter_mut().filter(|slot| !slot.captured.load(Ordering::Relaxed));
        let unused: Vec<_> = unused.filter_map(|slot| slot.loaded.take()).collect();
        if unused.is_empty() {
            return;
        }
        let Ok(_current) = CurrentContext::enter(&self.context) else { return };
        // Whoever resets a primary context takes the modules away, and their handles may be those of others by now.
        if context_id(&self.context) != Ok(self.id) {
            return;
        }
        let _relaxed = RelaxedCapture::enter();
        // Clippers that went before this one may have work under way on other streams, and the documentation of
        // cuModuleUnload promises no wait. What cannot be waited for stays with the context.
        if result::ctx::synchronize().is_err() {
            return;
        }
        for loaded in unused {
            loaded.unload();
        }
    }
}

const NOT_LOADED: Error = Error::CaptureNeedsWarmup { what: "a kernel of this call" };

impl Loaded {
    /// Tries each module we have of a kernel: that of the local nvcc first, then the snapshot, which older drivers take
    /// too. The context must be current.
    fn new(kernel: Kernel) -> Result<Self> {
        let symbol = kernel.symbol();
        let candidates = MODULES.iter().find(|(name, _)| *name == symbol).map_or(&[][..], |(_, texts)| texts);
        let mut last = Error::DriverTooOld { reason: format!("no PTX of {symbol} is embedded") };
        for text in candidates {
            // PTX is text, so no NUL is in it.
            let image = CString::new(*text).unwrap_or_default();
            // SAFETY: a context is current; the image is PTX that ends with a NUL, and is alive during the call.
            match unsafe { result::module::load_data(image.as_ptr().cast()) } {
                Ok(module) => return Self::of_module(module, symbol),
                Err(error) => last = load_error(symbol, text, error),
            }
        }
        Err(last)
    }

    /// Takes over `module`, which was just loaded.
    fn of_module(module: CUmodule, symbol: &str) -> Result<Self> {
        // Ours have no NUL in them.
        let name = CString::new(symbol).unwrap_or_default();
        // SAFETY: the module is loaded.
        match unsafe { result::module::get_function(module, name) } {
            Ok(function) => Ok(Self { module, function }),
            Err(error) => {
                // SAFETY: loaded by the caller, and used by nothing.
                let _ = unsafe { result::module::unload(module) };
                Err(driver_error("cuModuleGetFunction")(error))
            }
        }
    }

    /// The context must be current, and the one it was loaded into.
    fn unload(self) {
        // SAFETY: loaded above, unloaded once, by the table that gave the function to its clippers, which are gone. An
        // error here has nobody to go to.
        let _ = unsafe { result::module::unload(self.module) };
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

/// Whether the driver is one that takes the kernels, which are loaded only when they are needed.
fn check_driver_version() -> Result<()> {
    let driver = driver_version()?;
    let texts = MODULES.first().map_or(&[][..], |(_, texts)| texts);
    if texts.iter().any(|text| cuda_of_ptx(version_of(text)) <= driver) {
        return Ok(());
    }
    let versions: Vec<_> = texts.iter().map(|text| version_of(text)).collect();
    let reason = format!(
        "it is one for CUDA {}.{}, which does not take PTX {}",
        driver / 1000,
        driver % 1000 / 10,
        versions.join(" or ")
    );
    Err(Error::DriverTooOld { reason })
}

fn version_of(ptx: &str) -> &str {
    ptx.lines().find_map(|line| line.strip_prefix(".version ")).unwrap_or("?").trim()
}

/// The first CUDA release, counted as cuDriverGetVersion does, that takes a version of PTX: "Release History" in NVIDIA's
/// "Parallel Thread Execution ISA". Of a version that is not in there, 0: then the load says whether the driver takes it.
fn cuda_of_ptx(version: &str) -> i32 {
    let numbers = version.split_once('.').map(|(major, minor)| (major.parse(), minor.parse()));
    match numbers {
        Some((Ok(8), Ok(minor @ 0..=5))) => 12_000 + 10 * minor,
        Some((Ok(8), Ok(minor @ 6..=8))) => 12_010 + 10 * minor,
        Some((Ok(9), Ok(minor @ 0..=9))) => 13_000 + 10 * minor,
        _ => 0,
    }
}

fn load_error(symbol: &str, ptx: &str, error: DriverError) -> Error {
    match error.0 {
        CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION | CUresult::CUDA_ERROR_INVALID_PTX => {
            let reason = format!("it refuses {symbol} in PTX {} ({:?})", version_of(ptx), error.0);
            Error::DriverTooOld { reason }
        }
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory { what: "kernels", bytes: ptx.len() },
        _ => driver_error("cuModuleLoadData")(error),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_every_kernel_that_is_embedded() {
        let mut embedded: Vec<_> = MODULES.iter().map(|(symbol, _)| *symbol).collect();
        let mut ours = Kernel::ALL.map(Kernel::symbol);
        embedded.sort_unstable();
        ours.sort_unstable();
        assert_eq!(embedded, ours);
        assert!(MODULES.iter().all(|(_, texts)| !texts.is_empty()));
    }

    /// The releases are those of `tests/double/driver/modules.cpp`, which maps the other way.
    #[test]
    fn a_version_of_ptx_needs_a_cuda_release() {
        let pairs = [("7.8", 0), ("8.0", 12_000), ("8.5", 12_050), ("8.6", 12_070), ("8.7", 12_080), ("8.8", 12_090)];
        for (version, cuda) in pairs.into_iter().chain([("9.0", 13_000), ("9.1", 13_010), ("10.0", 0), ("?", 0)]) {
            assert_eq!(cuda_of_ptx(version), cuda, "{version}");
        }
        let snapshot = MODULES[0].1.last().unwrap();
        if COMPILER == "snapshot" {
            assert_eq!(cuda_of_ptx(version_of(snapshot)), 12_000, "as `Error::DriverTooOld` says");
        }
    }
}
