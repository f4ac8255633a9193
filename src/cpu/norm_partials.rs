//! Stage 1: one partial for each tile. Twin of `kernels/norm_partials.cu`, `tile.cuh` and `segment.cuh`: the same
//! additions in the same order, laid out for vector registers instead of lanes of a warp.

use super::element::CpuElement;
use super::isa::{Isa, Kernel, Simd};
use super::partial::{
    xor_tree, Partial, LARGEST_SAFE_F64, RANGE_FACTOR, RANGE_FACTOR_INVERSE, SMALLEST_SAFE_F32_SQUARES,
    SMALLEST_SAFE_F64_SQUARES,
};
use super::power::{self, Log2};
use super::summation::{FastSum, LaneSums, Lines};
use crate::abi::{PACK_BYTES, ROWS_PER_SEGMENT, SEGMENTS_PER_TILE, WARP_THREADS};
use crate::dtype::Dtype;
use crate::options::NormType;
use std::hint::black_box;

/// Segments that the processor is told to fetch before they are read. The sums hold too many instructions of arithmetic
/// for each cache line for it to keep enough lines in flight by itself; without, down to 37 % of a plain read were seen.
/// L2 norm of 512 MiB, both cores of a Zen 5 virtual machine, in percent of a plain read's bandwidth, with the hints to
/// keep the lines (T0) and not to (NTA), median of 5 runs that are up to 5 % apart, AVX-512 / AVX2:
///
/// | hint, ahead | f32 | f64 | f16 | bf16 |
/// |---|---|---|---|---|
/// | T0, 1 | 89 / 92 | 92 / 93 | 91 / 82 | 93 / 90 |
/// | T0, 2 | 88 / 92 | 87 / 90 | 94 / 79 | 91 / 87 |
/// | T0, 4 | 86 / 92 | 84 / 92 | 93 / 77 | 88 / 86 |
/// | NTA, 1 | 90 / 94 | 91 / 95 | 95 / 80 | 94 / 94 |
/// | NTA, 2 | 93 / 97 | 87 / 97 | 96 / 79 | 94 / 90 |
/// | NTA, 4 | 88 / 94 | 85 / 97 | 91 / 81 | 91 / 91 |
///
/// A clip of what fits a cache, which reads the lines again, was as fast with NTA as with T0.
const SEGMENTS_AHEAD: usize = 1;

/// The partials of the first tiles of `elements`, which are one tensor from a tile border to its end.
pub(crate) fn tile_partials<T: FastSum>(isa: Isa, norm_type: NormType, elements: &[T], partials: &mut [Partial]) {
    match norm_type.of_partials() {
        NormType::L1 => isa.run(SumTiles::<T, false> { elements, partials }),
        NormType::L2 | NormType::Rms => isa.run(SumTiles::<T, true> { elements, partials }),
        NormType::Inf => isa.run(MaxTiles { elements, partials }),
        NormType::P(p) => isa.run(PowerTiles { elements, partials, p }),
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
        let mut ahead = self.elements.chunks_exact(T::SEGMENT_NUMEL).skip(SEGMENTS_AHEAD);
        for (partial, tile) in self.partials.iter_mut().zip(self.elements.chunks(T::TILE_NUMEL)) {
            let segments = tile.chunks(T::SEGMENT_NUMEL);
            let mut lanes = [Lines([0.0; WARP_THREADS]); SEGMENTS_PER_TILE];
            for (lanes, segment) in lanes.iter_mut().zip(segments.clone()) {
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
                *lanes = T::lane_sums::<L2, S>(simd, segment, ahead.next().unwrap_or(segment));
            }
            let mut partials = [Partial::default(); SEGMENTS_PER_TILE];
            for ((partial, sum), segment) in partials.iter_mut().zip(sums_of_lanes(&lanes)).zip(segments) {
                *partial = if in_safe_range::<T, L2>(sum) {
                    Partial::unscaled(sum)
                } else {
                    rescued_sum::<T, L2>(segment, sum)
                };
            }
            *partial = fold_segments(partials, norm_type);
        }
    }
}

/// The trees of all segments of a tile at once: one tree alone is a chain of shuffles and additions that wait for each
/// other, and takes as long as a third of a segment.
#[inline(always)]
fn sums_of_lanes(lanes: &[LaneSums; SEGMENTS_PER_TILE]) -> [f64; SEGMENTS_PER_TILE] {
    black_box(lanes).map(|lanes| xor_tree(lanes.0, |a, b| a + b))
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
        Dtype::F64 if fast_sum < SMALLEST_SAFE_F64_SQUARES => (RANGE_FACTOR, RANGE_FACTOR_INVERSE),
        Dtype::F64 => (RANGE_FACTOR_INVERSE, RANGE_FACTOR),
        _ => (1.0, 1.0),
    };
    let lane_sum = |lane: usize| {
        let chain = |j: usize| {
            let elements = segment.get(lane * T::PACK_NUMEL + j..).unwrap_or_default();
            elements.iter().step_by(T::ROW_NUMEL).fold(0.0, |sum, x| {
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

/// Sums of powers, each segment relative to its largest magnitude.
struct PowerTiles<'a, T> {
    elements: &'a [T],
    partials: &'a mut [Partial],
    p: f64,
}

impl<T: FastSum> Kernel for PowerTiles<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (partial, tile) in self.partials.iter_mut().zip(self.elements.chunks(T::TILE_NUMEL)) {
            let mut partials = [Partial::default(); SEGMENTS_PER_TILE];
            for (partial, segment) in partials.iter_mut().zip(tile.chunks(T::SEGMENT_NUMEL)) {
                *partial = power_sum(segment, self.p);
            }
            *partial = fold_segments(partials, NormType::P(self.p));
        }
    }
}

#[inline(always)]
fn power_sum<T: FastSum>(segment: &[T], p: f64) -> Partial {
    let largest = T::largest_magnitude_bits(segment);
    let scale = T::magnitude_value(largest);
    if largest == 0 {
        return Partial::default();
    }
    if largest >= T::INF_BITS {
        return Partial { sum: scale, scale: f64::INFINITY };
    }
    let largest = Log2::of(scale);
    let mut padded;
    let segment = if segment.len() == T::SEGMENT_NUMEL {
        segment
    } else {
        padded = T::zeroed_segment();
        let padded = &mut padded.as_mut()[..T::SEGMENT_NUMEL];
        padded[..segment.len()].copy_from_slice(segment);
        padded
    };
    // Two registers of AVX-512, four of AVX2. With 8 elements the compiler takes the loop apart and makes scalar code of
    // it (0.08 thousand million elements a second of a Zen 5 core instead of 0.65); with 32 and 64 it is as fast.
    const GROUP: usize = 16;
    let mut chains = [0.0; WARP_THREADS * PACK_BYTES / 2];
    let mut numel = T::ROW_NUMEL;
    for (group, chains) in chains[..numel].as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
        for row in 0..ROWS_PER_SEGMENT {
            let elements = &segment[row * T::ROW_NUMEL + group * GROUP..][..GROUP];
            for i in 0..GROUP {
                chains[i] += power::term(elements[i], largest, p);
            }
        }
    }
    // The tree over a pack's chains, of all lanes at once: neighbours first.
    while numel > WARP_THREADS {
        numel /= 2;
        for i in 0..numel {
            chains[i] = chains[2 * i] + chains[2 * i + 1];
        }
    }
    let lanes: [f64; WARP_THREADS] = std::array::from_fn(|lane| chains[lane]);
    Partial { sum: xor_tree(lanes, |a, b| a + b), scale }
}
