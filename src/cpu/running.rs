//! A norm of gradients that come one after the other. Twin of `src/cuda/running.rs`.

use super::grads::{AsGrad, AsGradMut, Grad};
use super::partial::Partial;
use super::{apply, clip_coef, collect, parallel, report_of};
use crate::clip_coef::Verdict;
use crate::error::Result;
use crate::fp_env::DefaultFpEnv;
use crate::options::{ClipNorm, NormType};
use crate::plan::TensorRef;
use crate::report::NormReport;
use crate::running_list::RunningList;

/// A norm of gradients that are added as backward produces them, and then the clip by it: one pass less over memory that
/// backward has just written. The bits are those of one call over the list in the order of adding.
///
/// [`clip`](Self::clip) and [`total_norm`](Self::total_norm) finish a norm; the next [`add`](Self::add) begins another. So
/// keep one for all steps. Where gradients are accumulated over several micro-batches, add them in the last one only, when
/// they are complete: what is added and then changed is clipped by the norm of what it was.
///
/// ```
/// use gradclip::{cpu::RunningNorm, NormType};
/// let mut norm = RunningNorm::new(NormType::L2)?;
/// for _step in 0..2 {
///     let mut grads = [vec![0.0f32], vec![0.0]];
///     grads[1][0] = 4.0; // backward has come to the last layer
///     norm.add(&[&grads[1]])?;
///     grads[0][0] = 3.0; // and to the first
///     norm.add(&[&grads[0]])?;
///
///     let [first, last] = &mut grads;
///     let report = norm.clip(&mut [last, first], 1.0)?; // in the order of adding
///     assert_eq!((report.total_norm, grads), (5.0, [vec![0.6], vec![0.8]]));
/// }
/// # Ok::<(), gradclip::Error>(())
/// ```
#[derive(Debug)]
pub struct RunningNorm {
    norm_type: NormType,
    list: RunningList,
    partials: Vec<Partial>,
    finished: bool,
}

impl RunningNorm {
    /// A norm of nothing yet.
    ///
    /// # Errors
    /// [`Error::InvalidNormType`](crate::Error::InvalidNormType) for an order that is not positive.
    pub fn new(norm_type: NormType) -> Result<Self> {
        let norm_type = ClipNorm::measure_only(norm_type).validated()?.norm_type;
        Ok(Self { norm_type, list: RunningList::default(), partials: Vec::new(), finished: true })
    }

    /// Adds gradients behind those that were added before. They are read now, and their addresses kept for the clip;
    /// nothing borrows them in between.
    ///
    /// Cost: reads each of them once, all cores; 16 bytes for each 32 KiB are kept.
    ///
    /// # Errors
    /// [`Error::Overlap`](crate::Error::Overlap) if two gradients of the same norm share memory, also of different calls;
    /// indices count all that were added. Nothing is added then, and the norm goes on.
    pub fn add<G: AsGrad>(&mut self, grads: &[G]) -> Result<()> {
        self.begin();
        let grads = collect(grads.len(), grads.iter().map(AsGrad::as_grad))?;
        let added = self.list.add(&refs(&grads), |_| false)?;
        let tiles = self.list.tiles(added);
        self.partials.extend(parallel::norm_partials(self.norm_type, &grads, tiles.len()));
        Ok(())
    }

    /// The norm of all that was added; [`cpu::total_norm`](super::total_norm) of that list, bit for bit. Of nothing, 0.
    ///
    /// Finishes the norm; but a [`clip`](Self::clip) may follow.
    ///
    /// # Errors
    /// None; a `Result` as of the CUDA back end.
    pub fn total_norm(&mut self) -> Result<NormReport> {
        let report = self.measure(&ClipNorm::measure_only(self.norm_type))?.0;
        self.finished = true;
        Ok(report)
    }

    /// Scales all gradients so that their norm is at most `max_norm`: [`cpu::clip_grad_norm`](super::clip_grad_norm) of
    /// that list, bit for bit. The list is all that was added, in the order of adding; the order of the norm that of
    /// [`new`](Self::new).
    ///
    /// The gradients must not have changed since they were added: they are not looked at again before they are scaled.
    ///
    /// Cost: nothing if it does not clip; else reads and writes each gradient once. All cores.
    ///
    /// # Errors
    /// [`Error::OtherGradients`](crate::Error::OtherGradients) if the list is another one,
    /// [`Error::OtherNormType`](crate::Error::OtherNormType) if `clip` says another order (other than 2, its default); a
    /// threshold that is negative or NaN; a norm that is not finite, if the policy is
    /// [`NonFinite::Error`](crate::NonFinite::Error). Nothing is touched then, and the norm can still be used.
    pub fn clip<G: AsGradMut>(&mut self, grads: &mut [G], clip: impl Into<ClipNorm>) -> Result<NormReport> {
        let clip = clip.into().of_running_norm(self.norm_type)?.validated()?;
        clip.refuse_device_threshold()?;
        let readable = collect(grads.len(), grads.iter().map(AsGrad::as_grad))?;
        self.list.check_same(&refs(&readable))?;
        let (report, verdict) = self.measure(&clip)?;
        if verdict.written() {
            let mut writable = collect(grads.len(), grads.iter_mut().map(AsGradMut::as_grad_mut))?;
            apply(&verdict, &mut writable);
        }
        self.finished = true;
        Ok(report)
    }

    /// Forgets what was added since the last norm was finished: for a step that is given up.
    pub fn restart(&mut self) {
        self.list.restart();
        self.partials.clear();
        self.finished = false;
    }

    fn begin(&mut self) {
        if self.finished {
            self.restart();
        }
    }

    fn measure(&mut self, clip: &ClipNorm) -> Result<(NormReport, Verdict)> {
        let plan = self.list.plan();
        let _env = DefaultFpEnv::enter();
        let total_norm = clip_coef::norm_of(&self.partials, self.norm_type, plan.numel());
        let first_nonfinite = clip_coef::first_bad_tile(&self.partials).and_then(|tile| plan.tensor_of(tile as u64));
        report_of(clip, total_norm, first_nonfinite)
    }
}

fn refs(grads: &[Grad<'_>]) -> Vec<TensorRef> {
    grads.iter().map(Grad::tensor_ref).collect()
}
