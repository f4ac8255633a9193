//! Which vector instructions this processor has, found at run time. The bits are the same on all of them: a kernel is
//! one generic body, compiled once for each set.

/// A computation to be compiled for several instruction sets.
pub(crate) trait Kernel {
    type Output;

    /// `FMA` says whether `mul_add` is an instruction here. Must be `#[inline(always)]`, or it is compiled for the
    /// baseline only.
    fn run<const FMA: bool>(self) -> Self::Output;
}

/// An instruction set. Only [`Isa::detect`] makes one of the sets above the baseline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    /// What every processor of the target has; no FMA assumed.
    Baseline,
    /// AVX2, FMA and F16C (Haswell, Zen and later).
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ, VL besides (Skylake-X, Zen 4 and later).
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// aarch64, whose baseline has FMA.
    #[cfg(target_arch = "aarch64")]
    Neon,
}

impl Isa {
    /// The best set this processor has. `std` caches the answer.
    pub(crate) fn detect() -> Self {
        Self::available().last().copied().unwrap_or(Self::Baseline)
    }

    /// All sets this processor has, the best last.
    pub(crate) fn available() -> &'static [Self] {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        {
            if !(is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c"))
            {
                return &[Self::Baseline];
            }
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                return &[Self::Baseline, Self::Avx2, Self::Avx512];
            }
            return &[Self::Baseline, Self::Avx2];
        }
        #[cfg(all(target_arch = "aarch64", not(miri)))]
        return &[Self::Baseline, Self::Neon];
        #[allow(unreachable_code)]
        &[Self::Baseline]
    }

    /// Runs `kernel` as compiled for this set.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Self::Baseline => kernel.run::<false>(),
            // SAFETY: this value was handed out by `available`, which has seen the processor report these features.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { run_avx2(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { run_avx512(kernel) },
            #[cfg(target_arch = "aarch64")]
            Self::Neon => kernel.run::<true>(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<true>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<true>()
}
