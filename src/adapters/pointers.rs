//! Raw device pointers: what the driver knows about them, and whether a gradient can be there.
//!
//! Sources: CUDA driver API, "Unified Addressing" (each attribute; what the plural call does with an address it does not
//! know); CUDA programming guide, "Stream-Ordered Memory Allocator", "Pointer attributes" (memory of a pool has no context).

use crate::cuda::driver_error;
use crate::error::{Error, Result};
use crate::plan::TensorRef;
use cudarc::driver::sys::{self, CUpointer_attribute, CUresult};
use cudarc::driver::DriverError;

/// [`Error::BadPointer`] if the driver says that `tensor` cannot be on cuda:`ordinal`. `index` is its place in the list.
pub(super) fn check(index: usize, tensor: &TensorRef, ordinal: usize) -> Result<()> {
    let address = tensor.address;
    let bytes = tensor.numel.saturating_mul(tensor.dtype.size() as u64);
    let bad = |got: String| Error::BadPointer {
        tensor: index,
        expected: format!("{bytes} bytes of device memory on cuda:{ordinal}"),
        got: format!("{address:#x} is {got}"),
    };
    let Some(memory) = Memory::at(address)? else { return Ok(()) };
    if let Some(got) = memory.excludes(ordinal) {
        return Err(bad(got));
    }
    match memory.reach(address) {
        Some(reach) if reach < bytes && !memory.may_go_on(address.saturating_add(reach), ordinal)? => {
            Err(bad(format!("followed by {reach} bytes of its allocation")))
        }
        _ => Ok(()),
    }
}

/// What the driver says about one address. A gradient is refused for what is said, never for what is left out: the
/// documentation does not promise every answer for every kind of memory (from a pool, mapped, from another process).
struct Memory {
    kind: u32,
    device: i32,
    is_managed: bool,
    is_mapped: bool,
    /// Where the range around the address begins. For mapped virtual memory, the range is the reserved one.
    start: u64,
    size: u64,
    /// It belongs to a context or a pool, whose allocations never span two ranges.
    has_owner: bool,
}

/// CU_DEVICE_INVALID.
const NO_DEVICE: i32 = -2;
/// CU_DEVICE_CPU.
const HOST_DEVICE: i32 = -1;

impl Memory {
    /// None if the driver refuses the question.
    ///
    /// `cuPointerGetAttributes` takes all questions in one call, and an address that the driver does not know is no error
    /// for it, so that a sanitizer that watches for failed calls stays silent when a bad gradient is refused.
    fn at(address: u64) -> Result<Option<Self>> {
        use CUpointer_attribute::*;
        let mut questions = [
            CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
            CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
            CU_POINTER_ATTRIBUTE_IS_MANAGED,
            CU_POINTER_ATTRIBUTE_MAPPED,
            CU_POINTER_ATTRIBUTE_RANGE_START_ADDR,
            CU_POINTER_ATTRIBUTE_RANGE_SIZE,
            CU_POINTER_ATTRIBUTE_CONTEXT,
            CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE,
        ];
        // Eight bytes for each answer, the most that one takes: a short one fills the first of them, on the little-endian
        // machines that CUDA runs on.
        let mut answers = [0, u64::from(NO_DEVICE as u32), 0, 0, 0, 0, 0, 0];
        let mut places = answers.each_mut().map(|answer| std::ptr::from_mut(answer).cast());
        // SAFETY: as many places as questions, each with room for any answer; the driver looks the address up and does
        // not follow it.
        let result = unsafe {
            sys::cuPointerGetAttributes(questions.len() as u32, questions.as_mut_ptr(), places.as_mut_ptr(), address)
        };
        match result {
            CUresult::CUDA_SUCCESS => {}
            CUresult::CUDA_ERROR_INVALID_VALUE
            | CUresult::CUDA_ERROR_INVALID_DEVICE
            | CUresult::CUDA_ERROR_INVALID_CONTEXT
            | CUresult::CUDA_ERROR_NOT_SUPPORTED => return Ok(None),
            code => return Err(driver_error("cuPointerGetAttributes")(DriverError(code))),
        }
        let [kind, device, is_managed, is_mapped, start, size, context, pool] = answers;
        Ok(Some(Self {
            kind: kind as u32,
            device: device as i32,
            is_managed: is_managed as u32 != 0,
            is_mapped: is_mapped as u32 != 0,
            start,
            size,
            has_owner: context != 0 || pool != 0,
        }))
    }

    /// Why no gradient on cuda:`ordinal` can be here, if the answers prove it.
    fn excludes(&self, ordinal: usize) -> Option<String> {
        const HOST: u32 = sys::CUmemorytype::CU_MEMORYTYPE_HOST as u32;
        const ARRAY: u32 = sys::CUmemorytype::CU_MEMORYTYPE_ARRAY as u32;
        if self.is_managed {
            return None; // it moves to the device that uses it, wherever it is now
        }
        match (self.kind, self.device) {
            (0, _) if !self.is_mapped && !self.has_owner => Some("host or freed memory".into()),
            (HOST, _) | (_, HOST_DEVICE) => Some("host memory".into()),
            (ARRAY, _) => Some("memory of a CUDA array".into()),
            (_, device) if device >= 0 && device != ordinal as i32 => Some(format!("on cuda:{device}")),
            _ => None,
        }
    }

    /// Bytes from `address` to the end of its range, if the driver gave a range around it.
    fn reach(&self, address: u64) -> Option<u64> {
        let offset = address.checked_sub(self.start)?;
        (self.start > 0 && offset < self.size).then(|| self.size - offset)
    }

    /// Whether a gradient may go on beyond the `end` of this range: two reserved ranges of virtual memory, side by side,
    /// can hold one tensor.
    fn may_go_on(&self, end: u64, ordinal: usize) -> Result<bool> {
        let goes_on = |next: Self| !next.has_owner && !next.is_managed && next.excludes(ordinal).is_none();
        Ok(!self.has_owner && Self::at(end)?.is_none_or(goes_on))
    }
}
