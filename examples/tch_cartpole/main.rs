//! Clipping in reinforcement learning: a pole on a cart, balanced by an advantage actor-critic written in tch.
//!
//! The task is CartPole-v1: a reward of 1 for each step, at most 500 of them, and solved where 100 episodes in a row
//! have a mean of 475. Actor and critic share two layers of 64 tanh units. 16 carts run 16 steps, then comes one step of
//! plain SGD. The critic's error is in the units of the discounted returns, which grow up to 100 as the actor learns, and
//! its gradient grows with it. Each seed gives the same initial weights to both.
//!
//! ```text
//! cargo run --release --features tch --example tch_cartpole
//! cargo run --release --features tch --example tch_cartpole -- --gpu    # with the libtorch of a whole PyTorch
//! ```
//!
//! With libtorch's CPU library alone, `--gpu` is an error.
//!
//! After the runs of the table, seed 1 is trained once more, clipped with tch's own `Optimizer::clip_grad_norm`, and two
//! lines compare the share of an update that the two ways of clipping take. No GPU has run this yet.
//!
//! Measured on one core of an AMD EPYC (Zen 5), tch 0.26 on libtorch 2.13, 19 s, once built, before that run was added:
//!
//! ```text
//! cart-pole; 2000 updates of SGD at learning rate 0.1; 5 seeds; on the CPU
//!
//!                    seed  updates clipped  largest norm last episodes          solved  clip time
//! no clipping           1                -        8.7e21            23              no      1.4 %
//! no clipping           2                -        1.4e22            22              no      1.4 %
//! no clipping           3                -        1.2e22            22              no      1.4 %
//! no clipping           4                -        5.4e21            21              no      1.3 %
//! no clipping           5                -        9.0e21            25              no      1.4 %
//! norm clipping, 5      1       884 (44 %)         741.7           413   at update 949      1.0 %
//! norm clipping, 5      2       940 (47 %)        1005.0           409  at update 1340      1.0 %
//! norm clipping, 5      3       974 (49 %)         640.8           420  at update 1564      1.0 %
//! norm clipping, 5      4       859 (43 %)        1391.3           342   at update 790      1.0 %
//! norm clipping, 5      5      1102 (55 %)        1425.2           429  at update 1163      1.0 %
//! largest norm: before clipping; last episodes: mean length of 100; solved: that reached 475;
//! clip time: share of rollout, forward, backward, clip and update
//!
//! no clipping        0 of 5 solved
//! norm clipping, 5   5 of 5 solved
//! ```
//!
//! Learning rate and threshold were chosen by hand, to solve most of these seeds. With `--seeds 20`, 15 of which had no
//! part in that choice: 0 and 17. Solved of 5 seeds at other learning rates (`--lr`):
//!
//! | learning rate | 0.01 | 0.02 | 0.05 | 0.1 | 0.2 |
//! |---|---|---|---|---|---|
//! | no clipping | 2 | 3 | 2 | 0 | 0 |
//! | norm clipping, 5 | 0 | 0 | 4 | 5 | 1 |
//!
//! So a lower rate does without, for some seeds, and is only slowed down by the clip; what the clip buys is the rate at
//! which all of them learn in this time. "Solved" does not say that it stays so: the last episodes are shorter.
//!
//! Results repeat exactly on one machine. Another CPU, or libtorch, may add in another order.

use std::time::{Duration, Instant};

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use step_share::{StepTime, Timeline};
use tch::Device;
use train::{Clipping, Run, Setup};

mod cartpole;
#[path = "../step_share/mod.rs"]
mod step_share;
mod train;

/// Balances a pole on a cart by an advantage actor-critic in tch, with and without norm clipping.
#[derive(Parser)]
struct Args {
    /// Train on the first GPU; an error where libtorch finds none
    #[arg(long)]
    gpu: bool,
    /// A few seconds: 1 seed, 100 updates
    #[arg(long)]
    quick: bool,
    /// Number of seeds; each gives initial weights and starts of episodes [default: 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    seeds: Option<u64>,
    /// Updates of each run, after 256 steps each [default: 2000]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    updates: Option<u64>,
    /// Learning rate, the same for all
    #[arg(long, value_name = "X", default_value_t = 0.1)]
    lr: f64,
    /// Threshold of norm clipping
    #[arg(long, value_name = "X", default_value_t = 5.0)]
    max_norm: f64,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    tch::set_num_threads(1); // the layers are too small to share
    let updates = args.updates.unwrap_or(if args.quick { 100 } else { 2000 });
    let seeds = args.seeds.unwrap_or(if args.quick { 1 } else { 5 });
    let (device, timeline) = if args.gpu { gpu()? } else { (Device::Cpu, Timeline::Clock) };
    println!(
        "cart-pole; {updates} updates of SGD at learning rate {}; {seeds} seeds; on the {}\n",
        args.lr,
        if args.gpu { "GPU" } else { "CPU" }
    );

    let setup = Setup { updates: updates as usize, lr: args.lr, device, timeline };
    let bar = ProgressBar::new((2 * seeds + 1) * updates);
    bar.set_style(ProgressStyle::with_template("{bar:40} {percent:>3} %  {elapsed} of {duration}  {msg}")?);
    let start = Instant::now();
    let train = |clipping, seed| {
        let label = label(clipping);
        train::train(&setup, clipping, seed, |score| {
            bar.inc(1);
            bar.set_message(format!("{label}, seed {seed}: {score:.0} steps"));
        })
    };
    let mut runs = Vec::new();
    for clipping in [Clipping::Off, Clipping::Norm(args.max_norm)] {
        for seed in 1..=seeds {
            runs.push(train(clipping, seed)?);
        }
    }
    let by_tch = train(Clipping::NormByTch(args.max_norm), 1)?;
    bar.finish_and_clear();
    print(&runs);
    let ours = &runs[seeds as usize].times;
    println!("\n{}", step_share::lines(&setup.timeline, [("gradclip", ours), ("tch's own", &by_tch.times)]));
    println!("\ntime: {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// With an exponent where that is shorter.
fn number(x: f64) -> String {
    if x < 1e5 {
        format!("{x:.1}")
    } else {
        format!("{x:.1e}")
    }
}

fn label(clipping: Clipping) -> String {
    match clipping {
        Clipping::Off => "no clipping".into(),
        Clipping::Norm(max_norm) => format!("norm clipping, {max_norm}"),
        Clipping::NormByTch(max_norm) => format!("norm clipping by tch itself, {max_norm}"),
    }
}

/// The first GPU, and the stream that libtorch uses as long as nobody chooses another.
///
/// # Errors
/// There is no libtorch with CUDA, no driver or no GPU.
#[cfg(feature = "cuda")]
fn gpu() -> anyhow::Result<(Device, Timeline)> {
    let stream = gradclip::cuda::context(0)?.default_stream();
    gradclip::tch::load_cuda()?; // before anything of tch
    anyhow::ensure!(tch::Cuda::is_available(), "libtorch finds no GPU");
    Ok((Device::Cuda(0), Timeline::Stream(stream)))
}

#[cfg(not(feature = "cuda"))]
fn gpu() -> anyhow::Result<(Device, Timeline)> {
    anyhow::bail!("a GPU takes gradclip's feature `cuda`")
}

/// One row for each run, then one line for each kind of clipping.
fn print(runs: &[Run]) {
    println!(
        "{:<18} {:>4} {:>16} {:>13} {:>13} {:>15} {:>10}",
        "", "seed", "updates clipped", "largest norm", "last episodes", "solved", "clip time"
    );
    for run in runs {
        let percent = 100.0 * run.clipped as f64 / run.norms.len() as f64;
        let sum = |part: fn(&StepTime) -> Duration| run.times.iter().map(part).sum::<Duration>().as_secs_f64();
        println!(
            "{:<18} {:>4} {:>16} {:>13} {:>13.0} {:>15} {:>8.1} %",
            label(run.clipping),
            run.seed,
            if run.clipping == Clipping::Off { "-".into() } else { format!("{} ({percent:.0} %)", run.clipped) },
            number(run.norms.iter().copied().fold(0.0, f64::max)),
            run.score,
            run.solved.map_or("no".into(), |update| format!("at update {update}")),
            100.0 * sum(|time| time.clip) / sum(|time| time.step),
        );
    }
    println!("largest norm: before clipping; last episodes: mean length of 100; solved: that reached 475;");
    println!("clip time: share of rollout, forward, backward, clip and update\n");
    for same in runs.chunk_by(|a, b| a.clipping == b.clipping) {
        let solved = same.iter().filter(|run| run.solved.is_some()).count();
        println!("{:<18} {solved} of {} solved", label(same[0].clipping), same.len());
    }
}
