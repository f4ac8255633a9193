//! Gradients in host memory.

use crate::dtype::{Dtype, Element};
use crate::plan::TensorRef;
use bytemuck::Pod;
use half::{bf16, f16};

/// A gradient to read.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Grad<'a> {
    /// f32
    F32(&'a [f32]),
    /// f64
    F64(&'a [f64]),
    /// f16
    F16(&'a [f16]),
    /// bf16
    BF16(&'a [bf16]),
}

/// A gradient to clip in place.
#[derive(Debug)]
#[non_exhaustive]
pub enum GradMut<'a> {
    /// f32
    F32(&'a mut [f32]),
    /// f64
    F64(&'a mut [f64]),
    /// f16
    F16(&'a mut [f16]),
    /// bf16
    BF16(&'a mut [bf16]),
}

/// Evaluates `$body` with `$slice` bound to the slice inside `$grad`, whatever its type.
macro_rules! with_slice {
    ($kind:ident, $grad:expr, $slice:ident => $body:expr) => {
        match $grad {
            $kind::F32($slice) => $body,
            $kind::F64($slice) => $body,
            $kind::F16($slice) => $body,
            $kind::BF16($slice) => $body,
        }
    };
}
pub(crate) use with_slice;

impl Grad<'_> {
    pub(crate) fn tensor_ref(&self) -> TensorRef {
        fn of<T: Element>(slice: &[T]) -> TensorRef {
            TensorRef { address: slice.as_ptr() as u64, numel: slice.len() as u64, dtype: T::DTYPE }
        }
        with_slice!(Self, self, slice => of(slice))
    }

    /// Element type.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.tensor_ref().dtype
    }
}

/// Something that holds one gradient in host memory: slices, arrays and vectors of `f32`, `f64`, [`struct@f16`] and [`struct@bf16`],
/// references to them, and [`Grad`].
///
/// For a list of mixed types use `&dyn AsGrad` or [`Grad`].
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a gradient",
    note = "a call takes a list of gradients: slices, vectors or arrays of f32, f64, f16 or bf16; one flat buffer is `&mut [&mut buffer]`, mixed types are `&mut dyn AsGradMut`"
)]
pub trait AsGrad {
    /// The gradient.
    fn as_grad(&self) -> Grad<'_>;
}

/// Something that holds one gradient in host memory and can be written: the writable ones of [`AsGrad`], and
/// [`GradMut`].
///
/// For a list of mixed types use `&mut dyn AsGradMut` or [`GradMut`]:
///
/// ```
/// use gradclip::cpu::{self, AsGradMut};
/// let (mut weight, mut bias) = (vec![3.0f32], vec![half::bf16::from_f32(4.0)]);
/// let mut grads: [&mut dyn AsGradMut; 2] = [&mut weight, &mut bias];
/// assert_eq!(cpu::clip_grad_norm(&mut grads, 1.0)?.total_norm, 5.0);
/// # Ok::<(), gradclip::Error>(())
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a gradient",
    note = "a call takes a list of gradients: slices, vectors or arrays of f32, f64, f16 or bf16; one flat buffer is `&mut [&mut buffer]`, mixed types are `&mut dyn AsGradMut`"
)]
pub trait AsGradMut: AsGrad {
    /// The gradient.
    fn as_grad_mut(&mut self) -> GradMut<'_>;
}

/// A slice of one of the four types to its variant. Kept apart from [`Element`], whose documentation it would clutter.
trait Wrap: Element + Pod {
    fn wrap(slice: &[Self]) -> Grad<'_>;
    fn wrap_mut(slice: &mut [Self]) -> GradMut<'_>;
}

macro_rules! implement_for {
    ($type:ty, $variant:ident) => {
        impl Wrap for $type {
            fn wrap(slice: &[Self]) -> Grad<'_> {
                Grad::$variant(slice)
            }
            fn wrap_mut(slice: &mut [Self]) -> GradMut<'_> {
                GradMut::$variant(slice)
            }
        }
        impl<'a> From<&'a [$type]> for Grad<'a> {
            fn from(slice: &'a [$type]) -> Self {
                Grad::$variant(slice)
            }
        }
        impl<'a> From<&'a mut [$type]> for GradMut<'a> {
            fn from(slice: &'a mut [$type]) -> Self {
                GradMut::$variant(slice)
            }
        }
        impl AsGrad for [$type] {
            fn as_grad(&self) -> Grad<'_> {
                <$type>::wrap(self)
            }
        }
        impl AsGradMut for [$type] {
            fn as_grad_mut(&mut self) -> GradMut<'_> {
                <$type>::wrap_mut(self)
            }
        }
        impl AsGrad for Vec<$type> {
            fn as_grad(&self) -> Grad<'_> {
                <$type>::wrap(self)
            }
        }
        impl AsGradMut for Vec<$type> {
            fn as_grad_mut(&mut self) -> GradMut<'_> {
                <$type>::wrap_mut(self)
            }
        }
        impl<const N: usize> AsGrad for [$type; N] {
            fn as_grad(&self) -> Grad<'_> {
                <$type>::wrap(self)
            }
        }
        impl<const N: usize> AsGradMut for [$type; N] {
            fn as_grad_mut(&mut self) -> GradMut<'_> {
                <$type>::wrap_mut(self)
            }
        }
    };
}
implement_for!(f32, F32);
implement_for!(f64, F64);
implement_for!(f16, F16);
implement_for!(bf16, BF16);

impl<G: AsGrad + ?Sized> AsGrad for Box<G> {
    fn as_grad(&self) -> Grad<'_> {
        (**self).as_grad()
    }
}
impl<G: AsGradMut + ?Sized> AsGradMut for Box<G> {
    fn as_grad_mut(&mut self) -> GradMut<'_> {
        (**self).as_grad_mut()
    }
}
impl<G: AsGrad + ?Sized> AsGrad for &G {
    fn as_grad(&self) -> Grad<'_> {
        (**self).as_grad()
    }
}
impl<G: AsGrad + ?Sized> AsGrad for &mut G {
    fn as_grad(&self) -> Grad<'_> {
        (**self).as_grad()
    }
}
impl<G: AsGradMut + ?Sized> AsGradMut for &mut G {
    fn as_grad_mut(&mut self) -> GradMut<'_> {
        (**self).as_grad_mut()
    }
}
impl AsGrad for Grad<'_> {
    fn as_grad(&self) -> Grad<'_> {
        *self
    }
}
impl AsGrad for GradMut<'_> {
    fn as_grad(&self) -> Grad<'_> {
        with_slice!(Self, self, slice => Wrap::wrap(slice))
    }
}
impl AsGradMut for GradMut<'_> {
    fn as_grad_mut(&mut self) -> GradMut<'_> {
        with_slice!(Self, self, slice => Wrap::wrap_mut(slice))
    }
}
