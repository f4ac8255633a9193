//! Exploding gradients: what clipping does, shown on the task on which the problem was described.
//!
//! A plain recurrent network (50 tanh units) learns the temporal order task by plain SGD on batches of 20 sequences of
//! 40 steps: two symbols, A or B, stand far apart in a sequence of noise; asked is which two, in which order.
//! Source: Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", ICML 2013, after
//! Hochreiter and Schmidhuber 1997. `--task adding` is the other task of that paper.
//!
//! Each seed gives initial weights and data, the same for all three ways: no clipping, by norm, by value. All seeds are
//! shown. Sequence length, learning rate and thresholds were chosen by hand, so that a clipped network learns in 2000
//! steps; other learning rates are in the table below.
//!
//! ```text
//! cargo run --release --features candle --example exploding_rnn
//! ```
//!
//! Measured on two cores of an AMD EPYC (Zen 5), 49 s, once built:
//!
//! ```text
//! temporal order task, 40 time steps; 2000 steps of SGD at learning rate 0.05; 5 seeds; on the CPU
//!
//!                       seed  steps clipped  largest norm  test loss  accuracy     diverged  clip time
//! no clipping              1              -          16.4       1.44    26.6 %           no          -
//! no clipping              2              -          15.7       1.20    45.5 %           no          -
//! no clipping              3              -          26.9       1.41    25.7 %           no          -
//! no clipping              4              -          10.5       1.19    37.7 %           no          -
//! no clipping              5              -          10.1       1.07    66.2 %           no          -
//! norm clipping, 1         1     654 (33 %)           174      0.002   100.0 %           no      0.5 %
//! norm clipping, 1         2    1044 (52 %)          80.0      0.002   100.0 %           no      0.6 %
//! norm clipping, 1         3     777 (39 %)           851      0.091    98.6 %           no      0.5 %
//! norm clipping, 1         4    1109 (55 %)           240      0.002   100.0 %           no      0.4 %
//! norm clipping, 1         5     575 (29 %)          73.7      0.001   100.0 %           no      0.7 %
//! value clipping, 0.05     1     393 (20 %)           198      0.001   100.0 %           no      0.2 %
//! value clipping, 0.05     2     333 (17 %)           235      0.001   100.0 %           no      0.2 %
//! value clipping, 0.05     3     321 (16 %)           271      0.001   100.0 %           no      0.2 %
//! value clipping, 0.05     4     579 (29 %)           307      0.002   100.0 %           no      0.2 %
//! value clipping, 0.05     5     305 (15 %)           131      0.001   100.0 %           no      0.2 %
//! largest norm: before clipping; clip time: share of forward, backward, clip and update
//!
//! no clipping           accuracy 26 to 66 %
//! norm clipping, 1      accuracy 99 to 100 %
//! value clipping, 0.05  accuracy 100 %
//! ```
//!
//! Guessing gives 25 %. With `--seeds 20`, 15 of which had no part in that choice: no clipping 19 to 66 %, norm
//! clipping 99 to 100 %, value clipping 100 % but for one seed (65 %).
//!
//! Does a lower learning rate do as well? Seeds, of 5, that reach 90 % (`--lr`, all else as above):
//!
//! | learning rate | 0.001 | 0.003 | 0.01 | 0.02 | 0.05 | 0.1 | 0.2 |
//! |---|---|---|---|---|---|---|---|
//! | no clipping | 0 | 3 | 2 | 0 | 0 | 0 | 0 |
//! | norm clipping, 1 | 0 | 2 | 3 | 4 | 5 | 5 | 1 |
//! | value clipping, 0.05 | 1 | 5 | 5 | 4 | 5 | 4 | 0 |
//!
//! Not with every seed. But at 0.003 a norm of at most 1 is no help either: what clipping buys is the faster rates.
//!
//! `--task adding` has a number as its answer, so its loss has no bound: at its learning rate of 0.2, 3 of 5 unclipped
//! seeds end in NaN after 20 to 26 steps, and no clipped one, though one clipped by norm ends no better than a guess.
//! At 0.1 none diverges, and the three ways end about alike.
//!
//! Results repeat exactly on one machine. Another CPU may add in another order; after 2000 steps single numbers differ.

use std::path::PathBuf;
use std::time::Instant;

use candle_core::Device;
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

use task::Task;
use train::{Clipping, Setup};

mod chart;
mod model;
mod report;
mod task;
mod train;

/// Trains a plain recurrent network without clipping, with norm clipping and with value clipping.
#[derive(Parser)]
struct Args {
    /// A few seconds: 2 seeds, 300 steps
    #[arg(long)]
    quick: bool,
    /// What to learn
    #[arg(long, value_enum, default_value_t = Task::TemporalOrder)]
    task: Task,
    /// Number of seeds; each gives initial weights and sequences [default: 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    seeds: Option<u64>,
    /// Steps of each run [default: 2000]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
    /// Time steps of a sequence [default: 40 for temporal-order, 30 for adding]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(10..))]
    length: Option<u64>,
    /// Learning rate, the same for all [default: 0.05 for temporal-order, 0.2 for adding]
    #[arg(long, value_name = "X")]
    lr: Option<f64>,
    /// Threshold of norm clipping
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    max_norm: f64,
    /// Threshold of value clipping
    #[arg(long, value_name = "X", default_value_t = 0.05)]
    clip_value: f64,
    /// Where to write the chart
    #[arg(long, value_name = "FILE.png", default_value = "target/exploding_rnn.png")]
    out: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    // Where this is not set, candle 0.11 counts the CPUs anew at every matrix product. The products here are so small
    // that this made the training five times slower.
    if std::env::var_os("RAYON_NUM_THREADS").is_none() {
        std::env::set_var("RAYON_NUM_THREADS", "1");
    }
    let steps = args.steps.unwrap_or(if args.quick { 300 } else { 2000 });
    let seeds = args.seeds.unwrap_or(if args.quick { 2 } else { 5 });
    let setup = Setup {
        task: args.task,
        length: args.length.map_or(args.task.default_length(), |length| length as usize),
        steps: steps as usize,
        lr: args.lr.unwrap_or(args.task.default_lr()),
        device: device(),
    };
    let clippings = [Clipping::Off, Clipping::Norm(args.max_norm), Clipping::Value(args.clip_value)];
    println!(
        "{} task, {} time steps; {steps} steps of SGD at learning rate {}; {seeds} seeds; on the {}\n",
        setup.task.name(),
        setup.length,
        setup.lr,
        if setup.device.is_cuda() { "GPU" } else { "CPU" },
    );

    let bar = ProgressBar::new(clippings.len() as u64 * seeds * steps);
    bar.set_style(ProgressStyle::with_template("{bar:40} {percent:>3} %  {elapsed} of {duration}  {msg}")?);
    let start = Instant::now();
    let mut runs = Vec::new();
    for clipping in clippings {
        for seed in 1..=seeds {
            let done = runs.len() as u64 * steps;
            let label = clipping.label();
            let mut step = 0;
            let run = train::train(&setup, clipping, seed, |loss| {
                step += 1;
                bar.set_position(done + step);
                if step % 50 == 0 {
                    bar.set_message(format!("{label}, seed {seed}: loss {loss:.3}"));
                }
            })?;
            runs.push(run);
        }
    }
    bar.finish_and_clear();

    report::print(&runs);
    chart::draw(&setup, &runs, &args.out)?;
    println!("\nchart: {}   time: {:.0} s", args.out.display(), start.elapsed().as_secs_f64());
    Ok(())
}

/// The first GPU if this is built for one and one is there, else the CPU.
fn device() -> Device {
    Device::cuda_if_available(0).unwrap_or_else(|error| {
        println!("no usable GPU, so on the CPU: {error}");
        Device::Cpu
    })
}
