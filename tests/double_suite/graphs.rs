//! Capture into a CUDA graph, and replay.

use crate::suite::data::{tensor, Tensor};
use crate::suite::device::OnDevice;
use crate::support::double;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use gradclip::cuda::{self, Clipper};
use gradclip::{ClipNorm, Dtype, Error, NonFinite, NormType};
use std::sync::Arc;

const MODE: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
const FLAGS: CUgraphInstantiate_flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;

fn stream() -> Arc<CudaStream> {
    let context = cuda::context(0).unwrap();
    // SAFETY: everything happens on one stream. Waiting for an event from before a capture would break it.
    unsafe { context.disable_event_tracking() };
    context.new_stream().unwrap()
}

fn grads(stream: &Arc<CudaStream>, count: usize) -> Vec<CudaSlice<f32>> {
    (0..count).map(|_| stream.clone_htod(&[3.0f32, 4.0]).unwrap()).collect()
}

#[test]
fn captured_calls_clip_again_at_each_replay() {
    let Some(_double) = double::lock() else { return };
    // A list in the parameters, and one in memory.
    for count in [2, 300] {
        let stream = stream();
        let mut clipper = Clipper::new(&stream).unwrap();
        let mut list = grads(&stream, count);
        let norm = 5.0 * (count as f64).sqrt();
        clipper.clip_grad_norm(&mut list, f64::INFINITY).unwrap();
        stream.begin_capture(MODE).unwrap();
        let captured = clipper.clip_grad_norm(&mut list, norm / 2.0).unwrap();
        let graph = stream.end_capture(FLAGS).unwrap().unwrap();
        for _ in 0..3 {
            graph.launch().unwrap();
            assert!((captured.wait().unwrap().total_norm / norm - 1.0).abs() < 1e-7);
            assert_eq!(stream.clone_dtoh(&list[count - 1]).unwrap(), [1.5, 2.0]);
            stream.memcpy_htod(&[3.0f32, 4.0], &mut list[count - 1]).unwrap();
            for grad in &mut list {
                stream.memcpy_htod(&[3.0f32, 4.0], grad).unwrap();
            }
        }
    }
}

/// The same with outputs, whose table a graph goes on using while the clipper is given others.
#[test]
fn captured_calls_out_of_place_keep_their_outputs() {
    let Some(double) = double::lock() else { return };
    for count in [2, 300] {
        let stream = stream();
        let mut clipper = Clipper::new(&stream).unwrap();
        let list = grads(&stream, count);
        let zeros = || -> Vec<CudaSlice<f32>> { (0..count).map(|_| stream.alloc_zeros(2).unwrap()).collect() };
        let (mut outputs, mut others) = (zeros(), zeros());
        let norm = 5.0 * (count as f64).sqrt();
        stream.begin_capture(MODE).unwrap();
        let error = clipper.clip_grad_norm_into(&list, &mut outputs, norm / 2.0).unwrap_err();
        assert!(matches!(error, Error::CaptureNeedsWarmup { .. }), "{error}");
        stream.end_capture(FLAGS).unwrap();
        clipper.clip_grad_norm(&mut grads(&stream, count), norm).unwrap(); // makes room for the partials
        clipper.total_norm(&list, NormType::L2).unwrap();
        stream.begin_capture(MODE).unwrap();
        let error = clipper.clip_grad_norm_into(&list, &mut outputs, norm / 2.0).unwrap_err();
        assert_eq!(error, Error::CaptureNeedsWarmup { what: "the kernel of calls out of place" });
        stream.end_capture(FLAGS).unwrap();
        clipper.clip_grad_norm_into(&list, &mut others, norm).unwrap();
        stream.begin_capture(MODE).unwrap();
        let error = clipper.clip_grad_norm_into(&list, &mut outputs, norm / 2.0).unwrap_err();
        assert_eq!(error, Error::CaptureNeedsWarmup { what: "the table of outputs" });
        stream.end_capture(FLAGS).unwrap();
        clipper.clip_grad_norm_into(&list, &mut outputs, f64::INFINITY).unwrap();
        stream.begin_capture(MODE).unwrap();
        let captured = clipper.clip_grad_norm_into(&list, &mut outputs, norm / 2.0).unwrap();
        let graph = stream.end_capture(FLAGS).unwrap().unwrap();
        for _ in 0..2 {
            clipper.clip_grad_norm_into(&list, &mut others, f64::INFINITY).unwrap();
            graph.launch().unwrap();
            assert!(captured.wait().unwrap().written);
            assert_eq!(stream.clone_dtoh(&outputs[count - 1]).unwrap(), [1.5, 2.0]);
            assert_eq!(stream.clone_dtoh(&others[count - 1]).unwrap(), [3.0, 4.0]);
            assert_eq!(stream.clone_dtoh(&list[count - 1]).unwrap(), [3.0, 4.0]);
            stream.memcpy_htod(&[9.0f32, 9.0], &mut outputs[count - 1]).unwrap();
        }
    }
    assert_eq!(double.violated_guards(), 0);
}

/// Threshold, loss scale and the two halves of a split call, in one graph: replays follow what is on the device.
#[test]
fn a_captured_step_follows_the_loss_scale() {
    let Some(_double) = double::lock() else { return };
    let stream = stream();
    let mut clipper = Clipper::new(&stream).unwrap();
    let mut list = grads(&stream, 1);
    let mut scale = stream.clone_htod(&[1.0f32]).unwrap();
    // SAFETY: `scale` outlives the graph, and is written in the order of the stream only.
    let clip = unsafe { ClipNorm::new(2.5).loss_scale_at(scale.device_ptr(&stream).0) };
    let eager = clipper.total_norm(&list, NormType::L2).unwrap();
    stream.begin_capture(MODE).unwrap();
    let norm = clipper.total_norm(&list, NormType::L2).unwrap();
    let error = clipper.clip_with_norm(&mut list, &eager, clip).unwrap_err();
    assert!(matches!(error, Error::NormOutOfReach { .. }), "{error}");
    let coef = clipper.clip_coef(&list, clip).unwrap();
    let clipped = clipper.clip_with_norm(&mut list, &norm, clip).unwrap();
    let graph = stream.end_capture(FLAGS).unwrap().unwrap();
    for (loss_scale, multiplier) in [(1.0f32, 0.5), (1024.0, 0.5 / 1024.0), (0.5, 0.5 / 0.5), (3.0, 0.5 / 3.0)] {
        stream.memcpy_htod(&[loss_scale], &mut scale).unwrap();
        stream.memcpy_htod(&[3.0 * loss_scale, 4.0 * loss_scale], &mut list[0]).unwrap();
        graph.launch().unwrap();
        let report = clipped.wait().unwrap();
        assert_eq!((report.total_norm, report.multiplier), (5.0, multiplier));
        assert_eq!(coef.wait().unwrap().multiplier, multiplier);
        assert_eq!(norm.wait().unwrap().total_norm, 5.0 * f64::from(loss_scale));
        assert_eq!(stream.clone_dtoh(&list[0]).unwrap(), [1.5, 2.0]);
    }
}

/// After a capture the clipper goes on with other and longer lists; the graph must not notice.
#[test]
fn later_calls_do_not_disturb_a_captured_one() {
    let Some(double) = double::lock() else { return };
    {
        let stream = stream();
        let mut clipper = Clipper::new(&stream).unwrap();
        let mut list = grads(&stream, 200);
        clipper.clip_grad_norm(&mut list, f64::INFINITY).unwrap();
        stream.begin_capture(MODE).unwrap();
        let captured = clipper.clip_grad_norm(&mut list, 1.0).unwrap();
        let graph = stream.end_capture(FLAGS).unwrap().unwrap();
        for count in [250, 200, 900] {
            let mut other = grads(&stream, count);
            let eager = clipper.clip_grad_norm(&mut other, f64::INFINITY).unwrap();
            drop(other);
            graph.launch().unwrap();
            assert!((eager.wait().unwrap().total_norm / (5.0 * (count as f64).sqrt()) - 1.0).abs() < 1e-7);
            assert!((captured.wait().unwrap().total_norm / (5.0 * 200f64.sqrt()) - 1.0).abs() < 1e-7);
            for grad in &mut list {
                assert!(stream.clone_dtoh(grad).unwrap()[0] < 0.05);
                stream.memcpy_htod(&[3.0f32, 4.0], grad).unwrap();
            }
        }
        for _ in 0..2 * gradclip::REPORTS_KEPT {
            clipper.total_norm(&list, NormType::L2).unwrap();
        }
        graph.launch().unwrap();
        assert!(captured.wait().is_ok(), "a captured report never expires");
    }
    assert_eq!(double.violated_guards(), 0);
}

#[test]
fn what_cannot_be_done_while_capturing_is_refused() {
    let Some(_double) = double::lock() else { return };
    let stream = stream();
    let mut clipper = Clipper::new(&stream).unwrap();
    let mut list = grads(&stream, 200);
    let needs = |error: Error| matches!(error, Error::CaptureNeedsWarmup { .. });

    stream.begin_capture(MODE).unwrap();
    assert!(needs(clipper.clip_grad_norm(&mut list, 1.0).unwrap_err()), "workspace");
    stream.end_capture(FLAGS).ok();

    clipper.clip_grad_norm(&mut list, f64::INFINITY).unwrap();
    stream.begin_capture(MODE).unwrap();
    assert!(needs(clipper.clip_grad_norm(&mut list[..190], 1.0).unwrap_err()), "another table");
    let waits = ClipNorm::new(1.0).nonfinite(NonFinite::Error);
    assert!(needs(clipper.clip_grad_norm(&mut list, waits).unwrap_err()), "a wait");
    stream.end_capture(FLAGS).ok();
    assert_eq!(stream.clone_dtoh(&list[0]).unwrap(), [3.0, 4.0]);
}

#[test]
fn report_slots_held_by_graphs_run_out_with_an_error() {
    let Some(_double) = double::lock() else { return };
    let stream = stream();
    let mut clipper = Clipper::new(&stream).unwrap();
    let list: Vec<Tensor> = vec![tensor(Dtype::F32, &[3.0, 4.0])];
    let mut device = OnDevice::upload(&stream, &list);
    device.with(&list, |grads| {
        clipper.clip_grad_norm(grads, 1.0).unwrap();
        stream.begin_capture(MODE).unwrap();
        for _ in 0..gradclip::REPORTS_KEPT {
            clipper.clip_grad_norm(grads, 1.0).unwrap();
        }
        assert_eq!(clipper.clip_grad_norm(grads, 1.0).unwrap_err(), Error::NoReportSlot);
        stream.end_capture(FLAGS).ok();
    });
}

/// Reading a report while the stream captures: an error, in whatever thread, and the capture goes on.
#[test]
fn waiting_during_capture_is_refused_and_does_no_harm() {
    let Some(_double) = double::lock() else { return };
    for mode in [MODE, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED] {
        let stream = stream();
        let mut clipper = Clipper::new(&stream).unwrap();
        let mut list = grads(&stream, 1);
        let before = clipper.clip_grad_norm(&mut list, 100.0).unwrap();
        stream.begin_capture(mode).unwrap();
        let captured = clipper.clip_grad_norm(&mut list, 2.5).unwrap();
        let elsewhere = std::thread::scope(|scope| scope.spawn(|| before.wait()).join().unwrap());
        let another = Clipper::new(&stream).map(drop);
        for error in [before.wait().unwrap_err(), captured.wait().unwrap_err(), elsewhere.unwrap_err()] {
            assert_eq!(error, Error::CaptureNeedsWarmup { what: "the wait for a report" });
        }
        assert_eq!(another.unwrap_err(), Error::CaptureNeedsWarmup { what: "the clipper" });
        let graph = stream.end_capture(FLAGS).unwrap().unwrap();
        graph.launch().unwrap();
        assert_eq!(captured.wait().unwrap().total_norm, 5.0);
        assert_eq!(before.wait().unwrap().total_norm, 5.0);
    }
}

/// A captured report before any replay, also where eager calls have filled every other slot.
#[test]
fn a_captured_report_that_no_replay_has_written() {
    let Some(_double) = double::lock() else { return };
    for calls_before in [1, 2 * gradclip::REPORTS_KEPT] {
        let stream = stream();
        let mut clipper = Clipper::new(&stream).unwrap();
        let mut list = grads(&stream, 1);
        for _ in 0..calls_before {
            clipper.clip_grad_norm(&mut list, 100.0).unwrap();
        }
        stream.begin_capture(MODE).unwrap();
        let norm = clipper.clip_grad_norm(&mut list, 2.5).unwrap();
        let value = clipper.clip_grad_value(&mut list, 1.75).unwrap();
        let graph = stream.end_capture(FLAGS).unwrap().unwrap();
        assert_eq!(norm.wait().unwrap_err(), Error::ReportNotReady);
        assert_eq!(value.wait().unwrap_err(), Error::ReportNotReady);
        graph.launch().unwrap();
        assert_eq!((norm.wait().unwrap().total_norm, value.wait().unwrap().clipped), (5.0, 1));
    }
}

#[test]
fn failed_captures_do_not_use_up_slots() {
    let Some(double) = double::lock() else { return };
    let stream = stream();
    let mut clipper = Clipper::new(&stream).unwrap();
    let mut list = grads(&stream, 1);
    clipper.clip_grad_norm(&mut list, 100.0).unwrap();
    for attempt in 0..gradclip::REPORTS_KEPT as u64 + 44 {
        stream.begin_capture(MODE).unwrap();
        double.fail_named("cuLaunchKernel", attempt % 2, 2);
        if attempt % 3 == 0 {
            clipper.clip_grad_value(&mut list, 2.5).unwrap_err();
        } else {
            clipper.clip_grad_norm(&mut list, 2.5).unwrap_err();
        }
        stream.end_capture(FLAGS).ok();
    }
    stream.begin_capture(MODE).unwrap();
    let captured = clipper.clip_grad_norm(&mut list, 2.5).unwrap();
    stream.end_capture(FLAGS).unwrap().unwrap().launch().unwrap();
    assert_eq!(captured.wait().unwrap().total_norm, 5.0);
}

/// Slots that graphs hold are not those of eager calls: as many of these reports are kept as ever.
#[test]
fn reports_are_kept_as_long_beside_graphs() {
    let Some(_double) = double::lock() else { return };
    let stream = stream();
    let mut clipper = Clipper::new(&stream).unwrap();
    let mut list = grads(&stream, 1);
    clipper.clip_grad_norm(&mut list, 100.0).unwrap();
    stream.begin_capture(MODE).unwrap();
    for _ in 0..gradclip::REPORTS_KEPT {
        clipper.clip_grad_norm(&mut list, 2.5).unwrap();
    }
    stream.end_capture(FLAGS).ok();
    let first = clipper.total_norm(&list, NormType::L2).unwrap();
    for _ in 0..gradclip::REPORTS_KEPT - 1 {
        clipper.total_norm(&list, NormType::L2).unwrap();
    }
    assert!(first.wait().is_ok());
    clipper.total_norm(&list, NormType::L2).unwrap();
    assert_eq!(first.wait().unwrap_err(), Error::ReportExpired);
}

/// Capture, drop the clipper, replay: safe code, so what the graph refers to has to be there. It is left to the context,
/// no more than the clipper had; a clipper that never captured leaves nothing.
#[test]
fn replaying_after_the_clipper_is_gone() {
    let Some(double) = double::lock() else { return };
    for count in [1, 300] {
        double.reset();
        let stream = stream();
        let mut list = grads(&stream, count);
        let before = double.live_bytes();
        let mut clipper = Clipper::new(&stream).unwrap();
        clipper.clip_grad_norm(&mut list, f64::INFINITY).unwrap();
        stream.begin_capture(MODE).unwrap();
        let captured = clipper.clip_grad_norm(&mut list, 1.0).unwrap();
        let graph = stream.end_capture(FLAGS).unwrap().unwrap();
        let had = clipper.device_bytes() as u64;
        drop(clipper);
        let unloads = double.log().iter().filter(|name| *name == "cuModuleUnload").count();
        assert_eq!(unloads, 0, "the graph launches these kernels");
        drop(Clipper::new(&stream).unwrap());
        let unloads = double.log().iter().filter(|name| *name == "cuModuleUnload").count();
        assert_eq!(unloads, 4);
        assert_eq!(double.live_bytes() - before, had);
        let norm = 5.0 * (count as f64).sqrt();
        for expected in [norm, 1.0] {
            graph.launch().unwrap();
            let got = captured.wait().unwrap().total_norm;
            assert!((got / expected - 1.0).abs() < 1e-6, "{got}, expected {expected}");
        }
        drop(captured);
        graph.launch().unwrap();
        stream.synchronize().unwrap();
        assert_eq!((double.violated_guards(), double.counters().faults), (0, 0));
    }
}
