//! What the tests share: a C++ toolchain, the driver double, and the kernels as a stand-alone program.
#![allow(dead_code, missing_docs)] // every test binary uses a part
#![allow(clippy::expect_used)]

pub mod double;
pub mod exact;
pub mod format;
pub mod golden;
pub mod runner;
pub mod tensor;
pub mod tolerance;
pub mod toolchain;
pub mod world;
