//! The floating-point environment our bits are defined in: round to nearest, subnormals kept. A library that was built
//! with -ffast-math may have left the thread flushing them to zero.

/// Sets the environment for the current thread, and puts the caller's back when dropped.
pub(crate) struct DefaultFpEnv {
    saved: Control,
}

impl DefaultFpEnv {
    pub(crate) fn enter() -> Self {
        let saved = read();
        write(DEFAULT);
        Self { saved }
    }
}

impl Drop for DefaultFpEnv {
    fn drop(&mut self) {
        write(self.saved);
    }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
mod imp {
    pub(super) type Control = u32;
    /// All exceptions masked, nearest, no FTZ, no DAZ: the state a process starts in.
    pub(super) const DEFAULT: Control = 0x1f80;

    pub(super) fn read() -> Control {
        let mut control: Control = 0;
        // SAFETY: stmxcsr writes four bytes to the pointer, which is that of a live u32.
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &mut control, options(nostack, preserves_flags)) };
        control
    }

    pub(super) fn write(control: Control) {
        // SAFETY: ldmxcsr reads four bytes from the pointer, that of a live u32; the value is DEFAULT or one that
        // stmxcsr gave, so no reserved bit is set.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &control, options(nostack, preserves_flags)) };
    }
}

#[cfg(all(target_arch = "aarch64", not(miri)))]
mod imp {
    pub(super) type Control = u64;
    /// Nearest, no flush to zero, no trapping.
    pub(super) const DEFAULT: Control = 0;

    pub(super) fn read() -> Control {
        let control: Control;
        // SAFETY: reads a register that user code may read.
        unsafe { std::arch::asm!("mrs {}, fpcr", out(reg) control, options(nostack, preserves_flags)) };
        control
    }

    pub(super) fn write(control: Control) {
        // SAFETY: the value is DEFAULT or one read from the same register.
        unsafe { std::arch::asm!("msr fpcr, {}", in(reg) control, options(nostack, preserves_flags)) };
    }
}

#[cfg(any(miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
mod imp {
    pub(super) type Control = ();
    pub(super) const DEFAULT: Control = ();
    pub(super) fn read() -> Control {}
    pub(super) fn write(_control: Control) {}
}

use imp::{read, write, Control, DEFAULT};

#[cfg(all(test, target_arch = "x86_64", not(miri)))]
mod tests {
    use super::*;

    #[test]
    fn flush_to_zero_is_lifted_and_given_back() {
        const FTZ_AND_DAZ: u32 = 0x8040;
        let before = read();
        write(before | FTZ_AND_DAZ);
        {
            let _env = DefaultFpEnv::enter();
            let subnormal = std::hint::black_box(f32::from_bits(1));
            assert_eq!((subnormal * std::hint::black_box(1.0)).to_bits(), 1);
        }
        assert_eq!(read() & FTZ_AND_DAZ, FTZ_AND_DAZ);
        write(before);
    }
}
