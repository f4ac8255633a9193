//! CUDA tensors: their device memory, to this thread's clipper for candle's stream.

use super::grads::{offsets, GradList};
use crate::adapters::cudarc::{sealed, DeviceGrad, DeviceGradMut, Found, WrongContext};
use crate::adapters::deferred::{Deferred, DeferredScoped};
use crate::cuda;
use crate::error::Result;
use crate::options::{ClipNorm, ClipValue, NormType};
use crate::plan::TensorRef;
use crate::report::{NormReport, ValueReport};
use crate::scope::Scope;
use crate::total_norm::TotalNorm;
use candle_core::backend::BackendStorage;
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CudaStorage, DType, InplaceOp1, Layout, Storage, Tensor, Var};
use cudarc::driver::CudaStream;
use half::{bf16, f16};
use std::cell::RefCell;
use std::sync::Arc;

pub(super) fn total_norm(
    list: GradList,
    stream: &Arc<CudaStream>,
    norm_type: NormType,
) -> Result<Deferred<NormReport>> {
    let grads: Vec<CudaGrad<'_>> = cuda_grads(&list).collect();
    let pending = cuda::total_norm(stream, &grads, norm_type);
    Deferred::of_call(pending, list.into_variables())
}

pub(super) fn clip_grad_norm(
    list: GradList,
    stream: &Arc<CudaStream>,
    vars: &[Var],
    store: &mut GradStore,
    clip: ClipNorm,
) -> Result<Deferred<NormReport>> {
    let mut grads: Vec<CudaGrad<'_>> = cuda_grads(&list).collect();
    let pending = cuda::clip_grad_norm(stream, &mut grads, clip);
    if pending.is_ok() {
        list.put_back(vars, store); // whether they were scaled, the device knows; if not, they are what they were
    }
    Deferred::of_call(pending, list.into_variables())
}

pub(super) fn clip_with_norm(
    list: GradList,
    stream: &Arc<CudaStream>,
    vars: &[Var],
    store: &mut GradStore,
    total_norm: TotalNorm<'_>,
    clip: ClipNorm,
) -> Result<Deferred<NormReport>> {
    let mut grads: Vec<CudaGrad<'_>> = cuda_grads(&list).collect();
    let pending = cuda::clip_with_norm(stream, &mut grads, total_norm, clip);
    if pending.is_ok() {
        list.put_back(vars, store);
    }
    Deferred::of_call(pending, list.into_variables())
}

pub(super) fn clip_coef(list: GradList, stream: &Arc<CudaStream>, clip: ClipNorm) -> Result<Deferred<NormReport>> {
    let grads: Vec<CudaGrad<'_>> = cuda_grads(&list).collect();
    let pending = cuda::clip_coef(stream, &grads, clip);
    Deferred::of_call(pending, list.into_variables())
}

pub(super) fn clip_grad_value(
    list: GradList,
    stream: &Arc<CudaStream>,
    vars: &[Var],
    store: &mut GradStore,
    clip: ClipValue,
) -> Result<Deferred<ValueReport>> {
    let mut grads: Vec<CudaGrad<'_>> = cuda_grads(&list).collect();
    let pending = cuda::clip_grad_value(stream, &mut grads, clip);
    if pending.is_ok() {
        list.put_back(vars, store);
    }
    Deferred::of_call(pending, list.into_variables())
}

pub(super) fn norms_by(
    list: &GradList,
    stream: &Arc<CudaStream>,
    num_vars: usize,
    scope: &Scope<'_>,
    norm_type: NormType,
) -> Result<DeferredScoped> {
    cuda::norms_by(stream, &all_variables(list, num_vars), scope, norm_type).map(DeferredScoped::on_device)
}

pub(super) fn clip_grad_norm_by(
    list: &GradList,
    stream: &Arc<CudaStream>,
    vars: &[Var],
    store: &mut GradStore,
    scope: &Scope<'_>,
    clip: ClipNorm,
) -> Result<DeferredScoped> {
    let pending = cuda::clip_grad_norm_by(stream, &mut all_variables(list, vars.len()), scope, clip)?;
    list.put_back(vars, store);
    Ok(DeferredScoped::on_device(pending))
}

pub(super) fn clip_coef_by(
    list: &GradList,
    stream: &Arc<CudaStream>,
    num_vars: usize,
    scope: &Scope<'_>,
    clip: ClipNorm,
) -> Result<DeferredScoped> {
    cuda::clip_coef_by(stream, &all_variables(list, num_vars), scope, clip).map(DeferredScoped::on_device)
}

pub(super) fn clip_grad_value_by(
    list: &GradList,
    stream: &Arc<CudaStream>,
    vars: &[Var],
    store: &mut GradStore,
    scope: &Scope<'_>,
    clip: ClipValue,
) -> Result<DeferredScoped<ValueReport>> {
    let pending = cuda::clip_grad_value_by(stream, &mut all_variables(list, vars.len()), scope, clip)?;
    list.put_back(vars, store);
    Ok(DeferredScoped::on_device(pending))
}

fn cuda_grads(list: &GradList) -> impl Iterator<Item = CudaGrad<'_>> {
    list.tensors().iter().map(|tensor| CudaGrad(Some(tensor)))
}

/// Every variable has a place, so that all indices are those of variables.
fn all_variables(list: &GradList, num_vars: usize) -> Vec<CudaGrad<'_>> {
    list.variables().spread(num_vars, CudaGrad(None), cuda_grads(list))
}

/// A contiguous CUDA tensor of a dtype that is supported, or the gradient that a variable has not.
///
/// candle's locks order the host: `find` holds the storage's read lock, `find_mut` its write lock, each only while it
/// looks up the address. They say nothing of work that is already enqueued, candle's own neither. That is ordered by the
/// stream, which is candle's, and in cudarc's multi-stream mode by the events that cudarc records for each slice: so
/// after the launches the slices are looked up again, as for plain cudarc. Meanwhile the storage stays alive through the
/// list's tensor, and what memory is freed later goes back to the pool in the order of the same stream.
#[derive(Clone)]
struct CudaGrad<'a>(Option<&'a Tensor>);

impl sealed::Sealed for CudaGrad<'_> {}

impl DeviceGrad for CudaGrad<'_> {
    fn find(&self, stream: &CudaStream) -> Result<Found, WrongContext> {
        let Some(tensor) = self.0 else { return Ok(Found::vouched_for(TensorRef::NOTHING)) };
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { return Err(WrongContext::new("another device".into())) };
        let range = offsets(layout);
        let found = match storage.dtype() {
            DType::F32 => storage.as_cuda_slice::<f32>().map(|slice| slice.slice(range).find(stream)),
            DType::F64 => storage.as_cuda_slice::<f64>().map(|slice| slice.slice(range).find(stream)),
            DType::F16 => storage.as_cuda_slice::<f16>().map(|slice| slice.slice(range).find(stream)),
            _ => storage.as_cuda_slice::<bf16>().map(|slice| slice.slice(range).find(stream)),
        };
        found.unwrap_or_else(|error| Err(WrongContext::new(error.to_string())))
    }
}

impl DeviceGradMut for CudaGrad<'_> {
    fn find_mut(&mut self, stream: &CudaStream) -> Result<Found, WrongContext> {
        let Some(tensor) = self.0 else { return Ok(Found::vouched_for(TensorRef::NOTHING)) };
        let locate = Locate { stream, found: RefCell::default() };
        let run = tensor.inplace_op1(&locate);
        match (locate.found.take(), run) {
            (Some(found), _) => found,
            (None, Err(error)) => Err(WrongContext::new(error.to_string())),
            (None, Ok(())) => Err(WrongContext::new("another device".into())),
        }
    }
}

/// An operation in place, for the only way to a mutable CUDA storage that candle gives.
struct Locate<'a> {
    stream: &'a CudaStream,
    found: RefCell<Option<Result<Found, WrongContext>>>,
}

impl InplaceOp1 for Locate<'_> {
    fn name(&self) -> &'static str {
        "gradclip"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        Ok(())
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        let (stream, range) = (self.stream, offsets(layout));
        let found = match storage.dtype() {
            DType::F32 => storage.as_cuda_slice_mut::<f32>()?.slice_mut(range).find_mut(stream),
            DType::F64 => storage.as_cuda_slice_mut::<f64>()?.slice_mut(range).find_mut(stream),
            DType::F16 => storage.as_cuda_slice_mut::<f16>()?.slice_mut(range).find_mut(stream),
            _ => storage.as_cuda_slice_mut::<bf16>()?.slice_mut(range).find_mut(stream),
        };
        self.found.replace(Some(found));
        Ok(())
    }
}
