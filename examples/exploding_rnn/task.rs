//! The two tasks: sequences whose answer depends on two symbols far from the end.
//!
//! Both were set by Hochreiter and Schmidhuber (1997) for recurrent networks; the lengths and positions here are those
//! of Pascanu, Mikolov and Bengio (2013).

use candle_core::{DType, Device, Result, Tensor};
use clap::ValueEnum;
use rand::{rngs::SmallRng, Rng};

/// What the network has to learn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Task {
    /// Which of two symbols came at two places, and in which order? Four classes: AA, AB, BA, BB.
    TemporalOrder,
    /// Half the sum of two marked numbers among many.
    Adding,
}

/// A batch of sequences, time first.
pub struct Batch {
    /// One `batch x channels` tensor for each time step.
    pub inputs: Vec<Tensor>,
    /// A class number, or a value, for each sequence.
    pub targets: Tensor,
}

/// Loss and, where the task has classes, the fraction that is right.
pub struct Score {
    pub loss: f64,
    pub accuracy: Option<f64>,
}

impl Task {
    pub fn name(self) -> &'static str {
        match self {
            Self::TemporalOrder => "temporal order",
            Self::Adding => "adding",
        }
    }

    /// Input channels and outputs of the network.
    pub fn channels(self) -> (usize, usize) {
        match self {
            Self::TemporalOrder => (6, 4),
            Self::Adding => (2, 1),
        }
    }

    /// Sequence length where none is asked for.
    pub fn default_length(self) -> usize {
        match self {
            Self::TemporalOrder => 40,
            Self::Adding => 30,
        }
    }

    /// Learning rate where none is asked for.
    pub fn default_lr(self) -> f64 {
        match self {
            Self::TemporalOrder => 0.05,
            Self::Adding => 0.2,
        }
    }

    pub fn loss_name(self) -> &'static str {
        match self {
            Self::TemporalOrder => "cross-entropy",
            Self::Adding => "mean squared error",
        }
    }

    /// Loss of the best answer that ignores the sequence: every class alike, or always the mean.
    pub fn blind_loss(self) -> f64 {
        match self {
            Self::TemporalOrder => 4f64.ln(),
            Self::Adding => 1.0 / 24.0, // variance of (a + b) / 2, both uniform on [0, 1)
        }
    }

    /// Draws sequences and their answers.
    pub fn sample(self, batch: usize, length: usize, rng: &mut SmallRng, device: &Device) -> Result<Batch> {
        let (channels, _) = self.channels();
        let mut inputs = vec![vec![0f32; batch * channels]; length];
        let mut answers = Vec::with_capacity(batch);
        for row in 0..batch {
            let mut set = |t: usize, channel: usize, value: f32| inputs[t][row * channels + channel] = value;
            let answer = match self {
                Self::TemporalOrder => temporal_order(length, rng, &mut set),
                Self::Adding => adding(length, rng, &mut set),
            };
            answers.push(answer);
        }
        let inputs = inputs.into_iter().map(|step| Tensor::from_vec(step, (batch, channels), device));
        let answers = Tensor::from_vec(answers, (batch, 1), device)?;
        let targets = match self {
            Self::TemporalOrder => answers.squeeze(1)?.to_dtype(DType::U32)?,
            Self::Adding => answers,
        };
        Ok(Batch { inputs: inputs.collect::<Result<_>>()?, targets })
    }

    pub fn loss(self, outputs: &Tensor, targets: &Tensor) -> Result<Tensor> {
        match self {
            Self::TemporalOrder => {
                let right = outputs.gather(&targets.unsqueeze(1)?, 1)?.squeeze(1)?;
                (outputs.log_sum_exp(1)? - right)?.mean_all() // cross-entropy
            }
            Self::Adding => (outputs - targets)?.sqr()?.mean_all(),
        }
    }

    pub fn score(self, outputs: &Tensor, targets: &Tensor) -> Result<Score> {
        let loss = f64::from(self.loss(outputs, targets)?.to_scalar::<f32>()?);
        let accuracy = match self {
            Self::TemporalOrder => {
                let right = outputs.argmax(1)?.eq(targets)?.to_dtype(DType::F32)?;
                Some(f64::from(right.mean_all()?.to_scalar::<f32>()?))
            }
            Self::Adding => None,
        };
        Ok(Score { loss, accuracy })
    }
}

/// Six symbols, one-hot: A or B once in the second tenth of the sequence and once in the sixth, else c, d, e or f.
fn temporal_order(length: usize, rng: &mut SmallRng, set: &mut impl FnMut(usize, usize, f32)) -> f32 {
    let tenth = (length / 10).max(1);
    let places = [tenth + rng.random_range(0..tenth), length / 2 + rng.random_range(0..tenth)];
    let symbols = [rng.random_range(0..2), rng.random_range(0..2)];
    for t in 0..length {
        let symbol = match places.iter().position(|&place| place == t) {
            Some(i) => symbols[i],
            None => rng.random_range(2..6),
        };
        set(t, symbol, 1.0);
    }
    (symbols[0] + 2 * symbols[1]) as f32
}

/// A number in [0, 1) and a mark at each step; one mark in the first tenth, one between there and the half.
fn adding(length: usize, rng: &mut SmallRng, set: &mut impl FnMut(usize, usize, f32)) -> f32 {
    let tenth = (length / 10).max(1);
    let places = [rng.random_range(0..tenth), rng.random_range(tenth..(length / 2).max(tenth + 1))];
    let mut sum = 0.0;
    for t in 0..length {
        let number = rng.random::<f32>();
        set(t, 1, number);
        if places.contains(&t) {
            set(t, 0, 1.0);
            sum += number;
        }
    }
    sum / 2.0
}
