//! CPU tensors: slices of their storage, under its locks.

use super::grads::{offsets, GradList};
use super::locks::{in_own_pool, ReadLocks};
use crate::abi::ClampBounds;
use crate::adapters::deferred::Deferred;
use crate::clip_coef::Verdict;
use crate::cpu::{self, Counts, Grad, GradMut};
use crate::error::{Error, Result};
use crate::options::{ClipNorm, ClipValue, NormType};
use crate::report::{NormReport, ValueReport};
use crate::total_norm::TotalNorm;
use crate::value_bounds;
use candle_core::backend::BackendStorage;
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, InplaceOp1, Layout, Storage, Var};
use std::cell::RefCell;

pub(super) fn total_norm(list: GradList, norm_type: NormType) -> Result<Deferred<NormReport>> {
    let (report, _) = measure(&list, &ClipNorm::measure_only(norm_type))?;
    Ok(Deferred::on_host(report, list.into_variables()))
}

pub(super) fn clip_grad_norm(
    list: GradList,
    vars: &[Var],
    store: &mut GradStore,
    clip: &ClipNorm,
) -> Result<Deferred<NormReport>> {
    let (report, verdict) = measure(&list, clip)?;
    if verdict.written() {
        update(&list, &Scale { verdict, apply: cpu::apply })?;
        list.put_back(vars, store);
    }
    Ok(Deferred::on_host(report, list.into_variables()))
}

pub(super) fn clip_with_norm(
    list: GradList,
    vars: &[Var],
    store: &mut GradStore,
    total_norm: TotalNorm<'_>,
    clip: &ClipNorm,
) -> Result<Deferred<NormReport>> {
    let total_norm = total_norm.on_host()?;
    let (report, verdict) = with_slices(&list, |slices| cpu::judge(slices, total_norm, clip))?;
    if verdict.written() {
        update(&list, &Scale { verdict, apply: cpu::apply_to_any })?;
        list.put_back(vars, store);
    }
    Ok(Deferred::on_host(report, list.into_variables()))
}

pub(super) fn clip_coef(list: GradList, clip: &ClipNorm) -> Result<Deferred<NormReport>> {
    let (report, _) = measure(&list, clip)?;
    Ok(Deferred::on_host(NormReport { written: false, ..report }, list.into_variables()))
}

pub(super) fn clip_grad_value(
    list: GradList,
    vars: &[Var],
    store: &mut GradStore,
    clip: &ClipValue,
) -> Result<Deferred<ValueReport>> {
    with_slices(&list, |slices| cpu::check(slices).map(drop))?;
    let clamp = Clamp { bounds: value_bounds::in_each_dtype(clip), counts: RefCell::default() };
    update(&list, &clamp)?;
    let report = cpu::value_report(&clamp.counts.take());
    if report.written {
        list.put_back(vars, store);
    }
    Ok(Deferred::on_host(report, list.into_variables()))
}

fn measure(list: &GradList, clip: &ClipNorm) -> Result<(NormReport, Verdict)> {
    with_slices(list, |slices| cpu::measure(slices, clip))
}

/// Runs `work` over the gradients as slices, and names variables in its errors. Holds their read locks meanwhile.
fn with_slices<R: Send>(list: &GradList, work: impl FnOnce(&[Grad<'_>]) -> Result<R> + Send) -> Result<R> {
    let locks = ReadLocks::of(list);
    let tensors = list.tensors().iter().zip(list.storages()).enumerate();
    let slices: Result<Vec<Grad<'_>>> = tensors
        .map(|(index, (tensor, &storage))| match locks.get(storage) {
            Some(Storage::Cpu(storage)) => slice_of(storage, tensor.layout(), index),
            _ => Err(Error::WrongDevice { tensor: index, expected: "the CPU".into(), got: "a GPU".into() }),
        })
        .collect();
    slices.and_then(|slices| in_own_pool(bytes_of(list), || work(&slices))).map_err(|error| list.name_in(error))
}

fn bytes_of(list: &GradList) -> usize {
    list.tensors().iter().map(|tensor| tensor.elem_count() * tensor.dtype().size_in_bytes()).sum()
}

/// Applies `op` to each gradient, under its write lock.
fn update(list: &GradList, op: &impl InplaceOp1) -> Result<()> {
    list.tensors().iter().try_for_each(|tensor| tensor.inplace_op1(op).map_err(Error::from))
}

fn unsupported(index: usize, storage: &CpuStorage) -> Error {
    let dtype = storage.dtype();
    Error::UnsupportedDtype { tensor: index, got: dtype.as_str().to_owned() }
}

fn slice_of<'a>(storage: &'a CpuStorage, layout: &Layout, index: usize) -> Result<Grad<'a>> {
    let range = offsets(layout);
    match storage {
        CpuStorage::F32(all) => Ok((&all[range]).into()),
        CpuStorage::F64(all) => Ok((&all[range]).into()),
        CpuStorage::F16(all) => Ok((&all[range]).into()),
        CpuStorage::BF16(all) => Ok((&all[range]).into()),
        other => Err(unsupported(index, other)),
    }
}

fn slice_of_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> candle_core::Result<GradMut<'a>> {
    let range = offsets(layout);
    match storage {
        CpuStorage::F32(all) => Ok((&mut all[range]).into()),
        CpuStorage::F64(all) => Ok((&mut all[range]).into()),
        CpuStorage::F16(all) => Ok((&mut all[range]).into()),
        CpuStorage::BF16(all) => Ok((&mut all[range]).into()),
        other => Err(unsupported(0, other).into()),
    }
}

struct Scale {
    verdict: Verdict,
    apply: fn(&Verdict, &mut [GradMut<'_>]),
}

impl InplaceOp1 for Scale {
    fn name(&self) -> &'static str {
        "clip_grad_norm"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let bytes = layout.shape().elem_count() * storage.dtype().size_in_bytes();
        let mut grads = [slice_of_mut(storage, layout)?];
        in_own_pool(bytes, || (self.apply)(&self.verdict, &mut grads));
        Ok(())
    }
}

struct Clamp {
    bounds: ClampBounds,
    /// Of each gradient, in the order of the list.
    counts: RefCell<Vec<Counts>>,
}

impl InplaceOp1 for Clamp {
    fn name(&self) -> &'static str {
        "clip_grad_value"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let bytes = layout.shape().elem_count() * storage.dtype().size_in_bytes();
        let mut grads = [slice_of_mut(storage, layout)?];
        let bounds = &self.bounds;
        let counts = in_own_pool(bytes, || cpu::clamp_all(bounds, &mut grads));
        self.counts.borrow_mut().extend(counts);
        Ok(())
    }
}
