//! The toy kernels from Rust.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaFunction, CudaSlice, CudaStream, DriverError, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;

/// What a compiler would make of toy_kernels.cpp, without the code.
pub const PTX: &str = "// toy kernels, abridged
.version 7.0
.target sm_75
.address_size 64
.visible .entry toy_axpy(
    .param .u64 toy_axpy_param_0,
    .param .u64 toy_axpy_param_1,
    .param .f32 toy_axpy_param_2,
    .param .u32 toy_axpy_param_3
)
.maxntid 256, 1, 1
{ ret; }
.visible .entry toy_block_sums() { ret; }
.visible .entry toy_copy_packs() { ret; }
.visible .entry toy_nowhere() { ret; }
";

pub fn toy(context: &Arc<CudaContext>, symbol: &str) -> Result<CudaFunction, DriverError> {
    context.load_module(Ptx::from_src(PTX))?.load_function(symbol)
}

pub fn blocks(count: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (count, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 }
}

/// out += factor * input
pub fn axpy(
    stream: &Arc<CudaStream>,
    function: &CudaFunction,
    out: &mut CudaSlice<f32>,
    input: &CudaSlice<f32>,
    factor: f32,
) -> Result<(), DriverError> {
    let count = input.len() as u32;
    let mut launch = stream.launch_builder(function);
    launch.arg(out).arg(input).arg(&factor).arg(&count);
    // SAFETY: the arguments are those of toy_axpy; what lies outside a slice is reported by the double.
    unsafe { launch.launch(blocks(1)) }.map(drop)
}

/// The sum of every 256 values, in a buffer of `room` sums.
pub fn block_sums(
    stream: &Arc<CudaStream>,
    values: &[f64],
    num_blocks: u32,
    room: usize,
) -> Result<Vec<f64>, DriverError> {
    let function = toy(stream.context(), "toy_block_sums")?;
    let count = values.len() as u32;
    let values = stream.clone_htod(values)?;
    let mut sums = stream.alloc_zeros::<f64>(room)?;
    let mut launch = stream.launch_builder(&function);
    launch.arg(&values).arg(&count).arg(&mut sums);
    // SAFETY: the arguments are those of toy_block_sums; a write past `sums` meets its guard zone.
    unsafe { launch.launch(blocks(num_blocks)) }?;
    stream.clone_dtoh(&sums)
}

/// Copies packs of 16 bytes between addresses.
pub fn copy_packs(stream: &Arc<CudaStream>, to: u64, from: u64, count: u32) -> Result<(), DriverError> {
    let function = toy(stream.context(), "toy_copy_packs")?;
    let mut launch = stream.launch_builder(&function);
    launch.arg(&to).arg(&from).arg(&count);
    // SAFETY: the arguments are those of toy_copy_packs; the double checks each address before it is used.
    unsafe { launch.launch(blocks(1)) }.map(drop)
}
