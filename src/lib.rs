//! placeholder
#![cfg_attr(docsrs, feature(doc_cfg))]

mod adapters;
pub mod cpu;
#[cfg(feature = "cuda")]
#[cfg_attr(docsrs, doc(cfg(feature = "cuda")))]
pub mod cuda;
#[cfg(feature = "candle")]
#[cfg_attr(docsrs, doc(cfg(feature = "candle")))]
pub use adapters::candle;

#[doc(hidden)]
pub mod abi;
mod clip_coef;
mod dtype;
mod error;
mod options;
mod plan;
mod report;
mod value_bounds;

pub use dtype::{Dtype, Element};
pub use error::{Error, Result};
pub use options::{ClipNorm, ClipValue, NonFinite, NormType};
pub use report::{NormReport, ValueReport};

/// Reports of past calls that a CUDA clipper keeps on the device.
pub const REPORTS_KEPT: usize = 256;
