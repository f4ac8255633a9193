//! The only files that know a framework: they borrow its tensors, check them, and hand them on.

#[cfg(feature = "candle")]
pub mod candle;
#[cfg(feature = "cuda")]
pub(crate) mod cudarc;
#[cfg(any(feature = "candle", feature = "tch"))]
mod deferred;
#[cfg(feature = "cuda")]
mod pointers;
#[cfg(feature = "tch")]
pub mod tch;
#[cfg(any(feature = "candle", feature = "tch"))]
mod variables;

#[cfg(any(feature = "candle", feature = "tch"))]
pub use deferred::{Deferred, DeferredScoped};
