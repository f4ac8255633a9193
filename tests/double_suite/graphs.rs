//! Capture into a CUDA graph, and replay.

use crate::suite::data::{tensor, Tensor};
use crate::suite::device::OnDevice;
use crate::support::double;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use gradclip::cuda::{self, Clipper};
use gradclip::{ClipNorm, Dtype, Error, NonFinite, NormType, Scope};
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
        assert_eq!(error, Error::CaptureNeedsWarmup { what: "a kernel of this call" });
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
    clipper.clip_with_norm(&mut list, 1.0, f64::INFINITY).unwrap();
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

/// A whole step of a running norm, captured: each replay adds up what is there then.
#[test]
fn running_norms_are_captured() {
    let Some(double) = double::lock() else { return };
    let stream = stream();
    let clipper = Clipper::new(&stream).unwrap();
    for count in [3, 400] {
        let mut list = grads(&stream, count);
        let mut norm = clipper.running_norm(NormType::L2).unwrap();
        let step = |norm: &mut cuda::RunningNorm, list: &mut [CudaSlice<f32>], max_norm: f64| {
            norm.add(&list[..1]).unwrap();
            norm.add(&list[1..]).unwrap();
            norm.clip(list, max_norm)
        };
        let needs = |error: Error| matches!(error, Error::CaptureNeedsWarmup { .. });
        stream.begin_capture(MODE).unwrap();
        assert!(needs(norm.add(&list).unwrap_err()), "the partials");
        assert!(needs(clipper.running_norm(NormType::L2).unwrap_err()), "another norm");
        stream.end_capture(FLAGS).ok();
        step(&mut norm, &mut list, f64::INFINITY).unwrap();

        stream.begin_capture(MODE).unwrap();
        let captured = step(&mut norm, &mut list, 1.0).unwrap();
        let graph = stream.end_capture(FLAGS).unwrap().unwrap();
        // Something else in between, for which its memory grows.
        let others = grads(&stream, 2 * count);
        norm.add(&others).unwrap();
        assert!(
            (norm.total_norm().unwrap().wait().unwrap().total_norm / (50.0 * count as f64).sqrt() - 1.0).abs() < 1e-7
        );
        for factor in [1.0f32, 2.0] {
            for grad in &mut list {
                stream.memcpy_htod(&[3.0 * factor, 4.0 * factor], grad).unwrap();
            }
            graph.launch().unwrap();
            let expected = f64::from(factor) * 5.0 * (count as f64).sqrt();
            assert!((captured.wait().unwrap().total_norm / expected - 1.0).abs() < 1e-7);
            let clipped = stream.clone_dtoh(&list[count - 1]).unwrap();
            assert!((f64::from(clipped[0]) / (3.0 * f64::from(factor) / expected) - 1.0).abs() < 1e-6, "{clipped:?}");
        }
        drop(norm);
        graph.launch().unwrap(); // what it uses is still there
        stream.synchronize().unwrap();
    }
    assert_eq!(double.violated_guards(), 0);
}

#[test]
fn norms_of_any_order_are_captured() {
    let Some(double) = double::lock() else { return };
    let stream = stream();
    let mut clipper = Clipper::new(&stream).unwrap();
    let mut list = grads(&stream, 200);
    let clip = |max_norm| ClipNorm::new(max_norm).norm_type(NormType::P(3.0));
    let eager = clipper.clip_grad_norm(&mut list, clip(f64::INFINITY)).unwrap();
    stream.begin_capture(MODE).unwrap();
    let captured = clipper.clip_grad_norm(&mut list, clip(1.0)).unwrap();
    let graph = stream.end_capture(FLAGS).unwrap().unwrap();
    drop(clipper); // its kernels stay: the graph launches them
    graph.launch().unwrap();
    let norm = captured.wait().unwrap().total_norm;
    assert_eq!(norm, eager.wait().unwrap().total_norm);
    assert!((norm / (200.0 * (27.0 + 64.0f64)).cbrt() - 1.0).abs() < 1e-14);
    assert!(stream.clone_dtoh(&list[0]).unwrap()[0] < 0.2);
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
    let order = ClipNorm::new(1.0).norm_type(NormType::P(3.0));
    assert!(needs(clipper.clip_grad_norm(&mut list, order).unwrap_err()), "the kernel for another order");
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
        clipper.clip_grad_value(&mut list, 100.0).unwrap();
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

/// The same with a norm for each tensor, group and row: other gradients at each replay, and the report of that replay.
#[test]
fn captured_scoped_calls_clip_again_at_each_replay() {
    let Some(double) = double::lock() else { return };
    for count in [2, 300] {
        let stream = stream();
        let mut clipper = Clipper::new(&stream).unwrap();
        let mut list = grads(&stream, count);
        let group_of: Vec<usize> = (0..count).map(|i| i % 2).collect();
        let rows = vec![2; count];
        let scopes = [Scope::per_tensor().telemetry(), Scope::groups(&group_of), Scope::rows(&rows).telemetry()];
        for scope in scopes {
            let _ = clipper.clip_grad_norm_by(&mut list, &scope, f64::INFINITY).unwrap();
            stream.begin_capture(MODE).unwrap();
            let captured = clipper.clip_grad_norm_by(&mut list, &scope, 0.5).unwrap();
            let graph = stream.end_capture(FLAGS).unwrap().unwrap();
            for values in [[3.0f32, 4.0], [0.0, 12.0], [f32::NAN, 1.0], [0.1, 0.1]] {
                for grad in &mut list {
                    stream.memcpy_htod(&values, grad).unwrap();
                }
                let mut on_host = vec![values; count];
                let expected = gradclip::cpu::clip_grad_norm_by(&mut on_host, &scope, 0.5).unwrap();
                graph.launch().unwrap();
                let report = captured.wait().unwrap();
                assert_eq!(format!("{report:?}"), format!("{expected:?}"));
                for (grad, expected) in list.iter().zip(&on_host) {
                    let got = stream.clone_dtoh(grad).unwrap();
                    assert_eq!(got.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), expected.map(f32::to_bits));
                }
            }
        }
    }
    assert_eq!((double.violated_guards(), double.counters().faults), (0, 0));
}

/// Before any replay, after eager calls, and after one that needed more room for its reports.
#[test]
fn a_captured_scoped_report_is_that_of_its_last_replay() {
    let Some(double) = double::lock() else { return };
    {
        let stream = stream();
        let mut clipper = Clipper::new(&stream).unwrap();
        let (mut list, mut longer) = (grads(&stream, 2), grads(&stream, 400));
        let scope = Scope::per_tensor();
        let before = clipper.clip_grad_norm_by(&mut list, &scope, f64::INFINITY).unwrap();
        stream.begin_capture(MODE).unwrap();
        let captured = clipper.clip_grad_norm_by(&mut list, &scope, 2.5).unwrap();
        assert_eq!(captured.wait().unwrap_err(), Error::CaptureNeedsWarmup { what: "the wait for a report" });
        let graph = stream.end_capture(FLAGS).unwrap().unwrap();
        assert_eq!(captured.wait().unwrap_err(), Error::ReportNotReady);
        assert_eq!(before.wait().unwrap().groups[1].total_norm, 5.0, "nothing has run since");
        graph.launch().unwrap();
        assert_eq!(captured.wait().unwrap().groups[1].total_norm, 5.0);
        assert_eq!(before.wait().unwrap_err(), Error::ReportExpired);
        let eager = clipper.norms_by(&list, &scope, NormType::L1).unwrap();
        assert_eq!(captured.wait().unwrap_err(), Error::ReportExpired);
        assert!((eager.wait().unwrap().groups[1].total_norm - 3.5).abs() < 1e-6);
        graph.launch().unwrap();
        assert_eq!(eager.wait().unwrap_err(), Error::ReportExpired);
        assert_eq!(captured.wait().unwrap().groups[1].total_norm, 2.5);
        let eager = clipper.norms_by(&longer, &scope, NormType::L1).unwrap();
        stream.memcpy_htod(&[6.0f32, 8.0], &mut list[1]).unwrap();
        graph.launch().unwrap();
        assert_eq!(captured.wait().unwrap().groups[1].total_norm, 10.0);
        assert_eq!(eager.wait().unwrap().groups[399].total_norm, 7.0);
        for _ in 0..3 {
            let _ = clipper.clip_grad_norm_by(&mut longer, &scope.telemetry(), 1.0).unwrap();
            drop(grads(&stream, 500));
            graph.launch().unwrap();
        }
        assert_eq!(stream.clone_dtoh(&list[1]).unwrap(), [1.5, 2.0]);
    }
    assert_eq!((double.violated_guards(), double.counters().faults), (0, 0));
}

/// Each of the things that a scoped call prepares, missing: a typed error, and what was captured before goes on.
#[test]
fn scoped_calls_that_were_not_made_before_are_refused_and_the_capture_goes_on() {
    let Some(_double) = double::lock() else { return };
    let stream = stream();
    let mut clipper = Clipper::new(&stream).unwrap();
    let mut list = grads(&stream, 3);
    let mut wide = [stream.clone_htod(&[1.0f64, 0.0]).unwrap()];
    clipper.clip_grad_norm(&mut list, f64::INFINITY).unwrap();
    let refused = |clipper: &mut Clipper, list: &mut [CudaSlice<f32>], scope: Scope<'_>, missing: &str| {
        let error = clipper.clip_grad_norm_by(list, &scope, 1.0).unwrap_err();
        assert!(matches!(error, Error::CaptureNeedsWarmup { what } if what == missing), "{error}");
    };
    stream.begin_capture(MODE).unwrap();
    let captured = clipper.clip_grad_norm(&mut list, 3f64.sqrt()).unwrap();
    refused(&mut clipper, &mut list, Scope::per_tensor(), "a kernel of this call");
    stream.end_capture(FLAGS).unwrap().unwrap().launch().unwrap();
    assert!((captured.wait().unwrap().total_norm - 75f64.sqrt()).abs() < 1e-6);

    let with_telemetry = Scope::per_tensor().telemetry();
    let first = clipper.clip_grad_norm_by(&mut list, &Scope::per_tensor(), f64::INFINITY).unwrap();
    let thresholds = [Some(1.0), None, None];
    stream.begin_capture(MODE).unwrap();
    let captured = clipper.clip_grad_norm_by(&mut list, &Scope::per_tensor(), 0.5).unwrap();
    refused(&mut clipper, &mut list, with_telemetry, "a kernel of this call");
    refused(&mut clipper, &mut list, Scope::rows(&[2, 1, 1]), "the table of tensors");
    refused(&mut clipper, &mut list, Scope::per_tensor().max_norms(&thresholds), "the table of groups");
    let error = clipper.norms_by(&wide, &Scope::global(), NormType::L2).unwrap_err();
    assert!(matches!(error, Error::CaptureNeedsWarmup { .. }), "{error}");
    let waits = ClipNorm::new(1.0).nonfinite(NonFinite::Error);
    let error = clipper.clip_grad_norm_by(&mut list, &Scope::per_tensor(), waits).unwrap_err();
    assert_eq!(error, Error::CaptureNeedsWarmup { what: "the wait of NonFinite::Error" });
    let graph = stream.end_capture(FLAGS).unwrap().unwrap();
    assert!((first.wait().unwrap().groups[2].total_norm - 1.0).abs() < 1e-6);
    graph.launch().unwrap();
    assert_eq!(captured.wait().unwrap().num_written(), 3);
    let got = stream.clone_dtoh(&list[2]).unwrap();
    assert!((got[0] - 0.3).abs() < 1e-6 && (got[1] - 0.4).abs() < 1e-6, "{got:?}");
    let _ = clipper.clip_grad_norm_by(&mut wide, &Scope::global(), 0.5).unwrap();
    assert_eq!(stream.clone_dtoh(&wide[0]).unwrap(), [0.5, 0.0]);
}

#[test]
fn replaying_a_scoped_call_after_the_clipper_is_gone() {
    let Some(double) = double::lock() else { return };
    let stream = stream();
    let mut list = grads(&stream, 200);
    let before = double.live_bytes();
    let mut clipper = Clipper::new(&stream).unwrap();
    let scope = Scope::per_tensor().telemetry();
    let _ = clipper.clip_grad_norm_by(&mut list, &scope, f64::INFINITY).unwrap();
    stream.begin_capture(MODE).unwrap();
    let captured = clipper.clip_grad_norm_by(&mut list, &scope, 2.5).unwrap();
    let graph = stream.end_capture(FLAGS).unwrap().unwrap();
    let longer = grads(&stream, 300); // its reports need more room: the graph's are still counted
    let _ = clipper.norms_by(&longer, &scope, NormType::L2).unwrap();
    drop(longer);
    let had = clipper.device_bytes() as u64;
    assert_eq!(double.live_bytes() - before, had + clipper.pinned_bytes() as u64);
    drop(clipper);
    let left = double.live_bytes() - before;
    assert!(left > 0 && left <= had, "{left} of {had}");
    for expected in [5.0, 2.5] {
        graph.launch().unwrap();
        let report = captured.wait().unwrap();
        assert_eq!((report.groups[199].total_norm, report.tensors[199].norm), (expected, expected));
    }
    drop(captured);
    graph.launch().unwrap();
    stream.synchronize().unwrap();
    assert_eq!(double.live_bytes() - before, left, "the memory of the reports, too");
    assert_eq!((double.violated_guards(), double.counters().faults), (0, 0));
}
