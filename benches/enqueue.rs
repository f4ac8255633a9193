//! The host's work in each call, on the driver double, with launches that do nothing. scripts/callgrind.py runs it and
//! counts instructions; alone it prints the driver calls, and with `--time` the shortest of many calls, in nanoseconds.
//! That has the double's own time in it, which is no driver's: only what one tensor adds to a list of `RawGrad`s that is
//! the same each time, or is not looked up, is time of this crate.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "../tests/support/mod.rs"]
mod support;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use gradclip::cuda::{self, Clipper, DeviceGradMut, RawGrad};
use gradclip::{Dtype, NormType};
use std::cell::RefCell;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;
use support::double::{self, Double};

/// Twice each way of passing the table: in the parameters of the kernels, and in device memory.
const TENSORS: [usize; 4] = [80, 160, 1500, 3000];
const MOST: usize = 3000;
const VERBS: [&str; 3] = ["total_norm", "clip_grad_norm", "clip_grad_value"];

/// What scripts/callgrind.py collects: it begins when this is entered, and is written out when it returns.
#[no_mangle]
#[inline(never)]
fn gradclip_enqueue(call: &mut dyn FnMut()) {
    call();
}

fn enqueue<G: DeviceGradMut>(clipper: &mut Clipper, verb: &str, grads: &mut [G]) {
    match verb {
        "total_norm" => drop(black_box(clipper.total_norm(grads, NormType::L2)).unwrap()),
        "clip_grad_norm" => drop(black_box(clipper.clip_grad_norm(grads, 1.0)).unwrap()),
        _ => drop(black_box(clipper.clip_grad_value(grads, 0.5)).unwrap()),
    }
}

const TIMED: usize = 300;

/// The shortest of many calls with `list`, each after one with the list that `before` says.
fn shortest(mut call: impl FnMut(), mut before: impl FnMut()) -> u128 {
    let mut once = || {
        before();
        let start = Instant::now();
        gradclip_enqueue(&mut call);
        start.elapsed().as_nanos()
    };
    (0..TIMED).map(|_| once()).min().unwrap()
}

/// One line for each case, in the order in which they are collected: gradients, list, verb, tensors, driver calls.
fn measure<G: DeviceGradMut>(double: &Double, stream: &Arc<CudaStream>, gradients: &str, lists: [&mut [G]; 2]) {
    let [list, other] = lists;
    for tensors in TENSORS {
        let (list, other) = (&mut list[..tensors], &mut other[..tensors]);
        for verb in VERBS {
            let mut clipper = Clipper::new(stream).unwrap();
            // Twice each: both have been seen, and every buffer has its size.
            for _ in 0..2 {
                enqueue(&mut clipper, verb, other);
                enqueue(&mut clipper, verb, list);
            }
            for what in ["same", "new"] {
                let (grads, before) = if what == "same" { (&mut *list, None) } else { (&mut *other, Some(&mut *list)) };
                double.reset_counters();
                gradclip_enqueue(&mut || enqueue(&mut clipper, verb, black_box(&mut *grads)));
                let calls = double.counters().calls;
                if std::env::args().any(|arg| arg == "--time") {
                    let clipper = RefCell::new(&mut clipper);
                    let call = || enqueue(&mut clipper.borrow_mut(), verb, black_box(&mut *grads));
                    let mut before = before;
                    let first = || {
                        if let Some(before) = before.as_deref_mut() {
                            enqueue(&mut clipper.borrow_mut(), verb, before);
                        }
                    };
                    println!("{gradients},{what},{verb},{tensors},{calls},{}", shortest(call, first));
                } else {
                    println!("{gradients},{what},{verb},{tensors},{calls}");
                }
            }
        }
    }
}

fn slices(stream: &Arc<CudaStream>) -> Vec<CudaSlice<f32>> {
    (0..MOST).map(|_| stream.clone_htod(&[1.0f32; 4]).unwrap()).collect()
}

fn raw(slices: &[CudaSlice<f32>], stream: &CudaStream) -> Vec<RawGrad> {
    // SAFETY: the slices outlive the list, and no launch does anything.
    slices.iter().map(|slice| unsafe { RawGrad::new(slice.device_ptr(stream).0, 4, Dtype::F32) }).collect()
}

fn main() {
    let Some(double) = double::lock() else { return };
    double.set_kernels_run(false);
    let context = cuda::context(0).unwrap();
    let stream = context.default_stream();
    let mut lists = [slices(&stream), slices(&stream)];
    let mut looked_up = lists.each_ref().map(|slices| raw(slices, &stream));
    let not_looked_up = lists.each_ref().map(|slices| raw(slices, &stream));
    let mut not_looked_up = not_looked_up.map(|list| list.into_iter().map(RawGrad::not_looked_up).collect::<Vec<_>>());
    measure(&double, &stream, "RawGrad", looked_up.each_mut().map(Vec::as_mut_slice));
    measure(&double, &stream, "RawGrad not looked up", not_looked_up.each_mut().map(Vec::as_mut_slice));
    measure(&double, &stream, "CudaSlice", lists.each_mut().map(Vec::as_mut_slice));

    // With a second stream in the context, cudarc waits for an event of each slice and records one.
    let second = context.new_stream().unwrap();
    let mut lists = [slices(&second), slices(&second)];
    measure(&double, &second, "CudaSlice with events", lists.each_mut().map(Vec::as_mut_slice));
}
