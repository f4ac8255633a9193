//! What the kernels have to know of a dtype. Twin of `kernels/dtypes.cuh`.

use crate::abi::{PACK_BYTES, ROW_BYTES, SEGMENT_BYTES, TILE_BYTES};
use crate::clip_coef::CANONICAL_NAN;
use crate::dtype::Element;
use bytemuck::Pod;
use half::{bf16, f16};

/// An element type with the arithmetic of the kernels.
pub(crate) trait CpuElement: Element + Pod {
    /// The type its products are taken in.
    type Real: Copy + PartialOrd + Send + Sync;
    /// Raw bits of +Inf.
    const INF_BITS: u64;
    const PACK_NUMEL: usize = PACK_BYTES / size_of::<Self>();
    const ROW_NUMEL: usize = ROW_BYTES / size_of::<Self>();
    const SEGMENT_NUMEL: usize = SEGMENT_BYTES / size_of::<Self>();
    const TILE_NUMEL: usize = TILE_BYTES / size_of::<Self>();

    fn real(self) -> Self::Real;
    fn wide(self) -> f64;
    /// To nearest even, by way of `Real`; NaN to the canonical one.
    fn from_wide(x: f64) -> Self;
    /// Raw bits of |x|: as integers they order as NaN > Inf > finite.
    fn magnitude_bits(self) -> u64;
    fn from_magnitude_bits(bits: u64) -> Self;

    /// The value of [`magnitude_bits`](Self::magnitude_bits), NaN canonical.
    fn magnitude_value(bits: u64) -> f64 {
        if bits > Self::INF_BITS {
            CANONICAL_NAN
        } else {
            Self::from_magnitude_bits(bits).wide()
        }
    }
}

impl CpuElement for f32 {
    type Real = f32;
    const INF_BITS: u64 = 0x7f80_0000;
    #[inline(always)]
    fn real(self) -> f32 {
        self
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn from_wide(x: f64) -> Self {
        if x.is_nan() {
            Self::from_bits(0x7fc0_0000)
        } else {
            x as f32
        }
    }
    #[inline(always)]
    fn magnitude_bits(self) -> u64 {
        u64::from(self.to_bits() & 0x7fff_ffff)
    }
    fn from_magnitude_bits(bits: u64) -> Self {
        Self::from_bits(bits as u32)
    }
}

impl CpuElement for f64 {
    type Real = f64;
    const INF_BITS: u64 = 0x7ff0_0000_0000_0000;
    #[inline(always)]
    fn real(self) -> f64 {
        self
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        self
    }
    #[inline(always)]
    fn from_wide(x: f64) -> Self {
        if x.is_nan() {
            CANONICAL_NAN
        } else {
            x
        }
    }
    #[inline(always)]
    fn magnitude_bits(self) -> u64 {
        self.to_bits() & (u64::MAX >> 1)
    }
    fn from_magnitude_bits(bits: u64) -> Self {
        Self::from_bits(bits)
    }
}

impl CpuElement for f16 {
    type Real = f32;
    const INF_BITS: u64 = 0x7c00;
    #[inline(always)]
    fn real(self) -> f32 {
        f32_from_f16(self)
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(f32_from_f16(self))
    }
    #[inline(always)]
    fn from_wide(x: f64) -> Self {
        if x.is_nan() {
            Self::from_bits(0x7e00)
        } else {
            f16_from_f32(x as f32)
        }
    }
    #[inline(always)]
    fn magnitude_bits(self) -> u64 {
        u64::from(self.to_bits() & 0x7fff)
    }
    fn from_magnitude_bits(bits: u64) -> Self {
        Self::from_bits(bits as u16)
    }
}

impl CpuElement for bf16 {
    type Real = f32;
    const INF_BITS: u64 = 0x7f80;
    #[inline(always)]
    fn real(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(self.real())
    }
    #[inline(always)]
    fn from_wide(x: f64) -> Self {
        if x.is_nan() {
            Self::from_bits(0x7fc0)
        } else {
            bf16_from_f32(x as f32)
        }
    }
    #[inline(always)]
    fn magnitude_bits(self) -> u64 {
        u64::from(self.to_bits() & 0x7fff)
    }
    fn from_magnitude_bits(bits: u64) -> Self {
        Self::from_bits(bits as u16)
    }
}

// `half` converts one element at a time and asks for the processor's features each time, so its loops do not become
// vector code; these do. tests/conversions.rs compares them with `half` over all inputs.

/// Exact. A multiplication by 2^112 moves the exponent and normalises subnormals.
#[inline(always)]
pub(crate) fn f32_from_f16(x: f16) -> f32 {
    let bits = u32::from(x.to_bits());
    let magnitude = (bits & 0x7fff) << 13;
    let finite = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
    let magnitude = if magnitude >= 0x7c00 << 13 { magnitude | 0x7f80_0000 } else { finite.to_bits() };
    f32::from_bits(magnitude | (bits & 0x8000) << 16)
}

/// To nearest even. `x` is not a NaN.
#[inline(always)]
pub(crate) fn f16_from_f32(x: f32) -> f16 {
    const SMALLEST_NORMAL: u32 = (127 - 14) << 23;
    const HALF: u32 = 126 << 23;
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    // 0.5 has an ulp of 2^-24, the unit of f16's subnormals: the addition rounds to it.
    let subnormal = (f32::from_bits(magnitude) + f32::from_bits(HALF)).to_bits().wrapping_sub(HALF);
    let rebias = magnitude.wrapping_sub(112 << 23);
    let normal = rebias.wrapping_add(0xfff + (rebias >> 13 & 1)) >> 13;
    let rounded = if magnitude < SMALLEST_NORMAL { subnormal } else { normal.min(0x7c00) };
    let rounded = if magnitude >= 0x7f80_0000 { 0x7c00 } else { rounded };
    f16::from_bits((rounded | (bits >> 16 & 0x8000)) as u16)
}

/// To nearest even, subnormals kept (the processor's own instruction flushes them). `x` is not a NaN.
#[inline(always)]
pub(crate) fn bf16_from_f32(x: f32) -> bf16 {
    let bits = x.to_bits();
    bf16::from_bits((bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16)
}
