//! A gradient of any of the four types.
#![allow(dead_code)] // every test binary uses a part

use super::format::{nearest, Float, Format};
use gradclip::abi::TILE_BYTES;
use gradclip::cpu::{AsGrad, AsGradMut, Grad, GradMut};
use gradclip::Dtype;
use half::{bf16, f16};
use std::ops::Range;

#[derive(Clone, Debug, PartialEq)]
pub enum Tensor {
    F32(Vec<f32>),
    F64(Vec<f64>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

/// Evaluates `$body` with `$values` bound to the vector inside `$tensor`, whatever its type.
macro_rules! with_values {
    ($tensor:expr, $values:ident => $body:expr) => {
        match $tensor {
            Tensor::F32($values) => $body,
            Tensor::F64($values) => $body,
            Tensor::F16($values) => $body,
            Tensor::BF16($values) => $body,
        }
    };
}
#[allow(unused_imports)] // as above
pub(crate) use with_values;

impl Tensor {
    pub fn from_bits(dtype: Dtype, bits: impl IntoIterator<Item = u64>) -> Self {
        fn all<T: Float>(bits: impl IntoIterator<Item = u64>) -> Vec<T> {
            bits.into_iter().map(T::of_bits).collect()
        }
        match dtype {
            Dtype::F32 => Self::F32(all(bits)),
            Dtype::F64 => Self::F64(all(bits)),
            Dtype::F16 => Self::F16(all(bits)),
            _ => Self::BF16(all(bits)),
        }
    }

    /// Each value rounded to nearest in `dtype`.
    pub fn from_f64(dtype: Dtype, values: impl IntoIterator<Item = f64>) -> Self {
        Self::from_bits(dtype, values.into_iter().map(|x| nearest(dtype, x)))
    }

    pub fn dtype(&self) -> Dtype {
        self.as_grad().dtype()
    }

    pub fn format(&self) -> Format {
        Format::of(self.dtype())
    }

    pub fn numel(&self) -> usize {
        with_values!(self, values => values.len())
    }

    pub fn bits(&self) -> Vec<u64> {
        with_values!(self, values => values.iter().map(|x| x.bits()).collect())
    }

    /// As f64, which is exact.
    pub fn values(&self) -> Vec<f64> {
        with_values!(self, values => values.iter().map(|x| x.wide()).collect())
    }

    /// A part of it, as the library takes it.
    pub fn part(&self, part: Range<usize>) -> Grad<'_> {
        with_values!(self, values => values[part].into())
    }

    pub fn part_mut(&mut self, part: Range<usize>) -> GradMut<'_> {
        with_values!(self, values => (&mut values[part]).into())
    }

    pub fn has_nonfinite(&self) -> bool {
        self.bits().iter().any(|&bits| !self.format().is_finite(bits))
    }
}

/// The bits of a whole list.
pub fn bits_of(tensors: &[Tensor]) -> Vec<Vec<u64>> {
    tensors.iter().map(Tensor::bits).collect()
}

/// Index of the first tensor with a NaN or an Inf.
pub fn first_nonfinite(tensors: &[Tensor]) -> Option<usize> {
    tensors.iter().position(Tensor::has_nonfinite)
}

/// Tiles that a list is cut into: each tensor starts a new one.
pub fn tiles(tensors: &[Tensor]) -> usize {
    tensors.iter().map(|tensor| (tensor.numel() * tensor.dtype().size()).div_ceil(TILE_BYTES)).sum()
}

impl AsGrad for Tensor {
    fn as_grad(&self) -> Grad<'_> {
        with_values!(self, values => values.as_slice().into())
    }
}

impl AsGradMut for Tensor {
    fn as_grad_mut(&mut self) -> GradMut<'_> {
        with_values!(self, values => values.as_mut_slice().into())
    }
}
