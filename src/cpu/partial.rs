//! A partial result of a reduction, and how two of them combine. Twin of `kernels/partial.cuh`, bit for bit.

use crate::options::NormType;

/// Stands for `sum * 2^(600 * power * scale)`, power being 1 for L1 and 2 for L2. Only f64 tensors leave scale 0.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Partial {
    pub sum: f64,
    pub scale: i32,
}

pub(crate) const RANGE_FACTOR: f64 = f64::from_bits((1023 + 600) << 52);
pub(crate) const RANGE_FACTOR_INVERSE: f64 = f64::from_bits((1023 - 600) << 52);

/// The ranges in which a sum is taken as it is; `kernels/partial.cuh` says why these.
pub(crate) const SMALLEST_SAFE_F32_SQUARES: f64 = f64::from_bits((1023 - 92) << 52);
pub(crate) const SMALLEST_SAFE_F64_SQUARES: f64 = f64::from_bits((1023 - 900) << 52);
pub(crate) const LARGEST_SAFE_F64: f64 = f64::from_bits((1023 + 900) << 52);

impl Partial {
    pub(crate) fn unscaled(sum: f64) -> Self {
        Self { sum, scale: 0 }
    }

    /// For the infinity norm a partial is a maximum, NaN above everything; else a sum.
    #[inline(always)]
    pub(crate) fn combine(self, other: Self, norm_type: NormType) -> Self {
        if norm_type == NormType::Inf {
            return if self.sum.is_nan() || self.sum > other.sum { self } else { other };
        }
        if self.scale == other.scale {
            return Self { sum: self.sum + other.sum, scale: self.scale };
        }
        if self.sum == 0.0 {
            return other; // a zero has no range of its own
        }
        if other.sum == 0.0 {
            return self;
        }
        let (high, mut low) = if self.scale > other.scale { (self, other) } else { (other, self) };
        while low.scale < high.scale {
            low.sum *= RANGE_FACTOR_INVERSE;
            if norm_type == NormType::L2 {
                low.sum *= RANGE_FACTOR_INVERSE;
            }
            low.scale += 1;
        }
        Self { sum: high.sum + low.sum, scale: high.scale }
    }
}

/// Adds up pairs at distance `N / 2`, then `N / 4`, ...: the xor tree of a warp.
#[inline(always)]
pub(crate) fn xor_tree<T: Copy, const N: usize>(mut values: [T; N], combine: impl Fn(T, T) -> T) -> T {
    let mut half = N / 2;
    while half > 0 {
        for i in 0..half {
            values[i] = combine(values[i], values[i + half]);
        }
        half /= 2;
    }
    values[0]
}
