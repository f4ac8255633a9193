//! The bounds of value clipping in each dtype.

use crate::abi::ClampBounds;
use crate::dtype::Dtype;
use crate::fp_env::DefaultFpEnv;
use crate::options::ClipValue;

/// Each bound rounded to nearest in each dtype; a finite one stays finite, so that Inf ends at a bound.
pub(crate) fn in_each_dtype(clip: &ClipValue) -> ClampBounds {
    let _env = DefaultFpEnv::enter();
    let f32_of = |dtype: Dtype, bound: f64| dtype.round(bound) as f32;
    ClampBounds {
        lo_f64: clip.lo,
        hi_f64: clip.hi,
        lo_f32: f32_of(Dtype::F32, clip.lo),
        hi_f32: f32_of(Dtype::F32, clip.hi),
        lo_f16: f32_of(Dtype::F16, clip.lo),
        hi_f16: f32_of(Dtype::F16, clip.hi),
        lo_bf16: f32_of(Dtype::BF16, clip.lo),
        hi_bf16: f32_of(Dtype::BF16, clip.hi),
    }
}
