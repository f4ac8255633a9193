//! A table that the kernels read: kept on the device, copied there when its rows are others than before.
//!
//! The copy is asynchronous, from pinned memory. A captured graph goes on reading the table it was captured with, so that
//! one is never written again.

use super::driver::driver_error;
use super::memory::{GrowBuffer, PinnedBuffer};
use crate::error::{Error, Result};
use bytemuck::Pod;
use cudarc::driver::{result, CudaEvent, CudaStream};
use std::sync::Arc;

#[derive(Debug)]
pub(crate) struct DeviceTable<T> {
    stream: Arc<CudaStream>,
    what: &'static str,
    memory: GrowBuffer,
    /// What `memory` holds.
    uploaded: Vec<T>,
    staging: Vec<Staging>,
}

/// A pinned copy of a table on its way to the device.
#[derive(Debug)]
struct Staging {
    host: PinnedBuffer,
    copied: CudaEvent,
}

impl<T: Pod> DeviceTable<T> {
    /// `what` names it in errors.
    pub(crate) fn new(stream: &Arc<CudaStream>, what: &'static str) -> Self {
        Self { stream: stream.clone(), what, memory: GrowBuffer::default(), uploaded: Vec::new(), staging: Vec::new() }
    }

    /// Makes the table one of `rows`. The context is current.
    ///
    /// Copies only if the rows are not those on the device. Allocates only if they are more than ever before, or every
    /// staging buffer is still in flight (the host has then run that many calls ahead: a buffer more is cheaper than to
    /// wait). While capturing it does neither.
    pub(crate) fn set(&mut self, rows: &[T], capturing: bool) -> Result<()> {
        // As bytes: one memcmp, where field by field it is a quarter of a repeated call's work.
        if bytemuck::cast_slice::<_, u8>(&self.uploaded) != bytemuck::cast_slice::<_, u8>(rows) {
            self.upload(rows, capturing)?;
        }
        if capturing {
            self.memory.leave_to_graphs();
        }
        Ok(())
    }

    /// Of the first row.
    pub(crate) fn address(&self) -> u64 {
        self.memory.address()
    }

    pub(crate) fn device_bytes(&self) -> usize {
        self.memory.bytes()
    }

    pub(crate) fn pinned_bytes(&self) -> usize {
        self.staging.iter().map(|staging| staging.host.bytes()).sum()
    }

    fn upload(&mut self, rows: &[T], capturing: bool) -> Result<()> {
        if capturing {
            return Err(Error::CaptureNeedsWarmup { what: self.what });
        }
        let source: &[u8] = bytemuck::cast_slice(rows);
        self.uploaded.clear(); // until the copy is on its way
        self.memory.give_up_to_graphs();
        self.memory.reserve(&self.stream, self.what, source.len(), false)?;
        let staging = free_staging(&mut self.staging, &self.stream, self.what, source.len())?;
        let source = staging.host.fill(source);
        // SAFETY: the source is pinned and stays untouched until `copied` has passed; the target was reserved for it.
        unsafe { result::memcpy_htod_async(self.memory.address(), source, self.stream.cu_stream()) }
            .map_err(driver_error("copying a table to the device"))?;
        if let Err(error) = staging.copied.record(&self.stream) {
            // Without the event nobody would know when the copy has left the staging buffer.
            let _ = self.stream.synchronize();
            return Err(driver_error("cuEventRecord")(error));
        }
        self.uploaded.extend_from_slice(rows);
        Ok(())
    }
}

/// A staging buffer that no copy reads from any more.
fn free_staging<'a>(
    all: &'a mut Vec<Staging>,
    stream: &Arc<CudaStream>,
    what: &'static str,
    bytes: usize,
) -> Result<&'a mut Staging> {
    let free = |staging: &Staging| staging.host.bytes() >= bytes && staging.copied.is_complete();
    let index = match all.iter().position(free) {
        Some(index) => index,
        None => {
            let host = PinnedBuffer::new(stream, what, bytes)?;
            let copied = stream.context().new_event(None).map_err(driver_error("cuEventCreate"))?;
            all.retain(|staging| staging.host.bytes() >= bytes || !staging.copied.is_complete());
            all.push(Staging { host, copied });
            all.len() - 1
        }
    };
    Ok(&mut all[index])
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.copied.is_complete() {
            // Freeing pinned memory is not documented to wait for the copies that read it.
            let _ = self.copied.synchronize();
        }
    }
}
