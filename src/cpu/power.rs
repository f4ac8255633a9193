//! `|x|^p` for any order p of a norm, in f64. Twin of `kernels/power.cuh`, bit for bit, where the method is explained:
//! the functions of the C library are not the same on every machine, and not those of a GPU.

use super::element::CpuElement;

/// `log2(x) = whole + fraction`: an integer, and at most 1/2 on either side.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Log2 {
    whole: f64,
    fraction: f64,
}

const ONE_BITS: u64 = 0x3ff0_0000_0000_0000;
/// sqrt(1/2)
const ROOT_OF_HALF_BITS: u64 = 0x3fe6_a09e_667f_3bcd;
const FRACTION_MASK: u64 = (1 << 52) - 1;
const TWO_TO_52_BITS: u64 = 0x4330_0000_0000_0000;
const TWO_TO_54: f64 = f64::from_bits((1023 + 54) << 52);
/// What [`TWO_TO_52_BITS`] with a biased exponent in it has to be lessened by.
const WHOLE_OF_ZERO: f64 = 4_503_599_627_370_496.0 + 1023.0;

impl Log2 {
    /// Of a finite `x > 0`. (Of Inf it is 1024.)
    #[inline(always)]
    pub(crate) fn of(x: f64) -> Self {
        Self::of_either::<true>(x)
    }

    /// `SUBNORMALS`: whether `x` may be below 2^-1022.
    #[inline(always)]
    fn of_either<const SUBNORMALS: bool>(x: f64) -> Self {
        let (x, whole_of_zero) = if SUBNORMALS && x < f64::MIN_POSITIVE {
            (x * TWO_TO_54, WHOLE_OF_ZERO + 54.0)
        } else {
            (x, WHOLE_OF_ZERO)
        };
        let bits = x.to_bits().wrapping_add(ONE_BITS - ROOT_OF_HALF_BITS);
        let whole = f64::from_bits(bits >> 52 | TWO_TO_52_BITS) - whole_of_zero;
        let f = f64::from_bits((bits & FRACTION_MASK).wrapping_add(ROOT_OF_HALF_BITS));
        let (numerator, denominator) = (f - 1.0, f + 1.0);
        let inverse = 0.11686289071326848f64.mul_add(denominator, -0.7224441133556709);
        let inverse = inverse.mul_add(denominator, 1.4777559147244488);
        let miss = (-denominator).mul_add(inverse, 1.0);
        let inverse = inverse.mul_add(miss.mul_add(miss, miss), inverse);
        let s = numerator * inverse;
        let s = (-s).mul_add(denominator, numerator).mul_add(inverse, s);
        let w = s * s;
        let tail = polynomial(w, &LOG2_TAIL);
        Self { whole, fraction: (s * w).mul_add(tail, s * TWO_OVER_LN_2) }
    }
}

/// 2 / ln(2)
const TWO_OVER_LN_2: f64 = f64::from_bits(0x4007_1547_652b_82fe);
/// Of `2/ln(2) * atanh(s) = 2/ln(2) * s + s^3 * tail(s^2)`; the highest power first.
const LOG2_TAIL: [f64; 7] = [
    f64::from_bits(0x3fca_fdd0_6f96_939d),
    f64::from_bits(0x3fcc_4ff4_18a4_c6ed),
    f64::from_bits(0x3fd0_c9e9_175e_cd73),
    f64::from_bits(0x3fd4_84b0_91bb_27dc),
    f64::from_bits(0x3fda_6176_2b53_2f39),
    f64::from_bits(0x3fe2_776c_50ef_68fb),
    f64::from_bits(0x3fee_c709_dc3a_0401),
];
/// Of `2^f = 1 + f * slope(f)`; the highest power first.
const EXP2_SLOPE: [f64; 11] = [
    f64::from_bits(0x3dfe_9d3f_e395_2179),
    f64::from_bits(0x3e3e_6063_f721_7bc6),
    f64::from_bits(0x3e7b_524f_ae62_7834),
    f64::from_bits(0x3eb6_2bfd_4777_3353),
    f64::from_bits(0x3eef_fcbf_c670_dcd4),
    f64::from_bits(0x3f24_3091_3096_fd9f),
    f64::from_bits(0x3f55_d87f_e78a_5276),
    f64::from_bits(0x3f83_b2ab_6fba_1dda),
    f64::from_bits(0x3fac_6b08_d704_a0c2),
    f64::from_bits(0x3fce_bfbd_ff82_c598),
    f64::from_bits(0x3fe6_2e42_fefa_39ef),
];

#[inline(always)]
fn polynomial<const N: usize>(x: f64, coefficients: &[f64; N]) -> f64 {
    let mut sum = coefficients[0];
    for coefficient in &coefficients[1..] {
        sum = sum.mul_add(x, *coefficient);
    }
    sum
}

/// Added, it leaves no bits after the point: 1.5 * 2^52.
const ROUND_TO_INTEGER: f64 = 6_755_399_441_055_744.0;

/// `2^z = mantissa * 2^k`, k being the nearest integer of z and in the low bits of `whole`.
#[derive(Clone, Copy, Debug)]
struct Exp2 {
    mantissa: f64,
    whole: f64,
}

impl Exp2 {
    /// `|z| < 2^51`.
    #[inline(always)]
    fn of(z: f64) -> Self {
        let whole = z + ROUND_TO_INTEGER;
        let f = z - (whole - ROUND_TO_INTEGER);
        Self { mantissa: polynomial(f, &EXP2_SLOPE).mul_add(f, 1.0), whole }
    }
}

/// A power below this is 0: terms are added to at least 1.
const SMALLEST_EXPONENT: f64 = -1000.0;

/// `(x / largest)^p` for `0 <= x <= largest`, both finite; exactly 1 where they are equal.
#[inline(always)]
pub(crate) fn power_of_ratio(x: f64, largest: Log2, p: f64) -> f64 {
    power_of_ratio_of_either::<true>(x, largest, p)
}

#[inline(always)]
fn power_of_ratio_of_either<const SUBNORMALS: bool>(x: f64, largest: Log2, p: f64) -> f64 {
    let mine = Log2::of_either::<SUBNORMALS>(x);
    let log2_ratio = (mine.whole - largest.whole) + (mine.fraction - largest.fraction);
    let log2_ratio = if log2_ratio < 0.0 { log2_ratio } else { 0.0 };
    let z = p * log2_ratio;
    let power = Exp2::of(z);
    let value = f64::from_bits(power.mantissa.to_bits().wrapping_add(power.whole.to_bits() << 52));
    if x > 0.0 && z >= SMALLEST_EXPONENT {
        value
    } else {
        0.0
    }
}

/// The term of one element: `(|x| / largest)^p`.
#[inline(always)]
pub(crate) fn term<T: CpuElement>(x: T, largest: Log2, p: f64) -> f64 {
    let magnitude = x.wide().abs();
    if size_of::<T>() == size_of::<f64>() {
        power_of_ratio_of_either::<true>(magnitude, largest, p)
    } else {
        power_of_ratio_of_either::<false>(magnitude, largest, p)
    }
}

/// `x * 2^k` in two steps, as `2^k` itself may be beyond f64; `|k| <= 2000`.
fn times_power_of_two(x: f64, k: i32) -> f64 {
    let power_of_two = |exponent: i32| f64::from_bits(((exponent + 1023) as u64) << 52);
    x * power_of_two(k / 2) * power_of_two(k - k / 2)
}

/// `unit * sum^(1/p)` for a finite `unit > 0` and a `sum >= 1`; Inf where it is beyond f64. Exactly `unit` if the sum is 1.
#[inline(always)]
pub(crate) fn scaled_root(sum: f64, unit: f64, p: f64) -> f64 {
    let (of_sum, of_unit) = (Log2::of(sum), Log2::of(unit));
    let z = (of_sum.whole + of_sum.fraction) / p;
    if z.is_nan() || z >= 2200.0 {
        return f64::INFINITY; // a unit is at least 2^-1074
    }
    let root = Exp2::of(z);
    let unit_exponent = of_unit.whole as i32;
    let exponent = unit_exponent + (root.whole - ROUND_TO_INTEGER) as i32;
    if exponent > 1100 {
        return f64::INFINITY;
    }
    times_power_of_two(times_power_of_two(unit, -unit_exponent) * root.mantissa, exponent)
}

/// Whether `scaled_root` can take the root of a sum below 1, which is down to 2^-900 of the unit. Twin: `norm_over_ranks`
/// in `kernels/shards.cu`.
pub(crate) fn root_is_in_range(sum: f64, p: f64) -> bool {
    let of_sum = Log2::of(sum);
    (of_sum.whole + of_sum.fraction) / p >= -900.0
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The bounds that docs/numerics.md goes on from, in units of 2^-53: absolute for the fraction of a logarithm,
    /// relative for an exponential.
    const LOG2_ERROR: f64 = 1.5;
    const EXP2_ERROR: f64 = 2.0;
    const V: f64 = f64::EPSILON / 2.0;

    /// Argument, and the result to 106 bits; of `scripts/golden.py`, in decimal arithmetic of 80 digits.
    fn golden(function: &str) -> Vec<(f64, f64, f64)> {
        let text = include_str!("../../tests/golden/log2_exp2.txt");
        let number = |word: &str| f64::from_bits(u64::from_str_radix(word, 16).unwrap());
        let row = |line: &str| {
            let mut words = line.split(' ');
            (words.next() == Some(function)).then(|| {
                let mut next = || number(words.next().unwrap());
                (next(), next(), next())
            })
        };
        text.lines().filter_map(row).collect()
    }

    #[test]
    fn logarithms() {
        let rows = golden("log2");
        let mut worst = 0.0f64;
        for &(x, nearest, rest) in &rows {
            let Log2 { whole, fraction } = Log2::of(x);
            assert!(whole == whole.round() && fraction.abs() <= 0.5, "{x:e}");
            worst = worst.max((((whole - nearest) + fraction) - rest).abs() / V);
        }
        println!("log2: off by {worst:.3} units of 2^-53, {} arguments", rows.len());
        assert!(rows.len() > 300 && worst <= LOG2_ERROR && worst > LOG2_ERROR / 4.0, "{worst}");
        for k in -1074..=1023 {
            let exact = Log2::of(if k < -1022 { f64::from_bits(1 << (k + 1074)) } else { 2f64.powi(k) });
            assert_eq!((exact.whole, exact.fraction), (f64::from(k), 0.0));
        }
    }

    #[test]
    fn exponentials() {
        let rows = golden("exp2");
        let mut worst = 0.0f64;
        for &(z, nearest, rest) in &rows {
            let Exp2 { mantissa, whole } = Exp2::of(z);
            let got = times_power_of_two(mantissa, (whole - ROUND_TO_INTEGER) as i32);
            worst = worst.max((((got - nearest) - rest) / nearest).abs() / V);
        }
        println!("exp2: off by {worst:.3} units of 2^-53, {} arguments", rows.len());
        assert!(rows.len() > 300 && worst <= EXP2_ERROR && worst > EXP2_ERROR / 4.0, "{worst}");
    }

    #[test]
    fn powers_of_ratios_at_their_ends() {
        let largest = Log2::of(3.0);
        for p in [5e-324, 0.01, 1.5, 1e300, f64::MAX] {
            assert_eq!(power_of_ratio(3.0, largest, p), 1.0);
            assert_eq!(power_of_ratio(0.0, largest, p), 0.0);
            let below = power_of_ratio(3.0 - 4.0 * f64::EPSILON, largest, p);
            assert!((0.0..=1.0).contains(&below), "{p:e}: {below:e}");
        }
        // Neighbours, whose logarithms may come out in the wrong order.
        for i in 0..20_000u64 {
            let x = f64::from_bits(ROOT_OF_HALF_BITS + i * 0x0000_00d0_0000_03b5);
            let above = f64::from_bits(x.to_bits() + 1);
            assert!((0.0..=1.0).contains(&power_of_ratio(x, Log2::of(above), 1e300)), "{x:e}");
        }
        assert_eq!(power_of_ratio(1e-300, largest, 4.0), 0.0); // below 2^-1000
        assert_eq!(power_of_ratio(0.75, largest, 2.0), 0.0625);
        // Of the largest magnitudes of segments, one is infinite where an element is.
        assert!((0.0..=1.0).contains(&power_of_ratio(f64::MAX, Log2::of(f64::INFINITY), 0.5)));
    }

    #[test]
    fn roots_at_their_ends() {
        for unit in [5e-324, f64::MIN_POSITIVE, 0.7, 1.0, 3.0, f64::MAX] {
            for p in [5e-324, 0.01, 1.5, 1e300] {
                assert_eq!(scaled_root(1.0, unit, p), unit);
            }
            assert_eq!(scaled_root(1.0 + f64::EPSILON, unit, 1e-300), f64::INFINITY);
        }
        assert_eq!(scaled_root(4.0, f64::MAX, 2.0), f64::INFINITY);
        assert_eq!(scaled_root(16.0, 5e-324, 2.0), 2e-323);
        assert_eq!(scaled_root(4.0, 5e-324, 2.0 / 2097.0), 2f64.powi(1023)); // 2^2097, from the lowest unit
    }
}
