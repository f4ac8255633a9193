//! Failures: injected ones, and those that a program brings about itself.

use cudarc::driver::sys::CUresult;
use cudarc::driver::{result, CudaContext, DevicePtr, DriverError, LaunchConfig, PushKernelArg};

use crate::support;
use crate::toys::{axpy, block_sums, copy_packs, toy};

const ILLEGAL_ADDRESS: Result<(), DriverError> = Err(DriverError(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS));

fn whole_program() -> Result<f64, DriverError> {
    let context = CudaContext::new(0)?;
    let stream = context.new_stream()?;
    let sums = block_sums(&stream, &[0.5; 256], 1, 1)?;
    stream.synchronize()?;
    Ok(sums[0])
}

#[test]
fn any_call_can_be_made_to_fail() {
    let Some(double) = support::double::lock() else { return };
    assert_eq!(whole_program(), Ok(128.0));
    let calls = double.counters().calls;
    assert!(calls > 20);
    let log = double.log();
    for index in 0..calls {
        double.reset();
        double.fail(index, CUresult::CUDA_ERROR_UNKNOWN as i32);
        let outcome = whole_program();
        assert_eq!(double.failures_delivered(), 1, "call {index}");
        let expected = Err(DriverError(CUresult::CUDA_ERROR_UNKNOWN));
        // What fails while something is dropped reaches nobody.
        assert!(outcome == expected || outcome == Ok(128.0), "call {index}, {}: {outcome:?}", log[index as usize]);
    }
    double.reset();
    double.fail_named("cuMemAllocAsync", 1, CUresult::CUDA_ERROR_OUT_OF_MEMORY as i32);
    assert_eq!(whole_program(), Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)));
    assert_eq!(double.counters().allocs, 1, "the first one went through");
    assert_eq!(double.live_allocations(), 0);

    double.reset();
    double.fail_from(10, CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE as i32);
    assert_eq!(whole_program(), Err(DriverError(CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE)));
    assert!(double.failures_delivered() > 1);
}

#[test]
fn without_a_device_there_is_no_context() {
    let Some(double) = support::double::lock() else { return };
    double.set_device_count(0);
    assert_eq!(CudaContext::new(0).unwrap_err().0, CUresult::CUDA_ERROR_NO_DEVICE);
    double.set_device_count(1);
    assert!(CudaContext::new(0).is_ok());
    assert_eq!(CudaContext::new(1).unwrap_err().0, CUresult::CUDA_ERROR_INVALID_DEVICE);
}

#[test]
fn memory_runs_out() {
    let Some(double) = support::double::lock() else { return };
    double.set_total_memory(1000);
    let context = CudaContext::new(0).unwrap();
    let stream = context.default_stream();
    let first = stream.alloc_zeros::<u8>(600).unwrap();
    assert_eq!(context.mem_get_info().unwrap(), (400, 1000));
    assert_eq!(stream.alloc_zeros::<u8>(600).unwrap_err().0, CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    drop(first);
    assert!(stream.alloc_zeros::<u8>(600).is_ok());
}

#[test]
fn a_kernel_that_reads_past_an_allocation_breaks_the_context() {
    let Some(double) = support::double::lock() else { return };
    let context = CudaContext::new(0).unwrap();
    let stream = context.default_stream();
    let from = stream.alloc_zeros::<u8>(64).unwrap();
    let to = stream.alloc_zeros::<u8>(128).unwrap();
    let (to_address, from_address) = (to.device_ptr(&stream).0, from.device_ptr(&stream).0);
    copy_packs(&stream, to_address, from_address, 4).unwrap();
    assert!(stream.synchronize().is_ok());
    assert_eq!(copy_packs(&stream, to_address, from_address, 5), Ok(()), "a launch does not wait for its outcome");
    assert_eq!(stream.synchronize(), ILLEGAL_ADDRESS);
    assert_eq!(stream.alloc_zeros::<u8>(1).map(drop), ILLEGAL_ADDRESS, "and so for every call after it");
    assert_eq!((double.counters().faults, double.violated_guards()), (1, 0));
}

#[test]
fn copies_outside_an_allocation_break_the_context() {
    for bytes in [16, 17] {
        let Some(_double) = support::double::lock() else { return };
        let context = CudaContext::new(0).unwrap();
        let stream = context.default_stream();
        let slice = stream.alloc_zeros::<u8>(16).unwrap();
        let address = slice.device_ptr(&stream).0;
        // SAFETY: the double checks the range before it copies.
        unsafe { result::memcpy_htod_async(address, &vec![1u8; bytes], stream.cu_stream()) }.unwrap();
        assert_eq!(stream.synchronize(), if bytes == 16 { Ok(()) } else { ILLEGAL_ADDRESS });
    }
}

#[test]
fn memory_is_freed_once() {
    let Some(double) = support::double::lock() else { return };
    let _context = CudaContext::new(0).unwrap();
    // SAFETY: freed below; freeing again is what the double is to refuse.
    unsafe {
        let address = result::malloc_sync(64).unwrap();
        assert_eq!(result::free_sync(address), Ok(()));
        assert_eq!(result::free_sync(address), Err(DriverError(CUresult::CUDA_ERROR_INVALID_VALUE)));
    }
    assert_eq!(double.live_allocations(), 0);
}

#[test]
fn a_crashing_kernel_is_reported_later() {
    let Some(double) = support::double::lock() else { return };
    let context = CudaContext::new(0).unwrap();
    let stream = context.default_stream();
    let function = toy(&context, "toy_axpy").unwrap();
    let input = stream.clone_htod(&[1.0f32]).unwrap();
    let mut out = stream.alloc_zeros::<f32>(1).unwrap();
    double.crash_kernel(1, CUresult::CUDA_ERROR_LAUNCH_FAILED as i32);
    axpy(&stream, &function, &mut out, &input, 1.0).unwrap();
    assert!(stream.synchronize().is_ok());
    axpy(&stream, &function, &mut out, &input, 1.0).unwrap();
    assert_eq!(stream.synchronize(), Err(DriverError(CUresult::CUDA_ERROR_LAUNCH_FAILED)));
}

#[test]
fn a_launch_needs_the_block_the_kernel_is_written_for() {
    let Some(_double) = support::double::lock() else { return };
    let context = CudaContext::new(0).unwrap();
    let stream = context.default_stream();
    let function = toy(&context, "toy_axpy").unwrap();
    let input = stream.clone_htod(&[1.0f32]).unwrap();
    let address = input.device_ptr(&stream).0;
    for (grid_dim, block_dim) in [((1, 1, 1), (128, 1, 1)), ((0, 1, 1), (256, 1, 1)), ((1, 2, 1), (256, 1, 1))] {
        let mut launch = stream.launch_builder(&function);
        launch.arg(&address).arg(&address).arg(&1.0f32).arg(&1u32);
        // SAFETY: refused before it runs.
        let launched = unsafe { launch.launch(LaunchConfig { grid_dim, block_dim, shared_mem_bytes: 0 }) };
        assert_eq!(launched.map(drop), Err(DriverError(CUresult::CUDA_ERROR_INVALID_VALUE)));
    }
    assert_eq!(block_sums(&stream, &[1.0], 1, 1).unwrap(), [1.0], "and nothing is broken");
}

#[test]
fn a_launch_with_all_blocks_at_once_has_one_here() {
    use cudarc::driver::sys::{self, CUlaunchAttributeID};
    use std::ffi::c_void;
    let Some(_double) = support::double::lock() else { return };
    let context = CudaContext::new(0).unwrap();
    let stream = context.default_stream();
    let function = toy(&context, "toy_axpy").unwrap();
    let input = stream.clone_htod(&[2.0f32]).unwrap();
    let out = stream.alloc_zeros::<f32>(1).unwrap();
    let launch = |blocks, id| {
        let (out, input, factor, count) = (out.device_ptr(&stream).0, input.device_ptr(&stream).0, 1.0f32, 1u32);
        let mut args: [*mut c_void; 4] = [
            (&raw const out).cast_mut().cast(),
            (&raw const input).cast_mut().cast(),
            (&raw const factor).cast_mut().cast(),
            (&raw const count).cast_mut().cast(),
        ];
        let mut attribute =
            sys::CUlaunchAttribute { id, pad: [0; 4], value: sys::CUlaunchAttributeValue { cooperative: 1 } };
        let config = sys::CUlaunchConfig {
            gridDimX: blocks,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: 256,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            hStream: stream.cu_stream(),
            attrs: &raw mut attribute,
            numAttrs: 1,
        };
        // SAFETY: the arguments are those of toy_axpy, or it is refused before it runs.
        unsafe { sys::cuLaunchKernelEx(&config, function.cu_function(), args.as_mut_ptr(), std::ptr::null_mut()) }
    };
    use CUlaunchAttributeID::*;
    assert_eq!(launch(2, CU_LAUNCH_ATTRIBUTE_COOPERATIVE), CUresult::CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE);
    assert_eq!(launch(1, CU_LAUNCH_ATTRIBUTE_PRIORITY), CUresult::CUDA_ERROR_INVALID_VALUE);
    assert_eq!(launch(1, CU_LAUNCH_ATTRIBUTE_COOPERATIVE), CUresult::CUDA_SUCCESS);
    assert_eq!(launch(1, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION), CUresult::CUDA_SUCCESS);
    assert_eq!(stream.clone_dtoh(&out).unwrap(), [4.0]);
}
