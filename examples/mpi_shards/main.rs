//! Gradients sharded over processes, clipped by the norm over all of them; the processes talk by MPI.
//!
//! A small network is trained on two spirals by data parallelism with sharded parameters, as ZeRO and FSDP do it: each
//! process has a part of every batch, and the gradients' sum is cut into shards, one for each process but the last,
//! which has none. One bias is replicated instead: the processes with shards hold a copy each, and it counts once.
//! Between the gradients and the step stands one call on each process:
//!
//! ```text
//! let report = cpu::clip_grad_norm_sharded(&mut grads, &copies, clip, &mut world)?; // one collective
//! ```
//!
//! What it checks as it goes, and ends with an error if it is not so:
//!
//! * every rank reports the same bits of norm and coefficient, in every step;
//! * the norm is that of the whole gradient in one list, up to the rounding that docs/numerics.md allows;
//! * a NaN in one rank's shard leaves the parameters of all ranks as they were, and all name that rank;
//! * a rank whose options are refused is an error on every rank, and none hangs;
//! * the same training in one process ends with the same loss, up to the rounding of its steps.
//!
//! With its default settings, on 2 cores of an AMD EPYC (Zen 5):
//!
//! ```text
//! two spirals; 600 steps of SGD, learning rate 0.5; 4 processes
//! 1185 parameters: shards of 384, 384, 385; a bias of 32 on each of these ranks; nothing on the last
//!
//!                                  clipped  largest norm  held-out loss  accuracy
//! clipped, 4 processes                 387        1.3675       0.352299    85.8 %
//! clipped, one process                 387        1.3675       0.352299    85.8 %
//! not clipped, one process               0        1.5270       0.564983    71.3 %
//!
//! norm over the shards against that of one list: off by 8.9e-16 at most
//! a NaN on one rank: all ranks skipped the step; options refused on one rank: an error on all
//! ```
//!
//! To build and run it:
//!
//! ```text
//! eval "$(python3 scripts/mpi.py)"
//! cargo build --release -p mpi_shards
//! mpiexec -n 4 target/release/mpi_shards
//! ```

use anyhow::{ensure, Result};
use clap::Parser;
use gradclip::{AllGather, ClipNorm, Error, NonFinite};
use mpi::traits::{Communicator, CommunicatorCollectives, Equivalence};

use model::{Batch, Parameters};
use shards::Shards;

mod model;
mod shards;

/// Trains a network whose gradients are sharded over MPI processes, clipped by their norm together.
#[derive(Parser)]
struct Args {
    /// Steps of SGD
    #[arg(long, value_name = "N", default_value_t = 600)]
    steps: u64,
    /// Learning rate
    #[arg(long, value_name = "X", default_value_t = 0.5)]
    lr: f32,
    /// Threshold of the norm
    #[arg(long, value_name = "X", default_value_t = 0.5)]
    max_norm: f64,
}

/// The engine: MPI's own all-gather, on bytes.
pub struct World<'c, C>(pub &'c C);

impl<C: Communicator> AllGather for World<'_, C> {
    type Error = std::convert::Infallible; // MPI ends the program where a collective fails

    fn world_size(&self) -> usize {
        self.0.size() as usize
    }

    fn all_gather(&mut self, mine: &[u8], all: &mut [u8]) -> Result<(), Self::Error> {
        self.0.all_gather_into(mine, all);
        Ok(())
    }
}

/// What one training came to.
struct Outcome {
    clipped: u64,
    largest_norm: f64,
    /// Of the norm against that of one list, relative.
    largest_difference: f64,
    parameters: Parameters,
}

/// Twice the bound of docs/numerics.md for f32 and L2, since both norms are rounded, and 13 additions over the ranks.
const ALLOWED_DIFFERENCE: f64 = 2.0 * 2.4e-13 + 13.0 * f64::EPSILON;

fn main() -> Result<()> {
    let args = Args::parse();
    let Some(universe) = mpi::initialize() else { anyhow::bail!("MPI cannot be initialised") };
    let world = universe.world();
    run(&world, &args).inspect_err(|error| {
        eprintln!("rank {}: {error:#}", world.rank());
        world.abort(1); // the others may be waiting for this one
    })
}

fn run<C: Communicator>(world: &C, args: &Args) -> Result<()> {
    let clip = ClipNorm::new(args.max_norm);
    let held_out = Batch::new(u64::MAX, 0, 4096);

    let sharded = train_sharded(world, args, clip)?;
    nan_on_one_rank(world, &sharded.parameters, clip)?;
    refused_on_one_rank(world, &sharded.parameters, clip)?;
    if world.rank() == 0 {
        let alone = train_alone(args, world.size() as u64, Some(clip))?;
        let unclipped = train_alone(args, world.size() as u64, None)?;
        let shards = Shards::of(world);
        println!("two spirals; {} steps of SGD, learning rate {}; {} processes", args.steps, args.lr, world.size());
        println!("{} parameters: {}\n", Parameters::NUMEL, shards.describe());
        println!("                                 clipped  largest norm  held-out loss  accuracy");
        let row = |name: &str, outcome: &Outcome| {
            let (loss, accuracy) = outcome.parameters.evaluate(&held_out);
            println!(
                "{name:<32} {:>7}  {:>12.4}  {loss:>13.6}  {:>6.1} %",
                outcome.clipped,
                outcome.largest_norm,
                100.0 * accuracy
            );
            loss
        };
        let loss = row(&format!("clipped, {} processes", world.size()), &sharded);
        let loss_alone = row("clipped, one process", &alone);
        row("not clipped, one process", &unclipped);
        println!("\nnorm over the shards against that of one list: off by {:.1e} at most", sharded.largest_difference);
        println!("a NaN on one rank: all ranks skipped the step; options refused on one rank: an error on all");
        ensure!((loss - loss_alone).abs() < 1e-3, "the losses of both differ: {loss} and {loss_alone}");
    }
    Ok(())
}

fn train_sharded<C: Communicator>(world: &C, args: &Args, clip: ClipNorm) -> Result<Outcome> {
    let (rank, size) = (world.rank() as u64, world.size() as u64);
    let mut parameters = Parameters::new();
    let mut shards = Shards::of(world);
    let (mut clipped, mut largest_norm, mut largest_difference) = (0, 0f64, 0f64);
    for step in 0..args.steps {
        let mine = parameters.gradient(&Batch::of_step(step, rank, size));
        let mut all = vec![0f32; Parameters::NUMEL * size as usize];
        world.all_gather_into(&mine[..], &mut all[..]);
        let gradient = model::sum_in_order(all.chunks(Parameters::NUMEL));

        shards.take(&gradient);
        let report = shards.clip(clip, &mut World(world))?;
        ensure!(report.is_finite(), "the norm in step {step} is {}", report.total_norm);
        same_on_all(world, [report.total_norm.to_bits(), report.clip_coef.to_bits()])?;
        let whole = gradclip::cpu::total_norm(&[&gradient[..]], gradclip::NormType::L2)?.total_norm;
        largest_difference = largest_difference.max((report.total_norm / whole - 1.0).abs());

        shards.step(&mut parameters, args.lr, world)?;
        clipped += u64::from(report.clip_coef < 1.0);
        largest_norm = largest_norm.max(report.total_norm);
    }
    ensure!(largest_difference <= ALLOWED_DIFFERENCE, "the norm is off by {largest_difference:e}");
    same_on_all(world, [parameters.fingerprint()])?;
    Ok(Outcome { clipped, largest_norm, largest_difference, parameters })
}

/// The same batches and the same sums, in one process and one list.
fn train_alone(args: &Args, parts: u64, clip: Option<ClipNorm>) -> Result<Outcome> {
    let mut parameters = Parameters::new();
    let (mut clipped, mut largest_norm) = (0, 0f64);
    for step in 0..args.steps {
        let parts: Vec<Vec<f32>> =
            (0..parts).map(|rank| parameters.gradient(&Batch::of_step(step, rank, parts))).collect();
        let mut gradient = [model::sum_in_order(parts.iter().map(Vec::as_slice))];
        let report = gradclip::cpu::clip_grad_norm(&mut gradient, clip.unwrap_or(ClipNorm::new(f64::INFINITY)))?;
        parameters.descend(0..Parameters::NUMEL, &gradient[0], args.lr);
        clipped += u64::from(report.clip_coef < 1.0);
        largest_norm = largest_norm.max(report.total_norm);
    }
    Ok(Outcome { clipped, largest_norm, largest_difference: 0.0, parameters })
}

/// One step in which the shard of the last rank that has one goes bad: every rank skips it.
fn nan_on_one_rank<C: Communicator>(world: &C, trained: &Parameters, clip: ClipNorm) -> Result<()> {
    let mut shards = Shards::of(world);
    let bad_rank = shards.holders() - 1;
    shards.take(&trained.gradient(&Batch::of_step(0, 0, 1)));
    if world.rank() as usize == bad_rank {
        shards.spoil();
    }
    let before = shards.fingerprint();
    let report = shards.clip(clip.nonfinite(NonFinite::Skip), &mut World(world))?;
    ensure!(report.found_inf && !report.written && shards.fingerprint() == before, "a NaN was not skipped: {report:?}");
    ensure!(report.first_nonfinite_rank == Some(bad_rank), "the NaN is on rank {bad_rank}: {report:?}");
    same_on_all(world, [report.total_norm.to_bits(), report.clip_coef.to_bits()])
}

/// One step in which a rank has a threshold that is none: an error on every rank, after which all go on.
fn refused_on_one_rank<C: Communicator>(world: &C, trained: &Parameters, clip: ClipNorm) -> Result<()> {
    let mut shards = Shards::of(world);
    shards.take(&trained.gradient(&Batch::of_step(0, 0, 1)));
    let wrong = if world.rank() == 0 { ClipNorm::new(-1.0) } else { clip };
    match shards.clip(wrong, &mut World(world)) {
        Err(Error::InvalidThreshold { .. }) if world.rank() == 0 => {}
        Err(Error::RankFailed { rank: 0, .. }) if world.rank() != 0 => {}
        other => anyhow::bail!("a threshold of -1 on rank 0 gave {other:?} on rank {}", world.rank()),
    }
    ensure!(shards.clip(clip, &mut World(world))?.is_finite(), "the next call");
    Ok(())
}

/// An error unless all ranks have the same.
fn same_on_all<C: Communicator, const N: usize>(world: &C, mine: [u64; N]) -> Result<()>
where
    u64: Equivalence,
{
    let mut all = vec![0u64; N * world.size() as usize];
    world.all_gather_into(&mine[..], &mut all[..]);
    ensure!(all.chunks(N).all(|of_rank| of_rank == mine), "the ranks differ: {all:x?}");
    Ok(())
}
