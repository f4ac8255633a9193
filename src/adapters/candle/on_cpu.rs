//! CPU tensors: slices of their storage, under its locks.

use super::grads::{offsets, GradList};
use super::locks::{in_own_pool, ReadLocks};
use crate::abi::{ClampBounds, TILE_BYTES};
use crate::adapters::deferred::{Deferred, DeferredScoped};
use crate::clip_coef::Verdict;
use crate::cpu::scoped::{self, Measured};
use crate::cpu::{self, Counts, Grad, GradMut};
use crate::error::{Error, Result};
use crate::options::{ClipNorm, ClipValue, NormType};
use crate::report::{NormReport, ValueReport};
use crate::scope::Scope;
use crate::total_norm::TotalNorm;
use crate::value_bounds;
use candle_core::backend::BackendStorage;
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, InplaceOp1, Layout, Storage, Tensor, Var};
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
    let numel = list.tensors().iter().map(|tensor| tensor.elem_count() as u64).sum();
    let report = cpu::value_report(&clamp.counts.take(), numel);
    if report.written {
        list.put_back(vars, store);
    }
    Ok(Deferred::on_host(report, list.into_variables()))
}

pub(super) fn norms_by(
    list: &GradList,
    rows: &[usize],
    scope: &Scope<'_>,
    norm_type: NormType,
) -> Result<DeferredScoped> {
    let measured = measure_by(list, rows, &scope.only_measured(), &ClipNorm::measure_only(norm_type))?;
    Ok(DeferredScoped::on_host(measured.report))
}

pub(super) fn clip_grad_norm_by(
    list: &GradList,
    rows: &[usize],
    vars: &[Var],
    store: &mut GradStore,
    scope: &Scope<'_>,
    clip: &ClipNorm,
) -> Result<DeferredScoped> {
    let measured = measure_by(list, rows, scope, clip)?;
    for (index, tensor) in list.tensors().iter().enumerate() {
        let variable = list.variables().name(index);
        if measured.report.of_tensor(variable).is_some_and(|groups| groups.iter().any(|group| group.written)) {
            tensor.inplace_op1(&ScaleBy { measured: &measured, variable })?;
        }
    }
    if measured.report.num_written() > 0 {
        list.put_back(vars, store);
    }
    Ok(DeferredScoped::on_host(measured.report))
}

pub(super) fn clip_coef_by(
    list: &GradList,
    rows: &[usize],
    scope: &Scope<'_>,
    clip: &ClipNorm,
) -> Result<DeferredScoped> {
    let measured = measure_by(list, rows, scope, clip)?;
    Ok(DeferredScoped::on_host(measured.into_coefs()))
}

pub(super) fn clip_grad_value_by(
    list: &GradList,
    rows: &[usize],
    vars: &[Var],
    store: &mut GradStore,
    scope: &Scope<'_>,
    clip: &ClipValue,
) -> Result<DeferredScoped<ValueReport>> {
    let clamp = with_all_variables(list, rows, scope, |all| scoped::Clamp::new(all, scope, clip))?;
    let clamp = RefCell::new(clamp);
    for (index, tensor) in list.tensors().iter().enumerate() {
        tensor.inplace_op1(&ClampBy { clamp: &clamp, variable: list.variables().name(index) })?;
    }
    let report = clamp.into_inner().into_report();
    if report.num_written() > 0 {
        list.put_back(vars, store);
    }
    Ok(DeferredScoped::on_host(report))
}

fn measure_by(list: &GradList, rows: &[usize], scope: &Scope<'_>, clip: &ClipNorm) -> Result<Measured> {
    with_all_variables(list, rows, scope, |all| scoped::measure(all, scope, clip))
}

/// Runs `work` over a list in which every variable has a place, so that all indices are those of variables.
fn with_all_variables<R: Send>(
    list: &GradList,
    rows: &[usize],
    scope: &Scope<'_>,
    work: impl FnOnce(&[Grad<'_>]) -> Result<R> + Send,
) -> Result<R> {
    let bytes = bytes_of(list).saturating_add(scope.num_rows().saturating_mul(TILE_BYTES));
    let nothing = Grad::F32(&[]);
    lend_slices(list, bytes, |slices| work(&list.variables().spread(rows.len(), nothing, slices.iter().copied())))
}

fn measure(list: &GradList, clip: &ClipNorm) -> Result<(NormReport, Verdict)> {
    with_slices(list, |slices| cpu::measure(slices, clip))
}

/// Runs `work` over the gradients as slices, and names variables in its errors.
fn with_slices<R: Send>(list: &GradList, work: impl FnOnce(&[Grad<'_>]) -> Result<R> + Send) -> Result<R> {
    lend_slices(list, bytes_of(list), |slices| work(slices).map_err(|error| list.name_in(error)))
}

/// Runs `work` over the gradients as slices: that many bytes. Holds their read locks meanwhile.
fn lend_slices<R: Send>(
    list: &GradList,
    bytes: usize,
    work: impl FnOnce(&[Grad<'_>]) -> Result<R> + Send,
) -> Result<R> {
    let locks = ReadLocks::of(list);
    let tensors = list.tensors().iter().zip(list.storages()).enumerate();
    let slices: Result<Vec<Grad<'_>>> = tensors
        .map(|(index, (tensor, &storage))| match locks.get(storage) {
            Some(Storage::Cpu(storage)) => slice_of(storage, tensor.layout(), index),
            _ => Err(Error::WrongDevice { tensor: index, expected: "the CPU".into(), got: "a GPU".into() }),
        })
        .collect();
    let slices = slices.map_err(|error| list.name_in(error))?;
    in_own_pool(bytes, || work(&slices))
}

/// In whole tiles, as the work is dealt out to threads.
fn bytes_of(list: &GradList) -> usize {
    let bytes = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
    list.tensors().iter().map(|tensor| bytes(tensor).next_multiple_of(TILE_BYTES)).sum()
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

struct ScaleBy<'a> {
    measured: &'a Measured,
    variable: usize,
}

impl InplaceOp1 for ScaleBy<'_> {
    fn name(&self) -> &'static str {
        "clip_grad_norm_by"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let bytes = layout.shape().elem_count() * storage.dtype().size_in_bytes();
        let grad = (self.variable, slice_of_mut(storage, layout)?);
        in_own_pool(bytes, || scoped::apply_to(self.measured, std::iter::once(grad)));
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

struct ClampBy<'a> {
    clamp: &'a RefCell<scoped::Clamp>,
    variable: usize,
}

impl InplaceOp1 for ClampBy<'_> {
    fn name(&self) -> &'static str {
        "clip_grad_value_by"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let bytes = layout.shape().elem_count() * storage.dtype().size_in_bytes();
        let grad = (self.variable, slice_of_mut(storage, layout)?);
        let mut clamp = self.clamp.borrow_mut();
        let clamp: &mut scoped::Clamp = &mut clamp;
        in_own_pool(bytes, || clamp.apply_to(std::iter::once(grad)));
        Ok(())
    }
}
