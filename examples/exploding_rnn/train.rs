//! One training run: backward, clip, step.

use std::time::{Duration, Instant};

use candle_core::backprop::GradStore;
use candle_core::{Device, Var};
use gradclip::NormType;
use rand::{rngs::SmallRng, SeedableRng};

use crate::model::Rnn;
use crate::task::{Score, Task};

/// Hidden units and sequences per step, as in the paper.
const HIDDEN: usize = 50;
const BATCH: usize = 20;
/// Fresh sequences for the score at the end.
const TEST_SEQUENCES: usize = 1000;

/// What is done to the gradients between `backward` and `step`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Clipping {
    Off,
    /// Largest norm of all gradients together.
    Norm(f64),
    /// Largest magnitude of each element.
    Value(f64),
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
    /// Steps not taken, because the clip reported gradients that are not finite numbers.
    pub skipped: usize,
    /// Step at which the loss was no longer a finite number.
    pub diverged: Option<usize>,
    /// On sequences not trained on; none if the run diverged.
    pub score: Option<Score>,
    /// Forward, backward, clip and optimizer.
    pub step_time: Duration,
    /// The clip alone.
    pub clip_time: Duration,
}

/// Trains from the weights and on the sequences that `seed` gives, which are the same for every kind of clipping.
pub fn train(setup: &Setup, clipping: Clipping, seed: u64, mut progress: impl FnMut(f64)) -> anyhow::Result<Run> {
    let Setup { task, device, .. } = setup;
    let mut rng = SmallRng::seed_from_u64(seed);
    let (inputs, outputs) = task.channels();
    let model = Rnn::new(inputs, HIDDEN, outputs, &mut rng, device)?;
    let vars = model.vars();
    let mut run = Run::new(clipping, seed);

    for step in 0..setup.steps {
        let batch = task.sample(BATCH, setup.length, &mut rng, device)?;
        let forward = Instant::now();
        let loss = task.loss(&model.forward(&batch.inputs)?, &batch.targets)?;
        let value = f64::from(loss.to_scalar::<f32>()?);
        if !value.is_finite() {
            run.diverged = Some(step);
            return Ok(run);
        }
        run.losses.push(value);
        progress(value);

        let mut grads = loss.backward()?;
        device.synchronize()?; // or a GPU would still be at the backward pass while the clip is timed
        run.step_time += forward.elapsed();
        if !matches!(clipping, Clipping::Norm(_)) {
            // For the chart, so not timed: norm clipping reports its norm anyway.
            run.norms.push(gradclip::candle::total_norm(&vars, &grads, NormType::L2)?.wait()?.total_norm);
        }

        let clip = Instant::now();
        let mut finite = true;
        match clipping {
            Clipping::Off => {}
            Clipping::Norm(max_norm) => {
                let report = gradclip::candle::clip_grad_norm(&vars, &mut grads, max_norm)?.wait()?;
                run.norms.push(report.total_norm);
                run.clipped += usize::from(report.written);
                finite = report.first_nonfinite.is_none();
            }
            Clipping::Value(clip_value) => {
                let report = gradclip::candle::clip_grad_value(&vars, &mut grads, clip_value)?.wait()?;
                run.clipped += usize::from(report.written);
                finite = report.nan == 0;
            }
        }
        run.clip_time += clip.elapsed();

        if finite {
            sgd_step(&vars, &grads, setup.lr)?;
            device.synchronize()?;
        } else {
            run.skipped += 1;
        }
        run.step_time += clip.elapsed();
    }

    let mut rng = SmallRng::seed_from_u64(!seed);
    let test = task.sample(TEST_SEQUENCES, setup.length, &mut rng, device)?;
    run.score = Some(task.score(&model.forward(&test.inputs)?, &test.targets)?);
    Ok(run)
}

/// Plain SGD: `w -= lr * gradient`.
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
            step_time: Duration::ZERO,
            clip_time: Duration::ZERO,
        }
    }
}
