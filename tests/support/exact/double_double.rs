//! Numbers of 106 bits as the sum of two f64 (Dekker 1971), with the logarithm and the exponential: enough for a norm of
//! any order, rounded once. Nothing in it is shared with the crate, which computes to base 2 and in 53 bits.

use std::ops::{Add, Div, Mul, Neg, Sub};

/// The sum of both; the second is at most half a unit in the last place of the first.
#[derive(Clone, Copy, Debug)]
pub struct Double2(pub f64, pub f64);

/// ln(2)
const LN_2: Double2 = Double2(std::f64::consts::LN_2, 2.3190468138462996e-17);

fn two_sum(a: f64, b: f64) -> Double2 {
    let sum = a + b;
    let b_in_sum = sum - a;
    Double2(sum, (a - (sum - b_in_sum)) + (b - b_in_sum))
}

impl From<f64> for Double2 {
    fn from(x: f64) -> Self {
        Self(x, 0.0)
    }
}

impl Add for Double2 {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        let (high, low) = (two_sum(self.0, other.0), two_sum(self.1, other.1));
        let high = two_sum(high.0, high.1 + low.0);
        two_sum(high.0, high.1 + low.1)
    }
}

impl Neg for Double2 {
    type Output = Self;
    fn neg(self) -> Self {
        Self(-self.0, -self.1)
    }
}

impl Sub for Double2 {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        self + -other
    }
}

impl Mul for Double2 {
    type Output = Self;
    fn mul(self, other: Self) -> Self {
        let product = self.0 * other.0;
        let rest = self.0.mul_add(other.0, -product) + (self.0 * other.1 + self.1 * other.0);
        two_sum(product, rest)
    }
}

impl Div for Double2 {
    type Output = Self;
    fn div(self, other: Self) -> Self {
        let first = self.0 / other.0;
        let rest = self - other * first.into();
        let second = rest.0 / other.0;
        let rest = rest - other * second.into();
        two_sum(first, second) + (rest.0 / other.0).into()
    }
}

impl Double2 {
    /// e^self as (mantissa, k): mantissa * 2^k. By its series, for a 512th of what is left of powers of two.
    pub fn exp(self) -> (Self, i32) {
        let k = (self.0 / LN_2.0).round();
        let small = (self - LN_2 * k.into()) * (1.0 / 512.0).into();
        let (mut sum, mut term) = (Self::from(1.0), Self::from(1.0));
        for n in 1..14 {
            term = term * small / f64::from(n).into();
            sum = sum + term;
        }
        for _ in 0..9 {
            sum = sum * sum;
        }
        (sum, k as i32)
    }

    /// Natural logarithm of a number from 1/2 to 2^60: the f64 one, and one step of Newton's.
    pub fn ln(self) -> Self {
        let first = Self::from(self.0.ln());
        let (inverse, k) = (-first).exp();
        first + (self * inverse * 2f64.powi(k).into() - 1.0.into())
    }
}

/// A positive f64 as one from 1 to 2 times a power of two.
pub fn split(x: f64) -> (f64, i32) {
    let (x, shift) = if x < f64::MIN_POSITIVE { (x * 2f64.powi(100), 100) } else { (x, 0) };
    let exponent = (x.to_bits() >> 52) as i32 - 1023;
    (f64::from_bits((x.to_bits() & (u64::MAX >> 12)) | 1023 << 52), exponent - shift)
}

/// Natural logarithm of a positive f64.
pub fn ln(x: f64) -> Double2 {
    let (mantissa, exponent) = split(x);
    Double2::from(mantissa).ln() + LN_2 * f64::from(exponent).into()
}

/// The norm of order `p` of magnitudes, of which `largest` is finite, positive and the largest; Inf where it is beyond
/// f64. Equal elements next to each other cost one term.
pub fn norm(magnitudes: impl Iterator<Item = f64>, largest: f64, p: f64) -> f64 {
    let (ln_largest, order) = (ln(largest), Double2::from(p));
    let mut sum = Double2::from(0.0);
    let mut last = (largest, Double2::from(1.0));
    for x in magnitudes.filter(|x| *x > 0.0) {
        if x != last.0 {
            let exponent = (ln(x) - ln_largest).0 * p;
            last = (x, Double2::from(0.0));
            if exponent > -600.0 {
                let (mantissa, k) = ((ln(x) - ln_largest) * order).exp();
                last.1 = mantissa * 2f64.powi(k).into();
            }
        }
        sum = sum + last.1;
    }
    let exponent = sum.ln() / order;
    if exponent.0.is_nan() || exponent.0 >= 1600.0 {
        return f64::INFINITY;
    }
    let ((mantissa, k), (unit, unit_exponent)) = (exponent.exp(), split(largest));
    let norm = mantissa * unit.into();
    // In two steps, as the power of two itself may be out of range.
    let exponent = k + unit_exponent;
    (norm.0 + norm.1) * 2f64.powi(exponent / 2) * 2f64.powi(exponent - exponent / 2)
}
