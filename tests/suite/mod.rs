//! Tests of the CUDA back end that run on the driver double and on a GPU alike. `tests/on_double.rs` and
//! `tests/on_gpu.rs` each include them; a process can talk to one driver only.
#![allow(missing_docs)]

pub mod data;
pub mod device;

mod golden;
mod parity;
mod semantics;
