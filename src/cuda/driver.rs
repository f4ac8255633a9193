//! The border to the CUDA driver: is there one, what do its errors mean, whose context is current.

use crate::error::{Error, Result};
use cudarc::driver::sys::{self, cuDriverGetVersion, CUcontext, CUresult, CUstreamCaptureStatus};
use cudarc::driver::{result, CudaContext, CudaStream, DriverError};
use std::cell::Cell;
use std::ffi::c_ulonglong;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// Names the driver goes by. cudarc looks for the same.
#[cfg(not(windows))]
const LIBRARIES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];
#[cfg(windows)]
const LIBRARIES: [&str; 1] = ["nvcuda.dll"];
const LIBRARIES_TEXT: &str = if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1, libcuda.so" };

/// Driver functions reached by this crate. cudarc panics at the first use of one that the driver lacks, so they are
/// looked up here before.
const FUNCTIONS: [&str; 38] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxGetCurrent",
    "cuCtxGetId",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuModuleLoadData",
    "cuThreadExchangeStreamCaptureMode",
    "cuModuleGetFunction",
    "cuModuleUnload",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemAllocAsync",
    "cuMemFreeAsync",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemsetD8Async",
    "cuPointerGetAttributes",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuStreamIsCapturing",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuGetErrorName",
    "cuGetErrorString",
];

/// Whether a CUDA driver is installed that this crate can use. Loads the library, asks nothing of any GPU, never
/// panics; the answer is kept for the life of the process.
///
/// # Errors
/// [`Error::DriverMissing`], [`Error::DriverTooOld`].
pub fn check_driver() -> Result<()> {
    found().map(drop)
}

/// cuCtxGetId. Not called through cudarc, which has it only where it was built for CUDA 12 or later.
type CtxGetId = unsafe extern "C" fn(CUcontext, *mut c_ulonglong) -> CUresult;

fn found() -> Result<CtxGetId> {
    static ANSWER: OnceLock<Result<CtxGetId>> = OnceLock::new();
    ANSWER.get_or_init(probe).clone()
}

fn probe() -> Result<CtxGetId> {
    let mut reasons = Vec::new();
    for name in LIBRARIES {
        // SAFETY: opening the driver runs its initialisers, as any CUDA program does.
        match unsafe { libloading::Library::new(name) } {
            Ok(library) => {
                let missing = FUNCTIONS.iter().find(|function| {
                    // SAFETY: the symbol is looked up, never called or read.
                    unsafe { library.get::<*const ()>(function.as_bytes()) }.is_err()
                });
                // SAFETY: the symbol has this type in cuda.h, and the library stays open, see below.
                let ctx_get_id = unsafe { library.get::<CtxGetId>(b"cuCtxGetId") }.map(|symbol| *symbol);
                // Stays open: cudarc opens the same library, and closing a driver is not something drivers are good at.
                std::mem::forget(library);
                return match (missing, ctx_get_id) {
                    (None, Ok(ctx_get_id)) => Ok(ctx_get_id),
                    (missing, _) => {
                        let function = missing.unwrap_or(&"cuCtxGetId");
                        Err(Error::DriverTooOld { reason: format!("{name} has no {function}") })
                    }
                };
            }
            Err(error) => reasons.push(loader_text(&error)),
        }
    }
    Err(Error::DriverMissing { tried: LIBRARIES_TEXT, reason: reasons.join("; ") })
}

/// What the loader said is in the source of libloading's error.
pub(crate) fn loader_text(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}

/// The primary context of device `ordinal`: like [`CudaContext::new`], which panics where no driver is. The calling
/// thread's current context stays what it was.
///
/// # Errors
/// [`Error::DriverMissing`], [`Error::DriverTooOld`], [`Error::NoDevice`].
///
/// ```
/// match gradclip::cuda::context(0) {
///     Ok(context) => println!("GPU found: device {}", context.ordinal()),
///     Err(error) => println!("using the CPU: {error}"),
/// }
/// ```
pub fn context(ordinal: usize) -> Result<Arc<CudaContext>> {
    check_driver()?;
    let none = |count| Error::NoDevice { ordinal, count };
    match result::init() {
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => return Err(none(0)),
        other => other.map_err(driver_error("cuInit"))?,
    }
    let count = result::device::get_count().map_err(driver_error("cuDeviceGetCount"))?;
    let count = usize::try_from(count).unwrap_or(0);
    if ordinal >= count {
        return Err(none(count));
    }
    let _current = CurrentContext::save()?;
    CudaContext::new(ordinal).map_err(driver_error("creating the context"))
}

/// The id of a context, which no other context of the process has or will have: a primary context that was destroyed and
/// made again may have the address that it had, but not the id.
pub(crate) fn context_id(context: &CudaContext) -> Result<u64> {
    let (ctx_get_id, mut id) = (found()?, 0);
    // SAFETY: the function is the driver's, the context is alive, held by the reference, and the result goes to a local.
    unsafe { ctx_get_id(context.cu_ctx(), &raw mut id) }.result().map_err(driver_error("cuCtxGetId"))?;
    Ok(id)
}

/// The CUDA release that the driver is for: 12080 for 12.8.
pub(crate) fn driver_version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: the result goes to a local.
    unsafe { cuDriverGetVersion(&raw mut version) }.result().map_err(driver_error("cuDriverGetVersion"))?;
    Ok(version)
}

/// Wraps a driver error with what was being done. (`DriverError`'s own `Display` asks the driver for its text.)
pub(crate) fn driver_error(op: &'static str) -> impl Fn(DriverError) -> Error {
    move |DriverError(code)| Error::Driver { op, code: format!("{code:?}") }
}

/// The same for an allocation.
pub(crate) fn allocation_error(what: &'static str, bytes: usize) -> impl Fn(DriverError) -> Error {
    move |error| match error.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory { what, bytes },
        _ => driver_error(what)(error),
    }
}

/// Whether `stream` captures, or cannot be used because another one does. Asking does the capture no harm.
pub(crate) fn is_capturing(stream: &CudaStream) -> Result<bool> {
    // SAFETY: the stream is alive, held by the reference.
    match unsafe { result::stream::is_capturing(stream.cu_stream()) } {
        Ok(status) => Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE),
        Err(DriverError(CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT)) => Ok(true),
        Err(error) => Err(driver_error("cuStreamIsCapturing")(error)),
    }
}

/// The thread that a stream belongs to, if it belongs to one: the per-thread default stream has one handle, which is
/// another stream in each thread.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HomeThread(Option<u64>);

/// CU_STREAM_PER_THREAD.
const PER_THREAD: usize = 2;

impl HomeThread {
    /// Of a stream that this thread has just been given.
    pub(crate) fn of(stream: &CudaStream) -> Self {
        Self((stream.cu_stream() as usize == PER_THREAD).then(thread_number))
    }

    /// Whether the handle means the same stream in this thread.
    pub(crate) fn is_here(self) -> bool {
        self.0.is_none_or(|home| home == thread_number())
    }

    pub(crate) fn check(self) -> Result<()> {
        if self.is_here() {
            Ok(())
        } else {
            Err(Error::WrongThread)
        }
    }
}

/// A number that no other thread of the process has or will have. Unlike [`std::thread::current`] it can be asked for
/// in destructors of thread-local values.
fn thread_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    thread_local!(static MINE: Cell<u64> = const { Cell::new(0) });
    if MINE.get() == 0 {
        MINE.set(NEXT.fetch_add(1, Ordering::Relaxed));
    }
    MINE.get()
}

/// Remembers the calling thread's current context, and makes it current again when dropped.
pub(crate) struct CurrentContext {
    saved: cudarc::driver::sys::CUcontext,
}

impl CurrentContext {
    pub(crate) fn save() -> Result<Self> {
        let saved = result::ctx::get_current().map_err(driver_error("cuCtxGetCurrent"))?;
        Ok(Self { saved: saved.unwrap_or(std::ptr::null_mut()) })
    }

    /// Saves, then makes `context` current.
    pub(crate) fn enter(context: &CudaContext) -> Result<Self> {
        let guard = Self::save()?;
        if guard.saved != context.cu_ctx() {
            // SAFETY: the handle is that of a live context, held by the reference.
            unsafe { result::ctx::set_current(context.cu_ctx()) }.map_err(driver_error("cuCtxSetCurrent"))?;
        }
        Ok(guard)
    }
}

impl Drop for CurrentContext {
    fn drop(&mut self) {
        let unchanged =
            matches!(result::ctx::get_current(), Ok(now) if now.unwrap_or(std::ptr::null_mut()) == self.saved);
        if !unchanged {
            // SAFETY: the handle was current when it was read; its owner is the caller, who is still running. A driver
            // that refuses leaves another context current, which there is no one to tell.
            let _ = unsafe { result::ctx::set_current(self.saved) };
        }
    }
}

/// While it lives, this thread's calls do not disturb captures of other streams, for what a graph does not record, such as
/// loading a module: else one stream that captures in the global mode, which is the default, would make the driver refuse
/// such a call in any thread, and lose its graph ("Prohibited and unhandled operations", CUDA programming guide, "CUDA Graphs").
pub(crate) struct RelaxedCapture(sys::CUstreamCaptureMode);

impl RelaxedCapture {
    pub(crate) fn enter() -> Result<Self> {
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the mode of this thread, exchanged with a local.
        unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) }
            .result()
            .map_err(driver_error("cuThreadExchangeStreamCaptureMode"))?;
        Ok(Self(mode))
    }
}

impl Drop for RelaxedCapture {
    fn drop(&mut self) {
        // SAFETY: as above. An error here has nobody to go to.
        let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut self.0) };
    }
}

/// Holds driver objects whose destructors make their own context current, as those of cudarc do, and undoes that when
/// it drops them.
#[derive(Debug)]
pub(crate) struct KeepsContext<T>(std::mem::ManuallyDrop<T>);

impl<T> KeepsContext<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(std::mem::ManuallyDrop::new(value))
    }
}

impl<T> std::ops::Deref for KeepsContext<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> std::ops::DerefMut for KeepsContext<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T> Drop for KeepsContext<T> {
    fn drop(&mut self) {
        let _current = CurrentContext::save();
        // SAFETY: dropped here and nowhere else, and not used afterwards.
        unsafe { std::mem::ManuallyDrop::drop(&mut self.0) };
    }
}
