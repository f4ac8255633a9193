//! The element types a gradient can have.

use half::{bf16, f16};

/// Element type of a gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum Dtype {
    /// 32-bit float.
    F32 = 0,
    /// 64-bit float.
    F64 = 1,
    /// IEEE 754 half precision.
    F16 = 2,
    /// bfloat16.
    BF16 = 3,
}

impl Dtype {
    /// By their numbers.
    pub(crate) const ALL: [Self; 4] = [Self::F32, Self::F64, Self::F16, Self::BF16];

    /// Size of one element in bytes.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// Largest finite value, as f64.
    pub(crate) const fn largest(self) -> f64 {
        match self {
            Self::F32 => f32::MAX as f64,
            Self::F64 => f64::MAX,
            Self::F16 => 65504.0,
            Self::BF16 => 3.3895313892515355e38,
        }
    }

    /// `x` rounded to nearest even in this type, as f64. A finite `x` stays finite.
    pub(crate) fn round(self, x: f64) -> f64 {
        if x.is_infinite() {
            return x;
        }
        let rounded = match self {
            Self::F32 => f64::from(x as f32),
            Self::F64 => x,
            Self::F16 => f64::from(f16::from_f32(f32_rounded_to_odd(x))),
            Self::BF16 => f64::from(bf16::from_f32(f32_rounded_to_odd(x))),
        };
        rounded.clamp(-self.largest(), self.largest())
    }
}

/// What `f32` cannot hold of `x` is kept in its last bit, so that rounding the result to a type of fewer bits is the same
/// as rounding `x` (Boldo and Melquiond, "When double rounding is odd", 2005).
fn f32_rounded_to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    if f64::from(nearest) == x {
        return nearest;
    }
    let towards_zero = nearest.to_bits() - u32::from(f64::from(nearest).abs() > x.abs());
    f32::from_bits(towards_zero | 1)
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
        })
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// A Rust type that gradients can be made of: `f32`, `f64`, [`half::f16`], [`half::bf16`].
pub trait Element: sealed::Sealed + Copy + Send + Sync + 'static {
    /// Its tag.
    const DTYPE: Dtype;
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
}
impl Element for f64 {
    const DTYPE: Dtype = Dtype::F64;
}
impl Element for f16 {
    const DTYPE: Dtype = Dtype::F16;
}
impl Element for bf16 {
    const DTYPE: Dtype = Dtype::BF16;
}
