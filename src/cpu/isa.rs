//! Which vector instructions this processor has, found at run time. The bits are the same on all of them: a kernel is
//! one generic body, compiled once for each set.

use super::element::{f16_from_f32, f32_from_f16};
use half::f16;

/// A computation to be compiled for several instruction sets.
pub(crate) trait Kernel {
    type Output;

    /// Must be `#[inline(always)]`, and so must what it calls, or it is compiled for the baseline only.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// An instruction set. A value of it is the proof that the processor has it.
pub(crate) trait Simd: Copy {
    /// Whether [`mul_add`](Self::mul_add) is an instruction.
    const FMA: bool;

    /// `a * b + c`, rounded once. All finite, and neither the product nor the sum beyond f32.
    fn mul_add(self, a: f32, b: f32, c: f32) -> f32;
    /// Exact. A NaN may become a quiet one.
    fn f32_from_f16(self, x: &[f16; 16]) -> [f32; 16];
    /// To nearest even. No NaN.
    fn f16_from_f32(self, x: &[f32; 16]) -> [f16; 16];
}

/// An instruction set, by value. [`Isa::available`] makes those above the baseline.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Isa {
    /// What every processor of the target has; no FMA assumed.
    Baseline,
    /// AVX2, FMA and F16C (Haswell, Zen and later).
    #[cfg(target_arch = "x86_64")]
    Avx2(x86::Avx2),
    /// AVX-512 F, BW, DQ, VL besides (Skylake-X, Zen 4 and later). On Zen 5 its norms are 1.2 to 1.8 times as fast as
    /// those of AVX2 in L2 cache, and as fast from memory, within 10 %.
    #[cfg(target_arch = "x86_64")]
    Avx512(x86::Avx512),
    /// aarch64, whose baseline has FMA.
    #[cfg(target_arch = "aarch64")]
    Neon,
}

impl Isa {
    /// The best set this processor has. `std` caches the answer.
    pub(crate) fn detect() -> Self {
        Self::available().last().unwrap_or(Self::Baseline)
    }

    /// All sets this processor has, the best last.
    pub(crate) fn available() -> impl Iterator<Item = Self> {
        let sets = [
            Some(Self::Baseline),
            #[cfg(target_arch = "x86_64")]
            x86::Avx2::detect().map(Self::Avx2),
            #[cfg(target_arch = "x86_64")]
            x86::Avx512::detect().map(Self::Avx512),
            #[cfg(target_arch = "aarch64")]
            Some(Self::Neon),
        ];
        sets.into_iter().flatten()
    }

    /// Runs `kernel` as compiled for this set.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Self::Baseline => kernel.run(Portable::<false>),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(avx2) => avx2.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(avx512) => avx512.run(kernel),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => kernel.run(Portable::<true>),
        }
    }
}

/// What the compiler makes of plain Rust.
#[derive(Clone, Copy, Debug)]
struct Portable<const FMA: bool>;

impl<const FMA: bool> Simd for Portable<FMA> {
    const FMA: bool = FMA;

    #[inline(always)]
    fn mul_add(self, a: f32, b: f32, c: f32) -> f32 {
        if FMA {
            a.mul_add(b, c)
        } else {
            mul_add_by_f64(a, b, c)
        }
    }
    #[inline(always)]
    fn f32_from_f16(self, x: &[f16; 16]) -> [f32; 16] {
        x.map(f32_from_f16)
    }
    #[inline(always)]
    fn f16_from_f32(self, x: &[f32; 16]) -> [f16; 16] {
        x.map(f16_from_f32)
    }
}

/// Fused multiply-add without the instruction, for loops: `f32::mul_add` would call the C library for each element.
///
/// The product is exact in f64. The sum is not, and rounding it a second time could go wrong at a tie; rounded to odd it
/// cannot (Boldo and Melquiond, Emulation of FMA and correctly rounded sums, IEEE Trans. Computers 57, 2008).
#[inline(always)]
fn mul_add_by_f64(a: f32, b: f32, c: f32) -> f32 {
    let (product, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let sum = product + c;
    let c_in_sum = sum - product;
    let error = (product - (sum - c_in_sum)) + (c - c_in_sum);
    let bits = sum.to_bits();
    // The other neighbour of the exact sum, when this one is even.
    let away_from_zero = (error > 0.0) == (sum > 0.0);
    let odd = if away_from_zero { bits | 1 } else { bits.wrapping_sub(1) };
    let bits = if error != 0.0 && bits & 1 == 0 { odd } else { bits };
    f64::from_bits(bits) as f32
}

/// Asks for the cache line of `place`, soon to be read. Does nothing where there is no such instruction.
#[inline(always)]
pub(crate) fn prefetch<T>(place: &T) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_NTA};
        // SAFETY: a hint; it reads nothing that the program can see, and SSE is part of the target.
        unsafe { _mm_prefetch::<_MM_HINT_NTA>(std::ptr::from_ref(place).cast()) };
    }
    let _ = place;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Kernel, Simd};
    use half::f16;
    use std::arch::x86_64::*;

    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Avx2(());

    impl Avx2 {
        pub(super) fn detect() -> Option<Self> {
            let found = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
                && !cfg!(miri);
            found.then_some(Self(()))
        }

        #[inline]
        pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
            #[target_feature(enable = "avx2,fma,f16c")]
            fn compiled<K: Kernel>(avx2: Avx2, kernel: K) -> K::Output {
                kernel.run(avx2)
            }
            // SAFETY: `detect` made this value, and has seen the processor report these features.
            unsafe { compiled(self, kernel) }
        }
    }

    impl Simd for Avx2 {
        const FMA: bool = true;

        #[inline(always)]
        fn mul_add(self, a: f32, b: f32, c: f32) -> f32 {
            a.mul_add(b, c)
        }
        #[inline(always)]
        fn f32_from_f16(self, x: &[f16; 16]) -> [f32; 16] {
            let [a, b]: [__m128i; 2] = bytemuck::cast(*x);
            // SAFETY: `detect` made this value, and has seen the processor report F16C.
            bytemuck::cast(unsafe { [_mm256_cvtph_ps(a), _mm256_cvtph_ps(b)] })
        }
        #[inline(always)]
        fn f16_from_f32(self, x: &[f32; 16]) -> [f16; 16] {
            let [a, b]: [__m256; 2] = bytemuck::cast(*x);
            // SAFETY: as above.
            bytemuck::cast(unsafe {
                [_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(b)]
            })
        }
    }

    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Avx512(());

    impl Avx512 {
        pub(super) fn detect() -> Option<Self> {
            Avx2::detect()?;
            let found = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            found.then_some(Self(()))
        }

        #[inline]
        pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            fn compiled<K: Kernel>(avx512: Avx512, kernel: K) -> K::Output {
                kernel.run(avx512)
            }
            // SAFETY: `detect` made this value, and has seen the processor report these features.
            unsafe { compiled(self, kernel) }
        }
    }

    impl Simd for Avx512 {
        const FMA: bool = true;

        #[inline(always)]
        fn mul_add(self, a: f32, b: f32, c: f32) -> f32 {
            a.mul_add(b, c)
        }
        #[inline(always)]
        fn f32_from_f16(self, x: &[f16; 16]) -> [f32; 16] {
            // SAFETY: `detect` made this value, and has seen the processor report AVX-512 F; 64 bytes are 16 floats.
            unsafe { std::mem::transmute(_mm512_cvtph_ps(bytemuck::cast(*x))) }
        }
        #[inline(always)]
        fn f16_from_f32(self, x: &[f32; 16]) -> [f16; 16] {
            // SAFETY: as above.
            bytemuck::cast(unsafe {
                _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(std::mem::transmute::<[f32; 16], __m512>(*x))
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fused_multiply_add_by_way_of_f64() {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = || {
            state = state.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(1);
            (state >> 32) as u32
        };
        // Few bits set, so that ties are common; then any bits. Exponents within 2^-140..2^60.
        for round in 0..2_000_000 {
            let mut number = |lowest: u32, count: u32| {
                let fraction = if round % 2 == 0 { 3 << (random() % 23) } else { random() } & 0x007f_ffff;
                f32::from_bits((random() & 0x8000_0000) | (lowest + random() % count) << 23 | fraction)
            };
            let (a, b, c) = (number(64, 70), number(64, 70), number(1, 180));
            let (got, expected) = (mul_add_by_f64(a, b, c), a.mul_add(b, c));
            assert_eq!(got.to_bits(), expected.to_bits(), "{a:e} * {b:e} + {c:e}");
        }
        // The product, 1 + 2^-11 + 2^-24, is a tie; what decides it is too small for f64 to show.
        let (a, b) = (1.0 + 2f32.powi(-12), 1.0 + 2f32.powi(-12));
        for c in [2f32.powi(-80), -2f32.powi(-80), 0.0] {
            assert_eq!(mul_add_by_f64(a, b, c), a.mul_add(b, c));
        }
    }

    #[test]
    fn f16_conversions_agree_on_all_sets() {
        struct Both<'a>(&'a [f16; 16]);
        impl Kernel for Both<'_> {
            type Output = ([u32; 16], [u16; 16]);
            fn run<S: Simd>(self, simd: S) -> Self::Output {
                let x = simd.f32_from_f16(self.0);
                // Halfway to the next one: a tie for the way back.
                let ties = x.map(|x| f32::from_bits(x.to_bits() | 0x1000));
                (x.map(f32::to_bits), simd.f16_from_f32(&ties).map(f16::to_bits))
            }
        }
        for first in (0..=u16::MAX).step_by(16) {
            let x: [f16; 16] = std::array::from_fn(|i| f16::from_bits(first + i as u16));
            if x.iter().all(|x| x.is_finite()) {
                let expected = Isa::Baseline.run(Both(&x));
                for isa in Isa::available() {
                    assert_eq!(isa.run(Both(&x)), expected, "{isa:?}");
                }
            }
        }
    }
}
