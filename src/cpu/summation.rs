//! The fast sum of one segment. Twin of `kernels/summation.cuh`: chains of 8 elements, one for each place in a row,
//! merged two and two to one f64 for each lane, and those by the xor tree.
//!
//! Written so that the compiler makes vector code of it; `benches/README.md` says how to look. GB/s below are those of
//! one Zen 5 core at 3.7 GHz, data in its L2 cache.
#![allow(clippy::needless_range_loop)] // one index into several arrays at once

use super::element::CpuElement;
use super::isa::{prefetch, Simd};
use crate::abi::{ROWS_PER_SEGMENT, WARP_THREADS};
use half::{bf16, f16};
use std::hint::black_box;

/// Chains worked on at a time, in bytes of a row: two cache lines. With one or with four, less of the memory bandwidth is
/// reached (bf16 86 % of a plain read and f64 100 %, instead of 90 % and 109 %), and with four of f32 the 16 registers of
/// AVX2 do not hold the sums.
const GROUP_BYTES: usize = 128;
/// Of a cache line.
pub(crate) const LINE_BYTES: usize = 64;

/// A dtype whose segments can be added up.
pub(crate) trait FastSum: CpuElement {
    /// Room for one segment.
    type Segment: AsMut<[Self]>;
    fn zeroed_segment() -> Self::Segment;
    /// The sums of the lanes of `segment`; meanwhile the processor fetches `ahead`. Both have `SEGMENT_NUMEL` elements.
    fn lane_sums<const L2: bool, S: Simd>(simd: S, segment: &[Self], ahead: &[Self]) -> LaneSums;
    fn largest_magnitude_bits(elements: &[Self]) -> u64;
}

/// For element types of the size of `$bits`. A signed integer: without its sign a value is one that is not negative, and
/// SSE2 compares no other kind.
macro_rules! largest_magnitude_bits {
    ($bits:ty) => {
        #[inline(always)]
        fn largest_magnitude_bits(elements: &[Self]) -> u64 {
            let bits: &[$bits] = bytemuck::cast_slice(elements);
            bits.iter().fold(0, |largest, x| largest.max(x & <$bits>::MAX)) as u64
        }
    };
}

impl FastSum for f32 {
    type Segment = [f32; 1024];
    fn zeroed_segment() -> Self::Segment {
        [0.0; 1024]
    }
    #[inline(always)]
    fn lane_sums<const L2: bool, S: Simd>(_: S, segment: &[f32], ahead: &[f32]) -> LaneSums {
        compensated_sum::<L2, S>(rows(segment), ahead)
    }
    largest_magnitude_bits!(i32);
}

impl FastSum for f64 {
    type Segment = [f64; 512];
    fn zeroed_segment() -> Self::Segment {
        [0.0; 512]
    }
    #[inline(always)]
    fn lane_sums<const L2: bool, S: Simd>(_: S, segment: &[f64], ahead: &[f64]) -> LaneSums {
        wide_sum::<L2>(rows(segment), ahead)
    }
    largest_magnitude_bits!(i64);
}

impl FastSum for f16 {
    type Segment = [f16; 2048];
    fn zeroed_segment() -> Self::Segment {
        [f16::ZERO; 2048]
    }
    #[inline(always)]
    fn lane_sums<const L2: bool, S: Simd>(simd: S, segment: &[f16], ahead: &[f16]) -> LaneSums {
        half_sum::<L2, _, S>(simd, rows(segment), ahead)
    }
    largest_magnitude_bits!(i16);
}

impl FastSum for bf16 {
    type Segment = [bf16; 2048];
    fn zeroed_segment() -> Self::Segment {
        [bf16::ZERO; 2048]
    }
    #[inline(always)]
    fn lane_sums<const L2: bool, S: Simd>(simd: S, segment: &[bf16], ahead: &[bf16]) -> LaneSums {
        half_sum::<L2, _, S>(simd, rows(segment), ahead)
    }
    largest_magnitude_bits!(i16);
}

#[inline(always)]
fn rows<T, const CHAINS: usize>(segment: &[T]) -> &[[T; CHAINS]] {
    &segment.as_chunks().0[..ROWS_PER_SEGMENT]
}

/// Fetches the part of `ahead` whose turn it is while `row` of the group from chain `first` on is added: what is asked
/// for follows the order of the addresses, and no more is asked for at a time than is used.
#[inline(always)]
fn prefetch_part<T>(ahead: &[T], first: usize, row: usize) {
    let numel = GROUP_BYTES / size_of::<T>();
    let part = &ahead[first * ROWS_PER_SEGMENT + row * numel..][..numel];
    for line in part.chunks(LINE_BYTES / size_of::<T>()) {
        prefetch(&line[0]);
    }
}

/// Sums on their way through memory, from the loops to the tree: a register of them is one cache line.
///
/// The way is a detour on purpose. Where the compiler sees the tree behind the loops it puts the shuffles of the tree
/// into them, to every row (f64, L2, AVX-512: 74 GB/s instead of 117); hence [`black_box`].
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Lines<T>(pub T);

pub(crate) type LaneSums = Lines<[f64; WARP_THREADS]>;

/// x^2 or |x|.
#[inline(always)]
fn term_f32<const L2: bool>(x: f32) -> f32 {
    if L2 {
        x * x
    } else {
        x.abs()
    }
}

/// What rounding took from the term, exact while a square is in range: by fma, or in f64, where the product is exact.
#[inline(always)]
fn term_error<const L2: bool, S: Simd>(x: f32, term: f32) -> f32 {
    if !L2 {
        0.0
    } else if S::FMA {
        x.mul_add(x, -term)
    } else {
        (f64::from(x) * f64::from(x) - f64::from(term)) as f32
    }
}

/// `a + b == sum + error`, exactly, for two numbers that are not negative.
///
/// The error is exact, so it is the one that Knuth's TwoSum gives in the kernels. This is Dekker's way to it, which has
/// to know the larger of the two. As integers they order alike, and Zen 5 does four integer comparisons a cycle, but
/// two additions, of which Knuth's has three more (L2: 70 instead of 47 GB/s with AVX-512, 39 instead of 24 with AVX2;
/// with the processor's float min and max, which share the adders, 53 and 29).
#[inline(always)]
fn two_sum(a: f32, b: f32) -> (f32, f32) {
    let (a_bits, b_bits) = (a.to_bits() as i32, b.to_bits() as i32);
    let (larger, smaller) = (a_bits.max(b_bits) as u32, a_bits.min(b_bits) as u32);
    let sum = a + b;
    (sum, f32::from_bits(smaller) - (sum - f32::from_bits(larger)))
}

/// Dot2 of Ogita, Rump and Oishi (2005): the sum with its rounding errors carried beside it.
#[inline(always)]
fn compensated_sum<const L2: bool, S: Simd>(rows: &[[f32; 128]], ahead: &[f32]) -> LaneSums {
    const GROUP: usize = GROUP_BYTES / size_of::<f32>();
    let (mut sum, mut error) = (Lines([0.0; 128]), Lines([0.0; 128]));
    for first in (0..128).step_by(GROUP) {
        let (mut s, mut e) = ([0.0; GROUP], [0.0; GROUP]);
        for row in 0..ROWS_PER_SEGMENT {
            prefetch_part(ahead, first, row);
            for i in 0..GROUP {
                let x = rows[row][first + i];
                let term = term_f32::<L2>(x);
                let term_error = term_error::<L2, S>(x, term);
                if row == 0 {
                    (s[i], e[i]) = (term, term_error);
                } else {
                    let (next, step_error) = two_sum(s[i], term);
                    s[i] = next;
                    e[i] += step_error + term_error;
                }
            }
        }
        sum.0[first..][..GROUP].copy_from_slice(&s);
        error.0[first..][..GROUP].copy_from_slice(&e);
    }
    sum_of_quads(sum.0, error.0)
}

/// The sum of 32 lanes of 4 chains each, with their errors.
#[inline(always)]
fn sum_of_quads(sum: [f32; 128], error: [f32; 128]) -> LaneSums {
    let (sum, error) = merge_neighbours::<128, 64>(sum, error);
    let (sum, error) = merge_neighbours::<64, WARP_THREADS>(sum, error);
    let mut lanes = Lines([0.0; WARP_THREADS]);
    for i in 0..WARP_THREADS {
        lanes.0[i] = f64::from(sum[i]) + f64::from(error[i]);
    }
    lanes
}

#[inline(always)]
fn merge_neighbours<const N: usize, const HALF: usize>(sum: [f32; N], error: [f32; N]) -> ([f32; HALF], [f32; HALF]) {
    let (mut sums, mut errors) = ([0.0; HALF], [0.0; HALF]);
    for i in 0..HALF {
        let (next, step_error) = two_sum(sum[2 * i], sum[2 * i + 1]);
        sums[i] = next;
        errors[i] = (error[2 * i] + error[2 * i + 1]) + step_error;
    }
    (sums, errors)
}

/// Elements of a group of f16 or bf16.
const HALF_GROUP: usize = GROUP_BYTES / 2;

/// How f32 values come out of the 16-bit elements of a group, in an order of their own, and their sums back.
trait Unpack: Copy {
    fn unpack<S: Simd>(simd: S, group: &[Self; HALF_GROUP]) -> [f32; HALF_GROUP];
    /// Stores the sums of the group from chain `first` on.
    fn store(sum: &mut [f32; 256], first: usize, group: &[f32; HALF_GROUP]);
    /// Of what [`store`](Self::store) stored, the chains of the `i`-th pair of neighbours.
    fn pair(sum: &[f32; 256], i: usize) -> (f32, f32);
}

impl Unpack for f16 {
    #[inline(always)]
    fn unpack<S: Simd>(simd: S, group: &[Self; HALF_GROUP]) -> [f32; HALF_GROUP] {
        let [a, b, c, d]: &[[Self; 16]; HALF_GROUP / 16] = bytemuck::cast_ref(group);
        bytemuck::cast([simd.f32_from_f16(a), simd.f32_from_f16(b), simd.f32_from_f16(c), simd.f32_from_f16(d)])
    }
    #[inline(always)]
    fn store(sum: &mut [f32; 256], first: usize, group: &[f32; HALF_GROUP]) {
        sum[first..][..HALF_GROUP].copy_from_slice(group);
    }
    #[inline(always)]
    fn pair(sum: &[f32; 256], i: usize) -> (f32, f32) {
        (sum[2 * i], sum[2 * i + 1])
    }
}

/// The elements at even places are the lower halves of 32-bit words, those at odd places the upper ones: an f32 costs
/// one shift or one mask, and no shuffle.
impl Unpack for bf16 {
    #[inline(always)]
    fn unpack<S: Simd>(_: S, group: &[Self; HALF_GROUP]) -> [f32; HALF_GROUP] {
        const WORDS: usize = HALF_GROUP / 2;
        let words: [u32; WORDS] = bytemuck::cast(*group);
        let mut values = [0.0; HALF_GROUP];
        for i in 0..WORDS {
            let word = if cfg!(target_endian = "big") { words[i].rotate_left(16) } else { words[i] };
            values[i] = f32::from_bits(word << 16);
            values[WORDS + i] = f32::from_bits(word & 0xffff_0000);
        }
        values
    }
    #[inline(always)]
    fn store(sum: &mut [f32; 256], first: usize, group: &[f32; HALF_GROUP]) {
        let (even, odd) = sum.split_at_mut(128);
        even[first / 2..][..HALF_GROUP / 2].copy_from_slice(&group[..HALF_GROUP / 2]);
        odd[first / 2..][..HALF_GROUP / 2].copy_from_slice(&group[HALF_GROUP / 2..]);
    }
    #[inline(always)]
    fn pair(sum: &[f32; 256], i: usize) -> (f32, f32) {
        (sum[i], sum[128 + i])
    }
}

/// f16 and bf16: the terms are exact in f32, and so are the merges with their errors; only the chains round.
#[inline(always)]
fn half_sum<const L2: bool, T: Unpack, S: Simd>(simd: S, rows: &[[T; 256]], ahead: &[T]) -> LaneSums {
    let mut sum = Lines([0.0; 256]);
    for first in (0..256).step_by(HALF_GROUP) {
        let mut s = [0.0; HALF_GROUP];
        for row in 0..ROWS_PER_SEGMENT {
            prefetch_part(ahead, first, row);
            let x = T::unpack(simd, &rows[row].as_chunks().0[first / HALF_GROUP]);
            for i in 0..HALF_GROUP {
                s[i] += term_f32::<L2>(x[i]);
            }
        }
        T::store(&mut sum.0, first, &s);
    }
    let sum = &black_box(&sum).0;
    let (mut pairs, mut errors) = ([0.0; 128], [0.0; 128]);
    for i in 0..128 {
        let (left, right) = T::pair(sum, i);
        (pairs[i], errors[i]) = two_sum(left, right);
    }
    sum_of_quads(pairs, errors)
}

#[inline(always)]
fn wide_sum<const L2: bool>(rows: &[[f64; 64]], ahead: &[f64]) -> LaneSums {
    const GROUP: usize = GROUP_BYTES / size_of::<f64>();
    let mut sum = Lines([0.0; 64]);
    for first in (0..64).step_by(GROUP) {
        let mut s = [0.0; GROUP];
        for row in 0..ROWS_PER_SEGMENT {
            prefetch_part(ahead, first, row);
            for i in 0..GROUP {
                let x = rows[row][first + i];
                s[i] += if L2 { x * x } else { x.abs() };
            }
        }
        sum.0[first..][..GROUP].copy_from_slice(&s);
    }
    let mut lanes = Lines([0.0; WARP_THREADS]);
    for i in 0..WARP_THREADS {
        lanes.0[i] = sum.0[2 * i] + sum.0[2 * i + 1];
    }
    lanes
}
