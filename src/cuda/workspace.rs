//! Device memory of the stages: partials, and the descriptor table of long lists. Grows, never shrinks, is reused by
//! every call.
//!
//! Sizes: 8 bytes a tile, 4 more once a list holds f64; 24 bytes a tensor for lists of more than [`INLINE_TENSORS`], on
//! the device and in each pinned staging buffer. A captured graph goes on using what it was captured with, so such
//! buffers are never written from the host again, and never freed.

use super::driver::driver_error;
use super::memory::{DeviceBuffer, PinnedBuffer};
use crate::abi::{TensorDesc, TensorTable, INLINE_TENSORS};
use crate::error::{Error, Result};
use crate::plan::Plan;
use bytemuck::Zeroable;
use cudarc::driver::{result, CudaEvent, CudaStream};
use std::sync::Arc;

#[derive(Debug)]
pub(crate) struct Workspace {
    stream: Arc<CudaStream>,
    sums: Buffer,
    scales: Buffer,
    descs: Buffer,
    /// What `descs` holds.
    uploaded: Vec<TensorDesc>,
    staging: Vec<Staging>,
    /// Used by captured graphs only. Here to be counted.
    retired: Vec<DeviceBuffer>,
    table: Box<TensorTable>,
}

/// Device memory that grows.
#[derive(Debug, Default)]
struct Buffer {
    memory: Option<DeviceBuffer>,
}

/// A pinned copy of a table on its way to the device.
#[derive(Debug)]
struct Staging {
    host: PinnedBuffer,
    copied: CudaEvent,
}

impl Workspace {
    pub(crate) fn new(stream: &Arc<CudaStream>) -> Self {
        Self {
            stream: stream.clone(),
            sums: Buffer::default(),
            scales: Buffer::default(),
            descs: Buffer::default(),
            uploaded: Vec::new(),
            staging: Vec::new(),
            retired: Vec::new(),
            table: Box::new(TensorTable::zeroed()),
        }
    }

    /// Makes room for `plan`, and its table ready. The context is current.
    ///
    /// Allocates only if the plan is larger than any before, or every staging buffer is still in flight (the host has
    /// then run that many calls ahead: a buffer more is cheaper than to wait). Copies only if the table is long and
    /// not the one on the device. While capturing it does neither.
    pub(crate) fn prepare(&mut self, plan: &Plan, capturing: bool) -> Result<()> {
        let tiles = plan.num_tiles() as usize;
        self.sums.reserve(&self.stream, "partials", tiles * size_of::<f64>(), capturing, &mut self.retired)?;
        if plan.has_f64() {
            self.scales.reserve(&self.stream, "scales", tiles * size_of::<i32>(), capturing, &mut self.retired)?;
        }
        let descs = plan.descs();
        self.table.num_tensors = descs.len() as u64;
        if descs.len() <= INLINE_TENSORS {
            self.table.in_memory = 0;
            self.table.inline_tensors[..descs.len()].copy_from_slice(descs);
        } else {
            // As bytes: one memcmp, where field by field it is a quarter of a repeated call's work.
            if bytemuck::cast_slice::<_, u8>(&self.uploaded) != bytemuck::cast_slice::<_, u8>(descs) {
                self.upload(descs, capturing)?;
            }
            if capturing {
                self.descs.leave_to_graphs();
            }
            self.table.in_memory = self.descs.address();
        }
        Ok(())
    }

    /// The table of the plan that was prepared last.
    pub(crate) fn table(&self) -> &TensorTable {
        &self.table
    }

    /// One f64, or one u64 of counts, for each tile.
    pub(crate) fn sums(&self) -> u64 {
        self.sums.address()
    }

    /// One i32 for each tile; null if `plan` needs none.
    pub(crate) fn scales(&self, plan: &Plan) -> u64 {
        if plan.has_f64() {
            self.scales.address()
        } else {
            0
        }
    }

    /// Device memory in use.
    pub(crate) fn device_bytes(&self) -> usize {
        let held = |buffer: &Buffer| buffer.memory.as_ref().map_or(0, DeviceBuffer::bytes);
        held(&self.sums)
            + held(&self.scales)
            + held(&self.descs)
            + self.retired.iter().map(DeviceBuffer::bytes).sum::<usize>()
    }

    /// Pinned host memory in use.
    pub(crate) fn pinned_bytes(&self) -> usize {
        self.staging.iter().map(|staging| staging.host.bytes()).sum()
    }

    fn upload(&mut self, descs: &[TensorDesc], capturing: bool) -> Result<()> {
        if capturing {
            return Err(Error::CaptureNeedsWarmup { what: "the descriptor table" });
        }
        let source: &[u8] = bytemuck::cast_slice(descs);
        self.uploaded.clear(); // until the copy is on its way
        if self.descs.is_left_to_graphs() {
            self.descs.retire(&mut self.retired);
        }
        self.descs.reserve(&self.stream, "descriptor table", source.len(), false, &mut self.retired)?;
        let staging = free_staging(&mut self.staging, &self.stream, source.len())?;
        let source = staging.host.fill(source);
        // SAFETY: the source is pinned and stays untouched until `copied` has passed; the target was reserved for it.
        unsafe { result::memcpy_htod_async(self.descs.address(), source, self.stream.cu_stream()) }
            .map_err(driver_error("copying the descriptor table"))?;
        if let Err(error) = staging.copied.record(&self.stream) {
            // Without the event nobody would know when the copy has left the staging buffer.
            let _ = self.stream.synchronize();
            return Err(driver_error("cuEventRecord")(error));
        }
        self.uploaded.extend_from_slice(descs);
        Ok(())
    }
}

/// A staging buffer that no copy reads from any more.
fn free_staging<'a>(all: &'a mut Vec<Staging>, stream: &Arc<CudaStream>, bytes: usize) -> Result<&'a mut Staging> {
    let free = |staging: &Staging| staging.host.bytes() >= bytes && staging.copied.is_complete();
    let index = match all.iter().position(free) {
        Some(index) => index,
        None => {
            let host = PinnedBuffer::new(stream, "staging of the descriptor table", bytes)?;
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

impl Buffer {
    fn address(&self) -> u64 {
        self.memory.as_ref().map_or(0, DeviceBuffer::address)
    }

    fn reserve(
        &mut self,
        stream: &Arc<CudaStream>,
        what: &'static str,
        bytes: usize,
        capturing: bool,
        retired: &mut Vec<DeviceBuffer>,
    ) -> Result<()> {
        if self.memory.as_ref().map_or(0, DeviceBuffer::bytes) < bytes {
            if capturing {
                return Err(Error::CaptureNeedsWarmup { what });
            }
            let grown = DeviceBuffer::new(stream, what, bytes)?;
            self.retire(retired);
            self.memory = Some(grown);
        }
        if capturing {
            self.leave_to_graphs();
        }
        Ok(())
    }

    fn leave_to_graphs(&mut self) {
        if let Some(memory) = &mut self.memory {
            memory.leave_to_graphs();
        }
    }

    fn is_left_to_graphs(&self) -> bool {
        self.memory.as_ref().is_some_and(DeviceBuffer::is_left_to_graphs)
    }

    /// Lets go of the memory: to the driver, or to the graphs that were captured with it.
    fn retire(&mut self, retired: &mut Vec<DeviceBuffer>) {
        retired.extend(self.memory.take().filter(DeviceBuffer::is_left_to_graphs));
    }
}
