//! The stages over a list of gradients, on all cores of rayon's pool. Work is cut at tile borders, which fixes the
//! bits; how many tiles a task takes, and which thread takes it, does not matter to them.

use super::clamp::{self, Counts};
use super::grads::{with_slice, Grad, GradMut};
use super::isa::Isa;
use super::norm_partials::tile_partials;
use super::partial::Partial;
use super::scale;
use super::scale_into::{scale_into, with_pair, Pair, ScaleInto};
use super::stats::{self, TileStats, Watch};
use super::summation::FastSum;
use crate::abi::{ClampBounds, Stats, TILE_BYTES};
use crate::clip_coef::Verdict;
use crate::fp_env::DefaultFpEnv;
use crate::options::NormType;
use rayon::prelude::*;

/// Tiles of a task: 512 KiB are some 20 us of one core, hundreds of times what handing over a task costs.
const TILES_PER_TASK: usize = 16;
/// Up to this many bytes in all, one thread is done as soon as two, and sooner if the other has to be woken: for 1 MiB
/// the norm takes 16 us on one core, 14 to 35 us on two (Zen 5).
pub(crate) const SERIAL_BYTES: usize = 32 * TILE_BYTES;

/// `partials[tile]` for every tile of the list.
pub(crate) fn norm_partials(norm_type: NormType, grads: &[Grad<'_>], num_tiles: usize) -> Vec<Partial> {
    let isa = Isa::detect();
    let mut partials = vec![Partial::default(); num_tiles];
    for_each_run_of_tiles(grads, &mut partials, |grad, partials| {
        with_slice!(Grad, grad, slice => tile_partials(isa, norm_type, slice, partials));
    });
    partials
}

/// The same, and what else is seen of each tile. A tile is still in the cache when it is looked at for that.
pub(crate) fn norm_partials_and_stats(
    norm_type: NormType,
    grads: &[Grad<'_>],
    num_tiles: usize,
) -> (Vec<Partial>, Vec<Stats>) {
    fn run<T: FastSum + Watch>(isa: Isa, norm_type: NormType, slice: &[T], places: &mut [(Partial, Stats)]) {
        for (tile, (partial, stats)) in places.iter_mut().enumerate() {
            let rest = &slice[tile * T::TILE_NUMEL..];
            tile_partials(isa, norm_type, rest, std::slice::from_mut(partial));
            *stats = isa.run(TileStats(&rest[..rest.len().min(T::TILE_NUMEL)]));
        }
    }
    let isa = Isa::detect();
    let mut places = vec![(Partial::default(), stats::NONE); num_tiles];
    for_each_run_of_tiles(grads, &mut places, |grad, places| {
        with_slice!(Grad, grad, slice => run(isa, norm_type, slice, places));
    });
    places.into_iter().unzip()
}

/// Runs `work` over pieces of all gradients, each with the places of its tiles.
fn for_each_run_of_tiles<P: Send>(grads: &[Grad<'_>], mut places: &mut [P], work: impl Fn(Grad<'_>, &mut [P]) + Sync) {
    let serial = places.len() <= SERIAL_BYTES / TILE_BYTES;
    let mut tasks = Vec::with_capacity(grads.len());
    for grad in grads {
        with_slice!(Grad, grad, slice => cut(slice, &mut places, &mut tasks, |slice| (*slice).into()));
    }
    let run = |(grad, places): (Grad<'_>, &mut [P])| {
        let _env = DefaultFpEnv::enter();
        work(grad, places);
    };
    if serial {
        tasks.into_iter().for_each(run);
    } else {
        tasks.into_par_iter().for_each(run);
    }
}

/// Cuts one gradient into tasks, and takes their places from `rest`. A task has the gradient to its end, since it looks
/// ahead, and as many places as it has tiles to do.
fn cut<'a, 'p, T: FastSum, P>(
    mut slice: &'a [T],
    rest: &mut &'p mut [P],
    tasks: &mut Vec<(Grad<'a>, &'p mut [P])>,
    wrap: impl Fn(&&'a [T]) -> Grad<'a>,
) {
    while !slice.is_empty() {
        let numel = slice.len().min(TILES_PER_TASK * T::TILE_NUMEL);
        let (places, others) = std::mem::take(rest).split_at_mut(numel.div_ceil(T::TILE_NUMEL));
        tasks.push((wrap(&slice), places));
        *rest = others;
        slice = &slice[numel..];
    }
}

/// Applies the verdict to every gradient.
pub(crate) fn scale(verdict: &Verdict, grads: &mut [GradMut<'_>]) {
    let isa = Isa::detect();
    for_each_task(grads, |task| {
        with_slice!(GradMut, task, slice => scale::scale(isa, verdict, slice));
        Counts::default()
    });
}

/// Applies the verdict to every gradient, and writes its output.
pub(crate) fn scale_pairs(verdict: &Verdict, pairs: Vec<Pair<'_>>) {
    /// One task; the slices are of one length.
    fn run<T: ScaleInto<O>, O: scale::SplitScale>(isa: Isa, verdict: &Verdict, input: &[T], output: &mut [O]) {
        let _env = DefaultFpEnv::enter();
        scale_into(isa, verdict, input, output);
    }
    fn in_pieces<T: ScaleInto<O> + FastSum, O: scale::SplitScale>(
        isa: Isa,
        verdict: &Verdict,
        input: &[T],
        output: &mut [O],
    ) {
        let numel = TILES_PER_TASK * T::TILE_NUMEL;
        let pieces = input.par_chunks(numel).zip(output.par_chunks_mut(numel));
        pieces.for_each(|(input, output)| run(isa, verdict, input, output));
    }
    let isa = Isa::detect();
    let bytes: usize = pairs.iter().map(|pair| with_pair!(pair, input, _output => size_of_val(&input[..]))).sum();
    if bytes <= SERIAL_BYTES {
        pairs.into_iter().for_each(|pair| with_pair!(pair, input, output => run(isa, verdict, input, output)));
    } else {
        let pair_in_pieces = |pair| with_pair!(pair, input, output => in_pieces(isa, verdict, input, output));
        pairs.into_par_iter().for_each(pair_in_pieces);
    }
}

/// Applies to each gradient its own verdict.
pub(crate) fn scale_each(verdicts: &[&Verdict], grads: &mut [GradMut<'_>]) {
    let isa = Isa::detect();
    let work = |verdict: &Verdict, piece: GradMut<'_>| {
        let _env = DefaultFpEnv::enter();
        with_slice!(GradMut, piece, slice => scale::scale(isa, verdict, slice));
    };
    let whole = |(grad, verdict): (&mut GradMut<'_>, &&Verdict)| {
        if verdict.written() {
            with_slice!(GradMut, grad, slice => work(verdict, (&mut **slice).into()));
        }
    };
    let in_pieces = |(grad, verdict): (&mut GradMut<'_>, &&Verdict)| {
        if verdict.written() {
            with_slice!(GradMut, grad, slice => pieces(slice).for_each(|piece| work(verdict, piece.into())));
        }
    };
    if bytes_of(grads) <= SERIAL_BYTES {
        return grads.iter_mut().zip(verdicts).for_each(whole);
    }
    grads.par_iter_mut().zip(verdicts).for_each(in_pieces);
}

fn bytes_of(grads: &[GradMut<'_>]) -> usize {
    grads.iter().map(|grad| with_slice!(GradMut, grad, slice => size_of_val(&slice[..]))).sum()
}

/// Applies the verdict to gradients that may hold NaN or Inf.
pub(crate) fn scale_any(verdict: &Verdict, grads: &mut [GradMut<'_>]) {
    let isa = Isa::detect();
    for_each_task(grads, |task| {
        with_slice!(GradMut, task, slice => scale::scale_any(isa, verdict, slice));
        Counts::default()
    });
}

/// Clamps every gradient; what each of them held.
pub(crate) fn clamp(bounds: &ClampBounds, grads: &mut [GradMut<'_>]) -> Vec<Counts> {
    let isa = Isa::detect();
    for_each_task(grads, |task| with_slice!(GradMut, task, slice => clamp::clamp(isa, bounds, slice)))
}

/// Runs `work` over pieces of all gradients, and adds up what it gives for each gradient.
fn for_each_task(grads: &mut [GradMut<'_>], work: impl Fn(GradMut<'_>) -> Counts + Sync) -> Vec<Counts> {
    let work = |task: GradMut<'_>| {
        let _env = DefaultFpEnv::enter();
        work(task)
    };
    if bytes_of(grads) <= SERIAL_BYTES {
        let whole = |grad: &mut GradMut<'_>| with_slice!(GradMut, grad, slice => work((&mut **slice).into()));
        return grads.iter_mut().map(whole).collect();
    }
    let in_pieces = |grad: &mut GradMut<'_>| {
        with_slice!(GradMut, grad, slice => {
            pieces(slice).map(|piece| work(piece.into())).reduce(Counts::default, |a, b| a + b)
        })
    };
    grads.par_iter_mut().map(in_pieces).collect()
}

fn pieces<T: FastSum>(slice: &mut [T]) -> impl ParallelIterator<Item = &mut [T]> {
    slice.par_chunks_mut(TILES_PER_TASK * T::TILE_NUMEL)
}
