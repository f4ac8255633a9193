//! One training run: backward, clip, step, and a look at the reports now and then.

use candle_core::{Device, Tensor};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use gradclip::{ClipNorm, Deferred, NonFinite, NormReport, NormType};

use crate::data::Corpus;
use crate::model::Transformer;

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
    pub report: NormReport,
}

/// Trains from the weights and on the windows that `seed` gives, which are the same clipped and not. `look` gets the
/// steps so far whenever new ones have been read back.
pub fn train(setup: &Setup, clipping: Clipping, seed: u64, mut look: impl FnMut(&[Step])) -> anyhow::Result<Run> {
    let Setup { corpus, steps, device, .. } = setup;
    let model = Transformer::new(corpus.alphabet_len(), seed, device)?;
    let batches = corpus.draw(*steps, WINDOWS, !seed)?;
    let mut optimizer = AdamW::new(model.vars().to_vec(), ParamsAdamW { lr: setup.lr, ..ParamsAdamW::default() })?;
    let before = held_out_loss(&model, corpus)?;

    let mut read = Vec::with_capacity(*steps);
    let mut unread = Vec::with_capacity(LOOK_EVERY);
    for step in 0..*steps {
        let loss = model.loss(&corpus.batch(&batches, step)?)?;
        let mut grads = loss.backward()?;
        let report = match clipping {
            Clipping::Off => gradclip::candle::total_norm(model.vars(), &grads, NormType::L2)?,
            Clipping::Norm(max_norm) => {
                // Nobody looks before the step is taken, so what is not finite must not reach it: all become 0 then.
                let clip = ClipNorm::new(max_norm).nonfinite(NonFinite::Zero);
                gradclip::candle::clip_grad_norm(model.vars(), &mut grads, clip)?
            }
        };
        optimizer.set_learning_rate(setup.lr * schedule(step, *steps));
        optimizer.step(&grads)?;

        unread.push((loss.detach(), report)); // detached, or it would keep all that led to it
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
fn read_back(unread: &mut Vec<(Tensor, Deferred<NormReport>)>, read: &mut Vec<Step>) -> anyhow::Result<()> {
    let (losses, reports): (Vec<_>, Vec<_>) = unread.drain(..).unzip();
    let losses = Tensor::stack(&losses, 0)?.to_vec1::<f32>()?;
    for (loss, report) in losses.into_iter().zip(reports) {
        read.push(Step { loss: f64::from(loss), report: report.wait()? });
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
