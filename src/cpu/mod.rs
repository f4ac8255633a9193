//! Clipping gradients in host memory.
//!
//! The verbs are those of the CUDA back end, and so are the bits: every addition happens in an order that is fixed by
//! the index of the element, so the number of threads, the instruction set and the processor do not show.

mod clamp;
pub(crate) mod clip_coef;
mod element;
mod grads;
mod isa;
mod norm_partials;
mod parallel;
pub(crate) mod partial;
mod power;
mod running;
mod scale;
mod scale_into;
pub(crate) mod scoped;
pub(crate) mod shards;
mod stats;
mod summation;

pub(crate) use clamp::Counts;
pub use grads::{AsGrad, AsGradMut, Grad, GradMut};
#[cfg(feature = "candle")]
pub(crate) use parallel::SERIAL_BYTES;
pub use running::RunningNorm;
pub use shards::{clip_coef_sharded, clip_grad_norm_sharded, norm_partial, total_norm_sharded};

use crate::abi::ClampBounds;
use crate::clip_coef::{decide, Verdict};
use crate::error::{Error, Result};
use crate::fp_env::DefaultFpEnv;
use crate::options::{ClipNorm, ClipValue, NonFinite, NormType};
use crate::outputs::{check_pairs, in_outputs, refuse_shared};
use crate::plan::{Plan, TensorRef};
use crate::report::{NormReport, ValueReport};
use crate::scope::{Scope, ScopedReport};
use crate::total_norm::TotalNorm;
use crate::value_bounds;
use scale_into::Pair;

/// Norm over all gradients together.
///
/// L2: `sqrt(sum(x^2))`; L1: `sum(|x|)`; Inf: `max(|x|)`; P(p): `sum(|x|^p)^(1/p)`; Rms: `sqrt(mean(x^2))`. Of an empty list, or of empty
/// gradients, 0. NaN if any element is NaN, else infinite if any is. Squares and powers neither overflow nor vanish.
///
/// Cost: reads each gradient once, writes nothing; all cores. [`NormType::P`] computes a logarithm and an exponential of
/// each element in f64, which takes longer than reading it from memory.
///
/// # Errors
/// [`Error::Overlap`] if two gradients share memory; [`Error::InvalidNormType`] for an order that is not positive.
///
/// ```
/// use gradclip::{cpu, NormType};
/// let report = cpu::total_norm(&[[3e20f32, 4e20]], NormType::L2)?;
/// assert!((report.total_norm / 5e20 - 1.0).abs() < 1e-7);
/// # Ok::<(), gradclip::Error>(())
/// ```
pub fn total_norm<G: AsGrad>(grads: &[G], norm_type: NormType) -> Result<NormReport> {
    let grads = collect(grads.len(), grads.iter().map(AsGrad::as_grad))?;
    Ok(measure(&grads, &ClipNorm::measure_only(norm_type))?.0)
}

/// Scales all gradients so that their norm together is at most `max_norm`, up to the rounding of each element; the direction is kept.
///
/// See [`ClipNorm`] for the formula and the options; `1.0` is short for `ClipNorm::new(1.0)`. When the norm is within
/// the threshold nothing is written. When it is NaN or infinite, [`NonFinite`] decides; by default nothing is written.
/// Each clipped element is within one unit in the last place of `x * multiplier`, which is `x * clip_coef` without a
/// [`loss_scale`](ClipNorm::loss_scale).
///
/// Cost: reads each gradient once; if it clips, reads and writes each once more. All cores.
///
/// # Errors
/// A threshold that is negative or NaN, an order that is not positive; gradients that share memory; a norm that is not finite, if the policy is
/// [`NonFinite::Error`]. Nothing is touched then.
///
/// ```
/// let mut grads = vec![vec![3.0f32], vec![4.0]];
/// let report = gradclip::cpu::clip_grad_norm(&mut grads, 1.0)?;
/// assert_eq!((report.total_norm, report.clip_coef), (5.0, 0.2));
/// assert_eq!(grads, [[0.6], [0.8]]);
/// # Ok::<(), gradclip::Error>(())
/// ```
pub fn clip_grad_norm<G: AsGradMut>(grads: &mut [G], clip: impl Into<ClipNorm>) -> Result<NormReport> {
    let clip = clip.into();
    let readable = collect(grads.len(), grads.iter().map(AsGrad::as_grad))?;
    let (report, verdict) = measure(&readable, &clip)?;
    if verdict.written() {
        let mut writable = collect(grads.len(), grads.iter_mut().map(AsGradMut::as_grad_mut))?;
        apply(&verdict, &mut writable);
    }
    Ok(report)
}

/// The same out of place: clipped gradients go to `outputs`, one for each gradient, of its type or f32. The gradients are
/// only read.
///
/// Formula, options, norm and coefficient are those of [`clip_grad_norm`]. Output `i` becomes `x * multiplier` for every
/// `x` of gradient `i`, rounded once, to the output's type: within one unit in the last place for every finite `x`. Where
/// nothing is clipped (and there is no loss scale) it becomes `x`. f32 from f16 or bf16 is what an optimizer with f32
/// master weights takes: in place the product is rounded to 11 or 8 bits, and a small f16 can vanish, above all where a
/// [`loss_scale`](ClipNorm::loss_scale) comes off with it.
///
/// ```text
/// bf16 -> bf16, f32      f16 -> f16, f32      f64 -> f64, f32      f32 -> f32
/// ```
///
/// Outputs are always written, but for a norm that is NaN or infinite under [`NonFinite::Skip`] and
/// [`NonFinite::Error`]: then they keep what they held, and the report says `written: false`; do not step with them. Under
/// [`NonFinite::Zero`] they become +0, under [`NonFinite::Propagate`] what [`clip_grad_norm`] would leave; both, where
/// `max_norm` is infinite and there is no loss scale, write `x`. Every NaN in an output is the canonical one. An f64 beyond f32 becomes infinite.
///
/// Cost: reads each gradient twice, writes each output once. All cores. Nothing else of their size is allocated.
///
/// # Errors
/// Those of [`clip_grad_norm`]; [`Error::OutputCount`], [`Error::OutputNumel`], [`Error::OutputDtype`],
/// [`Error::OutputOverlapsGradient`]; [`Error::Outputs`] where outputs share memory. No output is touched then.
///
/// ```
/// use half::bf16;
/// let grads = [vec![bf16::from_f32(3.0)], vec![bf16::from_f32(4.0)]];
/// let mut master_grads = [vec![0.0f32], vec![0.0]];
/// let report = gradclip::cpu::clip_grad_norm_into(&grads, &mut master_grads, 1.0)?;
/// assert_eq!((report.total_norm, report.clip_coef, report.written), (5.0, 0.2, true));
/// assert_eq!(master_grads, [[0.6], [0.8]]); // in place: 0.6015625 and 0.80078125
/// # Ok::<(), gradclip::Error>(())
/// ```
pub fn clip_grad_norm_into<G: AsGrad, O: AsGradMut>(
    grads: &[G],
    outputs: &mut [O],
    clip: impl Into<ClipNorm>,
) -> Result<NormReport> {
    let clip = clip.into();
    clip.validate()?;
    clip.refuse_device_threshold()?;
    let readable = collect(grads.len(), grads.iter().map(AsGrad::as_grad))?;
    let writable = collect(outputs.len(), outputs.iter_mut().map(AsGradMut::as_grad_mut))?;
    let plan = check(&readable)?;
    let pairs = pair_up(&plan, &readable, writable)?;
    let (report, verdict) = measure_planned(&readable, &plan, &clip)?;
    let verdict = verdict.out_of_place(report.total_norm, clip.nonfinite);
    if verdict.written() {
        parallel::scale_pairs(&verdict, pairs);
    }
    Ok(NormReport { written: verdict.written(), ..report })
}

/// Scales the gradients by a norm that the caller has: what [`clip_grad_norm`] does after it has measured.
///
/// For a norm that is measured once and used for several lists, or is that of more gradients than are here: of shards,
/// of pipeline stages. It is PyTorch's `clip_grads_with_norm_`, as [`total_norm`] is its `get_total_norm`. Formula,
/// options and policies are those of [`ClipNorm`], by the norm that is given; its order does not matter here. The report
/// has that norm (with a [`loss_scale`](ClipNorm::loss_scale), over it), and names no tensor.
///
/// The norm is that of the gradients as they are: with a loss scale, what [`total_norm`] measures, or the `total_norm` of
/// the report of a call with that loss scale times the scale.
///
/// The gradients themselves are not looked at first. So where the norm is finite and they are not, they are multiplied
/// like all: an Inf stays one (times 0 it is NaN), a NaN stays NaN, without its payload.
///
/// Cost: nothing where the norm is within the threshold; else reads and writes each gradient once. All cores.
///
/// # Errors
/// A norm or a threshold that is negative, or a threshold that is NaN; gradients that share memory; a norm that is not
/// finite, if the policy is [`NonFinite::Error`]. Nothing is touched then.
///
/// ```
/// use gradclip::{cpu, NormType};
/// let (mut here, there) = ([[3.0f32]], [[4.0f32]]); // two shards
/// let norms = [&here, &there].map(|shard| cpu::total_norm(shard, NormType::L2));
/// let [a, b] = norms.map(|report| report.map_or(f64::NAN, |report| report.total_norm));
/// let report = cpu::clip_with_norm(&mut here, a.hypot(b), 1.0)?;
/// assert_eq!((report.total_norm, report.clip_coef), (5.0, 0.2));
/// assert_eq!(here, [[0.6]]);
/// # Ok::<(), gradclip::Error>(())
/// ```
pub fn clip_with_norm<G: AsGradMut>(grads: &mut [G], total_norm: f64, clip: impl Into<ClipNorm>) -> Result<NormReport> {
    let clip = clip.into();
    let readable = collect(grads.len(), grads.iter().map(AsGrad::as_grad))?;
    let (report, verdict) = judge(&readable, total_norm, &clip)?;
    if verdict.written() {
        let mut writable = collect(grads.len(), grads.iter_mut().map(AsGradMut::as_grad_mut))?;
        apply_to_any(&verdict, &mut writable);
    }
    Ok(report)
}

/// What [`clip_grad_norm`] would multiply the gradients by, for an optimizer that multiplies them itself: it reads them
/// anyway, so that saves reading and writing them once more.
///
/// The factor is [`multiplier`](NormReport::multiplier), and `written` is false. It is 1 where nothing is to be clipped.
/// When the norm is NaN or infinite:
///
/// | policy | `multiplier` | the optimizer |
/// |---|---|---|
/// | [`Skip`](NonFinite::Skip) | 1 | has to leave the step out, by [`found_inf`](NormReport::found_inf) |
/// | [`Zero`](NonFinite::Zero) | 0 | has to take 0 for the gradient: Inf or NaN times 0 is NaN |
/// | [`Propagate`](NonFinite::Propagate) | NaN, or 0 for an infinite norm | multiplies |
/// | [`Error`](NonFinite::Error) | | gets the error |
///
/// Cost: reads each gradient once, writes nothing; all cores.
///
/// # Errors
/// As [`clip_grad_norm`].
///
/// ```
/// use gradclip::{cpu, ClipNorm};
/// let (mut weights, grads) = ([1.0f32, 2.0], [[3.0f32 * 1024.0, 4.0 * 1024.0]]);
/// let report = cpu::clip_coef(&grads, ClipNorm::new(2.5).loss_scale(1024.0))?;
/// if !report.found_inf {
///     for (weight, grad) in weights.iter_mut().zip(&grads[0]) {
///         *weight -= 0.5 * (grad * report.multiplier as f32); // SGD, clipped and unscaled
///     }
/// }
/// assert_eq!((weights, grads), ([0.25, 1.0], [[3072.0, 4096.0]]));
/// # Ok::<(), gradclip::Error>(())
/// ```
pub fn clip_coef<G: AsGrad>(grads: &[G], clip: impl Into<ClipNorm>) -> Result<NormReport> {
    let grads = collect(grads.len(), grads.iter().map(AsGrad::as_grad))?;
    let (report, _) = measure(&grads, &clip.into())?;
    Ok(NormReport { written: false, ..report })
}

/// Limits each element to `[-v, v]`, or to the bounds of a [`ClipValue`].
///
/// NaN stays NaN and is counted; Inf becomes the bound.
///
/// Cost: reads each gradient once, writes only where something changes: 512 bytes, or 4 KiB where many elements do. All
/// cores.
///
/// # Errors
/// A value that is negative or NaN, or bounds with `lo > hi`; gradients that share memory. Nothing is touched then.
///
/// ```
/// let mut grads = [[0.1f32, -7.0, f32::INFINITY]];
/// let report = gradclip::cpu::clip_grad_value(&mut grads, 0.5)?;
/// assert_eq!(grads, [[0.1, -0.5, 0.5]]);
/// assert_eq!((report.clipped, report.clipped_fraction()), (2, 2.0 / 3.0));
/// # Ok::<(), gradclip::Error>(())
/// ```
pub fn clip_grad_value<G: AsGradMut>(grads: &mut [G], clip: impl Into<ClipValue>) -> Result<ValueReport> {
    let clip = clip.into();
    clip.validate()?;
    let numel = check(&collect(grads.len(), grads.iter().map(AsGrad::as_grad))?)?.numel();
    let bounds = value_bounds::in_each_dtype(&clip);
    let mut writable = collect(grads.len(), grads.iter_mut().map(AsGradMut::as_grad_mut))?;
    Ok(value_report(&clamp_all(&bounds, &mut writable), numel))
}

/// The norm of each group of a [`Scope`]: of each tensor, of named groups, of each row.
///
/// A group's norm has the bits of [`total_norm`] over a list of its tensors alone. Of thresholds in the scope only their number
/// matters.
///
/// Cost: reads each gradient once, writes nothing; all cores.
///
/// # Errors
/// As [`total_norm`], and a scope that does not fit the list: [`Error::ScopeLength`], [`Error::NoSuchGroup`],
/// [`Error::UnevenRows`], [`Error::ShapesUnknown`].
///
/// ```
/// use gradclip::{cpu, NormType, Scope};
/// let grads = [vec![3.0f32, 0.0, -4.0], vec![f32::NAN, 2.0]];
/// let report = cpu::norms_by(&grads, &Scope::per_tensor().telemetry(), NormType::L2)?;
/// assert_eq!(report.groups[0].total_norm, 5.0);
/// let (first, second) = (report.tensors[0], report.tensors[1]);
/// assert_eq!((first.max_abs, first.zeros, first.nonfinite), (4.0, 1, 0));
/// assert_eq!((second.max_abs, second.nonfinite, second.first_nonfinite), (2.0, 1, Some(0)));
/// # Ok::<(), gradclip::Error>(())
/// ```
pub fn norms_by<G: AsGrad>(grads: &[G], scope: &Scope<'_>, norm_type: NormType) -> Result<ScopedReport> {
    let grads = collect(grads.len(), grads.iter().map(AsGrad::as_grad))?;
    Ok(scoped::measure(&grads, &scope.only_measured(), &ClipNorm::measure_only(norm_type))?.report)
}

/// [`clip_grad_norm`] of each group of a [`Scope`] by itself: each tensor, named groups, each row; with a threshold for
/// all or one for each.
///
/// [`NonFinite`] decides for each group: a NaN in one leaves the others alone, but [`NonFinite::Error`] leaves all.
///
/// Cost: reads each gradient once; reads and writes those of the groups that clip once more. All cores.
///
/// # Errors
/// As [`clip_grad_norm`], and a scope that does not fit the list, as for [`norms_by`]. Nothing is touched then.
///
/// ```
/// use gradclip::{cpu, Scope};
/// let mut grads = [[3.0f32, 4.0], [0.3, 0.4]];
/// let report = cpu::clip_grad_norm_by(&mut grads, &Scope::per_tensor(), 1.0)?;
/// assert_eq!(grads, [[0.6, 0.8], [0.3, 0.4]]);
/// assert_eq!((report.num_written(), report.groups[0].clip_coef), (1, 0.2));
/// # Ok::<(), gradclip::Error>(())
/// ```
pub fn clip_grad_norm_by<G: AsGradMut>(
    grads: &mut [G],
    scope: &Scope<'_>,
    clip: impl Into<ClipNorm>,
) -> Result<ScopedReport> {
    let readable = collect(grads.len(), grads.iter().map(AsGrad::as_grad))?;
    let measured = scoped::measure(&readable, scope, &clip.into())?;
    scoped::apply(&measured, collect(grads.len(), grads.iter_mut().map(AsGradMut::as_grad_mut))?);
    Ok(measured.report)
}

/// What [`clip_grad_norm_by`] would multiply each group by, for an optimizer that multiplies itself: [`clip_coef`] with a
/// [`Scope`]. Each group's factor is its [`multiplier`](NormReport::multiplier); what it is by each policy, [`clip_coef`]
/// says.
///
/// Cost: reads each gradient once, writes nothing; all cores.
///
/// # Errors
/// As [`clip_grad_norm_by`].
///
/// ```
/// use gradclip::{cpu, Scope};
/// let (mut weights, grads) = ([[1.0f32, 2.0], [1.0, 1.0]], [[3.0f32, 4.0], [0.5, 0.5]]);
/// let report = cpu::clip_coef_by(&grads, &Scope::per_tensor(), 2.5)?;
/// for (index, (weight, grad)) in weights.iter_mut().zip(&grads).enumerate() {
///     let multiplier = report.groups[index].multiplier as f32;
///     weight.iter_mut().zip(grad).for_each(|(weight, grad)| *weight -= 0.5 * (grad * multiplier));
/// }
/// assert_eq!((weights, report.num_written()), ([[0.25, 1.0], [0.75, 0.75]], 0));
/// # Ok::<(), gradclip::Error>(())
/// ```
pub fn clip_coef_by<G: AsGrad>(grads: &[G], scope: &Scope<'_>, clip: impl Into<ClipNorm>) -> Result<ScopedReport> {
    let grads = collect(grads.len(), grads.iter().map(AsGrad::as_grad))?;
    Ok(scoped::measure(&grads, scope, &clip.into())?.into_coefs())
}

/// [`clip_grad_value`] with a report for each group of a [`Scope`]: what part of each tensor, named group or row was outside
/// the bounds, counted on the same pass. Elements become what [`clip_grad_value`] makes of them.
///
/// Cost: that of [`clip_grad_value`].
///
/// # Errors
/// As [`clip_grad_value`], and a scope that does not fit the list, as for [`norms_by`]; [`Error::ScopeForNorms`] for one
/// with [`max_norms`](Scope::max_norms) or [`telemetry`](Scope::telemetry). Nothing is touched then.
///
/// ```
/// use gradclip::{cpu, Scope};
/// let mut grads = [vec![0.1f32, -7.0, 0.2, 0.3], vec![0.4]];
/// let report = cpu::clip_grad_value_by(&mut grads, &Scope::per_tensor(), 0.5)?;
/// assert_eq!(grads, [vec![0.1, -0.5, 0.2, 0.3], vec![0.4]]);
/// let fractions: Vec<f64> = report.groups.iter().map(|tensor| tensor.clipped_fraction()).collect();
/// assert_eq!(fractions, [0.25, 0.0]);
/// # Ok::<(), gradclip::Error>(())
/// ```
pub fn clip_grad_value_by<G: AsGradMut>(
    grads: &mut [G],
    scope: &Scope<'_>,
    clip: impl Into<ClipValue>,
) -> Result<ScopedReport<ValueReport>> {
    let clip = clip.into();
    clip.validate()?;
    scope.refuse_norms()?;
    let mut clamp = scoped::Clamp::new(&collect(grads.len(), grads.iter().map(AsGrad::as_grad))?, scope, &clip)?;
    let writable = collect(grads.len(), grads.iter_mut().map(AsGradMut::as_grad_mut))?;
    clamp.apply_to(writable.into_iter().enumerate());
    Ok(clamp.into_report())
}

/// A list of gradients of no size can be longer than any memory.
fn collect<G>(count: usize, grads: impl Iterator<Item = G>) -> Result<Vec<G>> {
    let mut list = Vec::new();
    let too_long = |_| Error::OutOfMemory { what: "list of gradients", bytes: count.saturating_mul(size_of::<G>()) };
    list.try_reserve_exact(count).map_err(too_long)?;
    list.extend(grads);
    Ok(list)
}

/// Stages 1 and 2: what [`clip_grad_norm`] would report and do.
pub(crate) fn measure(grads: &[Grad<'_>], clip: &ClipNorm) -> Result<(NormReport, Verdict)> {
    clip.validate()?;
    clip.refuse_device_threshold()?;
    let plan = check(grads)?;
    measure_planned(grads, &plan, clip)
}

/// The same of a checked list.
fn measure_planned(grads: &[Grad<'_>], plan: &Plan, clip: &ClipNorm) -> Result<(NormReport, Verdict)> {
    let partials = parallel::norm_partials(clip.norm_type, grads, plan.num_tiles() as usize);
    // Not before: while this thread waits for the others it may run jobs of the caller's.
    let _env = DefaultFpEnv::enter();
    let total_norm = clip_coef::norm_of(&partials, clip.norm_type, plan.numel());
    let first_nonfinite = clip_coef::first_bad_tile(&partials).and_then(|tile| plan.tensor_of(tile as u64));
    report_of(clip, total_norm, first_nonfinite)
}

/// Stage 2 by a given norm: what [`clip_with_norm`] would report and do.
pub(crate) fn judge(grads: &[Grad<'_>], total_norm: f64, clip: &ClipNorm) -> Result<(NormReport, Verdict)> {
    clip.validate()?;
    clip.refuse_device_threshold()?;
    let total_norm = TotalNorm::check_value(total_norm)?;
    check(grads)?;
    let _env = DefaultFpEnv::enter();
    report_of(clip, total_norm, None)
}

/// `total_norm` with the loss scale in it. In the default floating-point environment.
fn report_of(clip: &ClipNorm, total_norm: f64, first_nonfinite: Option<usize>) -> Result<(NormReport, Verdict)> {
    let verdict = decide(clip, total_norm);
    let Verdict { total_norm, clip_coef, multiplier, .. } = verdict;
    let found_inf = !total_norm.is_finite();
    if clip.nonfinite == NonFinite::Error && found_inf {
        return Err(Error::NonFinite { total_norm, tensor: first_nonfinite });
    }
    let written = verdict.written();
    let first_nonfinite_rank = None;
    let report =
        NormReport { total_norm, clip_coef, multiplier, found_inf, written, first_nonfinite, first_nonfinite_rank };
    Ok((report, verdict))
}

/// Stage 3, after [`measure`], which has looked at every gradient.
pub(crate) fn apply(verdict: &Verdict, grads: &mut [GradMut<'_>]) {
    parallel::scale(verdict, grads);
}

/// Each gradient with its output, checked.
fn pair_up<'a>(plan: &Plan, grads: &[Grad<'a>], outputs: Vec<GradMut<'a>>) -> Result<Vec<Pair<'a>>> {
    let gradient_refs: Vec<TensorRef> = grads.iter().map(Grad::tensor_ref).collect();
    let output_refs: Vec<TensorRef> = outputs.iter().map(|output| output.as_grad().tensor_ref()).collect();
    check_pairs(&gradient_refs, &output_refs)?;
    let mut output_plan = Plan::default();
    output_plan.update(&output_refs).map_err(in_outputs)?;
    refuse_shared(plan, &output_plan)?;
    let pairs = grads.iter().zip(outputs).enumerate().map(|(tensor, (grad, output))| {
        let (gradient, to) = (gradient_refs[tensor].dtype, output_refs[tensor].dtype);
        Pair::of(*grad, output).ok_or(Error::OutputDtype { tensor, gradient, output: to })
    });
    pairs.collect()
}

/// Stage 3, after [`judge`], which has not.
pub(crate) fn apply_to_any(verdict: &Verdict, grads: &mut [GradMut<'_>]) {
    parallel::scale_any(verdict, grads);
}

/// Value clipping of a checked list; what each gradient held.
pub(crate) fn clamp_all(bounds: &ClampBounds, grads: &mut [GradMut<'_>]) -> Vec<Counts> {
    parallel::clamp(bounds, grads)
}

/// What the counts of all gradients, of so many elements together, come to.
pub(crate) fn value_report(counts: &[Counts], numel: u64) -> ValueReport {
    let total = counts.iter().fold(Counts::default(), |sum, counts| sum + *counts);
    ValueReport {
        clipped: total.clipped,
        nan: total.nan,
        numel,
        written: total.clipped > 0,
        first_nonfinite: counts.iter().position(|counts| counts.nonfinite),
    }
}

/// The list, cut into tiles; refuses overlaps.
pub(crate) fn check(grads: &[Grad<'_>]) -> Result<Plan> {
    let tensors: Vec<TensorRef> = grads.iter().map(Grad::tensor_ref).collect();
    let mut plan = Plan::default();
    plan.update(&tensors)?;
    Ok(plan)
}
