//! A plain recurrent network: `h[t] = tanh(x[t] W_xh + h[t-1] W_hh + b_h)`, and a linear read-out of the last state.

use candle_core::{DType, Device, Result, Tensor, Var};
use rand::{rngs::SmallRng, Rng};

/// Standard deviation of the input and output weights, as in the paper.
const WEIGHT_STD: f64 = 0.1;

pub struct Rnn {
    w_xh: Var,
    w_hh: Var,
    b_h: Var,
    w_hy: Var,
    b_y: Var,
}

impl Rnn {
    /// Recurrent weights orthogonal, so that signals neither grow nor fade at the start; biases zero.
    pub fn new(inputs: usize, hidden: usize, outputs: usize, rng: &mut SmallRng, device: &Device) -> Result<Self> {
        let mut gaussian = |rows: usize, columns: usize| {
            let values: Vec<f32> = (0..rows * columns).map(|_| (WEIGHT_STD * normal(rng)) as f32).collect();
            Var::from_vec(values, (rows, columns), device)
        };
        Ok(Self {
            w_xh: gaussian(inputs, hidden)?,
            w_hy: gaussian(hidden, outputs)?,
            w_hh: Var::from_vec(orthogonal(hidden, rng), (hidden, hidden), device)?,
            b_h: Var::zeros(hidden, DType::F32, device)?,
            b_y: Var::zeros(outputs, DType::F32, device)?,
        })
    }

    pub fn vars(&self) -> Vec<Var> {
        [&self.w_xh, &self.w_hh, &self.b_h, &self.w_hy, &self.b_y].map(Var::clone).to_vec()
    }

    /// Outputs after the last time step.
    pub fn forward(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let mut h: Option<Tensor> = None;
        for x in inputs {
            let mut drive = x.matmul(&self.w_xh)?.broadcast_add(&self.b_h)?;
            if let Some(h) = h {
                drive = (drive + h.matmul(&self.w_hh)?)?;
            }
            h = Some(drive.tanh()?);
        }
        let last = h.ok_or_else(|| candle_core::Error::msg("a sequence needs at least one step"))?;
        last.matmul(&self.w_hy)?.broadcast_add(&self.b_y)
    }
}

/// A sample of the normal distribution (Box and Muller).
fn normal(rng: &mut SmallRng) -> f64 {
    let (u, v) = (rng.random::<f64>(), rng.random::<f64>());
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// A random orthogonal matrix, row by row: normal samples, made orthogonal to the rows before and of length one.
fn orthogonal(n: usize, rng: &mut SmallRng) -> Vec<f32> {
    let mut rows: Vec<Vec<f64>> = Vec::with_capacity(n);
    for _ in 0..n {
        let mut row: Vec<f64> = (0..n).map(|_| normal(rng)).collect();
        for earlier in &rows {
            let dot: f64 = earlier.iter().zip(&row).map(|(a, b)| a * b).sum();
            row.iter_mut().zip(earlier).for_each(|(x, e)| *x -= dot * e);
        }
        let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        row.iter_mut().for_each(|x| *x /= length);
        rows.push(row);
    }
    rows.into_iter().flatten().map(|x| x as f32).collect()
}
