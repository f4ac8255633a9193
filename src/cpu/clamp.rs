//! Value clipping: min(max(x, lo), hi), in place. Twin of `kernels/clamp.cu`.

use super::element::{bf16_from_f32, f16_from_f32, CpuElement};
use super::isa::{Isa, Kernel};
use crate::abi::ClampBounds;
use half::{bf16, f16};

/// What clamping some elements found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub clipped: u64,
    pub nan: u64,
    pub inf: u64,
}

impl std::ops::Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { clipped: self.clipped + other.clipped, nan: self.nan + other.nan, inf: self.inf + other.inf }
    }
}

pub(crate) fn clamp<T: Clamp>(isa: Isa, bounds: &ClampBounds, elements: &mut [T]) -> Counts {
    isa.run(ClampElements { bounds: T::bounds_of(bounds), elements })
}

/// A dtype with its bounds.
pub(crate) trait Clamp: CpuElement {
    fn bounds_of(bounds: &ClampBounds) -> Bounds<Self>;
}

pub(crate) struct Bounds<T: CpuElement> {
    lo: T::Real,
    hi: T::Real,
    /// The same two as elements.
    lo_element: T,
    hi_element: T,
}

impl Clamp for f32 {
    fn bounds_of(bounds: &ClampBounds) -> Bounds<Self> {
        let (lo, hi) = (bounds.lo_f32, bounds.hi_f32);
        Bounds { lo, hi, lo_element: lo, hi_element: hi }
    }
}
impl Clamp for f64 {
    fn bounds_of(bounds: &ClampBounds) -> Bounds<Self> {
        let (lo, hi) = (bounds.lo_f64, bounds.hi_f64);
        Bounds { lo, hi, lo_element: lo, hi_element: hi }
    }
}
impl Clamp for f16 {
    fn bounds_of(bounds: &ClampBounds) -> Bounds<Self> {
        let (lo, hi) = (bounds.lo_f16, bounds.hi_f16);
        Bounds { lo, hi, lo_element: f16_from_f32(lo), hi_element: f16_from_f32(hi) }
    }
}
impl Clamp for bf16 {
    fn bounds_of(bounds: &ClampBounds) -> Bounds<Self> {
        let (lo, hi) = (bounds.lo_bf16, bounds.hi_bf16);
        Bounds { lo, hi, lo_element: bf16_from_f32(lo), hi_element: bf16_from_f32(hi) }
    }
}

struct ClampElements<'a, T: CpuElement> {
    bounds: Bounds<T>,
    elements: &'a mut [T],
}

impl<T: Clamp> Kernel for ClampElements<'_, T> {
    type Output = Counts;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> Counts {
        let Bounds { lo, hi, lo_element, hi_element } = self.bounds;
        // A chunk is looked at first, from memory into L1, and only written where something changes: on a typical step
        // little is outside, and a read costs half of a read and a write.
        const CHUNK: usize = 1024;
        let mut counts = Counts::default();
        for chunk in self.elements.chunks_mut(CHUNK) {
            let (mut clipped, mut outside_or_nan) = (0u32, 0u32);
            for x in chunk.iter() {
                let x = x.real();
                clipped += u32::from(x < lo) | u32::from(x > hi);
                outside_or_nan += u32::from(!(x >= lo && x <= hi));
            }
            counts.clipped += u64::from(clipped);
            counts.nan += u64::from(outside_or_nan - clipped);
            if clipped > 0 || !bounded(lo_element, hi_element) {
                counts.inf += chunk.iter().filter(|x| x.magnitude_bits() == T::INF_BITS).count() as u64;
            }
            if clipped > 0 {
                for x in chunk.iter_mut() {
                    let value = x.real();
                    let low = if value < lo { lo_element } else { *x };
                    *x = if value > hi { hi_element } else { low };
                }
            }
        }
        counts
    }
}

/// Whether no Inf can pass between the bounds.
#[inline(always)]
fn bounded<T: CpuElement>(lo: T, hi: T) -> bool {
    lo.magnitude_bits() < T::INF_BITS && hi.magnitude_bits() < T::INF_BITS
}
