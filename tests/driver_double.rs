//! The driver double against cudarc: what the other tests rely on when they run the CUDA path without a GPU.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod support;

use std::sync::Arc;

use cudarc::driver::sys::{CUresult, CUstreamCaptureMode};
use cudarc::driver::{
    result, sys, CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, DriverError,
    LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::Ptx;

const PTX: &str = "// toy kernels, abridged
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

const ILLEGAL_ADDRESS: CUresult = CUresult::CUDA_ERROR_ILLEGAL_ADDRESS;

fn toy(context: &Arc<CudaContext>, symbol: &str) -> CudaFunction {
    context
        .load_module(Ptx::from_src(PTX))
        .unwrap()
        .load_function(symbol)
        .unwrap()
}

const ONE_BLOCK: LaunchConfig = LaunchConfig {
    grid_dim: (1, 1, 1),
    block_dim: (256, 1, 1),
    shared_mem_bytes: 0,
};

fn axpy(
    stream: &Arc<CudaStream>,
    function: &CudaFunction,
    out: &mut CudaSlice<f32>,
    input: &CudaSlice<f32>,
    factor: f32,
) -> Result<(), DriverError> {
    let count = input.len() as u32;
    let mut launch = stream.launch_builder(function);
    launch.arg(out).arg(input).arg(&factor).arg(&count);
    // SAFETY: the arguments are those of toy_axpy, and both slices have `count` elements.
    unsafe { launch.launch(ONE_BLOCK) }.map(drop)
}

#[test]
fn a_kernel_runs_and_its_result_comes_back() {
    let Some(double) = support::double::lock() else { return };
    let context = CudaContext::new(0).unwrap();
    let stream = context.default_stream();
    let axpy_kernel = toy(&context, "toy_axpy");
    let input = stream.clone_htod(&[1.0f32, 2.0, 3.0]).unwrap();
    let mut out = stream.clone_htod(&[10.0f32, 20.0, 30.0]).unwrap();
    axpy(&stream, &axpy_kernel, &mut out, &input, 2.0).unwrap();
    assert_eq!(stream.clone_dtoh(&out).unwrap(), [12.0, 24.0, 36.0]);
    let counters = double.counters();
    assert_eq!((counters.launches, counters.kernels_run), (1, 1));
    assert_eq!((counters.htod_calls, counters.htod_bytes), (2, 24));
    assert_eq!((counters.dtoh_calls, counters.dtoh_bytes), (1, 12));
    assert_eq!(counters.allocs, 2);
    assert_eq!(double.live_allocations(), 2);
    assert!(double.log().iter().any(|name| name == "cuLaunchKernel"));
    drop((input, out));
    assert_eq!((double.live_allocations(), double.violated_guards()), (0, 0));
    println!("{:#?}\n{:?}", double.counters(), double.log());
}
