//! Reports that stay on the device until somebody asks.

use super::driver::{driver_error, is_capturing, CurrentContext, HomeThread};
use super::memory::DeviceBuffer;
use crate::abi::{action, ReportSlot, NO_RANK, RANK_OF_OTHER_ORDER, RANK_REFUSED};
use crate::clip_coef::out_of_place;
use crate::error::{Error, Result};
use crate::options::NonFinite;
use crate::plan::Plan;
use crate::report::{NormReport, Report};
use crate::{shards, REPORTS_KEPT};
use bytemuck::Zeroable;
use cudarc::driver::{result, CudaStream};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// The slots of a clipper: [`REPORTS_KEPT`] that calls use in turn, and after them as many that captured calls take one
/// by one. A slot of the second kind has never been written when it is taken, so a report that no replay has written is
/// known for what it is.
#[derive(Debug)]
pub(crate) struct ReportRing {
    memory: DeviceBuffer,
    stream: Arc<CudaStream>,
    home: HomeThread,
    /// For each slot, the number of the call that wrote it last; `CAPTURED` if a graph writes it.
    owner: Vec<AtomicU64>,
    next_call: AtomicU64,
}

const SLOTS: usize = 2 * REPORTS_KEPT;
const CAPTURED: u64 = u64::MAX;
const NOBODY: u64 = u64::MAX - 1;

/// What every byte of the ring is at first, and so the `action` of a slot that no kernel has written.
const UNWRITTEN: u8 = 0xFF;
const UNWRITTEN_ACTION: u32 = u32::from_ne_bytes([UNWRITTEN; 4]);

/// One slot, taken for one call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    index: usize,
    owner: u64,
}

impl ReportRing {
    /// The context of `stream` must be current.
    pub(crate) fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        let mut memory = DeviceBuffer::new(stream, "reports", SLOTS * size_of::<ReportSlot>())?;
        memory.fill(UNWRITTEN)?;
        Ok(Self {
            memory,
            stream: stream.clone(),
            home: HomeThread::of(stream),
            owner: (0..SLOTS).map(|_| AtomicU64::new(NOBODY)).collect(),
            next_call: AtomicU64::new(0),
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// Takes the next slot, or for a captured call one that no graph has. Only the clipper calls this.
    pub(crate) fn take(&self, capturing: bool) -> Result<Slot> {
        let (index, owner) = if capturing {
            let free = |slot: &usize| self.owner[*slot].load(Ordering::Relaxed) == NOBODY;
            ((REPORTS_KEPT..SLOTS).find(free).ok_or(Error::NoReportSlot)?, CAPTURED)
        } else {
            let call = self.next_call.fetch_add(1, Ordering::Relaxed);
            (call as usize % REPORTS_KEPT, call)
        };
        self.owner[index].store(owner, Ordering::Release); // before anything that writes the slot is launched
        Ok(Slot { index, owner })
    }

    /// For a call that failed before it launched what writes the slot.
    pub(crate) fn give_back(&self, slot: Slot) {
        self.owner[slot.index].store(NOBODY, Ordering::Release);
    }

    pub(crate) fn address(&self, slot: Slot) -> u64 {
        self.memory.address() + (slot.index * size_of::<ReportSlot>()) as u64
    }

    fn check_owner(&self, slot: Slot) -> Result<()> {
        if self.owner[slot.index].load(Ordering::Acquire) == slot.owner {
            Ok(())
        } else {
            Err(Error::ReportExpired)
        }
    }

    /// Waits for the stream.
    fn read(&self, slot: Slot) -> Result<ReportSlot> {
        self.home.check()?;
        self.check_owner(slot)?;
        let _current = CurrentContext::enter(self.stream.context())?;
        if is_capturing(&self.stream)? {
            // It would end the capture.
            return Err(Error::CaptureNeedsWarmup { what: "the wait for a report" });
        }
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
        // A call in another thread may have taken the slot since the first look: then the copy may be its report.
        self.check_owner(slot)?;
        if host[0].action == UNWRITTEN_ACTION {
            return Err(Error::ReportNotReady);
        }
        Ok(host[0])
    }
}

impl Drop for ReportRing {
    fn drop(&mut self) {
        if self.owner.iter().any(|owner| owner.load(Ordering::Relaxed) == CAPTURED) {
            self.memory.leave_to_graphs();
        }
    }
}

/// What a call does with what its slot says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Applied {
    /// Writes the gradients if it says to.
    InPlace,
    /// Writes nothing.
    Nowhere,
    /// Writes outputs, by this policy.
    OutOfPlace(NonFinite),
}

/// The result of a call that may still be running. Dropping it costs nothing; the work goes on.
///
/// The last [`REPORTS_KEPT`] reports of a clipper can be read, in any order, from any thread (but see
/// [`Error::WrongThread`]). A report of a call that was captured into a graph is not one of them and does not expire:
/// reading it gives the latest replay that has run on this stream.
#[derive(Clone, Debug)]
pub struct Pending<R> {
    ring: Arc<ReportRing>,
    slot: Slot,
    plan: Arc<Plan>,
    applied: Applied,
    over_ranks: bool,
    report: PhantomData<R>,
}

impl<R: Report> Pending<R> {
    pub(crate) fn new(ring: Arc<ReportRing>, slot: Slot, plan: Arc<Plan>) -> Self {
        Self { ring, slot, plan, applied: Applied::InPlace, over_ranks: false, report: PhantomData }
    }

    /// Of a call that does something else with what the slot says.
    pub(crate) fn applied(self, applied: Applied) -> Self {
        Self { applied, ..self }
    }

    pub(crate) fn slot(&self) -> Slot {
        self.slot
    }

    /// Of a call over several ranks, whose slot says more.
    pub(crate) fn over_ranks(self) -> Self {
        Self { over_ranks: true, ..self }
    }

    /// Waits for the stream, and reads the report. The only wait of this crate (with [`NonFinite::Error`], the clip
    /// itself calls it).
    ///
    /// Cost: one copy of 72 bytes, one synchronisation of the stream.
    ///
    /// # Errors
    /// [`Error::ReportExpired`] after [`REPORTS_KEPT`] later calls; [`Error::ReportNotReady`] for a captured call that no
    /// replay has run; [`Error::CaptureNeedsWarmup`] while the stream captures, which goes on; [`Error::WrongThread`] for
    /// the per-thread default stream of another thread; [`Error::Driver`] if the work on the stream failed; of a call over
    /// several ranks [`Error::RankFailed`].
    ///
    /// [`NonFinite::Error`]: crate::NonFinite::Error
    pub fn wait(&self) -> Result<R> {
        let mut slot = self.ring.read(self.slot)?;
        let first_nonfinite_rank = if self.over_ranks { rank_of(&slot)? } else { None };
        slot.action = match self.applied {
            Applied::InPlace => slot.action,
            Applied::Nowhere => action::KEEP,
            Applied::OutOfPlace(nonfinite) => out_of_place(slot.action, slot.total_norm, nonfinite),
        };
        let tensor_of = |tile| self.plan.tensor_of(tile);
        Ok(R::from_slot(&slot, self.plan.numel(), &tensor_of).of_ranks(first_nonfinite_rank))
    }
}

/// The first rank that is not finite, of a call over several ranks.
fn rank_of(slot: &ReportSlot) -> Result<Option<usize>> {
    let flags = RANK_REFUSED | RANK_OF_OTHER_ORDER;
    let failed = |reason| Err(Error::RankFailed { rank: (slot.rank & !flags) as usize, reason });
    match slot.rank {
        NO_RANK => Ok(None),
        rank if rank & RANK_REFUSED != 0 => failed(shards::RANK_REFUSED),
        rank if rank & RANK_OF_OTHER_ORDER != 0 => failed(shards::RANK_OF_OTHER_ORDER),
        rank => Ok(Some(rank as usize)),
    }
}

impl Pending<NormReport> {
    /// Device address of `total_norm`, an f64, for kernels later on the same stream. Valid until [`REPORTS_KEPT`] later
    /// calls of a living clipper; if the call was captured, as long as the context.
    #[must_use]
    pub fn total_norm_address(&self) -> u64 {
        self.address_of(std::mem::offset_of!(ReportSlot, total_norm))
    }

    /// Device address of `clip_coef`, an f64, for kernels later on the same stream; validity as above.
    #[must_use]
    pub fn clip_coef_address(&self) -> u64 {
        self.address_of(std::mem::offset_of!(ReportSlot, clip_coef))
    }

    /// Device address of [`multiplier`](NormReport::multiplier), an f64: what an optimizer that multiplies by a scale
    /// itself is to take after [`Clipper::clip_coef`](super::Clipper::clip_coef). For kernels later on the same stream;
    /// validity as above.
    #[must_use]
    pub fn multiplier_address(&self) -> u64 {
        self.address_of(std::mem::offset_of!(ReportSlot, multiplier))
    }

    /// Device address of the same as an f32, rounded to nearest: off by 2^-24 at most in the normal range of f32. Beyond
    /// it, which takes a multiplier below 2^-126, it has fewer bits. Validity as above.
    #[must_use]
    pub fn multiplier_f32_address(&self) -> u64 {
        self.address_of(std::mem::offset_of!(ReportSlot, multiplier_f32))
    }

    /// Device address of [`found_inf`](NormReport::found_inf) as PyTorch's fused optimizers take it: an f32 that is 1 if
    /// the norm is NaN or infinite, else 0. For kernels later on the same stream; validity as above.
    #[must_use]
    pub fn found_inf_address(&self) -> u64 {
        self.address_of(std::mem::offset_of!(ReportSlot, found_inf))
    }

    fn address_of(&self, field: usize) -> u64 {
        self.ring.address(self.slot) + field as u64
    }

    /// [`total_norm_address`](Self::total_norm_address), for a call of the clipper that has `ring`.
    pub(crate) fn norm_for(&self, ring: &Arc<ReportRing>, capturing: bool) -> Result<u64> {
        if !Arc::ptr_eq(&self.ring, ring) {
            let reason =
                "was measured by another clipper, maybe on another stream; wait for it and give its value, or \
                          order the streams and give its address";
            return Err(Error::NormOutOfReach { reason });
        }
        self.ring.check_owner(self.slot)?;
        if capturing && self.slot.owner != CAPTURED {
            let reason =
                "was measured outside of the capture, and its place will be used again before a replay; measure \
                          it inside, or give its value";
            return Err(Error::NormOutOfReach { reason });
        }
        Ok(self.total_norm_address())
    }
}
