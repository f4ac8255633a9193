//! Value clipping: min(max(x, lo), hi), in place. Twin of `kernels/clamp.cu`.

use super::element::{bf16_from_f32, f16_from_f32};
use super::isa::{prefetch, Isa, Kernel, Simd};
use super::summation::{FastSum, LINE_BYTES};
use crate::abi::ClampBounds;
use half::{bf16, f16};
use std::ops::AddAssign;

/// What clamping some elements found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub clipped: u64,
    pub nan: u64,
    /// Whether there was a NaN or an Inf.
    pub nonfinite: bool,
}

impl std::ops::Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            clipped: self.clipped + other.clipped,
            nan: self.nan + other.nan,
            nonfinite: self.nonfinite | other.nonfinite,
        }
    }
}

/// `in_cache` is a guess, which changes the speed and nothing else.
pub(crate) fn clamp<T: Clamp>(isa: Isa, bounds: &ClampBounds, in_cache: bool, elements: &mut [T]) -> Counts {
    let (lo, hi) = T::bounds(bounds);
    isa.run(ClampElements { lo, hi, in_cache, elements })
}

/// A dtype with the comparisons of value clipping.
pub(crate) trait Clamp: FastSum {
    /// Orders as the values do, NaN left out.
    type Key: Copy + PartialOrd;
    /// As wide as an element, so that counting needs no other registers than comparing. Holds the length of a block, and
    /// the bits of a magnitude.
    type Int: Default + AddAssign + Ord + From<bool> + Into<i64>;
    /// Whether a NaN's key compares false with all others, so that [`clamped`] keeps it.
    const KEEPS_NAN: bool;

    fn bounds(bounds: &ClampBounds) -> (Self, Self);
    fn key(self) -> Self::Key;
    fn magnitude(self) -> Self::Int;
}

macro_rules! clamp {
    ($type:ty, $int:ty, $key:ty, $keeps_nan:literal, |$x:ident| $key_of:expr, |$bounds:ident| $in_type:expr) => {
        impl Clamp for $type {
            type Key = $key;
            type Int = $int;
            const KEEPS_NAN: bool = $keeps_nan;

            fn bounds($bounds: &ClampBounds) -> (Self, Self) {
                $in_type
            }
            #[inline(always)]
            fn key(self) -> $key {
                let $x = self;
                $key_of
            }
            #[inline(always)]
            fn magnitude(self) -> $int {
                self.to_bits() as $int & <$int>::MAX
            }
        }
    };
}

clamp!(f32, i32, f32, true, |x| x, |bounds| (bounds.lo_f32, bounds.hi_f32));
clamp!(f64, i64, f64, true, |x| x, |bounds| (bounds.lo_f64, bounds.hi_f64));
clamp!(f16, i16, i16, false, |x| key_of_16_bits(x.to_bits()), |bounds| {
    (f16_from_f32(bounds.lo_f16), f16_from_f32(bounds.hi_f16))
});
clamp!(bf16, i16, i16, false, |x| key_of_16_bits(x.to_bits()), |bounds| {
    (bf16_from_f32(bounds.lo_bf16), bf16_from_f32(bounds.hi_bf16))
});

/// Sign and magnitude to an integer; both zeroes are 0. Comparing f32 instead would take four times the registers.
#[inline(always)]
fn key_of_16_bits(bits: u16) -> i16 {
    let magnitude = (bits & 0x7fff) as i16;
    if bits > 0x7fff {
        -magnitude
    } else {
        magnitude
    }
}

/// A chunk is looked at first, from memory into L1, and only written where something changes: on a typical step little
/// is outside, and a read costs half of a read and a write. With longer chunks memory has nothing to do during the
/// second look. Zen 5, one core, part of the bandwidth of a plain loop in place when every chunk of f32 is written: 61 %
/// with 8 KiB, 66 % with 4, 88 % with 1, 110 % with the prefetch too. 512 bytes are level with 1 KiB in memory, and take
/// 15 % less in L3.
const CHUNK_BYTES: usize = 512;
/// Chunks that the processor is told to fetch before they are read: 8 KiB.
const CHUNKS_AHEAD: usize = 16;
/// Where one chunk after the other is written, the look is a read too many. So after a block that had an element outside
/// for each of its chunks, the next one is clamped straight away, changed or not, if it comes from a cache. With 2 %
/// outside, f32, Zen 5, ns a KiB of the call (a plain loop that counts nothing, one core):
///
/// | list | look, then clamp | straight away |
/// |---|---|---|
/// | 512 KiB, one core | 14.1 (7.2) | 10.2 (7.1) |
/// | 4 MiB, two cores | 18.2 (9.2) | 13.6 (9.3) |
/// | 16 MiB | 20 (18) | 21 (18) |
/// | 256 MiB | 34 (39) | 38 (38) |
///
/// From memory it lacks the hints to fetch, and all of a block's hints at once did not help (35 to 40 ns).
const CHUNKS_PER_BLOCK: usize = 8;
/// A list up to this long is taken for one that lies in a cache: see there.
pub(crate) const IN_CACHE_BYTES: usize = 8 << 20;

struct ClampElements<'a, T> {
    lo: T,
    hi: T,
    in_cache: bool,
    elements: &'a mut [T],
}

impl<T: Clamp> Kernel for ClampElements<'_, T> {
    type Output = Counts;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Counts {
        let Self { lo, hi, in_cache, elements: mut rest } = self;
        let clamper = Clamper { lo, hi, inside: always_inside(lo, hi) };
        let chunk_numel = CHUNK_BYTES / size_of::<T>();
        let mut counts = Counts::default();
        let mut dense = false;
        let block_numel = CHUNKS_PER_BLOCK * chunk_numel;
        // The compiler sees that these have one length.
        while rest.len() >= block_numel {
            let (block, others) = std::mem::take(&mut rest).split_at_mut(block_numel);
            let of_block = if dense { clamper.clamp_block(block) } else { clamper.look_and_clamp(block, others) };
            dense = in_cache && T::KEEPS_NAN && of_block.clipped >= CHUNKS_PER_BLOCK as u64;
            counts = counts + of_block;
            rest = others;
        }
        counts + clamper.look_and_clamp(rest, &[])
    }
}

#[derive(Clone, Copy)]
struct Clamper<T> {
    lo: T,
    hi: T,
    inside: Option<u64>,
}

impl<T: Clamp> Clamper<T> {
    /// A block that may be shorter, by its chunks; meanwhile the processor fetches of what comes behind it.
    #[inline(always)]
    fn look_and_clamp(self, block: &mut [T], behind: &[T]) -> Counts {
        let chunk_numel = CHUNK_BYTES / size_of::<T>();
        let mut counts = Counts::default();
        let mut chunks = block.chunks_exact_mut(chunk_numel);
        for (chunk, ahead) in (&mut chunks).zip(CHUNKS_AHEAD - CHUNKS_PER_BLOCK..) {
            prefetch_chunk(behind, ahead * chunk_numel);
            counts = counts + self.look_and_clamp_chunk(chunk);
        }
        counts + self.look_and_clamp_chunk(chunks.into_remainder())
    }

    #[inline(always)]
    fn look_and_clamp_chunk(self, chunk: &mut [T]) -> Counts {
        let Self { lo, hi, inside } = self;
        let largest = T::largest_magnitude_bits(chunk);
        if inside.is_some_and(|inside| largest <= inside) {
            return Counts::default();
        }
        if largest > T::INF_BITS {
            return clamp_beside_nan(lo, hi, chunk);
        }
        let outside = lo.magnitude_bits() == hi.magnitude_bits()
            || chunk.iter().fold(false, |any, x| any | is_outside(lo, hi, *x));
        let clipped = if outside { clamp_chunk(lo, hi, chunk) } else { 0 };
        Counts { clipped, nan: 0, nonfinite: largest == T::INF_BITS }
    }

    /// Of a type that [keeps NaN](Clamp::KEEPS_NAN).
    #[inline(always)]
    fn clamp_block(self, block: &mut [T]) -> Counts {
        let (mut changed, mut largest) = (T::Int::default(), T::Int::default());
        for x in block.iter_mut() {
            let new = clamped(self.lo, self.hi, *x);
            changed += (new.key() != x.key()).into();
            largest = largest.max(x.magnitude());
            *x = new;
        }
        let nonfinite = largest.into() as u64 >= T::INF_BITS;
        // A NaN is still there, but differs from itself.
        let nan = if nonfinite { count_nan(block) } else { 0 };
        Counts { clipped: changed.into() as u64 - nan, nan, nonfinite }
    }
}

#[cold]
#[inline(never)]
fn count_nan<T: Clamp>(elements: &[T]) -> u64 {
    elements.iter().filter(|x| x.magnitude_bits() > T::INF_BITS).count() as u64
}

/// The largest magnitude that is inside the bounds with either sign, and finite.
fn always_inside<T: Clamp>(lo: T, hi: T) -> Option<u64> {
    let around_zero = lo.wide() <= 0.0 && hi.wide() >= 0.0;
    around_zero.then(|| lo.magnitude_bits().min(hi.magnitude_bits()).min(T::INF_BITS - 1))
}

/// Fetches the chunk from `first` on, if there is a whole one.
#[inline(always)]
fn prefetch_chunk<T>(elements: &[T], first: usize) {
    if let Some(chunk) = elements.get(first..first + CHUNK_BYTES / size_of::<T>()) {
        chunk.chunks(LINE_BYTES / size_of::<T>()).for_each(|line| prefetch(&line[0]));
    }
}

#[inline(always)]
fn is_outside<T: Clamp>(lo: T, hi: T, x: T) -> bool {
    (x.key() < lo.key()) | (x.key() > hi.key())
}

/// The second comparison is with what the first has made, which the compiler knows as the instructions max and min.
#[inline(always)]
fn clamped<T: Clamp>(lo: T, hi: T, x: T) -> T {
    let raised = if x.key() < lo.key() { lo } else { x };
    if raised.key() > hi.key() {
        hi
    } else {
        raised
    }
}

/// Clamps a chunk without NaN; how many were outside, which are those that changed. One comparison less for each element
/// than asking both bounds again: 16.5 against 18.7 ns a KiB of f32 in L2 (Zen 5, one core).
#[inline(always)]
fn clamp_chunk<T: Clamp>(lo: T, hi: T, chunk: &mut [T]) -> u64 {
    let mut clipped = T::Int::default();
    for x in chunk {
        let new = clamped(lo, hi, *x);
        clipped += (new.key() != x.key()).into();
        *x = new;
    }
    clipped.into() as u64
}

#[cold]
#[inline(never)]
fn clamp_beside_nan<T: Clamp>(lo: T, hi: T, chunk: &mut [T]) -> Counts {
    let mut counts = Counts { nonfinite: true, ..Counts::default() };
    for x in chunk {
        if x.magnitude_bits() > T::INF_BITS {
            counts.nan += 1;
        } else if is_outside(lo, hi, *x) {
            counts.clipped += 1;
            *x = clamped(lo, hi, *x);
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In the block that `special` is in.
    const SPECIALS: [&[usize]; 5] = [&[], &[0], &[1], &[1, 200], &[2, 3, 100, 101]];

    /// Blocks with nothing, one, some or everything outside, one kind after the other, with and without NaN and Inf, ended
    /// anywhere; bounds on both sides of zero, on one, equal, infinite.
    #[test]
    fn the_same_as_one_by_one_on_all_sets() {
        fn check<T: Clamp>() {
            let chunk = CHUNK_BYTES / size_of::<T>();
            let block = CHUNKS_PER_BLOCK * chunk;
            let infinite = f64::INFINITY;
            let bounds = [(-0.5, 0.5), (-0.25, 1.5), (0.25, 0.5), (0.5, 0.5), (0.0, 0.0), (-infinite, 0.5)];
            let lengths = [0, 1, chunk + 1, 2 * block, 3 * block + chunk - 1, 3 * block + chunk, 4 * block + 1];
            // Of how many elements one is outside, in every other block and in those between.
            for (one_of, one_of_others) in [(1, 1), (1, 60), (1, block), (3, block), (60, 60), (60, block), (block, 1)]
            {
                for special in SPECIALS {
                    let element = |i: usize| match i / block % 2 {
                        _ if i >= block && special.contains(&(i - block)) => [f64::NAN, infinite, -infinite][i % 3],
                        0 if i % one_of == one_of - 1 => [2.0, -3.0, 1e3][i % 3],
                        1 if i % one_of_others == one_of_others - 1 => [2.0, -3.0, 1e3][i % 3],
                        _ => [0.3, -0.0, 0.0][i % 3],
                    };
                    let elements: Vec<T> = (0..4 * block + 1).map(|i| T::from_wide(element(i))).collect();
                    for (lo, hi) in bounds.into_iter().chain([(-infinite, infinite)]) {
                        for numel in lengths {
                            assert_same(T::from_wide(lo), T::from_wide(hi), &elements[..numel]);
                        }
                    }
                }
            }
        }
        fn assert_same<T: Clamp>(lo: T, hi: T, elements: &[T]) {
            let (mut expected, mut counts) = (elements.to_vec(), Counts::default());
            for x in &mut expected {
                let wide = x.wide();
                counts.nan += u64::from(wide.is_nan());
                counts.nonfinite |= !wide.is_finite();
                if wide < lo.wide() || wide > hi.wide() {
                    counts.clipped += 1;
                    *x = if wide < lo.wide() { lo } else { hi };
                }
            }
            let bytes_of = |elements: &[T]| bytemuck::cast_slice::<T, u8>(elements).to_vec();
            for isa in Isa::available() {
                for in_cache in [false, true] {
                    let mut got = elements.to_vec();
                    let got_counts = isa.run(ClampElements { lo, hi, in_cache, elements: &mut got });
                    assert_eq!(got_counts, counts, "{isa:?}, {} elements", elements.len());
                    assert!(bytes_of(&got) == bytes_of(&expected), "{isa:?}, {} elements", elements.len());
                }
            }
        }
        check::<f32>();
        check::<f64>();
        check::<f16>();
        check::<bf16>();
    }
}
