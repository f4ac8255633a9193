//! Gradients in cudarc's slices and views, and behind raw device pointers.

use super::pointers;
use crate::dtype::{Dtype, Element};
use crate::error::{Error, Result};
use crate::plan::TensorRef;
use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceSlice, DriverError,
};

/// An error of the caller's own calls, for `?` between ours. (Its text without the driver's help, which may be missing.)
impl From<DriverError> for Error {
    fn from(DriverError(code): DriverError) -> Self {
        Self::Driver { op: "a call of cudarc", code: format!("{code:?}") }
    }
}

/// Where a gradient is, as its owner says.
#[derive(Clone, Copy, Debug)]
#[doc(hidden)]
pub struct Found {
    tensor: TensorRef,
    raw: bool,
}

impl Found {
    /// A gradient whose owner, a framework, says that this is device memory of the stream's context.
    #[cfg(any(feature = "candle-cuda", feature = "tch"))]
    pub(crate) fn vouched_for(tensor: TensorRef) -> Self {
        Self { tensor, raw: false }
    }
}

pub(crate) mod sealed {
    pub trait Sealed {}
}

/// Something that holds one gradient in device memory: [`CudaSlice`], [`CudaView`], [`CudaViewMut`] of `f32`, `f64`,
/// `f16` or `bf16`, [`RawGrad`], and references to them. For a list of mixed types use `&dyn DeviceGrad`.
///
/// Sealed: a wrong address would be undefined behaviour.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a gradient on a GPU",
    note = "a call takes a list of gradients: cudarc's CudaSlice, CudaView or CudaViewMut of f32, f64, f16 or bf16, or RawGrad; mixed types are `&dyn DeviceGrad`; gradients in host memory are for gradclip::cpu"
)]
pub trait DeviceGrad: sealed::Sealed {
    /// Orders `stream` after the work that writes this gradient, and says where it is. The second call of a pair orders
    /// later writers after `stream`.
    #[doc(hidden)]
    fn find(&self, stream: &CudaStream) -> std::result::Result<Found, WrongContext>;
}

/// A [`DeviceGrad`] that can be written. For a list of mixed types use `&mut dyn DeviceGradMut`.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a gradient on a GPU that can be written",
    note = "a call takes a list of gradients: cudarc's CudaSlice or CudaViewMut of f32, f64, f16 or bf16, or RawGrad; mixed types are `&mut dyn DeviceGradMut`; gradients in host memory are for gradclip::cpu"
)]
pub trait DeviceGradMut: DeviceGrad {
    /// As [`DeviceGrad::find`], for reading and writing.
    #[doc(hidden)]
    fn find_mut(&mut self, stream: &CudaStream) -> std::result::Result<Found, WrongContext>;
}

/// The gradient belongs to another context than the stream.
#[derive(Debug)]
#[doc(hidden)]
pub struct WrongContext {
    got: String,
}

impl WrongContext {
    /// `got` says where the gradient is instead.
    pub(crate) fn new(got: String) -> Self {
        Self { got }
    }
}

/// The same context object, not merely the same context: each object counts its own streams to decide whether to track
/// events, so with two of them cudarc would miss waits and records.
fn check_context(own: &CudaContext, stream: &CudaStream) -> std::result::Result<(), WrongContext> {
    let other = stream.context();
    if std::ptr::eq(own, &**other) {
        return Ok(());
    }
    let which = if own.cu_ctx() == other.cu_ctx() {
        ", the same GPU through another CudaContext object; clone one Arc<CudaContext> instead of making two"
    } else if own.ordinal() == other.ordinal() {
        " in another context"
    } else {
        ""
    };
    Err(WrongContext::new(format!("cuda:{}{which}", own.ordinal())))
}

fn found<T: Element>(address: u64, numel: usize) -> Found {
    Found { tensor: TensorRef { address, numel: numel as u64, dtype: T::DTYPE }, raw: false }
}

macro_rules! read_by_device_ptr {
    ($type:ty) => {
        impl<T: Element> sealed::Sealed for $type {}
        impl<T: Element> DeviceGrad for $type {
            fn find(&self, stream: &CudaStream) -> std::result::Result<Found, WrongContext> {
                check_context(self.stream().context(), stream)?;
                // Dropping the guard records the read on `stream`: too early in the first call of a pair, rightly in
                // the second, which comes after the launches.
                let (address, _recorded) = self.device_ptr(stream);
                Ok(found::<T>(address, self.len()))
            }
        }
    };
}
macro_rules! write_by_device_ptr_mut {
    ($type:ty) => {
        impl<T: Element> DeviceGradMut for $type {
            fn find_mut(&mut self, stream: &CudaStream) -> std::result::Result<Found, WrongContext> {
                check_context(self.stream().context(), stream)?;
                let numel = self.len();
                let (address, _recorded) = self.device_ptr_mut(stream);
                Ok(found::<T>(address, numel))
            }
        }
    };
}
read_by_device_ptr!(CudaSlice<T>);
read_by_device_ptr!(CudaView<'_, T>);
read_by_device_ptr!(CudaViewMut<'_, T>);
write_by_device_ptr_mut!(CudaSlice<T>);
write_by_device_ptr_mut!(CudaViewMut<'_, T>);

impl<G: sealed::Sealed + ?Sized> sealed::Sealed for &G {}
impl<G: sealed::Sealed + ?Sized> sealed::Sealed for &mut G {}
impl<G: DeviceGrad + ?Sized> DeviceGrad for &G {
    fn find(&self, stream: &CudaStream) -> std::result::Result<Found, WrongContext> {
        (**self).find(stream)
    }
}
impl<G: DeviceGrad + ?Sized> DeviceGrad for &mut G {
    fn find(&self, stream: &CudaStream) -> std::result::Result<Found, WrongContext> {
        (**self).find(stream)
    }
}
impl<G: DeviceGradMut + ?Sized> DeviceGradMut for &mut G {
    fn find_mut(&mut self, stream: &CudaStream) -> std::result::Result<Found, WrongContext> {
        (**self).find_mut(stream)
    }
}

/// A gradient behind a device pointer that something else owns: another framework, an arena, C++ code.
#[derive(Debug, PartialEq, Eq)]
pub struct RawGrad {
    tensor: TensorRef,
    looked_up: bool,
}

impl RawGrad {
    /// `numel` contiguous elements of `dtype` from `address` on.
    ///
    /// When a list is first seen, the driver is asked about each raw pointer in it. A pointer is refused with
    /// [`Error::BadPointer`] if the answer proves it wrong:
    ///
    /// | the driver says | then |
    /// |---|---|
    /// | nothing: no type of memory, nothing mapped there, no context, no pool | refused: host or freed memory |
    /// | managed memory | taken, on whichever device it is now |
    /// | host memory, memory of the CPU, a CUDA array, another device | refused |
    /// | an allocation, or its block in a pool, that ends before the last element | refused |
    /// | a reserved range of virtual memory that ends before the last element | refused, unless memory of this device follows at once |
    /// | no range, or one elsewhere; no device; an error for the question | taken: this proves nothing |
    ///
    /// So memory from `cuMemAlloc`, `cuMemAllocAsync`, `cuMemAllocManaged` and `cuMemMap`, or imported from another
    /// process, is taken. Two mistakes go unnoticed: a pointer to freed memory that the driver or a pool has given out
    /// again, and a gradient that reaches beyond its part of an arena.
    ///
    /// Cost: one call of `cuPointerGetAttributes` for each pointer, on the host; the same list again costs nothing.
    /// [`not_looked_up`](Self::not_looked_up) leaves it out.
    ///
    /// # Safety
    /// Whenever this value is passed to a call, and until that call's work on the stream has finished:
    /// * `address` points to `numel` elements in memory of the clipper's device, initialised but where they are an output,
    /// * no other work writes them, and none reads them if the call may write them, unless the stream orders it,
    /// * no Rust reference to them is used.
    #[must_use]
    pub unsafe fn new(address: u64, numel: usize, dtype: Dtype) -> Self {
        Self { tensor: TensorRef { address, numel: numel as u64, dtype }, looked_up: true }
    }

    /// The same without asking the driver: for lists that are new at every step, as of an allocator that hands out other
    /// addresses each time, and whose owner knows where they are. Alignment and overlap are checked all the same.
    #[must_use]
    pub fn not_looked_up(mut self) -> Self {
        self.looked_up = false;
        self
    }
}

impl sealed::Sealed for RawGrad {}
impl DeviceGrad for RawGrad {
    fn find(&self, _stream: &CudaStream) -> std::result::Result<Found, WrongContext> {
        Ok(Found { tensor: self.tensor, raw: self.looked_up })
    }
}
impl DeviceGradMut for RawGrad {
    fn find_mut(&mut self, stream: &CudaStream) -> std::result::Result<Found, WrongContext> {
        self.find(stream)
    }
}

/// The list of one call. Keeps its memory from call to call.
#[derive(Debug, Default)]
pub(crate) struct DeviceList {
    tensors: Vec<TensorRef>,
    /// Which of them are raw pointers.
    raw: Vec<usize>,
    /// `raw` of the list that was looked up last, and made into a plan.
    known: Vec<usize>,
}

impl DeviceList {
    pub(crate) fn tensors(&self) -> &[TensorRef] {
        &self.tensors
    }

    pub(crate) fn gather<G: DeviceGrad>(&mut self, grads: &[G], stream: &CudaStream) -> Result<()> {
        self.collect(grads.iter().map(|grad| grad.find(stream)), stream)
    }

    pub(crate) fn gather_mut<G: DeviceGradMut>(&mut self, grads: &mut [G], stream: &CudaStream) -> Result<()> {
        self.collect(grads.iter_mut().map(|grad| grad.find_mut(stream)), stream)
    }

    /// After the launches: lets cudarc record them, so that other streams wait for them where it manages that.
    pub(crate) fn release<G: DeviceGrad>(&mut self, grads: &[G], stream: &CudaStream) -> Result<()> {
        if stream.context().is_managing_stream_synchronization() {
            self.gather(grads, stream)?;
        }
        Ok(())
    }

    /// As [`release`](Self::release), for writes.
    pub(crate) fn release_mut<G: DeviceGradMut>(&mut self, grads: &mut [G], stream: &CudaStream) -> Result<()> {
        if stream.context().is_managing_stream_synchronization() {
            self.gather_mut(grads, stream)?;
        }
        Ok(())
    }

    fn collect(
        &mut self,
        grads: impl Iterator<Item = std::result::Result<Found, WrongContext>>,
        stream: &CudaStream,
    ) -> Result<()> {
        self.tensors.clear();
        self.raw.clear();
        for (index, grad) in grads.enumerate() {
            let found = grad.map_err(|wrong| Error::WrongDevice {
                tensor: index,
                expected: format!("cuda:{}", stream.context().ordinal()),
                got: wrong.got,
            })?;
            if found.raw && found.tensor.numel > 0 {
                self.raw.push(index);
            }
            self.tensors.push(found.tensor);
        }
        Ok(())
    }

    /// Whether the raw pointers are where they were in the last list that was looked up. The same address may have been
    /// that of a slice, which is not looked up, and may be gone.
    pub(crate) fn has_known_raw_pointers(&self) -> bool {
        self.raw == self.known
    }

    /// From here on the raw pointers of this list are known.
    pub(crate) fn remember_raw_pointers(&mut self) {
        self.known.clone_from(&self.raw);
    }

    /// Whether the driver has to be asked about this tensor.
    pub(crate) fn is_raw(&self, index: usize) -> bool {
        self.raw.binary_search(&index).is_ok()
    }

    /// Asks the driver about every raw pointer of the list.
    pub(crate) fn check_raw_pointers(&mut self, stream: &CudaStream) -> Result<()> {
        self.known.clear();
        for &index in &self.raw {
            pointers::check(index, &self.tensors[index], stream.context().ordinal())?;
        }
        Ok(())
    }
}
