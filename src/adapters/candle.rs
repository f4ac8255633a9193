//! Clipping the gradients of candle variables, in the [`GradStore`] that `backward` returns.
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//!
//! # fn main() -> candle_core::Result<()> {
//! let weight = Var::new(&[3.0f32, 4.0], &Device::Cpu)?;
//! let loss = (weight.as_tensor().sqr()? * 0.5)?.sum_all()?;
//!
//! let mut grads = loss.backward()?;
//! let clipped = gradclip::candle::clip_grad_norm(&[weight.clone()], &mut grads, 1.0)?;
//! // optimizer.step(&grads)?;
//!
//! assert_eq!(clipped.total_norm, 5.0);
//! assert_eq!(grads.get(&weight).unwrap().to_vec1::<f32>()?, [0.6, 0.8]);
//! # Ok(())
//! # }
//! ```
//!
//! Only the gradients of the given variables are touched: a `GradStore` also holds those of other inputs. A variable
//! without a gradient is skipped, and a gradient that two variables share is clipped once. Gradients are clipped in
//! place; one that is not contiguous is replaced by a contiguous copy first. CPU tensors of f32, f64, f16 and bf16.
//!
//! Indices in reports and errors are those of the variables.

use crate::clip_coef::Verdict;
use crate::cpu::{self, Counts, Grad, GradMut};
use crate::error::{Error, Result};
use crate::options::{ClipNorm, ClipValue, NormType};
use crate::report::{NormReport, ValueReport};
use crate::value_bounds;
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, InplaceOp1, Layout, Storage, StorageRef, Tensor, Var};
use std::sync::Mutex;

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        Self::wrap(error)
    }
}

/// Norm over the gradients of `vars`; see [`cpu::total_norm`]. A gradient that is not contiguous is read by way of a
/// contiguous copy.
///
/// # Errors
/// A gradient on another device than the CPU, or of another dtype; gradients that overlap without being the same.
pub fn total_norm(vars: &[Var], grads: &GradStore, norm_type: NormType) -> Result<NormReport> {
    let list = GradList::gather(vars, grads)?;
    Ok(list.measure(&ClipNorm::measure_only(norm_type))?.0)
}

/// Scales the gradients of `vars` so that their norm together is at most `max_norm`; see [`cpu::clip_grad_norm`].
///
/// # Errors
/// As [`total_norm`]; a threshold that is negative or NaN; a norm that is not finite, if the policy is
/// [`NonFinite::Error`](crate::NonFinite::Error). No value has changed then.
pub fn clip_grad_norm(vars: &[Var], grads: &mut GradStore, clip: impl Into<ClipNorm>) -> Result<NormReport> {
    let clip = clip.into();
    clip.validate()?;
    let list = GradList::gather(vars, grads)?;
    let (report, verdict) = list.measure(&clip)?;
    if verdict.written() {
        list.update(vars, grads, &Scale(verdict))?;
    }
    Ok(report)
}

/// Limits each element of the gradients of `vars`; see [`cpu::clip_grad_value`].
///
/// # Errors
/// As [`total_norm`]; a value that is negative or NaN, or bounds with `lo > hi`. No value has changed then.
pub fn clip_grad_value(vars: &[Var], grads: &mut GradStore, clip: impl Into<ClipValue>) -> Result<ValueReport> {
    let clip = clip.into();
    clip.validate()?;
    let list = GradList::gather(vars, grads)?;
    list.check()?;
    let clamp = Clamp { bounds: value_bounds::in_each_dtype(&clip), counts: Mutex::default() };
    list.update(vars, grads, &clamp)?;
    let counts = clamp.counts.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let total = counts.iter().fold(Counts::default(), |sum, counts| sum + *counts);
    Ok(ValueReport {
        clipped: total.clipped,
        nan: total.nan,
        written: total.clipped > 0,
        first_nonfinite: counts.iter().position(|counts| counts.nan + counts.inf > 0).map(|i| list.grads[i].var),
    })
}

/// The gradient of one variable, contiguous.
struct VarGrad {
    /// Index of the variable.
    var: usize,
    grad: Tensor,
    /// Whether `grad` is a copy of what the store has.
    copied: bool,
}

/// The gradients there are, each once.
struct GradList {
    grads: Vec<VarGrad>,
}

impl GradList {
    fn gather(vars: &[Var], store: &GradStore) -> Result<Self> {
        let mut grads: Vec<VarGrad> = Vec::with_capacity(vars.len());
        let mut seen = std::collections::HashSet::with_capacity(vars.len());
        for (var, tensor) in vars.iter().enumerate() {
            let Some(grad) = store.get(tensor) else { continue };
            check(var, grad)?;
            let copied = !grad.is_contiguous();
            let grad = if copied { grad.contiguous().map_err(framework)? } else { grad.clone() };
            if seen.insert(place(&grad)) {
                grads.push(VarGrad { var, grad, copied });
            }
        }
        Ok(Self { grads })
    }

    fn measure(&self, clip: &ClipNorm) -> Result<(NormReport, Verdict)> {
        self.with_slices(|slices| cpu::measure(slices, clip)).map(|(mut report, verdict)| {
            report.first_nonfinite = report.first_nonfinite.map(|i| self.grads[i].var);
            (report, verdict)
        })
    }

    fn check(&self) -> Result<()> {
        self.with_slices(|slices| cpu::check(slices).map(drop))
    }

    /// Runs `work` over the gradients as slices, and names variables in its errors. Holds their read locks meanwhile.
    fn with_slices<R>(&self, work: impl FnOnce(&[Grad<'_>]) -> Result<R>) -> Result<R> {
        let guards: Vec<(StorageRef<'_>, &Layout)> =
            self.grads.iter().map(|grad| grad.grad.storage_and_layout()).collect();
        let slices: Result<Vec<Grad<'_>>> = guards
            .iter()
            .zip(&self.grads)
            .map(|((storage, layout), grad)| match &**storage {
                Storage::Cpu(storage) => slice_of(storage, layout, grad.var),
                _ => Err(wrong_device(grad.var, &grad.grad)),
            })
            .collect();
        work(&slices?).map_err(|error| self.name_variables(error))
    }

    fn name_variables(&self, error: Error) -> Error {
        match error {
            Error::Overlap { first, second } => {
                Error::Overlap { first: self.grads[first].var, second: self.grads[second].var }
            }
            Error::NonFinite { total_norm, tensor } => {
                Error::NonFinite { total_norm, tensor: tensor.map(|i| self.grads[i].var) }
            }
            other => other,
        }
    }

    /// Applies `op` to each gradient, and puts the copied ones back.
    fn update(&self, vars: &[Var], store: &mut GradStore, op: &impl InplaceOp1) -> Result<()> {
        for VarGrad { var, grad, copied } in &self.grads {
            grad.inplace_op1(op).map_err(framework)?;
            if *copied {
                store.insert(&vars[*var], grad.clone());
            }
        }
        Ok(())
    }
}

fn check(var: usize, grad: &Tensor) -> Result<()> {
    use candle_core::DType;
    if !grad.device().is_cpu() {
        return Err(wrong_device(var, grad));
    }
    match grad.dtype() {
        DType::F32 | DType::F64 | DType::F16 | DType::BF16 => Ok(()),
        other => Err(unsupported(var, other)),
    }
}

/// The same for two gradients exactly if they are the same memory.
fn place(grad: &Tensor) -> (usize, usize, usize) {
    let (storage, layout) = grad.storage_and_layout();
    (std::ptr::from_ref::<Storage>(&storage) as usize, layout.start_offset(), grad.elem_count())
}

fn wrong_device(var: usize, grad: &Tensor) -> Error {
    Error::WrongDevice { tensor: var, expected: "the CPU".into(), got: format!("{:?}", grad.device().location()) }
}

fn unsupported(var: usize, dtype: candle_core::DType) -> Error {
    Error::UnsupportedDtype { tensor: var, got: dtype.as_str().to_owned() }
}

fn framework(error: candle_core::Error) -> Error {
    Error::Framework(error.to_string())
}

fn slice_of<'a>(storage: &'a CpuStorage, layout: &Layout, var: usize) -> Result<Grad<'a>> {
    let range = offsets(layout);
    match storage {
        CpuStorage::F32(all) => Ok((&all[range]).into()),
        CpuStorage::F64(all) => Ok((&all[range]).into()),
        CpuStorage::F16(all) => Ok((&all[range]).into()),
        CpuStorage::BF16(all) => Ok((&all[range]).into()),
        other => Err(unsupported(var, candle_core::backend::BackendStorage::dtype(other))),
    }
}

fn slice_of_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> candle_core::Result<GradMut<'a>> {
    let range = offsets(layout);
    match storage {
        CpuStorage::F32(all) => Ok((&mut all[range]).into()),
        CpuStorage::F64(all) => Ok((&mut all[range]).into()),
        CpuStorage::F16(all) => Ok((&mut all[range]).into()),
        CpuStorage::BF16(all) => Ok((&mut all[range]).into()),
        other => Err(unsupported(0, candle_core::backend::BackendStorage::dtype(other)).into()),
    }
}

/// The elements of a contiguous layout.
fn offsets(layout: &Layout) -> std::ops::Range<usize> {
    let start = layout.start_offset();
    start..start + layout.shape().elem_count()
}

struct Scale(Verdict);

impl InplaceOp1 for Scale {
    fn name(&self) -> &'static str {
        "clip_grad_norm"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        cpu::apply(&self.0, &mut [slice_of_mut(storage, layout)?]);
        Ok(())
    }
}

struct Clamp {
    bounds: crate::abi::ClampBounds,
    /// Of each gradient, in the order of the list.
    counts: Mutex<Vec<Counts>>,
}

impl InplaceOp1 for Clamp {
    fn name(&self) -> &'static str {
        "clip_grad_value"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let counts = cpu::clamp_all(&self.bounds, &mut [slice_of_mut(storage, layout)?]);
        let mut all = self.counts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        all.extend(counts);
        Ok(())
    }
}
