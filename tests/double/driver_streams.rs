//! Streams, events and graphs, with all asynchronous work deferred as far as the driver may.

use std::sync::Arc;

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode, CUstreamCaptureStatus};
use cudarc::driver::{result, CudaContext, CudaStream, DevicePtr, DriverError, PinnedHostSlice};

use crate::support;
use crate::toys::{axpy, toy};

// cudarc's own events would add waits between the streams, and break a capture.
fn untracked_context() -> Arc<CudaContext> {
    let context = CudaContext::new(0).unwrap();
    // SAFETY: the tests order their streams themselves.
    unsafe { context.disable_event_tracking() };
    context
}

fn pinned(context: &Arc<CudaContext>, value: f32) -> PinnedHostSlice<f32> {
    // SAFETY: written on the next line.
    let mut slice = unsafe { context.alloc_pinned::<f32>(1) }.unwrap();
    slice.as_mut_slice().unwrap()[0] = value;
    slice
}

/// Queues a copy of one float without cudarc's own bookkeeping.
fn copy_in(stream: &CudaStream, to: u64, from: *const f32) {
    // SAFETY: `from` points to a float that lives as long as the test.
    unsafe { result::memcpy_htod_async(to, std::slice::from_ref(&*from), stream.cu_stream()) }.unwrap();
}

#[test]
fn deferred_work_waits_for_the_host() {
    let Some(double) = support::double::lock() else { return };
    double.set_deferred(true);
    let context = untracked_context();
    let stream = context.new_stream().unwrap();
    let function = toy(&context, "toy_axpy").unwrap();
    let input = stream.clone_htod(&[1.0f32]).unwrap();
    let mut out = stream.alloc_zeros::<f32>(1).unwrap();
    axpy(&stream, &function, &mut out, &input, 1.0).unwrap();
    assert_eq!(double.counters().kernels_run, 0);
    assert!(double.pending_work() > 0);
    let event = stream.record_event(None).unwrap();
    assert!(!event.is_complete());
    event.synchronize().unwrap();
    assert_eq!((double.counters().kernels_run, double.pending_work()), (1, 0));
    assert!(event.is_complete());
    assert_eq!(stream.clone_dtoh(&out).unwrap(), [1.0]);
}

#[test]
fn pinned_memory_is_read_when_the_copy_runs_and_pageable_memory_at_the_call() {
    let Some(double) = support::double::lock() else { return };
    double.set_deferred(true);
    let context = untracked_context();
    let stream = context.new_stream().unwrap();
    let slots = stream.alloc_zeros::<f32>(2).unwrap();
    let address = slots.device_ptr(&stream).0;
    let mut in_pinned = pinned(&context, 1.0);
    let mut in_pageable = 1.0f32;
    copy_in(&stream, address, in_pinned.as_ptr().unwrap());
    copy_in(&stream, address + 4, &raw const in_pageable);
    // Reused too early.
    // SAFETY: one float, and nothing else refers to it.
    unsafe { in_pinned.as_mut_ptr().unwrap().write(2.0) };
    // SAFETY: as above.
    unsafe { (&raw mut in_pageable).write(2.0) };
    assert_eq!(stream.clone_dtoh(&slots).unwrap(), [2.0, 1.0]);
}

#[test]
fn pinned_memory_freed_too_early_is_reported() {
    let Some(double) = support::double::lock() else { return };
    double.set_deferred(true);
    let context = untracked_context();
    let stream = context.new_stream().unwrap();
    let slot = stream.alloc_zeros::<f32>(1).unwrap();
    let address = slot.device_ptr(&stream).0;
    // SAFETY: a block of four bytes, written before it is read, and freed once.
    unsafe {
        let host = result::malloc_host(4, 0).unwrap().cast::<f32>();
        host.write(1.0);
        copy_in(&stream, address, host);
        result::free_host(host.cast()).unwrap();
    }
    assert_eq!(stream.synchronize(), Err(DriverError(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS)));
}

#[test]
fn a_stream_runs_only_what_it_waits_for() {
    let Some(double) = support::double::lock() else { return };
    double.set_deferred(true);
    let context = untracked_context();
    let (first, second) = (context.new_stream().unwrap(), context.new_stream().unwrap());
    let slot = first.clone_htod(&[1.0f32]).unwrap();
    // SAFETY: read as bytes, of which every value is valid.
    let unordered = unsafe { second.alloc::<u8>(4) }.unwrap();
    first.synchronize().unwrap();
    copy_in(&first, slot.device_ptr(&first).0, &5.0);
    assert_eq!(second.clone_dtoh(&slot).unwrap(), [1.0], "nothing orders the two streams");
    second.join(&first).unwrap();
    assert_eq!(second.clone_dtoh(&slot).unwrap(), [5.0], "now an event does");
    drop(unordered);
}

#[test]
fn the_legacy_stream_waits_for_blocking_streams_only() {
    let Some(double) = support::double::lock() else { return };
    let context = untracked_context();
    let legacy = context.default_stream();
    let slots = legacy.clone_htod(&[0.0f32; 2]).unwrap();
    double.set_deferred(true);
    let address = slots.device_ptr(&legacy).0;
    copy_in(&context.per_thread_stream(), address, &1.0);
    let non_blocking = context.new_stream().unwrap();
    copy_in(&non_blocking, address + 4, &1.0);
    assert_eq!(legacy.clone_dtoh(&slots).unwrap(), [1.0, 0.0]);
    context.synchronize().unwrap();
    assert_eq!(legacy.clone_dtoh(&slots).unwrap(), [1.0, 1.0]);
}

#[test]
fn memory_is_freed_in_stream_order() {
    let Some(double) = support::double::lock() else { return };
    double.set_deferred(true);
    let context = untracked_context();
    let stream = context.new_stream().unwrap();
    let function = toy(&context, "toy_axpy").unwrap();
    let input = stream.clone_htod(&[3.0f32]).unwrap();
    let mut out = stream.alloc_zeros::<f32>(1).unwrap();
    axpy(&stream, &function, &mut out, &input, 1.0).unwrap();
    drop(input); // after the kernel, on the same stream
    assert_eq!(double.live_allocations(), 1);
    assert_eq!(stream.clone_dtoh(&out).unwrap(), [3.0]);
}

#[test]
fn a_graph_replays_its_kernels_and_reads_its_copies_anew() {
    let Some(double) = support::double::lock() else { return };
    let context = untracked_context();
    let stream = context.new_stream().unwrap();
    let function = toy(&context, "toy_axpy").unwrap();
    let input = stream.alloc_zeros::<f32>(1).unwrap();
    let mut out = stream.alloc_zeros::<f32>(1).unwrap();
    let mut host = pinned(&context, 1.0);
    let host_pointer = host.as_mut_ptr().unwrap();
    let mut factor = 10.0;

    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL).unwrap();
    copy_in(&stream, input.device_ptr(&stream).0, host_pointer);
    axpy(&stream, &function, &mut out, &input, factor).unwrap();
    assert_eq!(stream.capture_status().unwrap(), CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE);
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap();
    assert_eq!(double.counters().kernels_run, 0, "recorded, not run");
    assert_eq!(stream.clone_dtoh(&out).unwrap(), [0.0]);

    factor += 1.0; // the graph has its own copy of every argument
    assert_eq!(factor, 11.0);
    graph.launch().unwrap();
    assert_eq!(stream.clone_dtoh(&out).unwrap(), [10.0]);
    // SAFETY: one float, and no copy is in flight.
    unsafe { host_pointer.write(2.0) };
    graph.launch().unwrap();
    assert_eq!(stream.clone_dtoh(&out).unwrap(), [30.0]);
    let counters = double.counters();
    assert_eq!((counters.launches, counters.kernels_run, counters.graph_launches), (1, 2, 2));
    drop(graph);
}

#[test]
fn what_is_unsafe_in_a_capture_ends_it() {
    let Some(_double) = support::double::lock() else { return };
    let context = untracked_context();
    let stream = context.new_stream().unwrap();
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    let unsupported = CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    let invalidated = CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    assert_eq!(context.default_stream().begin_capture(mode).unwrap_err().0, unsupported);

    stream.begin_capture(mode).unwrap();
    assert_eq!(stream.synchronize().unwrap_err().0, unsupported);
    assert_eq!(stream.end_capture(CUgraphInstantiate_flags(0)).err().unwrap().0, invalidated);

    stream.begin_capture(mode).unwrap();
    // SAFETY: refused.
    assert_eq!(unsafe { result::malloc_sync(16) }.unwrap_err().0, unsupported);
    assert_eq!(stream.end_capture(CUgraphInstantiate_flags(0)).err().unwrap().0, invalidated);

    let per_thread = context.per_thread_stream();
    let implicit = CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    per_thread.begin_capture(mode).unwrap();
    assert_eq!(context.default_stream().capture_status().unwrap_err().0, implicit);
    assert_eq!(per_thread.capture_status().unwrap(), CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE);
    assert_eq!(context.default_stream().synchronize().unwrap_err().0, implicit);
    assert_eq!(per_thread.end_capture(CUgraphInstantiate_flags(0)).err().unwrap().0, invalidated);

    let before = context.new_stream().unwrap().record_event(None).unwrap();
    stream.begin_capture(mode).unwrap();
    assert_eq!(stream.wait(&before).unwrap_err().0, CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    assert_eq!(stream.end_capture(CUgraphInstantiate_flags(0)).err().unwrap().0, invalidated);

    let fork = context.new_stream().unwrap();
    for joined in [true, false] {
        stream.begin_capture(mode).unwrap();
        fork.join(&stream).unwrap();
        if joined {
            stream.join(&fork).unwrap();
        }
        let ended = stream.end_capture(CUgraphInstantiate_flags(0));
        assert_eq!(ended.err().map(|error| error.0), (!joined).then_some(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNJOINED));
    }
}
