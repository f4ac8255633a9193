//! Device memory of the bench: one buffer that the gradients lie in, one that keeps what they were.

use super::lists::Entry;
use anyhow::Result;
use cudarc::driver::sys::CUdevice_attribute;
use cudarc::driver::{result, CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr};
use gradclip::cuda::RawGrad;
use gradclip::Dtype;
use half::{bf16, f16};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::sync::Arc;

/// Standard deviation of the gradients; with it no type overflows or vanishes. A power of two, so exact in all.
pub const SIGMA: f32 = 1.0 / 64.0;
/// Elements that are drawn. The arena repeats them: 16 M random numbers would take the host longer than what is measured.
const DRAWN: usize = 1 << 20;

pub struct Arena {
    pub stream: Arc<CudaStream>,
    pub multiprocessors: u32,
    grads: CudaSlice<u8>,
    /// What the gradients were, to restore them from.
    spare: CudaSlice<u8>,
    /// More than twice the L2 cache.
    flush: CudaSlice<u8>,
    filled: Option<(Dtype, usize)>,
}

impl Arena {
    /// `bytes` for gradients, twice.
    pub fn new(context: &Arc<CudaContext>, bytes: usize, flush: Option<usize>) -> Result<Self> {
        // SAFETY: all work goes to the one stream that is made here. Tracked events would stand in the way of a capture.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream()?;
        let attribute = |which| context.attribute(which).map(|value| usize::try_from(value).unwrap_or(0));
        let l2 = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?;
        let multiprocessors = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1) as u32;
        let bytes = bytes.next_multiple_of(super::lists::ALIGN);
        Ok(Self {
            grads: stream.alloc_zeros(bytes)?,
            spare: stream.alloc_zeros(bytes)?,
            flush: stream.alloc_zeros(flush.unwrap_or(l2 * 5 / 2).max(1 << 10))?,
            filled: None,
            multiprocessors,
            stream,
        })
    }

    pub fn capacity(&self) -> usize {
        self.grads.len()
    }

    pub fn address(&self) -> u64 {
        self.grads.device_ptr(&self.stream).0
    }

    pub fn flush_address(&self) -> u64 {
        self.flush.device_ptr(&self.stream).0
    }

    pub fn flush_bytes(&self) -> usize {
        self.flush.len()
    }

    fn spare_address(&self) -> u64 {
        self.spare.device_ptr(&self.stream).0
    }

    pub fn event(&self) -> Result<CudaEvent> {
        use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
        Ok(self.stream.context().new_event(Some(CU_EVENT_DEFAULT))?)
    }

    /// Normal random numbers for all of a list.
    pub fn fill(&mut self, dtype: Dtype, span: usize) -> Result<()> {
        if self.filled.is_some_and(|(of, filled)| of == dtype && filled >= span) {
            return self.restore(span);
        }
        let drawn = normal_numbers(dtype);
        let first = drawn.len().min(span);
        self.stream.memcpy_htod(&drawn[..first], &mut self.spare.slice_mut(..first))?;
        let mut filled = first;
        while filled < span {
            let more = filled.min(span - filled);
            self.copy(self.spare_address() + filled as u64, self.spare_address(), more)?;
            filled += more;
        }
        self.stream.synchronize()?; // `drawn` goes
        self.filled = Some((dtype, span));
        self.restore(span)
    }

    /// Other bytes than were drawn, at that place of what gradients are restored from.
    #[allow(dead_code)] // a test of benches/variants.rs uses it
    pub fn poke(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        self.stream.memcpy_htod(bytes, &mut self.spare.slice_mut(at..at + bytes.len()))?;
        Ok(self.stream.synchronize()?)
    }

    /// Waits for all work, and says whether the device still takes any.
    pub fn is_alive(&self) -> bool {
        self.stream.synchronize().is_ok()
    }

    /// The gradients as they were.
    pub fn restore(&self, bytes: usize) -> Result<()> {
        self.copy(self.address(), self.spare_address(), bytes)
    }

    fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: both ranges are inside the buffers of `self`, and do not overlap: every caller sees to it.
        Ok(unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) }?)
    }

    /// Writes the flush buffer.
    pub fn write_flush(&self) -> Result<()> {
        let stream = self.stream.cu_stream();
        // SAFETY: the whole of a buffer that `self` owns, on the stream of all work. Nobody keeps anything in it.
        Ok(unsafe { result::memset_d8_async(self.flush_address(), 0, self.flush_bytes(), stream) }?)
    }

    /// A list as the library takes it. The driver is not asked about the pointers: one answer about the arena that the
    /// library does not expect would leave every list without a row. `tests/suite/semantics.rs` has it asked. The times are
    /// the same, as a list that is passed again is not looked up again.
    pub fn grads(&self, entry: &Entry) -> Vec<RawGrad> {
        let (starts, span) = entry.layout();
        assert!(span <= self.capacity());
        let place = |(start, numel): (&usize, &usize)| {
            // SAFETY: inside the arena, which outlives all work on its stream; nothing else uses that part meanwhile.
            unsafe { RawGrad::new(self.address() + *start as u64, *numel, entry.dtype()) }.not_looked_up()
        };
        starts.iter().zip(&entry.numels).map(place).collect()
    }

    pub fn download(&self, bytes: usize) -> Result<Vec<u8>> {
        let mut host = vec![0; bytes];
        if bytes > 0 {
            self.stream.memcpy_dtoh(&self.grads.slice(..bytes), &mut host)?;
        }
        self.stream.synchronize()?;
        Ok(host)
    }
}

/// Box-Muller, always the same numbers.
fn normal_numbers(dtype: Dtype) -> Vec<u8> {
    let mut rng = SmallRng::seed_from_u64(1);
    let mut drawn = Vec::with_capacity(DRAWN);
    while drawn.len() < DRAWN {
        let radius = SIGMA * (-2.0 * (1.0 - rng.random::<f32>()).ln()).sqrt();
        let (sin, cos) = (std::f32::consts::TAU * rng.random::<f32>()).sin_cos();
        drawn.extend([radius * sin, radius * cos]);
    }
    fn bytes<T: bytemuck::Pod>(numbers: &[f32], convert: impl Fn(f32) -> T) -> Vec<u8> {
        bytemuck::cast_slice(&numbers.iter().map(|x| convert(*x)).collect::<Vec<T>>()).to_vec()
    }
    match dtype {
        Dtype::F64 => bytes(&drawn, f64::from),
        Dtype::F16 => bytes(&drawn, f16::from_f32),
        Dtype::BF16 => bytes(&drawn, bf16::from_f32),
        _ => bytes(&drawn, |x| x),
    }
}
