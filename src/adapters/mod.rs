//! The only files that know a framework: they borrow its tensors, check them, and hand them on.

#[cfg(feature = "candle")]
pub mod candle;
#[cfg(feature = "cuda")]
pub(crate) mod cudarc;
