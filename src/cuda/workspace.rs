//! Device memory of the stages: partials, and the descriptor table of long lists. Grows, never shrinks, is reused by
//! every call.
//!
//! Sizes: 8 bytes a tile, 8 more once a list holds f64 or its norm is of any other order than 1, 2 and infinity; 24 bytes a tensor for lists of more than [`INLINE_TENSORS`], on
//! the device and in each pinned staging buffer.

use super::device_table::DeviceTable;
use super::memory::GrowBuffer;
use crate::abi::{TensorDesc, TensorTable, INLINE_TENSORS};
use crate::error::Result;
use crate::options::NormType;
use crate::plan::Plan;
use bytemuck::Zeroable;
use cudarc::driver::CudaStream;
use std::sync::Arc;

#[derive(Debug)]
pub(crate) struct Workspace {
    stream: Arc<CudaStream>,
    sums: GrowBuffer,
    scales: GrowBuffer,
    descs: DeviceTable<TensorDesc>,
    table: Box<TensorTable>,
}

impl Workspace {
    pub(crate) fn new(stream: &Arc<CudaStream>) -> Self {
        Self {
            stream: stream.clone(),
            sums: GrowBuffer::default(),
            scales: GrowBuffer::default(),
            descs: DeviceTable::new(stream, "the descriptor table"),
            table: Box::new(TensorTable::zeroed()),
        }
    }

    /// Makes room for `plan`, and its table ready. The context is current.
    ///
    /// Allocates and copies only for a list that is not the last one (and see [`DeviceTable::set`]); not while capturing.
    pub(crate) fn prepare(&mut self, plan: &Plan, capturing: bool) -> Result<()> {
        let tiles = plan.num_tiles() as usize;
        self.sums.reserve(&self.stream, "partials", tiles * size_of::<f64>(), capturing)?;
        let descs = plan.descs();
        self.table.num_tensors = descs.len() as u64;
        if descs.len() <= INLINE_TENSORS {
            self.table.in_memory = 0;
            self.table.inline_tensors[..descs.len()].copy_from_slice(descs);
        } else {
            self.descs.set(descs, capturing)?;
            self.table.in_memory = self.descs.address();
        }
        Ok(())
    }

    /// Makes room for the partials of `tiles` tiles, with scales, and keeps those of the first `kept`. The context is
    /// current; not while capturing.
    pub(crate) fn grow(&mut self, kept: u32, tiles: u32, capturing: bool) -> Result<()> {
        let [kept, bytes] = [kept, tiles].map(|tiles| tiles as usize * size_of::<f64>());
        self.sums.grow(&self.stream, "partials", kept, bytes, capturing)?;
        self.scales.grow(&self.stream, "scales", kept, bytes, capturing)
    }

    /// The scales that [`grow`](Self::grow) has made room for.
    pub(crate) fn all_scales(&self) -> u64 {
        self.scales.address()
    }

    /// The table of the plan that was prepared last.
    pub(crate) fn table(&self) -> &TensorTable {
        &self.table
    }

    /// One f64, or one u64 of counts, for each tile.
    pub(crate) fn sums(&self) -> u64 {
        self.sums.address()
    }

    /// The scales of the partials, one f64 for each tile; null where all are 1. `plan` is the one prepared last.
    /// Allocates as [`prepare`](Self::prepare) does.
    pub(crate) fn scales(&mut self, plan: &Plan, norm_type: NormType, capturing: bool) -> Result<u64> {
        if !norm_type.has_scales(plan.has_f64()) {
            return Ok(0);
        }
        let bytes = plan.num_tiles() as usize * size_of::<f64>();
        self.scales.reserve(&self.stream, "scales", bytes, capturing)?;
        Ok(self.scales.address())
    }

    /// Device memory in use.
    pub(crate) fn device_bytes(&self) -> usize {
        self.sums.bytes() + self.scales.bytes() + self.descs.device_bytes()
    }

    /// Pinned host memory in use.
    pub(crate) fn pinned_bytes(&self) -> usize {
        self.descs.pinned_bytes()
    }
}
