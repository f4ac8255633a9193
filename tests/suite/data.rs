//! Gradients of any dtype on the host.
#![allow(dead_code)] // every test binary uses a part

use gradclip::cpu::{AsGrad, AsGradMut, Grad, GradMut};
use gradclip::Dtype;
use half::{bf16, f16};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

pub const DTYPES: [Dtype; 4] = [Dtype::F32, Dtype::F64, Dtype::F16, Dtype::BF16];

#[derive(Clone, Debug)]
pub enum Values {
    F32(Vec<f32>),
    F64(Vec<f64>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

/// A gradient, and by how many elements its address is off a 256-byte border on the device.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub values: Values,
    pub offset: usize,
}

impl Values {
    pub fn from_f64(dtype: Dtype, values: impl IntoIterator<Item = f64>) -> Self {
        let values = values.into_iter();
        match dtype {
            Dtype::F32 => Self::F32(values.map(|x| x as f32).collect()),
            Dtype::F64 => Self::F64(values.collect()),
            Dtype::F16 => Self::F16(values.map(f16::from_f64).collect()),
            _ => Self::BF16(values.map(bf16::from_f64).collect()),
        }
    }

    pub fn bits(&self) -> Vec<u64> {
        match self {
            Self::F32(values) => values.iter().map(|x| u64::from(x.to_bits())).collect(),
            Self::F64(values) => values.iter().map(|x| x.to_bits()).collect(),
            Self::F16(values) => values.iter().map(|x| u64::from(x.to_bits())).collect(),
            Self::BF16(values) => values.iter().map(|x| u64::from(x.to_bits())).collect(),
        }
    }

    pub fn to_f64(&self) -> Vec<f64> {
        match self {
            Self::F32(values) => values.iter().map(|&x| f64::from(x)).collect(),
            Self::F64(values) => values.clone(),
            Self::F16(values) => values.iter().map(|x| x.to_f64()).collect(),
            Self::BF16(values) => values.iter().map(|x| x.to_f64()).collect(),
        }
    }

    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F64(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::BF16(values) => values.len(),
        }
    }
}

impl AsGrad for Values {
    fn as_grad(&self) -> Grad<'_> {
        match self {
            Self::F32(values) => values.as_slice().into(),
            Self::F64(values) => values.as_slice().into(),
            Self::F16(values) => values.as_slice().into(),
            Self::BF16(values) => values.as_slice().into(),
        }
    }
}

impl AsGradMut for Values {
    fn as_grad_mut(&mut self) -> GradMut<'_> {
        match self {
            Self::F32(values) => values.as_mut_slice().into(),
            Self::F64(values) => values.as_mut_slice().into(),
            Self::F16(values) => values.as_mut_slice().into(),
            Self::BF16(values) => values.as_mut_slice().into(),
        }
    }
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
