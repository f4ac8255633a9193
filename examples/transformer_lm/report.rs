//! What is printed: the norm of every step, a table, and text of the model's own.

use candle_core::{Result, Tensor};
use rand::{rngs::SmallRng, Rng, SeedableRng};

use crate::data::{Corpus, CONTEXT};
use crate::model::Transformer;
use crate::train::{Clipping, Run, Step, LOOK_EVERY};

/// Below 1, the likelier characters are taken more often than the model says.
const TEMPERATURE: f64 = 0.7;

impl Clipping {
    pub fn label(self) -> String {
        match self {
            Self::Off => "no clipping".into(),
            Self::Norm(max_norm) => format!("norm clipping, {max_norm}"),
            Self::NormByCandle(max_norm) => format!("norm clipping by candle's own operations, {max_norm}"),
        }
    }
}

/// The steps read back last: their mean loss, and the norm of each, with `*` where it was clipped.
pub fn latest(steps: &[Step]) -> String {
    let first = (steps.len() - 1) / LOOK_EVERY * LOOK_EVERY;
    let latest = &steps[first..];
    let loss = latest.iter().map(|step| step.loss).sum::<f64>() / latest.len() as f64;
    let norms: Vec<_> = latest.iter().map(|step| number(step.total_norm) + mark(step)).collect();
    format!("{first:>5} {loss:>6.3}   {}", norms.join(" "))
}

fn mark(step: &Step) -> &'static str {
    if step.clipped {
        "*"
    } else {
        " "
    }
}

/// One row for each run.
pub fn table(runs: &[Run]) {
    println!(
        "\n{:<17} {:>4} {:>14} {:>11} {:>12} {:>13} {:>25}",
        "", "seed", "steps clipped", "median norm", "largest norm", "training loss", "held-out before and after"
    );
    for run in runs {
        let mut norms: Vec<_> = run.steps.iter().map(|step| step.total_norm).collect();
        norms.sort_by(f64::total_cmp);
        let clipped = run.steps.iter().filter(|step| step.clipped).count();
        let clipped = match run.clipping {
            Clipping::Off => "-".into(),
            Clipping::Norm(_) | Clipping::NormByCandle(_) => {
                format!("{clipped} ({:.0} %)", 100.0 * clipped as f64 / norms.len() as f64)
            }
        };
        let last = &run.steps[run.steps.len().saturating_sub(LOOK_EVERY)..];
        println!(
            "{:<17} {:>4} {clipped:>14} {:>11} {:>12} {:>13.3} {:>14.3} {:>10.3}",
            run.clipping.label(),
            run.seed,
            number(norms[norms.len() / 2]),
            number(norms[norms.len() - 1]),
            last.iter().map(|step| step.loss).sum::<f64>() / last.len() as f64,
            run.held_out[0],
            run.held_out[1],
        );
    }
}

/// Text that goes on after `start`, one character at a time.
pub fn write_on(model: &Transformer, corpus: &Corpus, start: &str, characters: usize) -> Result<String> {
    let mut rng = SmallRng::seed_from_u64(0);
    let device = model.vars()[0].device();
    let mut text = start.to_string();
    let mut tokens: Vec<u32> = start.chars().map(|c| corpus.token(c)).collect();
    for _ in 0..characters {
        let window = &tokens[tokens.len().saturating_sub(CONTEXT)..];
        let logits = model.logits(&Tensor::new(window, device)?.unsqueeze(0)?)?;
        let logits = (logits.get(0)?.get(window.len() - 1)? / TEMPERATURE)?.to_vec1::<f32>()?;
        let token = draw(&logits, &mut rng);
        tokens.push(token);
        text.push(corpus.char(token));
    }
    Ok(text)
}

/// Draws a token with the probabilities that `logits` stand for.
fn draw(logits: &[f32], rng: &mut SmallRng) -> u32 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = logits.iter().map(|x| f64::from(x - largest).exp()).collect();
    let mut left = rng.random::<f64>() * weights.iter().sum::<f64>();
    for (token, weight) in weights.iter().enumerate() {
        left -= weight;
        if left < 0.0 {
            return token as u32;
        }
    }
    0 // all NaN, after a run that diverged
}

/// Three significant digits, so that usual norms take the same width.
fn number(x: f64) -> String {
    match x.abs() {
        a if a >= 1e4 => format!("{x:.0e}"),
        a if a >= 100.0 => format!("{x:.0}"),
        a if a >= 10.0 => format!("{x:.1}"),
        _ => format!("{x:.2}"),
    }
}
