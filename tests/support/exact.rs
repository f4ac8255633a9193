//! Norms without rounding: sums as fixed-point integers, rounded once, at the end. Those of any order in numbers of 106
//! bits.
#![allow(dead_code)] // every test binary uses a part

#[path = "exact/double_double.rs"]
pub mod double_double;

use super::format::{Float, Format};
use super::tensor::{with_values, Tensor};
use gradclip::{Dtype, NormType};
use std::cmp::Ordering;

/// Exponent of the lowest bit of the fixed-point number. Squares of f64 reach down to 2^-2148, and squares of halves of
/// its smallest unit, which decide the rounding of a subnormal norm, to 2^-2150.
const LOWEST: i32 = -34 * 64;
/// Up to 2^2048, the square of the largest f64, times 2^64 elements.
const LIMBS: usize = 67;

/// A sum of squares or of magnitudes of finite elements, with every bit.
#[derive(Clone)]
pub struct ExactSum {
    /// Exponent of each term: 1 or 2.
    power: u32,
    /// Little-endian, in units of 2^LOWEST.
    limbs: [u64; LIMBS],
    /// Whether the sum is a little more than that, below one unit.
    rest: bool,
}

impl ExactSum {
    pub fn new(norm_type: NormType) -> Self {
        let power = match norm_type {
            NormType::L1 => 1,
            NormType::L2 | NormType::Rms => 2,
            other => panic!("{other:?} is not of order 1 or 2"),
        };
        Self { power, limbs: [0; LIMBS], rest: false }
    }

    /// Terms with equal exponents are added as integers, and only what those bins hold is shifted into place: one
    /// integer addition for an element.
    pub fn add<T: Float>(&mut self, elements: &[T]) {
        let exponent_bits = T::FORMAT.width - T::FORMAT.precision;
        let mut bins = vec![0u128; 1 << exponent_bits];
        let square = self.power == 2;
        for &x in elements {
            assert!(T::FORMAT.is_finite(x.bits()), "the exact sum is over finite elements only");
            let x = T::FORMAT.decode(x.bits());
            let term = if square { x.mantissa * x.mantissa } else { x.mantissa };
            let index = (x.exponent - T::FORMAT.min_unit) as usize;
            match bins[index].checked_add(term) {
                Some(sum) => bins[index] = sum,
                None => {
                    self.add_term(bins[index], self.power as i32 * x.exponent);
                    bins[index] = term;
                }
            }
        }
        for (index, &sum) in bins.iter().enumerate() {
            if sum > 0 {
                self.add_term(sum, self.power as i32 * (T::FORMAT.min_unit + index as i32));
            }
        }
    }

    /// Adds `term * 2^exponent`.
    fn add_term(&mut self, term: u128, exponent: i32) {
        let mut carry = false;
        for (limb, part) in self.limbs.iter_mut().zip(at_exponent(term, exponent)) {
            let (sum, overflow) = limb.overflowing_add(part);
            let (sum, carry_overflow) = sum.overflowing_add(u64::from(carry));
            (*limb, carry) = (sum, overflow || carry_overflow);
        }
        assert!(!carry, "more than 2^64 elements");
    }

    /// The mean of `numel` terms, where this is their sum.
    pub fn mean(mut self, numel: usize) -> Self {
        let mut rest = 0u128;
        for limb in self.limbs.iter_mut().rev() {
            let high = rest << 64 | u128::from(*limb);
            *limb = (high / numel as u128) as u64;
            rest = high % numel as u128;
        }
        Self { rest: rest > 0, ..self }
    }

    /// The sum, or its square root, rounded once to nearest even. Inf where that is beyond the largest f64.
    pub fn norm(&self) -> f64 {
        let Some(top) = (0..LIMBS).rev().find(|&i| self.limbs[i] > 0) else { return 0.0 };
        let exponent = LOWEST + 64 * top as i32 + 63 - self.limbs[top].leading_zeros() as i32;
        // The norm is `units` of 2^unit and a rest; the number of units has 53 bits, or fewer below the normal range.
        let format = Format::of(Dtype::F64);
        let unit = (exponent.div_euclid(self.power as i32) - 52).max(format.min_unit);
        let (mut units, mut above) = (0u64, 1u64 << 53);
        while above - units > 1 {
            let middle = units + (above - units) / 2;
            if self.compare(middle, unit) == Ordering::Less {
                above = middle;
            } else {
                units = middle;
            }
        }
        let round_up = match self.compare(2 * units + 1, unit - 1) {
            Ordering::Greater => true,
            Ordering::Equal => units & 1 == 1,
            Ordering::Less => false,
        };
        // A carry into the exponent is right, also the one that makes Inf of the largest f64.
        let bits = (((unit - format.min_unit) as u64) << 52) + units + u64::from(round_up);
        f64::from_bits(bits.min(format.inf_bits()))
    }

    /// This sum against `(units * 2^unit)^power`.
    fn compare(&self, units: u64, unit: i32) -> Ordering {
        let other = at_exponent(u128::from(units).pow(self.power), self.power as i32 * unit);
        let more = if self.rest { Ordering::Greater } else { Ordering::Equal };
        self.limbs.iter().rev().cmp(other.iter().rev()).then(more)
    }
}

/// `term * 2^exponent` as a fixed-point number.
fn at_exponent(term: u128, exponent: i32) -> [u64; LIMBS] {
    let mut limbs = [0; LIMBS];
    let shift = (exponent - LOWEST) as usize;
    let (first, shift) = (shift / 64, shift % 64);
    let (low, high) = (term as u64, (term >> 64) as u64);
    let parts = if shift == 0 {
        [low, high, 0]
    } else {
        [low << shift, low >> (64 - shift) | high << shift, high >> (64 - shift)]
    };
    for (i, part) in parts.into_iter().enumerate().filter(|(_, part)| *part > 0) {
        limbs[first + i] = part;
    }
    limbs
}

/// The norm of a list, rounded once to f64: NaN if any element is NaN, else infinite if any is.
pub fn total_norm(tensors: &[Tensor], norm_type: NormType) -> f64 {
    let magnitudes = || tensors.iter().flat_map(Tensor::values).map(f64::abs);
    if magnitudes().any(f64::is_nan) {
        return f64::NAN;
    }
    let largest = magnitudes().fold(0.0, f64::max);
    if largest.is_infinite() || largest == 0.0 || norm_type == NormType::Inf {
        return largest;
    }
    if let NormType::P(p) = norm_type {
        return double_double::norm(magnitudes(), largest, p);
    }
    let mut sum = ExactSum::new(norm_type);
    for tensor in tensors {
        with_values!(tensor, values => sum.add(values));
    }
    if norm_type == NormType::Rms {
        sum = sum.mean(tensors.iter().map(Tensor::numel).sum());
    }
    sum.norm()
}

/// The norm of finite elements of one type, rounded once to f64.
pub fn norm<T: Float>(elements: &[T], norm_type: NormType) -> f64 {
    if let NormType::P(p) = norm_type {
        let magnitudes = || elements.iter().map(|x| T::FORMAT.value(x.bits()).abs());
        let largest = magnitudes().fold(0.0, f64::max);
        return if largest > 0.0 { double_double::norm(magnitudes(), largest, p) } else { 0.0 };
    }
    let mut sum = ExactSum::new(norm_type);
    sum.add(elements);
    if norm_type == NormType::Rms && !elements.is_empty() {
        sum = sum.mean(elements.len());
    }
    sum.norm()
}
