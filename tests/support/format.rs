//! The four element types as IEEE 754 binary formats: bits, values, correct rounding, units in the last place.
//!
//! Integer arithmetic only, so that it shares nothing with what it checks, `half` included, and does not depend on the
//! floating-point environment.
#![allow(dead_code)] // every test binary uses a part

use gradclip::{Dtype, Element};
use half::{bf16, f16};
use std::cmp::Ordering;

pub const DTYPES: [Dtype; 4] = [Dtype::F32, Dtype::F64, Dtype::F16, Dtype::BF16];

/// An IEEE 754 binary format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Bits of an element.
    pub width: u32,
    /// Bits of the significand, the hidden one included.
    pub precision: u32,
    /// Exponent of the smallest subnormal.
    pub min_unit: i32,
}

/// `mantissa * 2^exponent`, with a sign that a zero has too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exact {
    pub negative: bool,
    pub mantissa: u128,
    pub exponent: i32,
}

impl Format {
    pub const fn of(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self { width: 32, precision: 24, min_unit: -149 },
            Dtype::F64 => Self { width: 64, precision: 53, min_unit: -1074 },
            Dtype::F16 => Self { width: 16, precision: 11, min_unit: -24 },
            _ => Self { width: 16, precision: 8, min_unit: -133 }, // bf16: the exponents of f32
        }
    }

    pub const fn sign_bit(&self) -> u64 {
        1 << (self.width - 1)
    }

    /// All exponent bits set: +Inf.
    pub const fn inf_bits(&self) -> u64 {
        self.sign_bit() - (1 << (self.precision - 1))
    }

    pub const fn magnitude(&self, bits: u64) -> u64 {
        bits & (self.sign_bit() - 1)
    }

    pub const fn is_nan(&self, bits: u64) -> bool {
        self.magnitude(bits) > self.inf_bits()
    }

    pub const fn is_inf(&self, bits: u64) -> bool {
        self.magnitude(bits) == self.inf_bits()
    }

    pub const fn is_finite(&self, bits: u64) -> bool {
        self.magnitude(bits) < self.inf_bits()
    }

    pub const fn is_subnormal(&self, bits: u64) -> bool {
        let magnitude = self.magnitude(bits);
        magnitude != 0 && magnitude < 1 << (self.precision - 1)
    }

    /// A finite element, exactly.
    #[inline]
    pub fn decode(&self, bits: u64) -> Exact {
        let (magnitude, hidden) = (self.magnitude(bits), 1 << (self.precision - 1));
        let (field, fraction) = (magnitude / hidden, magnitude % hidden);
        Exact {
            negative: bits & self.sign_bit() != 0,
            mantissa: u128::from(if field == 0 { fraction } else { fraction + hidden }),
            exponent: self.min_unit + (field as i32 - 1).max(0),
        }
    }

    /// Any element as f64, which holds all four formats; NaN becomes f64's.
    pub fn value(&self, bits: u64) -> f64 {
        let sign = if bits & self.sign_bit() == 0 { 0 } else { 1 << 63 };
        if self.is_nan(bits) {
            return f64::NAN;
        }
        if self.is_inf(bits) {
            return f64::from_bits(sign | f64::INFINITY.to_bits());
        }
        let Exact { mantissa, exponent, .. } = self.decode(bits);
        if mantissa >> (self.precision - 1) == 0 {
            return f64::from_bits(Self::of(Dtype::F64).nearest(&self.decode(bits)));
        }
        // The leading bit of a normal element has this exponent; the others go below it.
        let leading = (exponent + self.precision as i32 - 1 + 1023) as u64;
        let fraction = (mantissa as u64) << (53 - self.precision) & ((1 << 52) - 1);
        f64::from_bits(sign | leading << 52 | fraction)
    }

    /// Bits of the largest magnitude that is not above that of `exact`, and whether they are equal.
    pub fn towards_zero(&self, exact: &Exact) -> (u64, bool) {
        if exact.mantissa == 0 {
            return (0, true);
        }
        let top = exact.exponent + 127 - exact.mantissa.leading_zeros() as i32;
        let unit = (top - self.precision as i32 + 1).max(self.min_unit);
        let shift = unit - exact.exponent;
        let (units, equal) = match shift {
            ..=0 => ((exact.mantissa << -shift) as u64, true),
            1..=127 => ((exact.mantissa >> shift) as u64, exact.mantissa << (128 - shift) == 0),
            _ => (0, false),
        };
        // The exponent field counts units above the smallest; the hidden bit adds one to it.
        let bits = (((unit - self.min_unit) as u64) << (self.precision - 1)) + units;
        if bits >= self.inf_bits() {
            (self.inf_bits() - 1, false)
        } else {
            (bits, equal)
        }
    }

    /// Rounded to nearest, ties to even; beyond the largest finite value by half a unit it becomes Inf.
    pub fn nearest(&self, exact: &Exact) -> u64 {
        let (below, equal) = self.towards_zero(exact);
        let up = !equal
            && match self.compare_with_midpoint(exact, below) {
                Ordering::Less => false,
                Ordering::Equal => below & 1 == 1,
                Ordering::Greater => true,
            };
        let sign = if exact.negative { self.sign_bit() } else { 0 };
        sign | (below + u64::from(up))
    }

    /// |exact| against the midpoint of the magnitude `below` and the next one.
    fn compare_with_midpoint(&self, exact: &Exact, below: u64) -> Ordering {
        let Exact { mantissa, exponent, .. } = self.decode(below);
        let (midpoint, exponent) = (2 * mantissa + 1, exponent - 1);
        // At most 55 significant bits against 128: one shift always fits, and the larger exponent tells which way.
        let shift = exact.exponent - exponent;
        if shift >= 0 {
            if shift >= exact.mantissa.leading_zeros() as i32 {
                return Ordering::Greater; // mantissa * 2^shift needs more than 127 bits, the midpoint has 55
            }
            (exact.mantissa << shift).cmp(&midpoint)
        } else if -shift > midpoint.leading_zeros() as i32 {
            Ordering::Less // the midpoint needs more than 128 bits
        } else {
            exact.mantissa.cmp(&(midpoint << -shift))
        }
    }

    /// The unit in the last place of `value`, a power of two.
    pub fn unit(&self, value: f64) -> f64 {
        let wide = Self::of(Dtype::F64);
        let Exact { mantissa, exponent, .. } = wide.decode(value.to_bits());
        let top = exponent + 127 - mantissa.leading_zeros() as i32;
        power_of_two(if mantissa == 0 { self.min_unit } else { (top - self.precision as i32 + 1).max(self.min_unit) })
    }

    /// Distance between neighbours at 1.
    pub fn epsilon(&self) -> f64 {
        power_of_two(1 - self.precision as i32)
    }

    /// Position of a finite or infinite element among all of them in order; both zeros are at 0.
    pub fn ordinal(&self, bits: u64) -> i64 {
        let magnitude = self.magnitude(bits) as i64;
        if bits & self.sign_bit() == 0 {
            magnitude
        } else {
            -magnitude
        }
    }

    /// How many steps from one element to the next lie between two of them; both zeros are one element.
    pub fn steps_between(&self, a: u64, b: u64) -> u64 {
        self.ordinal(a).abs_diff(self.ordinal(b))
    }
}

/// `2^exponent`, also where it is subnormal.
pub fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(Format::of(Dtype::F64).nearest(&Exact { negative: false, mantissa: 1, exponent }))
}

/// `x * c`, exactly: 53 by 53 bits.
pub fn product(format: Format, bits: u64, c: f64) -> Exact {
    let (x, c) = (format.decode(bits), Format::of(Dtype::F64).decode(c.to_bits()));
    Exact { negative: x.negative != c.negative, mantissa: x.mantissa * c.mantissa, exponent: x.exponent + c.exponent }
}

/// The elements that lie within one unit in the last place of `exact`: its two neighbours, or, if it is an element
/// itself, that one and its neighbours. A zero may have either sign; [`product`]'s sign tells which is right.
pub fn within_one_unit(format: Format, exact: &Exact, got: u64) -> bool {
    let (below, equal) = format.towards_zero(exact);
    let magnitude = format.magnitude(got);
    let sign_kept = (got & format.sign_bit() != 0) == exact.negative;
    let lowest = if equal { below.saturating_sub(1) } else { below };
    (lowest..=below + 1).contains(&magnitude) && (sign_kept || magnitude == 0)
}

/// An element type as bits.
pub trait Float: Element + std::fmt::Debug + PartialEq {
    const FORMAT: Format = Format::of(Self::DTYPE);

    fn bits(self) -> u64;
    fn of_bits(bits: u64) -> Self;

    /// As f64, which is exact.
    fn wide(self) -> f64 {
        Self::FORMAT.value(self.bits())
    }

    /// `x` rounded to nearest, ties to even; infinite beyond the largest finite value.
    fn nearest(x: f64) -> Self {
        Self::of_bits(nearest(Self::DTYPE, x))
    }
}

/// Bits of `x` rounded to nearest, ties to even, in `dtype`; a NaN becomes quiet, without payload.
pub fn nearest(dtype: Dtype, x: f64) -> u64 {
    let format = Format::of(dtype);
    if x.is_nan() {
        return format.inf_bits() | 1 << (format.precision - 2);
    }
    if x.is_infinite() {
        return format.inf_bits() | if x < 0.0 { format.sign_bit() } else { 0 };
    }
    format.nearest(&Format::of(Dtype::F64).decode(x.to_bits()))
}

macro_rules! float {
    ($type:ty, $bits:ty) => {
        impl Float for $type {
            #[inline]
            fn bits(self) -> u64 {
                self.to_bits().into()
            }
            fn of_bits(bits: u64) -> Self {
                Self::from_bits(bits as $bits)
            }
        }
    };
}
float!(f32, u32);
float!(f64, u64);
float!(f16, u16);
float!(bf16, u16);
