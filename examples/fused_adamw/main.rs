//! AdamW that clips and unscales while it reads the gradient, with plain cudarc: gradclip leaves the factor on the device
//! (`clip_coef`) and writes no gradient. Beside it the same training with the gradients written first (`clip_grad_norm`).
//!
//!     cargo run --release --example fused_adamw
//!
//! Least squares with a loss scale, on data in which one batch in ten has a label that is wildly off, and one in 40 a label
//! so large that the scaled gradients overflow. That step is left out and the loss scale halved, on the device: the host
//! reads the reports of 256 steps at a time, and waits for nothing else. Needs a GPU; without one it says what is missing
//! and ends.

#[path = "../cuda_graph/linear.rs"]
mod linear;
mod train;

use anyhow::Result;
use train::{gradient_bytes, step_bytes, Way};

const STEPS: usize = 400;
/// The smallest GPT-2.
const GPT2_PARAMETERS: u64 = 124_439_808;

fn main() -> Result<()> {
    println!("bytes moved per step, f32, counted: gradients in clip and step, and all of it");
    for (name, parameters) in [("this model", linear::FEATURES as u64), ("GPT-2", GPT2_PARAMETERS)] {
        let of = |way| (gradient_bytes(parameters, way), step_bytes(parameters, way));
        let ((written, all_written), (handed, all_handed)) = (of(Way::ClipThenStep), of(Way::HandOff));
        let saved = 100.0 * (1.0 - all_handed as f64 / all_written as f64);
        println!("{name:>10}: written {written:>13} of {all_written:>13}");
        println!("{:>10}  handed  {handed:>13} of {all_handed:>13}   {saved:.0} % less", "");
    }
    let context = match gradclip::cuda::context(0) {
        Ok(context) => context,
        Err(error) => {
            println!("not run: {error}");
            return Ok(());
        }
    };
    println!("{STEPS} steps; |w - truth| at the end");
    println!(
        "{:>4} {:>10} {:>10} {:>10} {:>10} {:>10} {:>12}",
        "seed", "written", "handed", "same bits", "clipped", "left out", "loss scale"
    );
    for seed in 1..=3 {
        let written = train::train(&context, seed, STEPS, Way::ClipThenStep)?;
        let handed = train::train(&context, seed, STEPS, Way::HandOff)?;
        let bits = |end: &train::End| end.weights.iter().map(|w| w.to_bits()).collect::<Vec<_>>();
        let same = bits(&written) == bits(&handed);
        let (left_out, scale) = (handed.steps_left_out, handed.loss_scale);
        let clipped = handed.reports.iter().filter(|report| report.clip_coef < 1.0).count();
        let (a, b) = (written.off, handed.off);
        println!("{seed:>4} {a:>10.3} {b:>10.3} {same:>10} {clipped:>10} {left_out:>10} {scale:>12}");
    }
    Ok(())
}
