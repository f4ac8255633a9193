//! Calls with more than one norm. Twin of `kernels/scoped.cu` and `scoped_stats.cu`: rows are gradients of their own, and
//! a group's norm is that of a list of its tensors alone.

use super::clip_coef::{first_bad_tile, norm_of};
use super::grads::{with_slice, Grad, GradMut};
use super::parallel;
use super::partial::Partial;
use super::{check, report_of, stats, Counts};
use crate::abi::{ClampBounds, ScopedGroup, Stats, StatsSlot, NO_ELEMENT, SAME_THRESHOLD, TILE_BYTES};
use crate::clip_coef::Verdict;
use crate::dtype::Dtype;
use crate::error::Result;
use crate::fp_env::DefaultFpEnv;
use crate::options::{ClipNorm, ClipValue};
use crate::report::ValueReport;
use crate::scope::{Scope, ScopedReport, TensorStats};
use crate::scoped_plan::ScopedPlan;
use crate::value_bounds;

/// What a scoped call found: its report, and what is to be done with each group.
pub(crate) struct Measured {
    pub report: ScopedReport,
    plan: ScopedPlan,
    verdicts: Vec<Verdict>,
}

impl Measured {
    /// The report of a call that only hands out the factors.
    pub(crate) fn into_coefs(self) -> ScopedReport {
        let mut report = self.report;
        report.groups.iter_mut().for_each(|group| group.written = false);
        report
    }
}

/// Stages 1 and 2.
pub(crate) fn measure(grads: &[Grad<'_>], scope: &Scope<'_>, clip: &ClipNorm) -> Result<Measured> {
    clip.validate()?;
    clip.refuse_device_threshold()?;
    let plan = ScopedPlan::new(&check(grads)?, scope)?;
    let rows = rows_in_order(&plan, grads.iter().copied());
    let (partials, tile_stats) = if plan.telemetry {
        parallel::norm_partials_and_stats(clip.norm_type, &rows, plan.num_tiles as usize)
    } else {
        (parallel::norm_partials(clip.norm_type, &rows, plan.num_tiles as usize), Vec::new())
    };
    let _env = DefaultFpEnv::enter();
    let (mut groups, mut verdicts) = (Vec::with_capacity(plan.groups.len()), Vec::with_capacity(plan.groups.len()));
    for group in &plan.groups {
        let of_group = &partials[ScopedPlan::tiles_of(group)];
        let total_norm = norm_of(of_group, clip.norm_type, group.numel);
        let bad_tile = first_bad_tile(of_group).map(|tile| u64::from(group.first_tile) + tile as u64);
        let first_nonfinite = bad_tile.and_then(|tile| plan.tensor_of(tile));
        let (report, verdict) = report_of(&of_group_options(clip, group), total_norm, first_nonfinite)?;
        groups.push(report);
        verdicts.push(verdict);
    }
    let tensors = tensor_stats(&plan, clip, &partials, &tile_stats);
    let report = ScopedReport::new(groups, tensors, plan.groups_of.clone());
    Ok(Measured { report, plan, verdicts })
}

/// Stage 3.
pub(crate) fn apply(measured: &Measured, grads: Vec<GradMut<'_>>) {
    if measured.verdicts.iter().any(Verdict::written) {
        apply_to(measured, grads.into_iter().enumerate());
    }
}

/// Stage 3, of some of the tensors: each with its index in the list.
pub(crate) fn apply_to<'a>(measured: &Measured, grads: impl Iterator<Item = (usize, GradMut<'a>)>) {
    let (mut verdicts, mut rows) = (Vec::new(), Vec::new());
    for (index, grad) in grads {
        let of_rows = &measured.verdicts[measured.plan.groups_of[index].clone()];
        let numel = with_slice!(GradMut, &grad, slice => slice.len());
        let row_numel = numel.checked_div(of_rows.len()).unwrap_or(0);
        if row_numel > 0 && of_rows.iter().any(Verdict::written) {
            grad.cut(row_numel, &mut rows);
            verdicts.extend(of_rows);
            rows.truncate(verdicts.len()); // of a gradient that has another length than it had
        }
    }
    parallel::scale_each(&verdicts, &mut rows);
}

/// Value clipping, with counts of each group.
pub(crate) struct Clamp {
    plan: ScopedPlan,
    bounds: ClampBounds,
    /// Of each group, with the first tensor that held a NaN or an Inf.
    groups: Vec<(Counts, Option<usize>)>,
}

impl Clamp {
    pub(crate) fn new(grads: &[Grad<'_>], scope: &Scope<'_>, clip: &ClipValue) -> Result<Self> {
        let plan = ScopedPlan::new(&check(grads)?, scope)?;
        let groups = vec![Default::default(); plan.groups.len()];
        Ok(Self { plan, bounds: value_bounds::in_each_dtype(clip), groups })
    }

    /// Clamps some of the tensors: each with its index in the list, in the order of the list.
    pub(crate) fn apply_to<'a>(&mut self, grads: impl Iterator<Item = (usize, GradMut<'a>)>) {
        let (mut rows, mut owners) = (Vec::new(), Vec::new());
        for (index, grad) in grads {
            let of_rows = self.plan.groups_of[index].clone();
            let numel = with_slice!(GradMut, &grad, slice => slice.len());
            let row_numel = numel.checked_div(of_rows.len()).unwrap_or(0);
            if row_numel > 0 {
                grad.cut(row_numel, &mut rows);
                owners.extend(of_rows.map(|group| (group, index)));
            }
        }
        for ((group, index), counts) in owners.into_iter().zip(parallel::clamp(&self.bounds, &mut rows)) {
            let (total, first_nonfinite) = &mut self.groups[group];
            *total = *total + counts;
            *first_nonfinite = first_nonfinite.or(counts.nonfinite.then_some(index));
        }
    }

    pub(crate) fn into_report(self) -> ScopedReport<ValueReport> {
        let reports =
            self.groups.iter().zip(&self.plan.groups).map(|(&(counts, first_nonfinite), group)| ValueReport {
                clipped: counts.clipped,
                nan: counts.nan,
                numel: group.numel,
                written: counts.clipped > 0,
                first_nonfinite,
            });
        ScopedReport::new(reports.collect(), Vec::new(), self.plan.groups_of)
    }
}

/// The options with the group's own threshold, if it has one.
fn of_group_options(clip: &ClipNorm, group: &ScopedGroup) -> ClipNorm {
    let mut clip = *clip;
    if group.max_norm != SAME_THRESHOLD {
        clip.max_norm = f64::from_bits(group.max_norm);
    }
    clip
}

fn tensor_stats(plan: &ScopedPlan, clip: &ClipNorm, partials: &[Partial], tile_stats: &[Stats]) -> Vec<TensorStats> {
    if !plan.telemetry {
        return Vec::new();
    }
    let mut of_tensors = vec![TensorStats::from(StatsSlot { norm: 0.0, stats: stats::NONE }); plan.tensors.len()];
    for tensor in &plan.tensors {
        let tiles = tensor.first_tile as usize..(tensor.first_tile + tensor.num_tiles) as usize;
        let tile_numel = (TILE_BYTES / Dtype::ALL[tensor.dtype as usize].size()) as u64;
        let in_tensor = |(tile, mut stats): (usize, Stats)| {
            if stats.first_nonfinite != NO_ELEMENT {
                let (row, tile_of_row) = (tile as u32 / tensor.tiles_per_row, tile as u32 % tensor.tiles_per_row);
                stats.first_nonfinite += u64::from(row) * tensor.row_numel + u64::from(tile_of_row) * tile_numel;
            }
            stats
        };
        let all = tile_stats[tiles.clone()].iter().copied().enumerate().map(in_tensor);
        let stats = all.fold(stats::NONE, stats::combine);
        let norm = norm_of(&partials[tiles], clip.norm_type, tensor.numel());
        of_tensors[tensor.index as usize] = StatsSlot { norm, stats }.into();
    }
    of_tensors
}

/// A gradient that can be cut into rows.
trait Rows: Sized {
    fn cut(self, row_numel: usize, rows: &mut Vec<Self>);
}

impl<'a> Rows for Grad<'a> {
    fn cut(self, row_numel: usize, rows: &mut Vec<Self>) {
        with_slice!(Self, self, slice => rows.extend(slice.chunks(row_numel).map(Grad::from)));
    }
}

impl<'a> Rows for GradMut<'a> {
    fn cut(self, row_numel: usize, rows: &mut Vec<Self>) {
        with_slice!(Self, self, slice => rows.extend(slice.chunks_mut(row_numel).map(GradMut::from)));
    }
}

/// The rows that are not empty, in the order of the plan.
fn rows_in_order<G: Rows>(plan: &ScopedPlan, grads: impl Iterator<Item = G>) -> Vec<G> {
    let mut grads: Vec<Option<G>> = grads.map(Some).collect();
    let mut rows = Vec::new();
    for tensor in plan.tensors.iter().filter(|tensor| tensor.num_tiles > 0) {
        if let Some(grad) = grads[tensor.index as usize].take() {
            grad.cut(tensor.row_numel as usize, &mut rows);
        }
    }
    rows
}
