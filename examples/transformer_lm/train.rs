//! One training run: backward, clip, step, and a look at the reports now and then.

use candle_core::{Device, Tensor};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use gradclip::{ClipNorm, Deferred, NonFinite, NormReport, NormType};

use crate::data::Corpus;
use crate::model::Transformer;
use crate::on_candle;
use crate::step_share::{Borders, StepTime};

/// Windows of text per step.
const WINDOWS: usize = 8;
/// Share of the steps over which the learning rate rises to its peak.
const WARMUP: f64 = 0.05;
/// Learning rate at the end, as a share of the peak.
const LAST_LR: f64 = 0.1;

/// Steps between two looks at the losses and reports: only there does anything wait for a GPU.
pub const LOOK_EVERY: usize = 16;
const _: () = assert!(LOOK_EVERY <= gradclip::REPORTS_KEPT, "on a GPU, older reports are overwritten");

/// What is done to the gradients between `backward` and `step`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Clipping {
    Off,
    /// Largest norm of all gradients together.
    Norm(f64),
    /// As `Norm`, but written with candle's own operations, which wait for every step.
    NormByCandle(f64),
}

/// What is the same in every run.
pub struct Setup {
    pub corpus: Corpus,
    pub steps: usize,
    /// Peak of the learning rate.
    pub lr: f64,
    pub device: Device,
}

/// What a run has left behind.
pub struct Run {
    pub clipping: Clipping,
    pub seed: u64,
    pub steps: Vec<Step>,
    /// Loss on the text not trained on, before and after.
    pub held_out: [f64; 2],
    pub model: Transformer,
}

/// One step, as it was read back.
pub struct Step {
    pub loss: f64,
    /// Norm of the gradients before clipping.
    pub total_norm: f64,
    /// Whether the gradients were changed.
    pub clipped: bool,
    pub time: StepTime,
}

/// The same while it may still lie on the GPU.
struct Unread {
    loss: Tensor,
    norm: Norm,
    borders: Borders,
}

enum Norm {
    Deferred(Deferred<NormReport>),
    /// The norm, and the threshold.
    Known(f64, f64),
}

/// Trains from the weights and on the windows that `seed` gives, which are the same clipped and not. `look` gets the
/// steps so far whenever new ones have been read back.
pub fn train(setup: &Setup, clipping: Clipping, seed: u64, mut look: impl FnMut(&[Step])) -> anyhow::Result<Run> {
    let Setup { corpus, steps, device, .. } = setup;
    let model = Transformer::new(corpus.alphabet_len(), seed, device)?;
    let batches = corpus.draw(*steps, WINDOWS, !seed)?;
    let mut optimizer = AdamW::new(model.vars().to_vec(), ParamsAdamW { lr: setup.lr, ..ParamsAdamW::default() })?;
    let before = held_out_loss(&model, corpus)?;
    let timeline = on_candle::timeline(device);

    let mut read = Vec::with_capacity(*steps);
    let mut unread = Vec::with_capacity(LOOK_EVERY);
    for step in 0..*steps {
        let start = timeline.mark()?;
        let loss = model.loss(&corpus.batch(&batches, step)?)?;
        let mut grads = loss.backward()?;
        let (backward, clip) = (timeline.mark()?, timeline.mark()?);
        let norm = match clipping {
            Clipping::Off => Norm::Deferred(gradclip::candle::total_norm(model.vars(), &grads, NormType::L2)?),
            Clipping::Norm(max_norm) => {
                // Nobody looks before the step is taken, so what is not finite must not reach it: all become 0 then.
                let clip = ClipNorm::new(max_norm).nonfinite(NonFinite::Zero);
                Norm::Deferred(gradclip::candle::clip_grad_norm(model.vars(), &mut grads, clip)?)
            }
            Clipping::NormByCandle(max_norm) => {
                Norm::Known(on_candle::clip_grad_norm(model.vars(), &mut grads, max_norm)?, max_norm)
            }
        };
        let clipped = timeline.mark()?;
        optimizer.set_learning_rate(setup.lr * schedule(step, *steps));
        optimizer.step(&grads)?;

        let borders = Borders { start, backward, clip, clipped, end: timeline.mark()? };
        unread.push(Unread { loss: loss.detach(), norm, borders }); // detached, or it would keep all that led to it
        if unread.len() == LOOK_EVERY || step + 1 == *steps {
            read_back(&mut unread, &mut read)?;
            look(&read);
        }
    }
    let held_out = [before, held_out_loss(&model, corpus)?];
    Ok(Run { clipping, seed, steps: read, held_out, model })
}

/// Reads the losses and reports of several steps. The first of these waits until the GPU has done the steps; the others
/// find it idle.
fn read_back(unread: &mut Vec<Unread>, read: &mut Vec<Step>) -> anyhow::Result<()> {
    let losses: Vec<_> = unread.iter().map(|step| &step.loss).collect();
    let losses = Tensor::stack(&losses, 0)?.to_vec1::<f32>()?;
    for (loss, Unread { norm, borders, .. }) in losses.into_iter().zip(unread.drain(..)) {
        let (total_norm, clipped) = match norm {
            Norm::Deferred(report) => {
                let report = report.wait()?;
                (report.total_norm, report.written)
            }
            Norm::Known(norm, max_norm) => (norm, norm > max_norm),
        };
        read.push(Step { loss: f64::from(loss), total_norm, clipped, time: borders.times()? });
    }
    Ok(())
}

/// Learning rate as a share of its peak: up in a straight line, down along half a cosine.
fn schedule(step: usize, steps: usize) -> f64 {
    let warmup = (WARMUP * steps as f64).ceil();
    let (step, steps) = (step as f64 + 1.0, steps as f64);
    if step <= warmup {
        return step / warmup;
    }
    let way = (step - warmup) / (steps - warmup);
    LAST_LR + (1.0 - LAST_LR) * 0.5 * (1.0 + (std::f64::consts::PI * way).cos())
}

fn held_out_loss(model: &Transformer, corpus: &Corpus) -> candle_core::Result<f64> {
    Ok(f64::from(model.loss(corpus.held_out())?.to_scalar::<f32>()?))
}
