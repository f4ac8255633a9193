//! One training run: backward, clip, step.

use candle_core::backprop::GradStore;
use candle_core::{Device, Var};
use gradclip::{ClipNorm, Deferred, NonFinite, NormReport, NormType};
use rand::{rngs::SmallRng, SeedableRng};

use crate::model::Rnn;
use crate::on_candle;
use crate::step_share::{Borders, StepTime};
use crate::task::{Score, Task};

/// Hidden units and sequences per step, as in the paper.
const HIDDEN: usize = 50;
const BATCH: usize = 20;
/// Fresh sequences for the score at the end.
const TEST_SEQUENCES: usize = 1000;
/// Steps between two looks at the reports of norm clipping and at the times.
const LOOK_EVERY: usize = 16;
const _: () = assert!(LOOK_EVERY <= gradclip::REPORTS_KEPT, "on a GPU, older reports are overwritten");

/// What is done to the gradients between `backward` and `step`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Clipping {
    Off,
    /// Largest norm of all gradients together.
    Norm(f64),
    /// Largest magnitude of each element.
    Value(f64),
    /// As `Norm`, but written with candle's own operations.
    NormByCandle(f64),
}

/// What is the same in every run.
pub struct Setup {
    pub task: Task,
    pub length: usize,
    pub steps: usize,
    pub lr: f64,
    pub device: Device,
}

/// What a run has left behind.
pub struct Run {
    pub clipping: Clipping,
    pub seed: u64,
    /// Loss of each step.
    pub losses: Vec<f64>,
    /// Norm of the gradients of each step, before clipping.
    pub norms: Vec<f64>,
    /// Steps whose gradients were changed.
    pub clipped: usize,
    /// Steps that changed no weight, because the clip reported gradients that are not finite numbers.
    pub skipped: usize,
    /// Step at which the loss was no longer a finite number.
    pub diverged: Option<usize>,
    /// On sequences not trained on; none if the run diverged.
    pub score: Option<Score>,
    /// What each step took: forward, backward, clip and update.
    pub times: Vec<StepTime>,
}

/// Trains from the weights and on the sequences that `seed` gives, which are the same for every kind of clipping.
pub fn train(setup: &Setup, clipping: Clipping, seed: u64, mut progress: impl FnMut(f64)) -> anyhow::Result<Run> {
    let Setup { task, device, .. } = setup;
    let mut rng = SmallRng::seed_from_u64(seed);
    let (inputs, outputs) = task.channels();
    let model = Rnn::new(inputs, HIDDEN, outputs, &mut rng, device)?;
    let vars = model.vars();
    let mut run = Run::new(clipping, seed);
    let timeline = on_candle::timeline(device);
    let mut unread = Unread::default();

    for step in 0..setup.steps {
        let batch = task.sample(BATCH, setup.length, &mut rng, device)?;
        let start = timeline.mark()?;
        let loss = task.loss(&model.forward(&batch.inputs)?, &batch.targets)?;
        let value = f64::from(loss.to_scalar::<f32>()?);
        if !value.is_finite() {
            run.diverged = Some(step);
            unread.read_into(&mut run)?;
            return Ok(run);
        }
        run.losses.push(value);
        progress(value);

        let mut grads = loss.backward()?;
        let backward = timeline.mark()?;
        if matches!(clipping, Clipping::Off | Clipping::Value(_)) {
            // For the chart, so not timed: norm clipping reports its norm anyway.
            run.norms.push(gradclip::candle::total_norm(&vars, &grads, NormType::L2)?.wait()?.total_norm);
        }

        let clip = timeline.mark()?;
        let mut finite = true;
        match clipping {
            Clipping::Off => {}
            Clipping::Norm(max_norm) => {
                // Nobody looks before the step is taken. If the norm is not finite, all gradients become 0, and a step
                // of plain SGD changes nothing then.
                let clip = ClipNorm::new(max_norm).nonfinite(NonFinite::Zero);
                unread.reports.push(gradclip::candle::clip_grad_norm(&vars, &mut grads, clip)?);
            }
            Clipping::Value(clip_value) => {
                let report = gradclip::candle::clip_grad_value(&vars, &mut grads, clip_value)?.wait()?;
                run.clipped += usize::from(report.written);
                finite = report.nan == 0;
            }
            Clipping::NormByCandle(max_norm) => {
                let norm = on_candle::clip_grad_norm(&vars, &mut grads, max_norm)?;
                run.norms.push(norm);
                run.clipped += usize::from(norm > max_norm);
                finite = norm.is_finite();
            }
        }
        let clipped = timeline.mark()?;

        if finite {
            sgd_step(&vars, &grads, setup.lr)?;
        } else {
            run.skipped += 1;
        }
        unread.borders.push(Borders { start, backward, clip, clipped, end: timeline.mark()? });
        if unread.borders.len() == LOOK_EVERY || step + 1 == setup.steps {
            unread.read_into(&mut run)?;
        }
    }

    let mut rng = SmallRng::seed_from_u64(!seed);
    let test = task.sample(TEST_SEQUENCES, setup.length, &mut rng, device)?;
    run.score = Some(task.score(&model.forward(&test.inputs)?, &test.targets)?);
    Ok(run)
}

/// Plain SGD: `w -= lr * gradient`. (`candle-nn` has it too, among much that would have to be built with it.)
fn sgd_step(vars: &[Var], grads: &GradStore, lr: f64) -> candle_core::Result<()> {
    for var in vars {
        if let Some(grad) = grads.get(var) {
            var.set(&(var.as_tensor() - (grad * lr)?)?)?;
        }
    }
    Ok(())
}

impl Run {
    fn new(clipping: Clipping, seed: u64) -> Self {
        Self {
            clipping,
            seed,
            losses: vec![],
            norms: vec![],
            clipped: 0,
            skipped: 0,
            diverged: None,
            score: None,
            times: vec![],
        }
    }
}

/// Of the last steps, what may still lie on the GPU.
#[derive(Default)]
struct Unread {
    reports: Vec<Deferred<NormReport>>,
    borders: Vec<Borders>,
}

impl Unread {
    /// Waits for those steps.
    fn read_into(&mut self, run: &mut Run) -> anyhow::Result<()> {
        for report in self.reports.drain(..) {
            let report = report.wait()?;
            run.norms.push(report.total_norm);
            run.clipped += usize::from(report.written && !report.found_inf);
            run.skipped += usize::from(report.found_inf);
        }
        for borders in self.borders.drain(..) {
            run.times.push(borders.times()?);
        }
        Ok(())
    }
}
