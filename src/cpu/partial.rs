//! A partial result of a reduction, and how two of them combine. Twin of `kernels/partial.cuh`, bit for bit.

use super::power::{power_of_ratio, Log2};
use crate::options::NormType;

/// Stands for `sum * scale^p`, p being 1 for L1 and 2 for L2. For these the scale is 1, 2^600 or 2^-600, and only f64
/// tensors leave 1; for any other p it is the largest magnitude, Inf where an element is not finite. For the infinity
/// norm the sum is a maximum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Partial {
    pub sum: f64,
    pub scale: f64,
}

impl Default for Partial {
    /// Nothing yet.
    fn default() -> Self {
        Self::unscaled(0.0)
    }
}

pub(crate) const RANGE_FACTOR: f64 = f64::from_bits((1023 + 600) << 52);
pub(crate) const RANGE_FACTOR_INVERSE: f64 = f64::from_bits((1023 - 600) << 52);

/// The ranges in which a sum is taken as it is; `kernels/partial.cuh` says why these.
pub(crate) const SMALLEST_SAFE_F32_SQUARES: f64 = f64::from_bits((1023 - 92) << 52);
pub(crate) const SMALLEST_SAFE_F64_SQUARES: f64 = f64::from_bits((1023 - 900) << 52);
pub(crate) const LARGEST_SAFE_F64: f64 = f64::from_bits((1023 + 900) << 52);

impl Partial {
    pub(crate) fn unscaled(sum: f64) -> Self {
        Self { sum, scale: 1.0 }
    }

    /// For the infinity norm a partial is a maximum, NaN above everything; else a sum.
    #[inline(always)]
    pub(crate) fn combine(self, other: Self, norm_type: NormType) -> Self {
        if matches!(norm_type, NormType::Inf) {
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
        let (high, low) = if self.scale > other.scale { (self, other) } else { (other, self) };
        // 2^-600, or 2^-1200: that is 0 as an f64, and would be beside the high sum.
        let ratio = if high.scale > 1.0 { low.scale * RANGE_FACTOR_INVERSE } else { low.scale };
        let low_sum = match norm_type {
            NormType::P(p) => low.sum * power_of_ratio(low.scale, Log2::of(high.scale), p),
            NormType::L2 => low.sum * ratio * ratio,
            _ => low.sum * ratio,
        };
        Self { sum: high.sum + low_sum, scale: high.scale }
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
