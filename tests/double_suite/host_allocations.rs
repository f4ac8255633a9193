//! The cost contract on the host's heap: a repeated call takes nothing from it.

use crate::support::double;
use cudarc::driver::{CudaSlice, CudaStream};
use gradclip::cuda::{self, Clipper, DeviceGradMut, RawGrad};
use gradclip::{ClipNorm, Dtype, NormType};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

/// Counts what each thread asks for, so that other tests do not matter. The double, which is C++, is not counted.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local!(static ALLOCATIONS: Cell<u64> = const { Cell::new(0) });

fn count() {
    ALLOCATIONS.set(ALLOCATIONS.get() + 1); // no destructor, no allocation: fine wherever an allocator is called
}

// SAFETY: all of it is the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: passed on to the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: passed on to the caller.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: passed on to the caller.
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: passed on to the caller.
        unsafe { System.alloc_zeroed(layout) }
    }
}

fn allocations(call: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.get();
    call();
    ALLOCATIONS.get() - before
}

fn slices(stream: &Arc<CudaStream>, count: usize) -> Vec<CudaSlice<f32>> {
    (0..count).map(|_| stream.clone_htod(&[3.0f32, -4.0, 0.5]).unwrap()).collect()
}

fn raw(slices: &[CudaSlice<f32>], stream: &CudaStream) -> Vec<RawGrad> {
    use cudarc::driver::DevicePtr;
    // SAFETY: the tests keep the slices, and use them for nothing else.
    let raw = |slice: &CudaSlice<f32>| unsafe { RawGrad::new(slice.device_ptr(stream).0, slice.len(), Dtype::F32) };
    slices.iter().map(raw).collect()
}

/// All verbs on one list.
fn verbs<G: DeviceGradMut>(clipper: &mut Clipper, grads: &mut [G]) {
    clipper.total_norm(grads, NormType::L2).unwrap();
    clipper.clip_grad_norm(grads, 1e3).unwrap(); // within
    clipper.clip_grad_norm(grads, ClipNorm::new(1.0)).unwrap();
    clipper.clip_grad_value(grads, 0.5).unwrap();
}

const COUNTS: [usize; 3] = [1, 160, 3000]; // the last one has its table in device memory

fn on_both_streams(body: impl Fn(&Arc<CudaStream>)) {
    let Some(double) = double::lock() else { return };
    for own_stream in [false, true] {
        double.reset();
        double.set_kernels_run(false); // thousands of tensors, and only the host counts
        let context = cuda::context(0).unwrap();
        // From the second stream on, cudarc waits for and records an event for each slice.
        let stream = if own_stream { context.new_stream().unwrap() } else { context.default_stream() };
        body(&stream);
    }
}

#[test]
fn a_repeated_call_takes_nothing_from_the_heap() {
    on_both_streams(|stream| {
        for count in COUNTS {
            let mut clipper = Clipper::new(stream).unwrap();
            let mut slices = slices(stream, count);
            let mut raw = raw(&slices, stream);
            verbs(&mut clipper, &mut raw);
            assert_eq!(allocations(|| verbs(&mut clipper, &mut raw)), 0, "{count} RawGrads");
            let mut references: Vec<&mut CudaSlice<f32>> = slices.iter_mut().collect();
            verbs(&mut clipper, &mut references);
            assert_eq!(allocations(|| verbs(&mut clipper, &mut references)), 0, "{count} slices");
            let mut dynamic: Vec<&mut dyn DeviceGradMut> =
                slices.iter_mut().map(|slice| slice as &mut dyn DeviceGradMut).collect();
            verbs(&mut clipper, &mut dynamic);
            assert_eq!(allocations(|| verbs(&mut clipper, &mut dynamic)), 0, "{count} slices of any type");
        }
    });
}

/// Also not for another list of that length, whose plan is made anew, as long as no report of an earlier one is held.
#[test]
fn new_addresses_take_nothing_from_the_heap() {
    on_both_streams(|stream| {
        for count in COUNTS {
            let mut clipper = Clipper::new(stream).unwrap();
            let lists: [_; 3] = std::array::from_fn(|_| slices(stream, count));
            let mut lists = lists.each_ref().map(|slices| raw(slices, stream));
            verbs(&mut clipper, &mut lists[0]);
            for list in &mut lists[1..] {
                assert_eq!(allocations(|| verbs(&mut clipper, list)), 0, "{count} RawGrads");
            }
            let mut report = None;
            let held = allocations(|| report = Some(clipper.total_norm(&lists[0], NormType::L2).unwrap()));
            assert_eq!(held, 0);
            // The report names tensors by the plan that it keeps, so the next list needs one of its own: the plan, its
            // descriptors, and the list by address, grown as they fill.
            assert!(allocations(|| verbs(&mut clipper, &mut lists[1])) > 0);
        }
    });
}

#[test]
fn the_functions_without_a_clipper_take_nothing_from_the_heap() {
    on_both_streams(|stream| {
        let mut slices = slices(stream, 200);
        let mut call = || {
            cuda::total_norm(stream, &slices, NormType::L2).unwrap();
            cuda::clip_grad_norm(stream, &mut slices, 1.0).unwrap();
            cuda::clip_grad_value(stream, &mut slices, 0.5).unwrap();
        };
        call();
        assert_eq!(allocations(&mut call), 0);
        cuda::release_thread_clippers(); // or they would go with the thread, when the double is another test's
    });
}
