//! Device and pinned memory that a clipper keeps.

use super::driver::{allocation_error, driver_error, CurrentContext, HomeThread};
use crate::error::{Error, Result};
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

/// Device memory that grows, never shrinks, and is reused by every call. A captured graph goes on using what it was
/// captured with, so that is never freed.
#[derive(Debug, Default)]
pub(crate) struct GrowBuffer {
    memory: Option<DeviceBuffer>,
    /// Used by captured graphs only. Here to be counted.
    retired: Vec<DeviceBuffer>,
}

impl GrowBuffer {
    /// 0 until something has been reserved.
    pub(crate) fn address(&self) -> u64 {
        self.memory.as_ref().map_or(0, DeviceBuffer::address)
    }

    /// Room for `bytes`. What was there is lost if it has to grow, which it cannot while capturing.
    pub(crate) fn reserve(
        &mut self,
        stream: &Arc<CudaStream>,
        what: &'static str,
        bytes: usize,
        capturing: bool,
    ) -> Result<()> {
        self.grow(stream, what, 0, bytes, capturing)
    }

    /// [`reserve`](Self::reserve), where the first `kept` bytes are not lost: copied on the device, in the order of the
    /// stream. Doubles at least, so that what grows bit by bit is copied as often as it has binary digits.
    pub(crate) fn grow(
        &mut self,
        stream: &Arc<CudaStream>,
        what: &'static str,
        kept: usize,
        bytes: usize,
        capturing: bool,
    ) -> Result<()> {
        let size = self.memory.as_ref().map_or(0, DeviceBuffer::bytes);
        if size < bytes {
            if capturing {
                return Err(Error::CaptureNeedsWarmup { what });
            }
            let grown = DeviceBuffer::new(stream, what, if kept > 0 { bytes.max(2 * size) } else { bytes })?;
            if kept > 0 {
                // SAFETY: both allocations are ours and at least this large (`kept` was written here before), and the
                // stream, on which the old one is freed too, orders the copy after what wrote it.
                unsafe { result::memcpy_dtod_async(grown.address(), self.address(), kept, stream.cu_stream()) }
                    .map_err(driver_error("copying what has been added up"))?;
            }
            self.retire();
            self.memory = Some(grown);
        }
        if capturing {
            self.leave_to_graphs();
        }
        Ok(())
    }

    pub(crate) fn leave_to_graphs(&mut self) {
        if let Some(memory) = &mut self.memory {
            memory.leave_to_graphs();
        }
    }

    /// Lets go of what graphs use, so that it is never written from the host again.
    pub(crate) fn give_up_to_graphs(&mut self) {
        if self.memory.as_ref().is_some_and(DeviceBuffer::is_left_to_graphs) {
            self.retire();
        }
    }

    /// In use, by graphs too.
    pub(crate) fn bytes(&self) -> usize {
        self.memory.iter().chain(&self.retired).map(DeviceBuffer::bytes).sum()
    }

    /// Lets go of the memory: to the driver, or to the graphs that were captured with it.
    fn retire(&mut self) {
        self.retired.extend(self.memory.take().filter(DeviceBuffer::is_left_to_graphs));
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
        // cuMemFreeHost promises no wait, so the owner has waited (`Staging` in device_table.rs).
        let _ = unsafe { result::free_host(self.pointer) };
    }
}
