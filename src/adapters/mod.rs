//! The only files that know a framework: they borrow its tensors, check them, and hand them on.

#[cfg(feature = "candle")]
pub mod candle;
#[cfg(feature = "cuda")]
pub(crate) mod cudarc;
#[cfg(feature = "candle")]
mod deferred;
#[cfg(feature = "candle")]
mod variables;

#[cfg(feature = "candle")]
pub use deferred::Deferred;
