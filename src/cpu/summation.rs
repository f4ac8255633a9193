//! The fast sum of one segment. Twin of `kernels/summation.cuh`: chains of 8 elements, one for each place in a row,
//! merged two and two to one f64 for each lane, and those by the xor tree.

use super::element::{f32_from_f16, CpuElement};
use super::partial::xor_tree;
use crate::abi::{ROWS_PER_SEGMENT, WARP_THREADS};
use half::{bf16, f16};

/// Chains worked on at a time: what fits into the vector registers together with its operands.
const GROUP: usize = 32;

/// A dtype whose segments can be added up.
pub(crate) trait FastSum: CpuElement {
    /// Room for one segment.
    type Segment: AsMut<[Self]>;
    fn zeroed_segment() -> Self::Segment;
    /// `segment` has `SEGMENT_NUMEL` elements.
    fn segment_sum<const L2: bool, const FMA: bool>(segment: &[Self]) -> f64;
    fn largest_magnitude_bits(elements: &[Self]) -> u64;
}

/// For element types held in `$bits`, an unsigned integer.
macro_rules! largest_magnitude_bits {
    ($bits:ty, $mask:expr) => {
        #[inline(always)]
        fn largest_magnitude_bits(elements: &[Self]) -> u64 {
            let bits: &[$bits] = bytemuck::cast_slice(elements);
            let mut largest: [$bits; 64] = [0; 64];
            let (chunks, rest) = bits.as_chunks::<64>();
            for chunk in chunks {
                for (largest, x) in largest.iter_mut().zip(chunk) {
                    *largest = (*largest).max(x & $mask);
                }
            }
            let rest = rest.iter().map(|x| x & $mask).max().unwrap_or(0);
            u64::from(largest.into_iter().fold(rest, <$bits>::max))
        }
    };
}

impl FastSum for f32 {
    type Segment = [f32; 1024];
    fn zeroed_segment() -> Self::Segment {
        [0.0; 1024]
    }
    #[inline(always)]
    fn segment_sum<const L2: bool, const FMA: bool>(segment: &[f32]) -> f64 {
        compensated_sum::<L2, FMA>(segment)
    }
    largest_magnitude_bits!(u32, 0x7fff_ffff);
}

impl FastSum for f64 {
    type Segment = [f64; 512];
    fn zeroed_segment() -> Self::Segment {
        [0.0; 512]
    }
    #[inline(always)]
    fn segment_sum<const L2: bool, const FMA: bool>(segment: &[f64]) -> f64 {
        plain_sum_f64::<L2>(segment)
    }
    largest_magnitude_bits!(u64, u64::MAX >> 1);
}

impl FastSum for f16 {
    type Segment = [f16; 2048];
    fn zeroed_segment() -> Self::Segment {
        [f16::ZERO; 2048]
    }
    #[inline(always)]
    fn segment_sum<const L2: bool, const FMA: bool>(segment: &[f16]) -> f64 {
        plain_sum_f32::<L2, _>(segment, f32_from_f16)
    }
    largest_magnitude_bits!(u16, 0x7fff);
}

impl FastSum for bf16 {
    type Segment = [bf16; 2048];
    fn zeroed_segment() -> Self::Segment {
        [bf16::ZERO; 2048]
    }
    #[inline(always)]
    fn segment_sum<const L2: bool, const FMA: bool>(segment: &[bf16]) -> f64 {
        plain_sum_f32::<L2, _>(segment, CpuElement::real)
    }
    largest_magnitude_bits!(u16, 0x7fff);
}

/// x^2 or |x|.
#[inline(always)]
fn term_f32<const L2: bool>(x: f32) -> f32 {
    if L2 {
        x * x
    } else {
        x.abs()
    }
}

/// Knuth's TwoSum: `a + b == sum + error`, exactly.
#[inline(always)]
fn two_sum(a: f32, b: f32) -> (f32, f32) {
    let sum = a + b;
    let b_in_sum = sum - a;
    (sum, (a - (sum - b_in_sum)) + (b - b_in_sum))
}

/// `x * x - square`, exact while the square is in range: by fma, or in f64, where the product is exact.
#[inline(always)]
fn square_error<const FMA: bool>(x: f32, square: f32) -> f32 {
    if FMA {
        x.mul_add(x, -square)
    } else {
        (f64::from(x) * f64::from(x) - f64::from(square)) as f32
    }
}

/// Dot2 of Ogita, Rump and Oishi (2005): the sum with its rounding errors carried beside it.
#[inline(always)]
fn compensated_sum<const L2: bool, const FMA: bool>(segment: &[f32]) -> f64 {
    const CHAINS: usize = 128;
    let mut sum = [0.0f32; CHAINS];
    let mut error = [0.0f32; CHAINS];
    for group in (0..CHAINS).step_by(GROUP) {
        let mut s = [0.0f32; GROUP];
        let mut e = [0.0f32; GROUP];
        for row in 0..ROWS_PER_SEGMENT {
            let x = &segment[row * CHAINS + group..][..GROUP];
            for i in 0..GROUP {
                let term = term_f32::<L2>(x[i]);
                let (next, mut step_error) = two_sum(s[i], term);
                if L2 {
                    step_error += square_error::<FMA>(x[i], term);
                }
                s[i] = next;
                e[i] += step_error;
            }
        }
        sum[group..][..GROUP].copy_from_slice(&s);
        error[group..][..GROUP].copy_from_slice(&e);
    }
    let merge = |(a, a_error): (f32, f32), (b, b_error): (f32, f32)| {
        let (sum, step_error) = two_sum(a, b);
        (sum, (a_error + b_error) + step_error)
    };
    let mut lanes = [0.0f64; WARP_THREADS];
    for (lane, value) in lanes.iter_mut().enumerate() {
        let chain = |j: usize| (sum[4 * lane + j], error[4 * lane + j]);
        let (sum, error) = merge(merge(chain(0), chain(1)), merge(chain(2), chain(3)));
        *value = f64::from(sum) + f64::from(error);
    }
    xor_tree(lanes, |a, b| a + b)
}

/// f16 and bf16 in f32: the terms are exact, at most 32 are added before f64 takes over.
#[inline(always)]
fn plain_sum_f32<const L2: bool, T: Copy>(segment: &[T], real: impl Fn(T) -> f32 + Copy) -> f64 {
    const CHAINS: usize = 256;
    let mut sum = [0.0f32; CHAINS];
    for group in (0..CHAINS).step_by(GROUP) {
        let mut s = [0.0f32; GROUP];
        for row in 0..ROWS_PER_SEGMENT {
            let x = &segment[row * CHAINS + group..][..GROUP];
            for i in 0..GROUP {
                s[i] += term_f32::<L2>(real(x[i]));
            }
        }
        sum[group..][..GROUP].copy_from_slice(&s);
    }
    let mut lanes = [0.0f64; WARP_THREADS];
    for (lane, value) in lanes.iter_mut().enumerate() {
        let chain = |j: usize| sum[8 * lane + j];
        let low = (chain(0) + chain(1)) + (chain(2) + chain(3));
        let high = (chain(4) + chain(5)) + (chain(6) + chain(7));
        *value = f64::from(low) + f64::from(high);
    }
    xor_tree(lanes, |a, b| a + b)
}

#[inline(always)]
fn plain_sum_f64<const L2: bool>(segment: &[f64]) -> f64 {
    const CHAINS: usize = 64;
    let mut sum = [0.0f64; CHAINS];
    for group in (0..CHAINS).step_by(GROUP) {
        let mut s = [0.0f64; GROUP];
        for row in 0..ROWS_PER_SEGMENT {
            let x = &segment[row * CHAINS + group..][..GROUP];
            for i in 0..GROUP {
                s[i] += if L2 { x[i] * x[i] } else { x[i].abs() };
            }
        }
        sum[group..][..GROUP].copy_from_slice(&s);
    }
    let lanes: [f64; WARP_THREADS] = std::array::from_fn(|lane| sum[2 * lane] + sum[2 * lane + 1]);
    xor_tree(lanes, |a, b| a + b)
}
