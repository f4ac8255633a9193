//! Order between streams: cudarc's event tracking must see our reads and writes.

use crate::support::double;
use gradclip::cuda::{self, Clipper};
use gradclip::Error;

/// Written on one stream, clipped on another, read on a third, with all work deferred: only the recorded events order
/// them.
#[test]
fn writes_are_seen_across_streams() {
    let Some(double) = double::lock() else { return };
    double.set_deferred(true);
    let context = cuda::context(0).unwrap();
    let [producer, middle, consumer] = std::array::from_fn(|_| context.new_stream().unwrap());
    let mut clipper = Clipper::new(&middle).unwrap();
    for step in 1..=3 {
        let mut grads = [producer.clone_htod(&[3.0f32 * step as f32, 4.0 * step as f32]).unwrap()];
        let pending = clipper.clip_grad_norm(&mut grads, 1.0).unwrap();
        assert_eq!(consumer.clone_dtoh(&grads[0]).unwrap(), [0.6, 0.8]);
        assert_eq!(pending.wait().unwrap().total_norm, 5.0 * f64::from(step));
    }
}

#[test]
fn one_clipper_for_each_stream_of_a_thread() {
    let Some(double) = double::lock() else { return };
    let context = cuda::context(0).unwrap();
    let streams = [context.default_stream(), context.per_thread_stream(), context.new_stream().unwrap()];
    for (stream, expected) in streams.into_iter().zip([3, 0, 0]) {
        let mut grads = [stream.clone_htod(&[3.0f32, 4.0]).unwrap()];
        let loads = double.counters().module_loads;
        for _ in 0..2 {
            cuda::clip_grad_norm(&stream, &mut grads, 1.0).unwrap().wait().unwrap();
        }
        assert_eq!(double.counters().module_loads - loads, expected, "kernels are those of the context");
    }
    cuda::release_thread_clippers();
}

/// A clamp that was launched writes, also if the launch after it fails: another stream has to wait for it.
#[test]
fn a_failed_launch_does_not_hide_a_write_from_other_streams() {
    let Some(double) = double::lock() else { return };
    let context = cuda::context(0).unwrap();
    let (own, stream) = (context.new_stream().unwrap(), context.new_stream().unwrap());
    let mut clipper = Clipper::new(&stream).unwrap();
    let mut grads = [own.clone_htod(&[3.0f32, 4.0]).unwrap()];
    clipper.clip_grad_value(&mut grads, 10.0).unwrap().wait().unwrap();
    double.set_deferred(true);
    double.fail_named("cuLaunchKernel", 1, 2);
    clipper.clip_grad_value(&mut grads, 1.0).unwrap_err();
    let seen = own.clone_dtoh(&grads[0]).unwrap();
    stream.synchronize().unwrap();
    assert_eq!(seen, own.clone_dtoh(&grads[0]).unwrap(), "changed behind cudarc's back");
}

/// Two context objects for one GPU, as two calls of `cuda::context(0)` give: the thread's clipper, made with the first,
/// works for the second, and with its event tracking.
#[test]
fn the_thread_clipper_of_another_context_object_keeps_order() {
    let Some(double) = double::lock() else { return };
    let first = cuda::context(0).unwrap();
    let mut warm = [first.default_stream().clone_htod(&[3.0f32, 4.0]).unwrap()];
    cuda::clip_grad_norm(&first.default_stream(), &mut warm, 1.0).unwrap().wait().unwrap();
    let loads = double.counters().module_loads;

    let second = cuda::context(0).unwrap();
    let stream = second.default_stream();
    let consumer = second.new_stream().unwrap();
    let mut grads = [stream.clone_htod(&[3.0f32, 4.0]).unwrap()];
    cuda::clip_grad_norm(&stream, &mut grads, 10.0).unwrap().wait().unwrap();
    double.set_deferred(true);
    let pending = cuda::clip_grad_norm(&stream, &mut grads, 1.0).unwrap();
    let seen = consumer.clone_dtoh(&grads[0]).unwrap();
    pending.wait().unwrap();
    cuda::clip_grad_norm(&first.default_stream(), &mut warm, 1.0).unwrap().wait().unwrap();
    cuda::release_thread_clippers();
    assert_eq!(seen, [0.6, 0.8], "read before the clip was done");
    assert_eq!(double.counters().module_loads, loads, "a clipper for each object");
}

/// An explicit clipper of one context object cannot keep the order of another's slices, so it refuses them.
#[test]
fn slices_of_another_context_object_are_refused() {
    let Some(double) = double::lock() else { return };
    let (first, second) = (cuda::context(0).unwrap(), cuda::context(0).unwrap());
    // One that tracks events and one that does not, both ways round.
    let tracked = second.new_stream().unwrap();
    for (here, there) in [(first.default_stream(), &tracked), (tracked.clone(), &first.default_stream())] {
        let mut clipper = Clipper::new(&here).unwrap();
        let mut grads = [there.clone_htod(&[3.0f32, 4.0]).unwrap()];
        double.set_deferred(true);
        for error in [
            clipper.clip_grad_norm(&mut grads, 1.0).unwrap_err(),
            clipper.clip_grad_value(&mut grads, 1.0).unwrap_err(),
            clipper.total_norm(&grads, gradclip::NormType::L2).unwrap_err(),
        ] {
            let Error::WrongDevice { tensor: 0, got, .. } = error else { panic!("{error}") };
            assert!(got.contains("the same GPU through another CudaContext object"), "{got}");
        }
        double.set_deferred(false);
        assert_eq!(there.clone_dtoh(&grads[0]).unwrap(), [3.0, 4.0]);
    }
    assert_eq!(double.counters().launches, 0);
}

/// A program that makes streams again and again does not collect clippers without end.
#[test]
fn a_thread_keeps_a_bounded_number_of_clippers() {
    let Some(double) = double::lock() else { return };
    let context = cuda::context(0).unwrap();
    let none: &[cudarc::driver::CudaSlice<f32>] = &[];
    let mut most = 0;
    for _ in 0..100 {
        let stream = context.new_stream().unwrap();
        cuda::total_norm(&stream, none, gradclip::NormType::L2).unwrap().wait().unwrap();
        most = most.max(double.live_allocations());
    }
    assert_eq!(most, 64);
    cuda::release_thread_clippers();
    assert_eq!(double.live_allocations(), 0);
}
