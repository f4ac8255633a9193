//! A network with two hidden layers that tells two spirals apart, and its gradient.

use std::ops::Range;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const WIDTH: usize = 32;
/// Points of a batch, over all processes.
const BATCH: u64 = 256;

/// Weights and biases of the three layers, one after the other.
#[derive(Clone)]
pub struct Parameters(Vec<f32>);

const W1: Range<usize> = 0..2 * WIDTH;
const B1: Range<usize> = W1.end..W1.end + WIDTH;
const W2: Range<usize> = B1.end..B1.end + WIDTH * WIDTH;
pub const B2: Range<usize> = W2.end..W2.end + WIDTH;
const W3: Range<usize> = B2.end..B2.end + WIDTH;
const B3: usize = W3.end;

/// Points and which spiral each is on.
pub struct Batch(Vec<([f32; 2], bool)>);

impl Batch {
    /// The part of a step's batch that one of `parts` ranks has.
    pub fn of_step(step: u64, rank: u64, parts: u64) -> Self {
        Self::new(step, rank, (BATCH / parts) as usize)
    }

    pub fn new(step: u64, rank: u64, points: usize) -> Self {
        let mut rng = SmallRng::seed_from_u64(step.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(rank));
        let point = |_| {
            let (turn, spiral) = (rng.random_range(0.1f32..1.0), rng.random_bool(0.5));
            let angle = 3.5 * std::f32::consts::PI * turn + if spiral { std::f32::consts::PI } else { 0.0 };
            let mut noise = || rng.random_range(-0.02f32..0.02);
            ([2.0 * turn * angle.cos() + noise(), 2.0 * turn * angle.sin() + noise()], spiral)
        };
        Self((0..points).map(point).collect())
    }
}

/// What the layers give for one point.
struct Activations {
    first: [f32; WIDTH],
    second: [f32; WIDTH],
    logit: f32,
}

impl Parameters {
    pub const NUMEL: usize = B3 + 1;

    /// The same in every process.
    pub fn new() -> Self {
        let mut rng = SmallRng::seed_from_u64(7);
        let mut values = vec![0.0; Self::NUMEL];
        for (layer, bound) in [(W1, 2.0), (W2, 0.5), (W3, 0.5)] {
            values[layer].fill_with(|| rng.random_range(-bound..bound));
        }
        Self(values)
    }

    fn forward(&self, point: &[f32; 2]) -> Activations {
        let p = &self.0;
        let first: [f32; WIDTH] = std::array::from_fn(|i| {
            (p[B1.start + i] + p[W1.start + 2 * i] * point[0] + p[W1.start + 2 * i + 1] * point[1]).tanh()
        });
        let second = std::array::from_fn(|i| {
            let row = &p[W2.start + i * WIDTH..][..WIDTH];
            (p[B2.start + i] + row.iter().zip(&first).map(|(w, x)| w * x).sum::<f32>()).tanh()
        });
        let logit = p[B3] + p[W3].iter().zip(&second).map(|(w, x)| w * x).sum::<f32>();
        Activations { first, second, logit }
    }

    /// Of the mean logistic loss.
    pub fn gradient(&self, batch: &Batch) -> Vec<f32> {
        let mut gradient = vec![0.0; Self::NUMEL];
        for (point, spiral) in &batch.0 {
            let Activations { first, second, logit } = self.forward(point);
            let of_logit = (1.0 / (1.0 + (-logit).exp()) - f32::from(u8::from(*spiral))) / batch.0.len() as f32;
            gradient[B3] += of_logit;
            let mut of_first = [0.0; WIDTH];
            for i in 0..WIDTH {
                gradient[W3.start + i] += of_logit * second[i];
                let of_second = of_logit * self.0[W3.start + i] * (1.0 - second[i] * second[i]);
                gradient[B2.start + i] += of_second;
                for j in 0..WIDTH {
                    gradient[W2.start + i * WIDTH + j] += of_second * first[j];
                    of_first[j] += of_second * self.0[W2.start + i * WIDTH + j];
                }
            }
            for i in 0..WIDTH {
                let of_sum = of_first[i] * (1.0 - first[i] * first[i]);
                gradient[B1.start + i] += of_sum;
                gradient[W1.start + 2 * i] += of_sum * point[0];
                gradient[W1.start + 2 * i + 1] += of_sum * point[1];
            }
        }
        gradient
    }

    /// One step of SGD on some of the parameters.
    pub fn descend(&mut self, which: Range<usize>, gradient: &[f32], lr: f32) {
        for (x, g) in self.0[which].iter_mut().zip(gradient) {
            *x -= lr * g;
        }
    }

    pub fn part_mut(&mut self, which: Range<usize>) -> &mut [f32] {
        &mut self.0[which]
    }

    /// Mean loss, and the share of points that are told right.
    pub fn evaluate(&self, batch: &Batch) -> (f64, f64) {
        let (mut loss, mut right) = (0.0, 0u32);
        for (point, spiral) in &batch.0 {
            let logit = f64::from(self.forward(point).logit) * if *spiral { 1.0 } else { -1.0 };
            loss += (-logit).exp().ln_1p();
            right += u32::from(logit > 0.0);
        }
        (loss / batch.0.len() as f64, f64::from(right) / batch.0.len() as f64)
    }

    pub fn fingerprint(&self) -> u64 {
        fingerprint(&self.0)
    }
}

/// Of every bit (FNV-1a).
pub fn fingerprint(values: &[f32]) -> u64 {
    values.iter().fold(0xcbf2_9ce4_8422_2325, |hash, x| (hash ^ u64::from(x.to_bits())).wrapping_mul(0x100_0000_01b3))
}

/// The mean over the ranks, added up in rank order: in every process the same bits.
pub fn sum_in_order<'a>(parts: impl ExactSizeIterator<Item = &'a [f32]>) -> Vec<f32> {
    let share = 1.0 / parts.len() as f32;
    let mut sum = vec![0.0; Parameters::NUMEL];
    for part in parts {
        for (sum, x) in sum.iter_mut().zip(part) {
            *sum += share * x;
        }
    }
    sum
}
