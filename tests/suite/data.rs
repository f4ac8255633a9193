//! Gradients of any dtype on the host.
#![allow(dead_code)] // every test binary uses a part

pub use crate::support::tensor::Tensor as Values;
use gradclip::cpu::{AsGrad, AsGradMut, Grad, GradMut};
use gradclip::Dtype;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

pub const DTYPES: [Dtype; 4] = [Dtype::F32, Dtype::F64, Dtype::F16, Dtype::BF16];

/// A gradient, and by how many elements its address is off a 256-byte border on the device.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub values: Values,
    pub offset: usize,
}

impl AsGrad for Tensor {
    fn as_grad(&self) -> Grad<'_> {
        self.values.as_grad()
    }
}

impl AsGradMut for Tensor {
    fn as_grad_mut(&mut self) -> GradMut<'_> {
        self.values.as_grad_mut()
    }
}

/// Reproducible data.
pub struct Source(SmallRng);

impl Source {
    pub fn new(seed: u64) -> Self {
        Self(SmallRng::seed_from_u64(seed))
    }

    /// Sum of four uniform numbers: bell-shaped, both signs.
    pub fn bell(&mut self) -> f64 {
        (0..4).map(|_| self.0.random_range(-1.0..1.0)).sum()
    }

    pub fn below(&mut self, end: usize) -> usize {
        self.0.random_range(0..end)
    }

    /// `numel` values of the kind that training gives, `offset` elements off alignment.
    pub fn tensor(&mut self, dtype: Dtype, numel: usize, offset: usize) -> Tensor {
        let values = (0..numel).map(|_| 1e-2 * self.bell()).collect::<Vec<_>>();
        Tensor { values: Values::from_f64(dtype, values), offset }
    }
}

pub fn tensor(dtype: Dtype, values: &[f64]) -> Tensor {
    Tensor { values: Values::from_f64(dtype, values.iter().copied()), offset: 0 }
}

pub fn bits(list: &[Tensor]) -> Vec<Vec<u64>> {
    list.iter().map(|tensor| tensor.values.bits()).collect()
}
