//! Device and pinned memory that a clipper keeps.

use super::driver::{allocation_error, driver_error, CurrentContext, HomeThread};
use crate::error::Result;
use cudarc::driver::{result, CudaStream};
use std::ffi::c_void;
use std::sync::Arc;

/// Device memory, ordered on one stream.
#[derive(Debug)]
pub(crate) struct DeviceBuffer {
    address: u64,
    bytes: usize,
    stream: Arc<CudaStream>,
    home: HomeThread,
    captured: bool,
}

impl DeviceBuffer {
    /// The context of `stream` must be current.
    pub(crate) fn new(stream: &Arc<CudaStream>, what: &'static str, bytes: usize) -> Result<Self> {
        let address = if stream.context().has_async_alloc() {
            // SAFETY: the stream is alive, held below; nobody reads the memory before a kernel or copy has written it.
            unsafe { result::malloc_async(stream.cu_stream(), bytes) }
        } else {
            // SAFETY: as above.
            unsafe { result::malloc_sync(bytes) }
        };
        let address = address.map_err(allocation_error(what, bytes))?;
        Ok(Self { address, bytes, stream: stream.clone(), home: HomeThread::of(stream), captured: false })
    }

    /// Fills the memory with `byte`, in the order of the stream. The context must be current.
    pub(crate) fn fill(&mut self, byte: u8) -> Result<()> {
        // SAFETY: the whole allocation, which is ours; the stream is alive, held below.
        unsafe { result::memset_d8_async(self.address, byte, self.bytes, self.stream.cu_stream()) }
            .map_err(driver_error("cuMemsetD8Async"))
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Graphs may use the memory from now on. Since nobody says when the last one is gone, it is never freed: the driver
    /// does that with the context, which each graph keeps alive.
    pub(crate) fn leave_to_graphs(&mut self) {
        self.captured = true;
    }

    pub(crate) fn is_left_to_graphs(&self) -> bool {
        self.captured
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.captured {
            return;
        }
        let Ok(_current) = CurrentContext::enter(self.stream.context()) else { return };
        // An error here has nobody to go to; the driver frees what is left with the context.
        if self.stream.context().has_async_alloc() && self.home.is_here() {
            // SAFETY: allocated above by malloc_async on this stream, freed once, after all work of ours on it.
            let _ = unsafe { result::free_async(self.address, self.stream.cu_stream()) };
            return;
        }
        // cuMemFree need not wait for work that uses the memory. In another thread the handle of a per-thread stream
        // does not mean ours, so only the context as a whole can be waited for.
        let idle = if self.home.is_here() {
            // SAFETY: the stream is alive, held by the buffer.
            unsafe { result::stream::synchronize(self.stream.cu_stream()) }
        } else {
            result::ctx::synchronize()
        };
        if idle.is_ok() {
            // SAFETY: allocated above, by malloc_async or malloc_sync, and freed once; no work of ours is left.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

/// Page-locked host memory, from which a copy to the device is asynchronous. Whoever owns it waits for the copies before
/// it is dropped.
#[derive(Debug)]
pub(crate) struct PinnedBuffer {
    pointer: *mut c_void,
    bytes: usize,
    stream: Arc<CudaStream>,
}

// SAFETY: the pointer is to host memory that only this value refers to.
unsafe impl Send for PinnedBuffer {}

impl PinnedBuffer {
    /// The context of `stream` must be current.
    pub(crate) fn new(stream: &Arc<CudaStream>, what: &'static str, bytes: usize) -> Result<Self> {
        // SAFETY: a context is current; the memory is written before it is read (`fill`).
        let pointer = unsafe { result::malloc_host(bytes, 0) }.map_err(allocation_error(what, bytes))?;
        Ok(Self { pointer, bytes, stream: stream.clone() })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies `source` to the start of the buffer, and gives that part.
    pub(crate) fn fill(&mut self, source: &[u8]) -> &[u8] {
        assert!(source.len() <= self.bytes);
        // SAFETY: the buffer has at least this many bytes and is ours alone; the caller has made sure that no copy
        // from it is in flight.
        unsafe {
            std::ptr::copy_nonoverlapping(source.as_ptr(), self.pointer.cast(), source.len());
            std::slice::from_raw_parts(self.pointer.cast(), source.len())
        }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        let Ok(_current) = CurrentContext::enter(self.stream.context()) else { return };
        // SAFETY: allocated above by malloc_host and freed once. No copy from it is in flight: the documentation of
        // cuMemFreeHost promises no wait, so the owner has waited (`Staging` in workspace.rs).
        let _ = unsafe { result::free_host(self.pointer) };
    }
}
