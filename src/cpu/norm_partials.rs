//! Stage 1: one partial for each tile. Twin of `kernels/norm_partials.cu`: the same additions in the same order, laid
//! out for vector registers instead of lanes of a warp.

use super::element::CpuElement;
use super::isa::{Isa, Kernel, Simd};
use super::partial::{
    xor_tree, Partial, LARGEST_SAFE_F64, RANGE_FACTOR, RANGE_FACTOR_INVERSE, SMALLEST_SAFE_F32_SQUARES,
    SMALLEST_SAFE_F64_SQUARES,
};
use super::summation::FastSum;
use crate::abi::{SEGMENTS_PER_TILE, WARP_THREADS};
use crate::dtype::Dtype;
use crate::options::NormType;

/// Segments that the processor is told to fetch before they are read. The sums hold too many instructions of arithmetic
/// for each cache line for it to keep enough lines in flight by itself. L2 norm from memory, one core of a Zen 5, in
/// percent of a plain read's bandwidth (AVX-512 / AVX2):
///
/// | ahead | f32 | f64 | f16 | bf16 |
/// |---|---|---|---|---|
/// | none | 75 / 37 | 89 / 59 | 63 / 48 | 74 / 39 |
/// | 1 | 100 / 84 | 106 / 84 | 96 / 77 | 97 / 82 |
/// | 2 | 100 / 93 | 108 / 89 | 99 / 86 | 97 / 93 |
/// | 4 | 91 / 89 | 106 / 86 | 84 / 75 | 95 / 88 |
const SEGMENTS_AHEAD: usize = 2;

/// The partials of the first tiles of `elements`, which are one tensor from a tile border to its end.
pub(crate) fn tile_partials<T: FastSum>(isa: Isa, norm_type: NormType, elements: &[T], partials: &mut [Partial]) {
    match norm_type {
        NormType::L1 => isa.run(SumTiles::<T, false> { elements, partials }),
        NormType::L2 => isa.run(SumTiles::<T, true> { elements, partials }),
        NormType::Inf => isa.run(MaxTiles { elements, partials }),
    }
}

/// Sum of squares if `L2`, else of magnitudes.
struct SumTiles<'a, T, const L2: bool> {
    elements: &'a [T],
    partials: &'a mut [Partial],
}

impl<T: FastSum, const L2: bool> Kernel for SumTiles<'_, T, L2> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let norm_type = if L2 { NormType::L2 } else { NormType::L1 };
        let mut segments = self.elements.chunks(T::SEGMENT_NUMEL);
        let mut ahead = self.elements.chunks_exact(T::SEGMENT_NUMEL).skip(SEGMENTS_AHEAD);
        for partial in self.partials {
            let mut partials = [Partial::default(); SEGMENTS_PER_TILE];
            for (partial, segment) in partials.iter_mut().zip(&mut segments) {
                let mut padded;
                let segment = if segment.len() == T::SEGMENT_NUMEL {
                    segment
                } else {
                    // Zeroes add nothing, so the end of a tensor is summed as if it were followed by them.
                    padded = T::zeroed_segment();
                    let padded = &mut padded.as_mut()[..T::SEGMENT_NUMEL];
                    padded[..segment.len()].copy_from_slice(segment);
                    padded
                };
                *partial = segment_partial::<T, L2, S>(simd, segment, ahead.next().unwrap_or(segment));
            }
            *partial = fold_segments(partials, norm_type);
        }
    }
}

/// ((0+1)+(2+3))+((4+5)+(6+7))
#[inline(always)]
fn fold_segments(mut fold: [Partial; SEGMENTS_PER_TILE], norm_type: NormType) -> Partial {
    let mut step = 1;
    while step < SEGMENTS_PER_TILE {
        for s in (0..SEGMENTS_PER_TILE).step_by(2 * step) {
            fold[s] = fold[s].combine(fold[s + step], norm_type);
        }
        step *= 2;
    }
    fold[0]
}

#[inline(always)]
fn segment_partial<T: FastSum, const L2: bool, S: Simd>(simd: S, segment: &[T], ahead: &[T]) -> Partial {
    let sum = T::segment_sum::<L2, S>(simd, segment, ahead);
    if in_safe_range::<T, L2>(sum) {
        Partial::unscaled(sum)
    } else {
        rescued_sum::<T, L2>(segment, sum)
    }
}

#[inline(always)]
fn in_safe_range<T: CpuElement, const L2: bool>(sum: f64) -> bool {
    match (T::DTYPE, L2) {
        (Dtype::F64, true) => (SMALLEST_SAFE_F64_SQUARES..=LARGEST_SAFE_F64).contains(&sum),
        (Dtype::F64, false) => sum <= LARGEST_SAFE_F64,
        (_, true) => (SMALLEST_SAFE_F32_SQUARES..f64::INFINITY).contains(&sum),
        (_, false) => sum < f64::INFINITY,
    }
}

/// A segment whose fast sum is not safe: all zero, not finite, or out of range. Added up again in f64, in the same
/// order and in its own range.
#[cold]
#[inline(never)]
fn rescued_sum<T: CpuElement, const L2: bool>(segment: &[T], fast_sum: f64) -> Partial {
    let largest = segment.iter().map(|x| x.magnitude_bits()).max().unwrap_or(0);
    if largest == 0 || largest >= T::INF_BITS {
        return Partial::unscaled(T::magnitude_value(largest));
    }
    let (factor, scale) = match T::DTYPE {
        Dtype::F64 if fast_sum < SMALLEST_SAFE_F64_SQUARES => (RANGE_FACTOR, -1),
        Dtype::F64 => (RANGE_FACTOR_INVERSE, 1),
        _ => (1.0, 0),
    };
    let lane_sum = |lane: usize| {
        let chain = |j: usize| {
            let elements = segment[lane * T::PACK_NUMEL + j..].iter().step_by(T::ROW_NUMEL);
            elements.fold(0.0, |sum, x| {
                let x = x.wide() * factor;
                sum + if L2 { x * x } else { x.abs() }
            })
        };
        // The tree over a pack's chains: neighbours first.
        let mut chains: [f64; 8] = std::array::from_fn(|j| if j < T::PACK_NUMEL { chain(j) } else { 0.0 });
        let mut step = 1;
        while step < T::PACK_NUMEL {
            for j in (0..T::PACK_NUMEL).step_by(2 * step) {
                chains[j] += chains[j + step];
            }
            step *= 2;
        }
        chains[0]
    };
    let lanes: [f64; WARP_THREADS] = std::array::from_fn(lane_sum);
    Partial { sum: xor_tree(lanes, |a, b| a + b), scale }
}

/// The largest magnitude.
struct MaxTiles<'a, T> {
    elements: &'a [T],
    partials: &'a mut [Partial],
}

impl<T: FastSum> Kernel for MaxTiles<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (partial, tile) in self.partials.iter_mut().zip(self.elements.chunks(T::TILE_NUMEL)) {
            *partial = Partial::unscaled(T::magnitude_value(T::largest_magnitude_bits(tile)));
        }
    }
}
