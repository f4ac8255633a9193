//! A norm of gradients that come one after the other. Twin of `src/cpu/running.rs`.
//!
//! A tensor's tiles do not depend on what else is in the list, and a partial has its slot by the number of its tile. So
//! the partials of what is added go behind those that are there, and the fold over all of them is that of one call.

use super::clipper::{clip_params, finish, Clipper};
use super::device_table::DeviceTable;
use super::driver::{is_capturing, CurrentContext, KeepsContext};
use super::kernel::Kernel;
use super::launch::Launcher;
use super::reports::{Applied, Pending};
use crate::abi::{TensorDesc, TensorTable, INLINE_TENSORS};
use crate::adapters::cudarc::{DeviceGrad, DeviceGradMut};
use crate::error::{Error, Result};
use crate::options::{ClipNorm, NonFinite, NormType};
use crate::report::NormReport;
use crate::running_list::RunningList;
use bytemuck::Zeroable;
use std::ops::Range;

/// A norm of gradients that are added as backward produces them, and then the clip by it. Made by
/// [`Clipper::running_norm`]. The bits are those of one [`Clipper::clip_grad_norm`] over the list in the order of adding.
///
/// While backward goes on, what it has just written is measured, from the cache if it is still there. Adding enqueues one
/// kernel and never waits, so it can be called from the hooks of a framework. A value of this type borrows nothing: it
/// shares the kernels of its clipper, and has memory of its own. It can be moved to another thread (but see
/// [`Error::WrongThread`]) and outlive the clipper.
///
/// [`clip`](Self::clip) and [`total_norm`](Self::total_norm) finish a norm; the next [`add`](Self::add) begins another. So
/// keep one for all steps: from the second on nothing is allocated or copied, if the same is added in the same order. Such
/// a step can be captured into a graph, from the first `add` to the clip.
///
/// ```no_run
/// use gradclip::{cuda::{self, Clipper}, NormType};
/// let stream = cuda::context(0)?.default_stream();
/// let mut first = stream.clone_htod(&[3.0f32])?;
/// let mut last = stream.clone_htod(&[4.0f32])?;
/// let mut norm = Clipper::new(&stream)?.running_norm(NormType::L2)?;
/// for _step in 0..1000 {
///     // ... backward through the last layer ...
///     norm.add(&[&last])?; // one launch, no wait
///     // ... and through the first ...
///     norm.add(&[&first])?;
///     let report = norm.clip(&mut [&mut last, &mut first], 1.0)?; // in the order of adding; two launches, no wait
///     # let _ = report;
/// }
/// # Ok::<(), gradclip::Error>(())
/// ```
#[derive(Debug)]
pub struct RunningNorm {
    /// For its stream, workspace and reports; its list is the one of the current call.
    clipper: Clipper,
    norm_type: NormType,
    list: RunningList,
    /// Of an `add`.
    table: Box<TensorTable>,
    /// For each `add` of a step that has too many tensors for the parameters of a kernel.
    tables: KeepsContext<Vec<DeviceTable<TensorDesc>>>,
    tables_used: usize,
    rows: Vec<TensorDesc>,
    finished: bool,
}

impl Clipper {
    /// A norm that gradients are added to one after the other; see [`RunningNorm`].
    ///
    /// Cost: 36 KiB of device memory.
    ///
    /// # Errors
    /// [`Error::InvalidNormType`] for an order that is not positive; [`Error::WrongThread`], [`Error::OutOfMemory`],
    /// [`Error::CaptureNeedsWarmup`] while the stream captures, [`Error::Driver`].
    pub fn running_norm(&self, norm_type: NormType) -> Result<RunningNorm> {
        let norm_type = ClipNorm::measure_only(norm_type).validated()?.norm_type;
        self.home.check()?;
        let _current = CurrentContext::enter(self.stream.context())?;
        Ok(RunningNorm {
            clipper: self.sibling()?,
            norm_type,
            list: RunningList::default(),
            table: Box::new(TensorTable::zeroed()),
            tables: KeepsContext::new(Vec::new()),
            tables_used: 0,
            rows: Vec::new(),
            finished: true,
        })
    }
}

impl RunningNorm {
    /// Adds gradients behind those that were added before, in the order of the stream.
    ///
    /// Until the clip or the next `restart` nothing may write them that should not be in the norm; their memory need not
    /// live on if there is no clip.
    ///
    /// Cost: reads each of them once; one launch for any number of them, no wait. In the first step also what
    /// [`device_bytes`](Self::device_bytes) grows by, and a copy of the partials on the device when they outgrow their
    /// memory; more than 160 gradients in one call are listed in a table, which is copied when it is another than in the
    /// step before.
    ///
    /// # Errors
    /// As [`Clipper::total_norm`]; [`Error::Overlap`] also with what earlier calls added. Indices count all gradients
    /// added to this norm. Nothing is added then, and the norm goes on.
    pub fn add<G: DeviceGrad>(&mut self, grads: &[G]) -> Result<()> {
        self.clipper.home.check()?;
        let _current = CurrentContext::enter(self.clipper.stream.context())?;
        if self.finished {
            self.restart();
        }
        let first = self.list.count();
        let of_norm = |error: Error| error.rename_tensors(|tensor| first + tensor);
        let stream = self.clipper.stream.clone();
        self.clipper.list.gather(grads, &stream).map_err(of_norm)?;
        let added = self.add_gathered();
        let released = self.clipper.list.release(grads, &stream); // after an error too, as in `Clipper::total_norm`
        added.and(released.map_err(of_norm))
    }

    /// The norm of all that was added; [`Clipper::total_norm`] of that list, bit for bit. Of nothing, 0.
    ///
    /// Finishes the norm; but a [`clip`](Self::clip) may follow.
    ///
    /// Cost: one launch, no wait.
    ///
    /// # Errors
    /// [`Error::WrongThread`], [`Error::NoReportSlot`] during capture, [`Error::Driver`].
    pub fn total_norm(&mut self) -> Result<Pending<NormReport>> {
        self.clipper.home.check()?;
        let _current = CurrentContext::enter(self.clipper.stream.context())?;
        let pending = self.last_stages(&ClipNorm::measure_only(self.norm_type), Applied::Nowhere)?;
        self.finished = true;
        Ok(pending)
    }

    /// Scales all gradients so that their norm is at most `max_norm`: [`Clipper::clip_grad_norm`] of that list, bit for
    /// bit. The list is all that was added, in the order of adding; the order of the norm is that of
    /// [`Clipper::running_norm`].
    ///
    /// The gradients must not have changed since they were added: they are not looked at again before they are scaled.
    ///
    /// Cost: reads nothing if it does not clip; else reads and writes each gradient once. Two launches, no wait (but
    /// [`NonFinite::Error`] has to wait for the norm).
    ///
    /// # Errors
    /// [`Error::OtherGradients`] if the list is another one, [`Error::OtherNormType`] if `clip` says another order (other
    /// than 2, its default); otherwise as [`Clipper::clip_grad_norm`]. Nothing is touched then, and the norm can still be
    /// used.
    pub fn clip<G: DeviceGradMut>(
        &mut self,
        grads: &mut [G],
        clip: impl Into<ClipNorm>,
    ) -> Result<Pending<NormReport>> {
        let clip = clip.into().of_running_norm(self.norm_type)?.validated()?;
        self.clipper.home.check()?;
        let _current = CurrentContext::enter(self.clipper.stream.context())?;
        let stream = self.clipper.stream.clone();
        self.clipper.list.gather_mut(grads, &stream)?;
        let pending = self.clip_gathered(&clip);
        let released = self.clipper.list.release_mut(grads, &stream); // after an error too, as above
        let pending = pending?;
        released?;
        let pending = finish(pending, &clip)?;
        self.finished = true;
        Ok(pending)
    }

    /// Forgets what was added since the last norm was finished: for a step that is given up.
    pub fn restart(&mut self) {
        self.list.restart();
        self.tables_used = 0;
        self.finished = false;
    }

    /// Device memory this norm holds, in bytes: 36 KiB for reports, up to 32 for each 32 KiB of gradients (16, if their
    /// number was never more than in the first call), and 24 for each gradient of lists of more than 160.
    #[must_use]
    pub fn device_bytes(&self) -> usize {
        self.clipper.device_bytes() + self.tables.iter().map(DeviceTable::device_bytes).sum::<usize>()
    }

    fn add_gathered(&mut self) -> Result<()> {
        let capturing = is_capturing(&self.clipper.stream)?;
        let gathered = &mut self.clipper.list;
        if !self.list.expects(gathered.tensors(), |index| gathered.is_raw(index)) {
            let first = self.list.count();
            let checked = gathered.check_raw_pointers(&self.clipper.stream);
            checked.map_err(|error| error.rename_tensors(|tensor| first + tensor))?;
        }
        let added = self.list.add(gathered.tensors(), |index| gathered.is_raw(index))?;
        let launched = self.launch_partials(added.clone(), capturing);
        if launched.is_err() {
            self.list.remove(added);
        }
        launched
    }

    fn launch_partials(&mut self, added: Range<usize>, capturing: bool) -> Result<()> {
        let tiles = self.list.tiles(added.clone());
        self.clipper.kernels.prepare(&[Kernel::norm_partials(self.norm_type)], capturing)?;
        self.clipper.workspace.grow(tiles.start, tiles.end, capturing)?;
        self.fill_table(added, capturing)?;
        let launcher = Launcher {
            kernels: &self.clipper.kernels,
            stream: &self.clipper.stream,
            multiprocessors: self.clipper.multiprocessors,
            table: &self.table,
            num_tiles: tiles.end - tiles.start,
        };
        let place = u64::from(tiles.start) * size_of::<f64>() as u64;
        let workspace = &self.clipper.workspace;
        launcher.norm_partials(self.norm_type, workspace.sums() + place, workspace.all_scales() + place)
    }

    /// The table of the tensors that are added, as of a list of their own.
    fn fill_table(&mut self, added: Range<usize>, capturing: bool) -> Result<()> {
        let count = added.len();
        self.table.num_tensors = count as u64;
        self.table.in_memory = 0;
        if count <= INLINE_TENSORS {
            for (place, desc) in self.table.inline_tensors.iter_mut().zip(self.list.descs_alone(added)) {
                *place = desc;
            }
            return Ok(());
        }
        self.rows.clear();
        self.rows.extend(self.list.descs_alone(added));
        if self.tables.len() == self.tables_used {
            self.tables.push(DeviceTable::new(&self.clipper.stream, "the descriptor table"));
        }
        let table = &mut self.tables[self.tables_used];
        table.set(&self.rows, capturing)?;
        self.table.in_memory = table.address();
        self.tables_used += 1;
        Ok(())
    }

    fn clip_gathered(&mut self, clip: &ClipNorm) -> Result<Pending<NormReport>> {
        let gathered = &mut self.clipper.list;
        self.list.check_same(gathered.tensors())?;
        // Memory that was added as a slice, and is a raw pointer now, is not known yet.
        if (0..gathered.tensors().len()).any(|index| gathered.is_raw(index) && !self.list.was_looked_up(index)) {
            gathered.check_raw_pointers(&self.clipper.stream)?;
        }
        self.last_stages(clip, Applied::InPlace)
    }

    /// Stage 2, and if asked for stage 3.
    fn last_stages(&mut self, clip: &ClipNorm, applied: Applied) -> Result<Pending<NormReport>> {
        let clipper = &mut self.clipper;
        let capturing = is_capturing(&clipper.stream)?;
        if capturing && clip.nonfinite == NonFinite::Error {
            return Err(Error::CaptureNeedsWarmup { what: "the wait of NonFinite::Error" });
        }
        let stage_3 = (applied == Applied::InPlace).then_some(Kernel::Scale);
        clipper.kernels.prepare(&[Kernel::clip_coef(clip.norm_type)], capturing)?;
        clipper.kernels.prepare(stage_3.as_slice(), capturing)?;
        let plan = self.list.plan();
        if applied == Applied::InPlace {
            clipper.workspace.prepare(plan, capturing)?;
        }
        if capturing {
            clipper.workspace.grow(plan.num_tiles(), plan.num_tiles(), capturing)?;
            // it is there, and has to stay
        }
        let slot = clipper.reports.take(capturing)?;
        let report = clipper.reports.address(slot);
        let launcher = Launcher {
            kernels: &clipper.kernels,
            stream: &clipper.stream,
            multiprocessors: clipper.multiprocessors,
            table: clipper.workspace.table(),
            num_tiles: plan.num_tiles(),
        };
        launcher
            .clip_coef(
                clip.norm_type,
                &clip_params(clip),
                [clipper.workspace.sums(), clipper.workspace.all_scales()],
                plan.numel(),
                report,
            )
            .inspect_err(|_| clipper.reports.give_back(slot))?;
        if applied == Applied::InPlace {
            launcher.scale(report)?; // the slot stays taken: a graph may write it by now
        }
        Ok(Pending::new(clipper.reports.clone(), slot, plan.clone()).applied(applied))
    }
}
