//! The driver double against cudarc: what the other tests rely on when they run the CUDA path without a GPU.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "double/cuda_on_host.rs"]
mod cuda_on_host;
#[path = "double/driver_faults.rs"]
mod driver_faults;
#[path = "double/driver_streams.rs"]
mod driver_streams;
mod support;
#[path = "double/toys.rs"]
mod toys;

use cudarc::driver::sys::{CUpointer_attribute, CUresult};
use cudarc::driver::{result, sys, CudaContext, DevicePtr, DriverError};
use cudarc::nvrtc::Ptx;
use toys::{axpy, block_sums, copy_packs, toy, PTX};

/// For scripts that link programs against the double.
#[test]
fn the_library_is_here() {
    let Some(compiler) = support::toolchain::compiler() else { return };
    println!("{}", support::double::build(compiler, &[]).unwrap()[0].display());
}

#[test]
fn a_kernel_runs_and_its_result_comes_back() {
    let Some(double) = support::double::lock() else { return };
    let context = CudaContext::new(0).unwrap();
    let stream = context.default_stream();
    let function = toy(&context, "toy_axpy").unwrap();
    let input = stream.clone_htod(&[1.0f32, 2.0, 3.0]).unwrap();
    let mut out = stream.clone_htod(&[10.0f32, 20.0, 30.0]).unwrap();
    axpy(&stream, &function, &mut out, &input, 2.0).unwrap();
    assert_eq!(stream.clone_dtoh(&out).unwrap(), [12.0, 24.0, 36.0]);

    let counters = double.counters();
    assert_eq!((counters.launches, counters.kernels_run), (1, 1));
    assert_eq!((counters.htod_calls, counters.htod_bytes), (2, 24));
    assert_eq!((counters.dtoh_calls, counters.dtoh_bytes), (1, 12));
    assert_eq!((counters.allocs, counters.alloc_bytes, counters.frees), (2, 24, 0));
    assert_eq!(counters.syncs, 1, "the copy to pageable memory");
    let log = double.log();
    assert_eq!(log.len() as u64, counters.calls);
    assert_eq!(log.iter().filter(|name| *name == "cuLaunchKernel").count(), 1);

    assert_eq!((double.live_allocations(), double.live_bytes()), (2, 24));
    drop((input, out));
    assert_eq!((double.live_allocations(), double.violated_guards()), (0, 0));
    drop((function, stream, context));
    assert_eq!(double.live_handles(), 0);
}

#[test]
fn both_orders_run_every_thread_of_every_block() {
    let Some(double) = support::double::lock() else { return };
    let context = CudaContext::new(0).unwrap();
    let stream = context.new_stream().unwrap();
    let values: Vec<f64> = (0..1000).map(f64::from).collect();
    let expected: Vec<f64> = values.chunks(256).map(|block| block.iter().sum()).collect();
    for reversed in [false, true] {
        double.set_reversed_order(reversed);
        assert_eq!(block_sums(&stream, &values, 4, 4).unwrap(), expected);
    }
}

#[test]
fn fresh_memory_is_poison() {
    let Some(_double) = support::double::lock() else { return };
    let context = CudaContext::new(0).unwrap();
    let stream = context.default_stream();
    // SAFETY: read as bytes, of which every value is valid.
    let fresh = unsafe { stream.alloc::<u8>(100) }.unwrap();
    assert_eq!(stream.clone_dtoh(&fresh).unwrap(), [0xff; 100]);
    assert_eq!(stream.clone_dtoh(&stream.alloc_zeros::<u8>(100).unwrap()).unwrap(), [0; 100]);
    assert_eq!(fresh.device_ptr(&stream).0 % 512, 256, "aligned to what cuMemAlloc promises, and to no more");
}

#[test]
fn a_write_past_the_end_is_found_by_the_guards() {
    let Some(double) = support::double::lock() else { return };
    let context = CudaContext::new(0).unwrap();
    let stream = context.default_stream();
    assert_eq!(block_sums(&stream, &[1.0; 512], 2, 2).unwrap(), [256.0, 256.0]);
    assert_eq!(double.violated_guards(), 0);
    block_sums(&stream, &[1.0; 512], 2, 1).unwrap(); // sums has room for one block, and two write
    assert_eq!(double.violated_guards(), 1);
}

#[test]
fn two_devices_are_kept_apart() {
    let Some(double) = support::double::lock() else { return };
    assert_eq!(CudaContext::device_count().unwrap(), 2);
    let contexts = [CudaContext::new(0).unwrap(), CudaContext::new(1).unwrap()];
    assert_eq!(CudaContext::new(2).unwrap_err().0, CUresult::CUDA_ERROR_INVALID_DEVICE);
    let streams = contexts.clone().map(|context| context.new_stream().unwrap());
    let inputs = streams.clone().map(|stream| stream.clone_htod(&[1.0f32; 4]).unwrap());
    let addresses = [0, 1].map(|ordinal| inputs[ordinal].device_ptr(&streams[ordinal]).0);
    for ordinal in 0..2 {
        let address = addresses[ordinal];
        assert_eq!(pointer_attributes(address + 4), (2, ordinal as i32, address, 16));
        let mut owner: sys::CUcontext = std::ptr::null_mut();
        // SAFETY: a stream of ours, and room for one handle.
        unsafe { sys::cuStreamGetCtx(streams[ordinal].cu_stream(), &mut owner) }.result().unwrap();
        assert_eq!(owner, contexts[ordinal].cu_ctx());
    }
    let function = toy(&contexts[1], "toy_axpy").unwrap();
    let mut out = streams[0].alloc_zeros::<f32>(4).unwrap();
    let error = axpy(&streams[0], &function, &mut out, &inputs[0], 1.0).unwrap_err();
    assert_eq!(error.0, CUresult::CUDA_ERROR_INVALID_HANDLE, "a function of one device on a stream of the other");

    copy_packs(&streams[0], addresses[0], addresses[1], 1).unwrap();
    assert_eq!(streams[0].synchronize().unwrap_err().0, CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    assert!(streams[1].synchronize().is_ok(), "the other device goes on");
    assert_eq!(double.counters().faults, 1);
}

fn pointer_attributes(address: u64) -> (u32, i32, u64, u64) {
    use CUpointer_attribute::*;
    let (mut kind, mut device, mut start, mut size) = (0u32, 0i32, 0u64, 0u64);
    let get = |data: *mut std::ffi::c_void, attribute| {
        // SAFETY: each attribute is written to a variable of its size.
        unsafe { sys::cuPointerGetAttribute(data, attribute, address) }.result().unwrap();
    };
    get((&raw mut kind).cast(), CU_POINTER_ATTRIBUTE_MEMORY_TYPE);
    get((&raw mut device).cast(), CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL);
    get((&raw mut start).cast(), CU_POINTER_ATTRIBUTE_RANGE_START_ADDR);
    get((&raw mut size).cast(), CU_POINTER_ATTRIBUTE_RANGE_SIZE);
    (kind, device, start, size)
}

#[test]
fn a_host_pointer_has_no_attributes() {
    let Some(_double) = support::double::lock() else { return };
    let _context = CudaContext::new(0).unwrap();
    let on_host = 1.0f32;
    let mut kind = 0u32;
    // SAFETY: room for the attribute.
    let result = unsafe {
        sys::cuPointerGetAttribute(
            (&raw mut kind).cast(),
            CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
            (&raw const on_host) as u64,
        )
    };
    assert_eq!(result, CUresult::CUDA_ERROR_INVALID_VALUE);
}

#[test]
fn a_driver_says_of_a_pointer_what_a_test_has_it_say() {
    use CUpointer_attribute::*;
    let Some(double) = support::double::lock() else { return };
    let context = CudaContext::new(0).unwrap();
    let stream = context.default_stream();
    let slice = stream.clone_htod(&[1.0f32; 4]).unwrap();
    let address = slice.device_ptr(&stream).0;
    let size = |address| {
        let mut size = 7u64;
        let data = (&raw mut size).cast();
        // SAFETY: room for the attribute.
        let code = unsafe { sys::cuPointerGetAttribute(data, CU_POINTER_ATTRIBUTE_RANGE_SIZE, address) };
        (code, size)
    };
    let device_and_size = |address| {
        let mut attributes = [CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, CU_POINTER_ATTRIBUTE_RANGE_SIZE];
        let (mut device, mut size) = (7i32, 7u64);
        let mut data = [(&raw mut device).cast(), (&raw mut size).cast()];
        // SAFETY: room for two attributes.
        unsafe { sys::cuPointerGetAttributes(2, attributes.as_mut_ptr(), data.as_mut_ptr(), address) }
            .result()
            .unwrap();
        (device, size)
    };
    assert_eq!((size(address), device_and_size(address)), ((CUresult::CUDA_SUCCESS, 16), (0, 16)));
    assert_eq!(device_and_size(0x10), (-2, 0), "no pointer of CUDA's: the defaults");
    let [device, range] = [CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, CU_POINTER_ATTRIBUTE_RANGE_SIZE].map(|a| a as i32);
    double.answer(address, range, Ok(1 << 40));
    double.answer(address, device, Ok(1));
    assert_eq!((size(address), device_and_size(address)), ((CUresult::CUDA_SUCCESS, 1 << 40), (1, 1 << 40)));
    assert_eq!(device_and_size(address + 4), (0, 16), "of another address, the truth");
    double.answer(address, range, Err(CUresult::CUDA_ERROR_NOT_SUPPORTED as i32));
    double.answer(address, device, Err(CUresult::CUDA_ERROR_INVALID_VALUE as i32));
    assert_eq!(size(address), (CUresult::CUDA_ERROR_NOT_SUPPORTED, 7));
    assert_eq!(device_and_size(address), (-2, 0));
}

#[test]
fn a_module_has_to_be_ptx_that_the_driver_and_the_device_take() {
    let Some(double) = support::double::lock() else { return };
    let context = CudaContext::new(0).unwrap();
    let load = |text: &str| context.load_module(Ptx::from_src(text)).map(drop).map_err(|error| error.0);
    assert_eq!(load("\x7fELF"), Err(CUresult::CUDA_ERROR_INVALID_IMAGE));
    assert_eq!(load(PTX), Ok(()));
    assert_eq!(
        load(&PTX.replace("toy_axpy_param_3\n", "toy_axpy_param_3[2]\n")),
        Err(CUresult::CUDA_ERROR_INVALID_IMAGE)
    );

    let ptx_8_8 = PTX.replace(".version 7.0", ".version 8.8");
    double.set_driver_version(12080);
    assert_eq!(load(&ptx_8_8), Err(CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION));
    double.set_driver_version(12090);
    assert_eq!(load(&ptx_8_8), Ok(()));

    double.set_compute_capability(7, 0);
    assert_eq!(load(PTX), Err(CUresult::CUDA_ERROR_INVALID_PTX));
    double.set_compute_capability(7, 5);
    assert_eq!(load(PTX), Ok(()));

    let module = context.load_module(Ptx::from_src(PTX)).unwrap();
    for missing in ["toy_elsewhere", "toy_nowhere"] {
        assert_eq!(module.load_function(missing).unwrap_err().0, CUresult::CUDA_ERROR_NOT_FOUND, "{missing}");
    }
}

#[test]
fn every_kernel_of_the_crate_is_there() {
    let Some(double) = support::double::lock() else { return };
    let kernels = double.kernels();
    for (symbol, threads) in [
        ("norm_partials_l1", 256),
        ("norm_partials_l2", 256),
        ("norm_partials_inf", 256),
        ("clip_coef", 1024),
        ("clip_coef_rms", 1024),
        ("clip_coef_of_norm", 32),
        ("scale", 256),
        ("scale_into", 256),
        ("scale_any", 256),
        ("clamp", 256),
        ("clamp_counts", 1024),
        ("weigh_partials", 256),
        ("fold_partials", 1024),
        ("fold_partials_p", 1024),
        ("clip_coef_of_ranks", 1024),
        ("clip_coef_of_ranks_p", 1024),
    ] {
        let kernel = kernels.iter().find(|kernel| kernel.symbol == symbol).expect(symbol);
        assert_eq!(kernel.threads, threads, "{symbol}");
        assert!(kernel.param_bytes <= 4096, "{symbol}: {} bytes of parameters", kernel.param_bytes);
    }
}

#[test]
fn the_current_context_is_a_stack_of_each_thread() {
    let Some(_double) = support::double::lock() else { return };
    let contexts = [CudaContext::new(0).unwrap(), CudaContext::new(1).unwrap()];
    assert_eq!(result::ctx::get_current().unwrap(), Some(contexts[1].cu_ctx()));
    let other_thread = std::thread::spawn(|| result::ctx::get_current().unwrap().is_none());
    assert!(other_thread.join().unwrap());
    contexts[0].bind_to_thread().unwrap();
    assert_eq!(result::ctx::get_current().unwrap(), Some(contexts[0].cu_ctx()));
    // SAFETY: no context is a context to set.
    unsafe { result::ctx::set_current(std::ptr::null_mut()) }.unwrap();
    assert_eq!(result::ctx::get_current().unwrap(), None);
    // SAFETY: fails before it allocates.
    let without = unsafe { result::malloc_sync(16) };
    assert_eq!(without, Err(DriverError(CUresult::CUDA_ERROR_INVALID_CONTEXT)));
}
