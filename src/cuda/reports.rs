//! Reports that stay on the device until somebody asks.

use super::driver::{driver_error, CurrentContext};
use super::memory::DeviceBuffer;
use crate::abi::ReportSlot;
use crate::error::{Error, Result};
use crate::plan::Plan;
use crate::report::{NormReport, Report};
use crate::REPORTS_KEPT;
use bytemuck::Zeroable;
use cudarc::driver::{result, CudaStream};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// The slots of a clipper, used in turn.
#[derive(Debug)]
pub(crate) struct ReportRing {
    memory: DeviceBuffer,
    stream: Arc<CudaStream>,
    /// For each slot, the number of the call that wrote it last; `CAPTURED` if a graph writes it.
    owner: Vec<AtomicU64>,
    next_call: AtomicU64,
}

const CAPTURED: u64 = u64::MAX;
const NOBODY: u64 = u64::MAX - 1;

/// One slot, taken for one call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    index: usize,
    owner: u64,
}

impl ReportRing {
    pub(crate) fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        Ok(Self {
            memory: DeviceBuffer::new(stream, "reports", REPORTS_KEPT * size_of::<ReportSlot>())?,
            stream: stream.clone(),
            owner: (0..REPORTS_KEPT).map(|_| AtomicU64::new(NOBODY)).collect(),
            next_call: AtomicU64::new(0),
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// Takes the next slot that no graph holds. One captured now is held until the clipper goes.
    pub(crate) fn take(&self, capturing: bool) -> Result<Slot> {
        for _ in 0..REPORTS_KEPT {
            let call = self.next_call.fetch_add(1, Ordering::Relaxed);
            let index = call as usize % REPORTS_KEPT;
            if self.owner[index].load(Ordering::Relaxed) != CAPTURED {
                let owner = if capturing { CAPTURED } else { call };
                self.owner[index].store(owner, Ordering::Relaxed);
                return Ok(Slot { index, owner });
            }
        }
        Err(Error::NoReportSlot)
    }

    pub(crate) fn address(&self, slot: Slot) -> u64 {
        self.memory.address() + (slot.index * size_of::<ReportSlot>()) as u64
    }

    /// Waits for the stream.
    fn read(&self, slot: Slot) -> Result<ReportSlot> {
        if self.owner[slot.index].load(Ordering::Relaxed) != slot.owner {
            return Err(Error::ReportExpired);
        }
        let _current = CurrentContext::enter(self.stream.context())?;
        let mut host = [ReportSlot::zeroed()];
        // SAFETY: the slot lies inside the ring, which is alive; the target lives until the synchronisation below, which
        // happens even if the copy was refused.
        let copied = unsafe {
            result::memcpy_dtoh_async(
                bytemuck::cast_slice_mut::<ReportSlot, u8>(&mut host),
                self.address(slot),
                self.stream.cu_stream(),
            )
        };
        // SAFETY: the stream is alive, held by the ring.
        let waited = unsafe { result::stream::synchronize(self.stream.cu_stream()) };
        copied.map_err(driver_error("copying the report"))?;
        waited.map_err(driver_error("waiting for the report"))?;
        Ok(host[0])
    }
}

/// The result of a call that may still be running. Dropping it costs nothing; the work goes on.
///
/// The last [`REPORTS_KEPT`] reports of a clipper can be read, in any order, from any thread. A report of a call that
/// was captured into a graph belongs to that graph: reading it gives the latest replay that has run on this stream.
#[derive(Clone, Debug)]
pub struct Pending<R> {
    ring: Arc<ReportRing>,
    slot: Slot,
    plan: Arc<Plan>,
    report: PhantomData<R>,
}

impl<R: Report> Pending<R> {
    pub(crate) fn new(ring: Arc<ReportRing>, slot: Slot, plan: Arc<Plan>) -> Self {
        Self { ring, slot, plan, report: PhantomData }
    }

    /// Waits for the stream, and reads the report. The only wait of this crate (with [`NonFinite::Error`], the clip
    /// itself calls it).
    ///
    /// Cost: one copy of 64 bytes, one synchronisation of the stream.
    ///
    /// # Errors
    /// [`Error::ReportExpired`] after [`REPORTS_KEPT`] later calls; [`Error::Driver`] if the work on the stream failed.
    ///
    /// [`NonFinite::Error`]: crate::NonFinite::Error
    pub fn wait(&self) -> Result<R> {
        let slot = self.ring.read(self.slot)?;
        Ok(R::from_slot(&slot, &|tile| self.plan.tensor_of(tile)))
    }
}

impl Pending<NormReport> {
    /// Device address of `total_norm`, an f64, for kernels later on the same stream. Valid until [`REPORTS_KEPT`] later
    /// calls, or for the life of the clipper if the call was captured.
    #[must_use]
    pub fn total_norm_address(&self) -> u64 {
        self.ring.address(self.slot) + std::mem::offset_of!(ReportSlot, total_norm) as u64
    }

    /// Device address of `clip_coef`, an f64, for kernels later on the same stream; validity as above.
    #[must_use]
    pub fn clip_coef_address(&self) -> u64 {
        self.ring.address(self.slot) + std::mem::offset_of!(ReportSlot, clip_coef) as u64
    }
}
