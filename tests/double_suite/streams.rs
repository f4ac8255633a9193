//! Order between streams: cudarc's event tracking must see our reads and writes.

use crate::support::double;
use gradclip::cuda::{self, Clipper};

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
    for stream in [context.default_stream(), context.per_thread_stream(), context.new_stream().unwrap()] {
        let mut grads = [stream.clone_htod(&[3.0f32, 4.0]).unwrap()];
        let loads = double.counters().module_loads;
        for _ in 0..2 {
            cuda::clip_grad_norm(&stream, &mut grads, 1.0).unwrap().wait().unwrap();
        }
        assert_eq!(double.counters().module_loads - loads, 4);
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
