//! Carries host gradients to a device, runs a call there, and brings them back.

use super::data::{Tensor, Values};
use cudarc::driver::{CudaSlice, CudaStream, CudaViewMut};
use gradclip::cuda::{Clipper, DeviceGradMut};
use gradclip::{ClipNorm, ClipValue, NormReport, NormType, Result, Scope, ScopedReport, TotalNorm, ValueReport};
use half::{bf16, f16};
use std::ops::Range;
use std::sync::Arc;

/// A list on the device: each gradient in an allocation of its own, `offset` elements from its start.
pub struct OnDevice {
    stream: Arc<CudaStream>,
    slices: Vec<(Slice, usize)>,
}

enum Slice {
    F32(CudaSlice<f32>),
    F64(CudaSlice<f64>),
    F16(CudaSlice<f16>),
    BF16(CudaSlice<bf16>),
}

macro_rules! each {
    ($kind:ident, $value:expr, $inner:ident => $body:expr) => {
        match $value {
            $kind::F32($inner) => $body,
            $kind::F64($inner) => $body,
            $kind::F16($inner) => $body,
            $kind::BF16($inner) => $body,
        }
    };
}

enum View<'a> {
    F32(CudaViewMut<'a, f32>),
    F64(CudaViewMut<'a, f64>),
    F16(CudaViewMut<'a, f16>),
    BF16(CudaViewMut<'a, bf16>),
}

impl OnDevice {
    pub fn upload(stream: &Arc<CudaStream>, list: &[Tensor]) -> Self {
        fn place<T: gradclip::Element + cudarc::driver::DeviceRepr>(
            stream: &Arc<CudaStream>,
            values: &[T],
            offset: usize,
        ) -> CudaSlice<T> {
            // SAFETY: the part that is read is written below.
            let mut slice = unsafe { stream.alloc::<T>(offset + values.len().max(1)) }.unwrap();
            if !values.is_empty() {
                stream.memcpy_htod(values, &mut slice.slice_mut(offset..offset + values.len())).unwrap();
            }
            slice
        }
        let upload = |tensor: &Tensor| match &tensor.values {
            Values::F32(values) => Slice::F32(place(stream, values, tensor.offset)),
            Values::F64(values) => Slice::F64(place(stream, values, tensor.offset)),
            Values::F16(values) => Slice::F16(place(stream, values, tensor.offset)),
            Values::BF16(values) => Slice::BF16(place(stream, values, tensor.offset)),
        };
        let slices = list.iter().map(|tensor| (upload(tensor), tensor.offset)).collect();
        Self { stream: stream.clone(), slices }
    }

    /// Device address of a gradient.
    pub fn address(&self, index: usize) -> u64 {
        use cudarc::driver::DevicePtr;
        let (slice, offset) = &self.slices[index];
        match slice {
            Slice::F32(slice) => slice.device_ptr(&self.stream).0 + 4 * *offset as u64,
            Slice::F64(slice) => slice.device_ptr(&self.stream).0 + 8 * *offset as u64,
            Slice::F16(slice) => slice.device_ptr(&self.stream).0 + 2 * *offset as u64,
            Slice::BF16(slice) => slice.device_ptr(&self.stream).0 + 2 * *offset as u64,
        }
    }

    pub fn download(&self, list: &mut [Tensor]) {
        for ((slice, offset), tensor) in self.slices.iter().zip(list) {
            let part = *offset..*offset + tensor.values.numel();
            if part.is_empty() {
                continue;
            }
            match (slice, &mut tensor.values) {
                (Slice::F32(slice), Values::F32(values)) => self.stream.memcpy_dtoh(&slice.slice(part), values),
                (Slice::F64(slice), Values::F64(values)) => self.stream.memcpy_dtoh(&slice.slice(part), values),
                (Slice::F16(slice), Values::F16(values)) => self.stream.memcpy_dtoh(&slice.slice(part), values),
                (Slice::BF16(slice), Values::BF16(values)) => self.stream.memcpy_dtoh(&slice.slice(part), values),
                _ => unreachable!("the list is the one that was uploaded"),
            }
            .unwrap();
        }
        self.stream.synchronize().unwrap();
    }

    /// Calls `run` with the list as the library takes it.
    pub fn with<R>(&mut self, list: &[Tensor], run: impl FnOnce(&mut [&mut dyn DeviceGradMut]) -> R) -> R {
        let parts: Vec<_> = list.iter().map(|tensor| tensor.offset..tensor.offset + tensor.values.numel()).collect();
        self.with_parts(&parts, run)
    }

    /// Calls `run` with a part of each gradient, in elements of its allocation.
    pub fn with_parts<R>(&mut self, parts: &[Range<usize>], run: impl FnOnce(&mut [&mut dyn DeviceGradMut]) -> R) -> R {
        let mut views: Vec<View<'_>> = self
            .slices
            .iter_mut()
            .zip(parts.iter().cloned())
            .map(|((slice, _), part)| match slice {
                Slice::F32(slice) => View::F32(slice.slice_mut(part)),
                Slice::F64(slice) => View::F64(slice.slice_mut(part)),
                Slice::F16(slice) => View::F16(slice.slice_mut(part)),
                Slice::BF16(slice) => View::BF16(slice.slice_mut(part)),
            })
            .collect();
        let mut grads: Vec<&mut dyn DeviceGradMut> =
            views.iter_mut().map(|view| each!(View, view, view => view as &mut dyn DeviceGradMut)).collect();
        run(&mut grads)
    }
}

/// The verbs on a device, in the shape of those on the CPU.
pub fn clip_grad_norm(clipper: &mut Clipper, list: &mut [Tensor], clip: ClipNorm) -> Result<NormReport> {
    let mut device = OnDevice::upload(clipper.stream(), list);
    let report = device.with(list, |grads| clipper.clip_grad_norm(grads, clip)).and_then(|pending| pending.wait());
    device.download(list);
    report
}

pub fn clip_grad_norm_by(
    clipper: &mut Clipper,
    list: &mut [Tensor],
    scope: &Scope<'_>,
    clip: ClipNorm,
) -> Result<ScopedReport> {
    let mut device = OnDevice::upload(clipper.stream(), list);
    let report =
        device.with(list, |grads| clipper.clip_grad_norm_by(grads, scope, clip)).and_then(|pending| pending.wait());
    device.download(list);
    report
}

pub fn norms_by(
    clipper: &mut Clipper,
    list: &[Tensor],
    scope: &Scope<'_>,
    norm_type: NormType,
) -> Result<ScopedReport> {
    let mut device = OnDevice::upload(clipper.stream(), list);
    device.with(list, |grads| clipper.norms_by(grads, scope, norm_type)).and_then(|pending| pending.wait())
}

pub fn clip_grad_value(clipper: &mut Clipper, list: &mut [Tensor], clip: ClipValue) -> Result<ValueReport> {
    let mut device = OnDevice::upload(clipper.stream(), list);
    let report = device.with(list, |grads| clipper.clip_grad_value(grads, clip)).and_then(|pending| pending.wait());
    device.download(list);
    report
}

pub fn clip_with_norm<'a>(
    clipper: &mut Clipper,
    list: &mut [Tensor],
    total_norm: impl Into<TotalNorm<'a>>,
    clip: ClipNorm,
) -> Result<NormReport> {
    let mut device = OnDevice::upload(clipper.stream(), list);
    let pending = device.with(list, |grads| clipper.clip_with_norm(grads, total_norm, clip));
    let report = pending.and_then(|pending| pending.wait());
    device.download(list);
    report
}

/// Panics if a gradient was written.
pub fn clip_coef(clipper: &mut Clipper, list: &[Tensor], clip: ClipNorm) -> Result<NormReport> {
    let mut device = OnDevice::upload(clipper.stream(), list);
    let report = device.with(list, |grads| clipper.clip_coef(grads, clip)).and_then(|pending| pending.wait());
    let mut after = list.to_vec();
    device.download(&mut after);
    assert_eq!(super::data::bits(&after), super::data::bits(list), "clip_coef writes nothing");
    report
}

pub fn total_norm(clipper: &mut Clipper, list: &[Tensor], norm_type: NormType) -> Result<NormReport> {
    let mut device = OnDevice::upload(clipper.stream(), list);
    device.with(list, |grads| clipper.total_norm(grads, norm_type)).and_then(|pending| pending.wait())
}
