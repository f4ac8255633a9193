//! A training step as a CUDA graph, with plain cudarc: forward, backward, clip and update are captured once and replayed
//! for every batch, and the threshold of the clip is changed on the device between replays.
//!
//!     cargo run --release --example cuda_graph
//!
//! Least squares on data in which one batch in ten has a label that is wildly off, by SGD. The threshold is that of
//! AutoClip, the 10th percentile of the norms so far: a captured graph could not follow it if it held the threshold as a
//! number. Needs a GPU; without one it says what is missing and ends.

mod linear;
mod train;

use anyhow::Result;

const STEPS: usize = 400;

fn main() -> Result<()> {
    let context = match gradclip::cuda::context(0) {
        Ok(context) => context,
        Err(error) => {
            println!("not run: {error}");
            return Ok(());
        }
    };
    println!("{STEPS} replays; |w - truth| at the end");
    println!(
        "{:>4} {:>16} {:>16} {:>14} {:>14} {:>14}",
        "seed", "without", "AutoClip", "clipped", "first max", "last max"
    );
    for seed in 1..=3 {
        let (_, without) = train::train(&context, seed, STEPS, false)?;
        let (log, with) = train::train(&context, seed, STEPS, true)?;
        let clipped = log.iter().filter(|step| step.report.written).count();
        let (first, last) = (log[1].max_norm, log[STEPS - 1].max_norm);
        println!("{seed:>4} {without:>16.3} {with:>16.3} {clipped:>14} {first:>14.3} {last:>14.3}");
    }
    Ok(())
}
