//! A norm over several ranks, on the CPU. Twin of `src/cuda/shards.rs` and `kernels/shards.cu`.

use super::grads::{AsGrad, AsGradMut, Grad};
use super::partial::Partial;
use super::power::root_is_in_range;
use super::{apply, check, clip_coef, collect, parallel, report_of};
use crate::clip_coef::Verdict;
use crate::error::{Error, Result};
use crate::fp_env::DefaultFpEnv;
use crate::options::{ClipNorm, NormType};
use crate::plan::Plan;
use crate::report::NormReport;
use crate::shards::{check_world_size, AllGather, Copies, NormPartial};

/// The partial norm of the gradients of this rank, to be exchanged and [merged](NormPartial::merge); then
/// [`clip_with_norm`](super::clip_with_norm) clips by the norm over all ranks. [`clip_grad_norm_sharded`] does the
/// three in one call.
///
/// Cost: reads each gradient once, writes nothing; all cores.
///
/// # Errors
/// As [`total_norm`](super::total_norm); [`Error::ScopeLength`] if `copies` has not one entry for each gradient. The
/// other ranks wait for a partial all the same: send them [`NormPartial::refused`].
pub fn norm_partial<'a, G: AsGrad>(
    grads: &[G],
    copies: impl Into<Copies<'a>>,
    norm_type: NormType,
) -> Result<NormPartial> {
    let grads = collect(grads.len(), grads.iter().map(AsGrad::as_grad))?;
    Ok(local(&grads, copies.into(), &ClipNorm::measure_only(norm_type))?.partial)
}

/// Norm over the gradients of all ranks; [`clip_grad_norm_sharded`] without the clipping. Every rank calls it.
///
/// Cost: reads each gradient once, writes nothing; all cores. One collective of 32 bytes a rank.
///
/// # Errors
/// As [`clip_grad_norm_sharded`].
pub fn total_norm_sharded<'a, G: AsGrad, E: AllGather>(
    grads: &[G],
    copies: impl Into<Copies<'a>>,
    norm_type: NormType,
    ranks: &mut E,
) -> Result<NormReport> {
    clip_coef_sharded(grads, copies, ClipNorm::measure_only(norm_type), ranks)
}

/// [`clip_coef`](super::clip_coef) by the norm over the gradients of all ranks: what [`clip_grad_norm_sharded`] would
/// multiply them by, for an optimizer that multiplies its shard itself. Every rank calls it, and gets the same bits.
///
/// The factor is [`multiplier`](NormReport::multiplier), and `written` is false; what it is by each policy, see there.
///
/// Cost: reads each gradient once, writes nothing; all cores. One collective of 32 bytes a rank.
///
/// # Errors
/// As [`clip_grad_norm_sharded`].
pub fn clip_coef_sharded<'a, G: AsGrad, E: AllGather>(
    grads: &[G],
    copies: impl Into<Copies<'a>>,
    clip: impl Into<ClipNorm>,
    ranks: &mut E,
) -> Result<NormReport> {
    let clip = clip.into();
    let grads = collect(grads.len(), grads.iter().map(AsGrad::as_grad));
    let local = grads.and_then(|grads| local(&grads, copies.into(), &clip));
    let (report, _) = over_ranks(local, &clip, ranks)?;
    Ok(NormReport { written: false, ..report })
}

/// [`clip_grad_norm`](super::clip_grad_norm) by the norm over the gradients of all ranks: each rank has some of them,
/// whole or in part (FSDP and ZeRO shards, tensor and pipeline parallelism), or none.
///
/// Formula, options and policies are those of [`ClipNorm`], and have to be the same on all ranks. `copies` says which
/// gradients are on several ranks, so that each parameter counts once: [`Copies::One`] if none is. The ranks exchange
/// one [`NormPartial`] each, 32 bytes, through an engine of the caller's, and every rank finishes the same sum: so
/// `total_norm`, `clip_coef` and what is decided are the same bits everywhere. A NaN on one rank is one on all: each
/// leaves its gradients alone, or does what [`NonFinite`](crate::NonFinite) says, and the report says which rank was
/// [first](NormReport::first_nonfinite_rank).
///
/// The norm differs from that of the same gradients in one list by no more than the bounds of `docs/numerics.md`: a
/// shard starts a tile. It does not depend on how fast the ranks are.
///
/// Every rank calls it, also with an empty list: the collective waits for all. That is also so where a rank is refused
/// (a bad threshold, list or `copies`): it takes part, returns its own error, and all others get
/// [`Error::RankFailed`], so that none waits for ever and none clips by half a norm.
///
/// Cost: reads each gradient once; if it clips, reads and writes each once more. All cores. One collective.
///
/// # Errors
/// As [`clip_grad_norm`](super::clip_grad_norm), and [`Error::ScopeLength`] if `copies` has not one entry for each
/// gradient; [`Error::RankFailed`]; [`Error::Exchange`] from the engine, of which the other ranks are not told. Nothing
/// is touched then.
///
/// ```
/// use gradclip::{cpu, AllGather, Copies, Error};
/// # use std::sync::{Arc, Barrier, Mutex};
/// # /// Threads for ranks.
/// # #[derive(Clone)]
/// # struct World { rank: usize, bytes: Arc<Mutex<Vec<u8>>>, barrier: Arc<Barrier> }
/// # impl World {
/// #     fn of(size: usize) -> Vec<Self> {
/// #         let (bytes, barrier) = (Arc::new(Mutex::new(vec![0; 32 * size])), Arc::new(Barrier::new(size)));
/// #         (0..size).map(|rank| Self { rank, bytes: bytes.clone(), barrier: barrier.clone() }).collect()
/// #     }
/// # }
/// # impl AllGather for World {
/// #     type Error = &'static str;
/// #     fn world_size(&self) -> usize { self.bytes.lock().unwrap().len() / 32 }
/// #     fn all_gather(&mut self, mine: &[u8], all: &mut [u8]) -> Result<(), Self::Error> {
/// #         self.bytes.lock().unwrap()[32 * self.rank..][..32].copy_from_slice(mine);
/// #         self.barrier.wait();
/// #         all.copy_from_slice(&self.bytes.lock().unwrap());
/// #         self.barrier.wait();
/// #         Ok(())
/// #     }
/// # }
/// let step = |rank: usize, mut world: World| {
///     let mut grads = [[[3.0f32]], [[4.0]]][rank]; // of a parameter that is sharded over two ranks
///     let report = cpu::clip_grad_norm_sharded(&mut grads, Copies::One, 1.0, &mut world)?;
///     assert_eq!((report.total_norm, report.clip_coef), (5.0, 0.2));
///     Ok::<f32, Error>(grads[0][0])
/// };
/// let ranks: Vec<_> = World::of(2).into_iter().enumerate().collect();
/// let clipped: Vec<f32> = std::thread::scope(|scope| {
///     let ranks: Vec<_> = ranks.into_iter().map(|(rank, world)| scope.spawn(move || step(rank, world))).collect();
///     ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Result<_, _>>()
/// })?;
/// assert_eq!(clipped, [0.6, 0.8]);
/// # Ok::<(), gradclip::Error>(())
/// ```
pub fn clip_grad_norm_sharded<'a, G: AsGradMut, E: AllGather>(
    grads: &mut [G],
    copies: impl Into<Copies<'a>>,
    clip: impl Into<ClipNorm>,
    ranks: &mut E,
) -> Result<NormReport> {
    let (copies, clip) = (copies.into(), clip.into());
    let readable = collect(grads.len(), grads.iter().map(AsGrad::as_grad));
    let local = readable.and_then(|readable| local(&readable, copies, &clip));
    let (report, verdict) = over_ranks(local, &clip, ranks)?;
    if verdict.written() {
        let mut writable = collect(grads.len(), grads.iter_mut().map(AsGradMut::as_grad_mut))?;
        apply(&verdict, &mut writable);
    }
    Ok(report)
}

/// What this rank has measured.
struct Local {
    partial: NormPartial,
    first_nonfinite: Option<usize>,
}

fn local(grads: &[Grad<'_>], copies: Copies<'_>, clip: &ClipNorm) -> Result<Local> {
    clip.validate_over_ranks()?;
    clip.refuse_device_threshold()?;
    let plan = check(grads)?;
    copies.check(grads.len())?;
    let mut partials = parallel::norm_partials(clip.norm_type, grads, plan.num_tiles() as usize);
    let _env = DefaultFpEnv::enter();
    if let Some(copies) = copies.other_than_one() {
        weigh(&plan, copies, clip.norm_type, &mut partials);
    }
    let first_nonfinite = clip_coef::first_bad_tile(&partials).and_then(|tile| plan.tensor_of(tile as u64));
    let total = clip_coef::total_of(&partials, clip.norm_type);
    Ok(Local { partial: NormPartial::measured(total, clip.norm_type), first_nonfinite })
}

/// Twin of `weigh_partials` in `kernels/shards.cu`.
fn weigh(plan: &Plan, copies: &[u32], norm_type: NormType, partials: &mut [Partial]) {
    for (tile, partial) in partials.iter_mut().enumerate().filter(|(_, partial)| partial.sum.is_finite()) {
        match plan.tensor_of(tile as u64).map(|tensor| copies[tensor]) {
            Some(0) => partial.sum = 0.0,
            Some(holders) if holders > 1 && norm_type != NormType::Inf => partial.sum /= f64::from(holders),
            _ => {}
        }
    }
}

/// Takes part in the exchange, also after an error; what all ranks report and do.
fn over_ranks<E: AllGather>(local: Result<Local>, clip: &ClipNorm, ranks: &mut E) -> Result<(NormReport, Verdict)> {
    let mine = local.as_ref().map_or(NormPartial::refused(), |local| local.partial).to_bytes();
    let exchanged = gather(&mine, ranks);
    // Its own error, rather than what the others make of it.
    let local = local?;
    // What is no partial is that of a rank that failed, as for the kernel.
    let partial_of = |bytes| NormPartial::from_bytes(bytes).unwrap_or(NormPartial::refused());
    let partials: Vec<NormPartial> = exchanged?.chunks_exact(NormPartial::BYTES).map(partial_of).collect();
    let total_norm = NormPartial::merge(&partials)?.total_norm()?;
    let _env = DefaultFpEnv::enter();
    let (report, verdict) = report_of(clip, total_norm, local.first_nonfinite)?;
    let first_nonfinite_rank = partials.iter().position(|partial| !partial.is_finite());
    Ok((NormReport { first_nonfinite_rank, ..report }, verdict))
}

/// The bytes of all ranks.
fn gather<E: AllGather>(mine: &[u8], ranks: &mut E) -> Result<Vec<u8>> {
    let bytes = check_world_size(ranks.world_size())? as usize * NormPartial::BYTES;
    let mut all = Vec::new();
    all.try_reserve_exact(bytes).map_err(|_| Error::OutOfMemory { what: "partials of all ranks", bytes })?;
    all.resize(bytes, 0);
    ranks.all_gather(mine, &mut all).map_err(|error| Error::Exchange { reason: error.to_string() })?;
    Ok(all)
}

/// Twin: `norm_over_ranks` in `kernels/shards.cu`, which says why.
pub(crate) fn norm_over_ranks(total: Partial, norm_type: NormType) -> f64 {
    match norm_type {
        NormType::P(p) if total.sum > 0.0 && total.sum < 1.0 && !root_is_in_range(total.sum, p) => 0.0,
        _ => clip_coef::norm_of_total(total, norm_type),
    }
}
