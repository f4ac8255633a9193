//! CPU tensors: slices of their memory.

use super::grads::GradList;
use crate::adapters::deferred::{Deferred, DeferredScoped};
use crate::clip_coef::Verdict;
use crate::cpu::scoped::{self, Measured};
use crate::cpu::{self, Grad, GradMut};
use crate::dtype::{Dtype, Element};
use crate::error::Result;
use crate::options::{ClipNorm, ClipValue, NormType};
use crate::plan::TensorRef;
use crate::report::{NormReport, ValueReport};
use crate::scope::Scope;
use crate::total_norm::TotalNorm;
use crate::value_bounds;
use std::ptr::{with_exposed_provenance, with_exposed_provenance_mut};
use std::slice::{from_raw_parts, from_raw_parts_mut};

pub(super) fn total_norm(list: GradList, norm_type: NormType) -> Result<Deferred<NormReport>> {
    let (report, _) = measure(&list, &ClipNorm::measure_only(norm_type))?;
    Ok(Deferred::on_host(report, list.into_variables()))
}

pub(super) fn clip_grad_norm(mut list: GradList, clip: &ClipNorm) -> Result<Deferred<NormReport>> {
    let (report, verdict) = measure(&list, clip)?;
    if verdict.written() {
        // SAFETY: `measure` has refused overlaps.
        cpu::apply(&verdict, &mut unsafe { slices_mut(&mut list) });
        list.put_back()?;
    }
    Ok(Deferred::on_host(report, list.into_variables()))
}

pub(super) fn clip_with_norm(
    mut list: GradList,
    total_norm: TotalNorm<'_>,
    clip: &ClipNorm,
) -> Result<Deferred<NormReport>> {
    let total_norm = total_norm.on_host()?;
    let judged = cpu::judge(&slices(&list), total_norm, clip);
    let (report, verdict) = judged.map_err(|error| list.name_in(error))?;
    if verdict.written() {
        // SAFETY: `judge` has refused overlaps.
        cpu::apply_to_any(&verdict, &mut unsafe { slices_mut(&mut list) });
        list.put_back()?;
    }
    Ok(Deferred::on_host(report, list.into_variables()))
}

pub(super) fn clip_coef(list: GradList, clip: &ClipNorm) -> Result<Deferred<NormReport>> {
    let (report, _) = measure(&list, clip)?;
    Ok(Deferred::on_host(NormReport { written: false, ..report }, list.into_variables()))
}

pub(super) fn clip_grad_value(mut list: GradList, clip: &ClipValue) -> Result<Deferred<ValueReport>> {
    let numel = cpu::check(&slices(&list)).map_err(|error| list.name_in(error))?.numel();
    let bounds = value_bounds::in_each_dtype(clip);
    // SAFETY: `check` has refused overlaps.
    let counts = cpu::clamp_all(&bounds, &mut unsafe { slices_mut(&mut list) });
    let report = cpu::value_report(&counts, numel);
    if report.written {
        list.put_back()?;
    }
    Ok(Deferred::on_host(report, list.into_variables()))
}

pub(super) fn norms_by(list: &GradList, scope: &Scope<'_>, norm_type: NormType) -> Result<DeferredScoped> {
    let measured = measure_by(list, &scope.only_measured(), &ClipNorm::measure_only(norm_type))?;
    Ok(DeferredScoped::on_host(measured.report))
}

pub(super) fn clip_grad_norm_by(list: &mut GradList, scope: &Scope<'_>, clip: &ClipNorm) -> Result<DeferredScoped> {
    let measured = measure_by(list, scope, clip)?;
    if measured.report.num_written() > 0 {
        // SAFETY: `measure_by` has refused overlaps.
        scoped::apply_to(&measured, unsafe { parameters_mut(list) });
        list.put_back()?;
    }
    Ok(DeferredScoped::on_host(measured.report))
}

pub(super) fn clip_coef_by(list: &GradList, scope: &Scope<'_>, clip: &ClipNorm) -> Result<DeferredScoped> {
    let measured = measure_by(list, scope, clip)?;
    Ok(DeferredScoped::on_host(measured.into_coefs()))
}

pub(super) fn clip_grad_value_by(
    list: &mut GradList,
    scope: &Scope<'_>,
    clip: &ClipValue,
) -> Result<DeferredScoped<ValueReport>> {
    let mut clamp = scoped::Clamp::new(&all_slices(list), &scope.with_leading_dimensions(list.rows()), clip)?;
    // SAFETY: `Clamp::new` has refused overlaps.
    clamp.apply_to(unsafe { parameters_mut(list) });
    let report = clamp.into_report();
    if report.num_written() > 0 {
        list.put_back()?;
    }
    Ok(DeferredScoped::on_host(report))
}

fn measure_by(list: &GradList, scope: &Scope<'_>, clip: &ClipNorm) -> Result<Measured> {
    scoped::measure(&all_slices(list), &scope.with_leading_dimensions(list.rows()), clip)
}

/// Every parameter has a place, so that all indices are those of parameters.
fn all_slices(list: &GradList) -> Vec<Grad<'_>> {
    list.variables().spread(list.rows().len(), Grad::F32(&[]), slices(list))
}

/// The gradients, to write, each with the index of its parameter.
///
/// # Safety
/// As [`slices_mut`].
unsafe fn parameters_mut(list: &mut GradList) -> impl Iterator<Item = (usize, GradMut<'_>)> {
    let parameters: Vec<usize> = (0..list.places().len()).map(|index| list.variables().name(index)).collect();
    // SAFETY: the caller's promise.
    parameters.into_iter().zip(unsafe { slices_mut(list) })
}

fn measure(list: &GradList, clip: &ClipNorm) -> Result<(NormReport, Verdict)> {
    cpu::measure(&slices(list), clip).map_err(|error| list.name_in(error))
}

/// The gradients, to read.
fn slices(list: &GradList) -> Vec<Grad<'_>> {
    let slice_of = |&place: &TensorRef| {
        // SAFETY: the list is borrowed for as long as the slice, and nothing is written while it is.
        unsafe {
            match place.dtype {
                Dtype::F32 => Grad::F32(elements(place)),
                Dtype::F64 => Grad::F64(elements(place)),
                Dtype::F16 => Grad::F16(elements(place)),
                Dtype::BF16 => Grad::BF16(elements(place)),
            }
        }
    };
    list.places().iter().map(slice_of).collect()
}

/// The gradients, to write.
///
/// # Safety
/// No two places of the list overlap.
unsafe fn slices_mut(list: &mut GradList) -> Vec<GradMut<'_>> {
    let slice_of = |&place: &TensorRef| {
        // SAFETY: the list is borrowed mutably for as long as the slice, and the caller keeps it free of overlaps, so
        // each is the only reference to its elements.
        unsafe {
            match place.dtype {
                Dtype::F32 => GradMut::F32(elements_mut(place)),
                Dtype::F64 => GradMut::F64(elements_mut(place)),
                Dtype::F16 => GradMut::F16(elements_mut(place)),
                Dtype::BF16 => GradMut::BF16(elements_mut(place)),
            }
        }
    };
    list.places().iter().map(slice_of).collect()
}

/// # Safety
/// `place` comes from a list that lives for `'a`, `T` is its dtype, and nothing writes it during `'a`.
///
/// The list has seen to the rest: the elements of a CPU tensor, which it owns, fill that memory, and the address is
/// aligned. tch hands out no reference to elements. That no other thread writes or resizes the tensor meanwhile is up
/// to the caller of the crate, as in any operation of libtorch.
unsafe fn elements<'a, T: Element>(place: TensorRef) -> &'a [T] {
    if place.numel == 0 {
        return &[]; // the address of an empty tensor means nothing
    }
    // SAFETY: the above.
    unsafe { from_raw_parts(with_exposed_provenance(place.address as usize), place.numel as usize) }
}

/// # Safety
/// As [`elements`], and nothing else reads it either.
unsafe fn elements_mut<'a, T: Element>(place: TensorRef) -> &'a mut [T] {
    if place.numel == 0 {
        return &mut [];
    }
    // SAFETY: the above.
    unsafe { from_raw_parts_mut(with_exposed_provenance_mut(place.address as usize), place.numel as usize) }
}
