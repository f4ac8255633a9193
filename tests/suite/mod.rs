//! Tests of the CUDA back end that run on the driver double and on a GPU alike. `tests/on_double.rs` and
//! `tests/on_gpu.rs` each include them; a process can talk to one driver only.
#![allow(missing_docs)]

pub mod data;
pub mod device;

pub mod every_kernel;
pub mod example_cuda_graph;
pub mod example_fused_adamw;
mod golden;
mod into;
#[cfg(feature = "nccl")]
mod nccl;
mod parity;
mod running;
mod scoped;
mod semantics;
mod shards;

/// The training of the examples, to run it here.
#[path = "../../examples/cuda_graph/train.rs"]
#[allow(dead_code)]
mod cuda_graph;
#[path = "../../examples/fused_adamw/train.rs"]
#[allow(dead_code)]
mod fused_adamw;
#[path = "../../examples/cuda_graph/linear.rs"]
mod linear;
