//! Every tolerance of the tests, with where it comes from.
//!
//! Notation: u = 2^-24 and v = 2^-53 are the unit roundoffs of f32 and f64. Terms are never negative, so an error of a
//! partial sum relative to that sum is at most as large relative to the whole, and errors of the levels of a tree add.
//! Second-order terms are covered by rounding the counts up.
#![allow(dead_code)] // every test binary uses a part

use super::format::Format;
use super::tensor::{tiles, Tensor};
use gradclip::abi::{FOLD_THREADS, ROWS_PER_SEGMENT, ROW_BYTES};
use gradclip::{Dtype, NormType};
use std::f64::consts::LN_2;

const U: f64 = 1.0 / (1u64 << 24) as f64;
const V: f64 = 1.0 / (1u64 << 53) as f64;

/// Promised for normally distributed gradients (docs/numerics.md): relative to the exactly rounded norm.
pub fn promised_on_normal_data(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 | Dtype::F64 => 1e-9,
        _ => 5e-8,
    }
}

/// Promised for any finite gradients.
pub const PROMISED_WORST_CASE: f64 = 2e-6;

/// Relative error of the norm of a list, for any finite elements: what the order of the additions allows. Much tighter
/// than what is promised, so that a step of the summation that goes missing is seen.
///
/// Above the lanes everything is f64: 1 addition to get there, 5 levels over the lanes of a warp, 3 over the segments
/// of a tile; then each of [`FOLD_THREADS`] threads adds every 1024th tile, and 10 levels add up the threads. Changes
/// of range are multiplications by powers of two: exact, or below 2^-170 of the sum.
pub fn norm(tensors: &[Tensor], norm_type: NormType) -> f64 {
    if let NormType::P(p) = norm_type {
        return norm_of_any_order(tensors.iter().map(Tensor::numel).sum(), tiles(tensors), p);
    }
    let lanes = tensors.iter().map(|tensor| lane_sum(tensor.dtype(), tensor.numel())).fold(0.0, f64::max);
    norm_of_sum(lanes, tiles(tensors), norm_type)
}

/// [`norm`] of what several ranks hold together: one division by the copies, then a fold over the ranks as over tiles, so
/// at most 11 additions and one for each 1024 ranks more.
pub fn norm_over_ranks(tensors: &[Tensor], norm_type: NormType, ranks: usize) -> f64 {
    let levels = 1 + 11 + ranks.div_ceil(FOLD_THREADS);
    match norm_type {
        NormType::P(p) => {
            let numel = tensors.iter().map(Tensor::numel).sum();
            // A combination more for each level of ranks; the division is a rounding of the sum.
            norm_of_any_order(numel, tiles(tensors) + levels * FOLD_THREADS, p) + V / p
        }
        NormType::Inf => 0.0,
        _ => norm(tensors, norm_type) + levels as f64 * V,
    }
}

/// [`norm`] of one tensor.
pub fn norm_of(dtype: Dtype, numel: usize, norm_type: NormType) -> f64 {
    let tiles = (numel * dtype.size()).div_ceil(gradclip::abi::TILE_BYTES);
    if let NormType::P(p) = norm_type {
        return norm_of_any_order(numel, tiles, p);
    }
    norm_of_sum(lane_sum(dtype, numel), tiles, norm_type)
}

/// Largest absolute error of the fraction of a logarithm to base 2, and relative one of an exponential:
/// `src/cpu/power.rs` holds its functions to them.
const LOG2_ERROR: f64 = 1.5 * V;
const EXP2_ERROR: f64 = 2.0 * V;

/// Any order, of any dtype: all is f64. A term is `2^z`, `z = p * (log2 x - log2 largest)`, and each of the combinations
/// on its way (3 levels of a tile, one for each 1024 tiles, 10 levels of the fold) multiplies by such a power again.
///
/// The errors of the logarithms themselves cancel between one change of scale and the next, but for those of the element
/// and of the last scale; the difference of two fractions is rounded each time, by V / 2. In the norm, a power of 1/p of
/// the sum, that is independent of p. What is rounded in proportion to z (the difference and the product) adds up to
/// 2 V |z| of the change from the element to the last scale. As a mean over all terms, by their share of the sum, |z| is
/// at most log2 of their number: it is their entropy less log2 of the sum. That, the exponentials, and the products and
/// additions (10 in a lane, 5 levels of a segment, then one of each for each combination) are errors of the sum, and
/// those of the norm are 1/p of them. The root takes the logarithm of a sum of at most `numel`, rounded to f64, and
/// divides it by p; then come an exponential and a product.
fn norm_of_any_order(numel: usize, tiles: usize, p: f64) -> f64 {
    let combinations = (3 + tiles.div_ceil(FOLD_THREADS) + 10) as f64;
    let log2_numel = (numel.max(2) as f64).log2();
    let of_logarithms = LN_2 * (2.0 * LOG2_ERROR + (1.0 + combinations) * V / 2.0);
    let of_sum = LN_2 * 2.0 * log2_numel * V + (1.0 + combinations) * EXP2_ERROR + (15.0 + 2.0 * combinations) * V;
    let of_root = LN_2 * (LOG2_ERROR + 2.0 * log2_numel * V);
    of_logarithms + (of_sum + of_root) / p + EXP2_ERROR + V
}

fn norm_of_sum(lanes: f64, tiles: usize, norm_type: NormType) -> f64 {
    let levels = 1 + 5 + 3 + tiles.div_ceil(FOLD_THREADS) + 10;
    let sum = lanes + levels as f64 * V;
    match norm_type {
        NormType::L1 => sum,
        NormType::L2 => sum / 2.0 + 2.0 * V, // the root halves a relative error; itself, it adds one rounding
        NormType::Rms => sum / 2.0 + 3.0 * V, // and the quotient before it half of one
        _ => 0.0,                            // a maximum is not rounded
    }
}

/// Relative error of the sum of one lane: 8 terms a chain, then 1 level over 2 chains (f64), 2 over 4 (f32) or 3 over 8
/// (f16, bf16).
fn lane_sum(dtype: Dtype, numel: usize) -> f64 {
    // Squares below 2^-126 lose up to 2^-150 each, of 2048 that add up to 2^-92 or are redone in f64.
    let underflow = 2048.0 * 2f64.powi(-150 + 92);
    match dtype {
        // The square is rounded, then 7 of 8 additions (the first is to zero) and 1 level.
        Dtype::F64 => 10.0 * V,
        // Terms are exact: squares of 8 or 11 bits fit 24. 7 additions, none in a chain of one. What the 3 levels of
        // merges round is carried beside the sum, 3 u together, and rounded at most twice a level.
        Dtype::F16 | Dtype::BF16 => {
            let additions = (numel * dtype.size()).div_ceil(ROW_BYTES).clamp(1, ROWS_PER_SEGMENT) - 1;
            additions as f64 * U * (1.0 + 7.0 * U) + 20.0 * U * U + underflow
        }
        // Dot2. The errors carried beside the sum are u for each square and u for each of the 9 additions it goes
        // through, together 10 u of the sum; as they are added up in f32 they are rounded at most 13 times: twice on
        // entering a chain, 7 times in it, twice at each of 2 levels.
        _ => 130.0 * U * U * (1.0 + 20.0 * U) + underflow,
    }
}

/// Two ways to add up the same elements differ by at most the error of each.
pub fn reordered(a: &[Tensor], b: &[Tensor], norm_type: NormType) -> f64 {
    norm(a, norm_type) + norm(b, norm_type)
}

/// Whether two norms agree to a relative error. Half a unit of the smallest subnormal is allowed: there a norm cannot be
/// closer to the truth, and changing its range rounds it once more.
pub fn close(got: f64, expected: f64, relative: f64) -> bool {
    if !got.is_finite() || !expected.is_finite() {
        return got == expected || (got.is_nan() && expected.is_nan());
    }
    // One unit: the truth is rounded to a multiple of it, and so is the result.
    (got - expected).abs() <= relative * expected.abs() + f64::from_bits(1) * f64::from(u8::from(expected < 1e-290))
}

/// Relative error of a norm, 0 for equal ones.
pub fn relative_error(got: f64, expected: f64) -> f64 {
    if got == expected {
        0.0
    } else {
        ((got - expected) / expected).abs()
    }
}

/// By how much the true norm of clipped gradients may miss the threshold: `relative * max_norm + absolute`.
///
/// The norm that was found is off by [`norm`], and so is c, which takes two roundings besides (times an eps of 0). Every
/// product is off by one unit in the last place at most: relative 2^(1 - precision), or one smallest subnormal, of which
/// the norm over n elements is n (L1) or sqrt(n) (L2).
pub struct Miss {
    pub relative: f64,
    pub absolute: f64,
}

pub fn norm_after_clipping(tensors: &[Tensor], norm_type: NormType) -> Miss {
    let rounding = tensors.iter().map(|tensor| tensor.format().epsilon()).fold(0.0, f64::max);
    let absolute = tensors.iter().map(|tensor| {
        let (unit, numel) = (tensor.format().unit(0.0), tensor.numel() as f64);
        match norm_type {
            NormType::L1 => unit * numel,
            NormType::L2 => unit * numel.sqrt(),
            NormType::P(p) if p >= 1.0 => unit * numel.powf(1.0 / p),
            NormType::P(p) => panic!("no triangle inequality at p = {p}"),
            _ => unit, // Inf; Rms: that of L2 over the root of numel
        }
    });
    Miss { relative: norm(tensors, norm_type) + rounding + 4.0 * V, absolute: absolute.sum() }
}

/// Units in the last place that one more rounding moves an element by.
pub const ROUNDING_STEPS: u64 = 1;

/// How far a peer may be from the truth where its answer is taken as right: 4 units in the last place of its own
/// arithmetic, which is that of the narrowest dtype of the list (scripts/golden.py, TOLERANCE_ULPS).
pub fn peer_norm(tensors: &[Tensor], exact: f64) -> f64 {
    4.0 * f64::max(narrowest_epsilon(tensors) * exact.abs(), Format::of(Dtype::F64).unit(exact))
}

/// The same for an element: of its norm, in the narrowest dtype, and of its own rounding.
pub fn peer_element(tensors: &[Tensor], format: Format, exact: f64) -> f64 {
    4.0 * (format.unit(exact) + narrowest_epsilon(tensors) * exact.abs())
}

/// Relative error of an element that a peer clips by the norm of the norms of `tensors` tensors of up to `numel`
/// elements, all in `dtype`, in an order of its own: each of n terms is rounded once and goes through at most n - 1
/// additions; the root halves that, and is rounded itself. Then come one rounding of the coefficient and one of the
/// product, which the other side of a comparison has too.
pub fn peer_clip(dtype: Dtype, numel: usize, tensors: usize) -> f64 {
    let unit = if dtype == Dtype::F64 { V } else { U };
    let norm = |terms: usize| (terms as f64 / 2.0 + 1.0) * unit;
    (norm(numel) + norm(tensors) + 4.0 * unit) * (1.0 + numel as f64 * unit)
}

fn narrowest_epsilon(tensors: &[Tensor]) -> f64 {
    tensors.iter().map(|tensor| tensor.format().epsilon()).fold(Format::of(Dtype::F64).epsilon(), f64::max)
}
