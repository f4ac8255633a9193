//! Which kernels are loaded, when, how often, and for how long.

use crate::support::double::{self, Double};
use cudarc::driver::sys::{self, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{result, CudaSlice, CudaStream};
use gradclip::cuda::{self, Clipper};
use gradclip::{ClipNorm, Copies, Error, NormType, Scope};
use std::collections::BTreeSet;
use std::sync::{Arc, Barrier};

const MODE: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
const FLAGS: CUgraphInstantiate_flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
const OUT_OF_MEMORY: i32 = 2;

fn stream() -> Arc<CudaStream> {
    let context = cuda::context(0).unwrap();
    // SAFETY: everything happens on one stream. Waiting for an event from before a capture would break it.
    unsafe { context.disable_event_tracking() };
    context.new_stream().unwrap()
}

fn three_and_four(stream: &Arc<CudaStream>) -> [CudaSlice<f32>; 1] {
    [stream.clone_htod(&[3.0f32, 4.0]).unwrap()]
}

/// Clips `[3, 4]` to norm 1, and gives the number of modules loaded for it.
fn clip(double: &Double, clipper: &mut Clipper) -> u64 {
    let stream = clipper.stream().clone();
    let mut grads = three_and_four(&stream);
    let before = double.counters().module_loads;
    let report = clipper.clip_grad_norm(&mut grads, 1.0).unwrap().wait().unwrap();
    assert_eq!((report.total_norm, report.written), (5.0, true));
    assert_eq!(stream.clone_dtoh(&grads[0]).unwrap(), [0.6, 0.8]);
    double.counters().module_loads - before
}

/// One process alone.
struct Alone;

// SAFETY: the copy is of these bytes, to where they belong, in the order of the stream.
unsafe impl cuda::DeviceAllGather for Alone {
    type Error = cudarc::driver::DriverError;
    fn world_size(&self) -> usize {
        1
    }
    unsafe fn all_gather(&self, on: &Arc<CudaStream>, mine: u64, all: u64, bytes: usize) -> Result<(), Self::Error> {
        // SAFETY: both are addresses of so many bytes.
        unsafe { result::memcpy_dtod_async(all, mine, bytes, on.cu_stream()) }
    }
}

/// The kernels that the README says a first call loads.
fn in_the_readme(call: &str) -> Option<BTreeSet<String>> {
    let readme = include_str!("../../README.md");
    let (_, rest) = readme.split_once("<!-- first-call:begin -->").unwrap();
    let (table, _) = rest.split_once("<!-- first-call:end -->").unwrap();
    let row = table.lines().find_map(|line| line.strip_prefix(&format!("| {call} | ")))?;
    let (kernels, _) = row.split_once(" | ").unwrap();
    Some(kernels.split(", ").map(|kernel| kernel.trim_matches('`').to_owned()).collect())
}

/// Every verb in a context of its own: what it loads is what it launches, and what the README says.
#[test]
fn a_call_loads_the_kernels_that_it_launches_and_no_others() {
    let Some(double) = double::lock() else { return };
    type Call = fn(&mut Clipper, &mut [CudaSlice<f32>; 1], NormType) -> gradclip::Result<()>;
    let calls: [(&str, Call); 14] = [
        ("total_norm", |clipper, grads, norm| clipper.total_norm(grads, norm).map(drop)),
        ("clip_coef", |clipper, grads, norm| clipper.clip_coef(grads, ClipNorm::new(1.0).norm_type(norm)).map(drop)),
        ("clip_grad_norm", |clipper, grads, norm| {
            clipper.clip_grad_norm(grads, ClipNorm::new(1.0).norm_type(norm)).map(drop)
        }),
        ("clip_grad_norm_into", |clipper, grads, norm| {
            let mut outputs = [clipper.stream().alloc_zeros::<f32>(2)?];
            clipper.clip_grad_norm_into(grads, &mut outputs, ClipNorm::new(1.0).norm_type(norm)).map(drop)
        }),
        ("clip_with_norm", |clipper, grads, _| clipper.clip_with_norm(grads, 5.0, 1.0).map(drop)),
        ("clip_grad_value", |clipper, grads, _| clipper.clip_grad_value(grads, 1.0).map(drop)),
        ("RunningNorm::total_norm", |clipper, grads, norm| {
            let mut running = clipper.running_norm(norm)?;
            running.add(grads)?;
            running.total_norm().map(drop)
        }),
        ("RunningNorm::clip", |clipper, grads, norm| {
            let mut running = clipper.running_norm(norm)?;
            running.add(grads)?;
            running.clip(grads, 1.0).map(drop)
        }),
        ("norms_by", |clipper, grads, norm| clipper.norms_by(grads, &Scope::per_tensor(), norm).map(drop)),
        ("clip_grad_norm_by", |clipper, grads, norm| {
            let clip = ClipNorm::new(1.0).norm_type(norm);
            clipper.clip_grad_norm_by(grads, &Scope::per_tensor(), clip).map(drop)
        }),
        ("clip_grad_norm_by, telemetry", |clipper, grads, norm| {
            let clip = ClipNorm::new(1.0).norm_type(norm);
            clipper.clip_grad_norm_by(grads, &Scope::per_tensor().telemetry(), clip).map(drop)
        }),
        ("clip_grad_value_by", |clipper, grads, _| {
            clipper.clip_grad_value_by(grads, &Scope::per_tensor(), 1.0).map(drop)
        }),
        ("clip_grad_norm_sharded", |clipper, grads, norm| {
            let clip = ClipNorm::new(1.0).norm_type(norm);
            clipper.clip_grad_norm_sharded(grads, Copies::One, clip, &Alone).map(drop)
        }),
        ("clip_grad_norm_sharded, copies", |clipper, grads, norm| {
            let clip = ClipNorm::new(1.0).norm_type(norm);
            clipper.clip_grad_norm_sharded(grads, &[1][..], clip, &Alone).map(drop)
        }),
    ];
    let mut compared = 0;
    for (name, call) in calls {
        for norm in [NormType::L2, NormType::L1, NormType::Inf, NormType::P(3.0), NormType::Rms] {
            if norm == NormType::Rms && name.contains("sharded") {
                continue; // there is none over several ranks
            }
            double.reset();
            {
                let stream = stream();
                let mut grads = three_and_four(&stream);
                let mut clipper = Clipper::new(&stream).unwrap();
                assert_eq!(double.counters().module_loads, 0, "{name}: a clipper alone loads nothing");
                call(&mut clipper, &mut grads, norm).unwrap();
                stream.synchronize().unwrap();
                let launched: BTreeSet<_> = double.kernel_runs().into_iter().map(|run| run.symbol).collect();
                let any_order = launched.iter().all(|symbol| symbol.ends_with("_p"));
                assert!(norm == NormType::P(3.0) || !any_order, "{name}, {norm:?}: {launched:?}");
                assert_eq!(double.counters().module_loads, launched.len() as u64, "{name}, {norm:?}: {launched:?}");
                let row = match (norm, name.split_once(", ")) {
                    (NormType::L2, Some((verb, option))) => format!("`{verb}`, {option}"),
                    (NormType::L2, None) => format!("`{name}`"),
                    _ => format!("`{name}`, order {}", norm.order()),
                };
                if let Some(expected) = in_the_readme(&row) {
                    assert_eq!(launched, expected, "{row}");
                    compared += 1;
                }
                // Another clipper of the context, of another stream and another object for the context.
                let elsewhere = cuda::context(0).unwrap().new_stream().unwrap();
                let mut second = Clipper::new(&elsewhere).unwrap();
                call(&mut second, &mut three_and_four(&elsewhere), norm).unwrap();
                elsewhere.synchronize().unwrap();
                assert_eq!(double.counters().module_loads, launched.len() as u64, "{name}, {norm:?}, again");
                drop(clipper);
                call(&mut second, &mut three_and_four(&elsewhere), norm).unwrap();
                elsewhere.synchronize().unwrap();
                assert_eq!(double.log().iter().filter(|name| *name == "cuModuleUnload").count(), 0, "{name}: in use");
            }
            assert_eq!((double.live_allocations(), double.live_handles(), double.violated_guards()), (0, 0, 0));
        }
    }
    assert_eq!(compared, 12, "rows of the README");
}

#[test]
fn each_gpu_has_kernels_of_its_own() {
    let Some(double) = double::lock() else { return };
    let clippers = [0, 1].map(|gpu| Clipper::new(&cuda::context(gpu).unwrap().new_stream().unwrap()).unwrap());
    assert_eq!(clippers.map(|mut clipper| [clip(&double, &mut clipper), clip(&double, &mut clipper)]), [[3, 0]; 2]);
}

/// All at once, many times: nothing is loaded twice, and what one thread loads the others launch.
#[test]
fn threads_that_begin_at_once_load_once() {
    let Some(double) = double::lock() else { return };
    const THREADS: usize = 4;
    for round in 0..20 {
        double.reset();
        {
            let context = cuda::context(0).unwrap();
            let start = Barrier::new(THREADS);
            std::thread::scope(|scope| {
                for _ in 0..THREADS {
                    scope.spawn(|| {
                        let stream = context.new_stream().unwrap();
                        let mut grads = three_and_four(&stream);
                        start.wait();
                        let mut clipper = Clipper::new(&stream).unwrap();
                        start.wait(); // or the first could be gone before the last begins
                        clipper.clip_grad_norm(&mut grads, 1.0).unwrap().wait().unwrap();
                        start.wait();
                        assert_eq!(stream.clone_dtoh(&grads[0]).unwrap(), [0.6, 0.8]);
                    });
                }
            });
            assert_eq!(double.counters().module_loads, 3, "round {round}");
        }
        assert_eq!((double.live_allocations(), double.live_handles()), (0, 0), "round {round}");
    }
}

/// At the same address, and with kernels left behind that graphs launched: they are of the context that is gone.
#[test]
fn a_primary_context_that_is_made_again_is_another_one() {
    let Some(double) = double::lock() else { return };
    let mut addresses = BTreeSet::new();
    for round in 0..3 {
        let stream = stream();
        addresses.insert(stream.context().cu_ctx() as usize);
        let mut clipper = Clipper::new(&stream).unwrap();
        assert_eq!(clip(&double, &mut clipper), 3, "round {round}");
        let mut grads = three_and_four(&stream);
        stream.begin_capture(MODE).unwrap();
        let captured = clipper.clip_grad_norm(&mut grads, 1.0).unwrap();
        let graph = stream.end_capture(FLAGS).unwrap().unwrap();
        drop(clipper);
        graph.launch().unwrap();
        assert_eq!(captured.wait().unwrap().total_norm, 5.0);
    }
    assert_eq!(addresses.len(), 1, "or this tests nothing");
}

/// A reset takes the modules from under a clipper, while its context object is still held.
#[test]
fn a_primary_context_that_is_reset_is_another_one() {
    let Some(double) = double::lock() else { return };
    {
        let stream = stream();
        let mut old = Clipper::new(&stream).unwrap();
        assert_eq!(clip(&double, &mut old), 3);
        // SAFETY: of what a reset takes away, the double takes the modules, which the library has to find out.
        unsafe { sys::cuDevicePrimaryCtxReset_v2(0) }.result().unwrap();
        let mut grads = three_and_four(&stream);
        let error = old.clip_grad_norm(&mut grads, 1.0).unwrap_err();
        assert!(matches!(error, Error::Driver { .. }), "{error}");
        let mut new = Clipper::new(&stream).unwrap();
        assert_eq!(clip(&double, &mut new), 3);
        let unloads = || double.log().iter().filter(|name| *name == "cuModuleUnload").count();
        drop(old);
        assert_eq!(unloads(), 0, "its modules are gone, and their handles may be those of others");
        assert_eq!(clip(&double, &mut new), 0);
        drop(new);
        assert_eq!(unloads(), 3);
    }
    assert_eq!(double.live_handles(), 0);
}

/// Kernels of a graph stay loaded when the last clipper goes, the others do not. The next clipper takes them over: a
/// clipper for each capture does not load them each time.
#[test]
fn kernels_that_graphs_launch_are_kept_and_used_again() {
    let Some(double) = double::lock() else { return };
    let stream = stream();
    let mut grads = three_and_four(&stream);
    let mut graphs = Vec::new();
    for round in 0..3 {
        let mut clipper = Clipper::new(&stream).unwrap();
        let handles = double.live_handles();
        clipper.clip_grad_value(&mut grads, 100.0).unwrap(); // not captured
        let loads = clip(&double, &mut clipper);
        assert_eq!(loads, if round == 0 { 3 } else { 0 }, "round {round}");
        stream.begin_capture(MODE).unwrap();
        let captured = clipper.clip_grad_norm(&mut grads, 1.0).unwrap();
        if round == 1 {
            drop(clipper); // while it captures
            graphs.push((stream.end_capture(FLAGS).unwrap().unwrap(), captured));
        } else {
            graphs.push((stream.end_capture(FLAGS).unwrap().unwrap(), captured));
            drop(clipper);
        }
        // A graph, what it was made from, and the three kernels of the first round.
        assert_eq!(double.live_handles(), handles + 2 + loads, "round {round}");
        for (graph, captured) in &graphs {
            stream.memcpy_htod(&[3.0f32, 4.0], &mut grads[0]).unwrap();
            graph.launch().unwrap();
            assert_eq!(captured.wait().unwrap().total_norm, 5.0);
            assert_eq!(stream.clone_dtoh(&grads[0]).unwrap(), [0.6, 0.8]);
        }
    }
    assert_eq!((double.violated_guards(), double.counters().faults), (0, 0));
}

/// Each of the loads of a call fails once, in each of its two steps: the gradients are as they were, and the call after it
/// loads what is missing.
#[test]
fn a_load_that_fails_is_made_up_for() {
    let Some(double) = double::lock() else { return };
    for function in ["cuModuleLoadData", "cuModuleGetFunction"] {
        for failing in 0..3 {
            double.reset();
            {
                let stream = stream();
                let mut grads = three_and_four(&stream);
                let mut clipper = Clipper::new(&stream).unwrap();
                double.fail_named(function, failing, OUT_OF_MEMORY);
                let error = clipper.clip_grad_norm(&mut grads, 1.0).unwrap_err();
                match function {
                    "cuModuleLoadData" => {
                        assert!(matches!(error, Error::OutOfMemory { what: "kernels", .. }), "{error}")
                    }
                    _ => assert!(matches!(error, Error::Driver { op: "cuModuleGetFunction", .. }), "{error}"),
                }
                assert_eq!(double.counters().launches, 0);
                assert_eq!(stream.clone_dtoh(&grads[0]).unwrap(), [3.0, 4.0]);
                assert_eq!(clip(&double, &mut clipper), 3 - failing, "{function} {failing}");
            }
            assert_eq!((double.live_allocations(), double.live_handles()), (0, 0), "{function} {failing}");
        }
    }
}

/// Loading and unloading happen in the clipper's context, whatever is current.
#[test]
fn the_current_context_is_what_it_was_after_loads() {
    let Some(_double) = double::lock() else { return };
    let other = cuda::context(1).unwrap();
    let here = || result::ctx::get_current().unwrap().unwrap_or(std::ptr::null_mut());
    for current in [std::ptr::null_mut(), other.cu_ctx()] {
        let stream = stream();
        let mut grads = three_and_four(&stream);
        // SAFETY: null, or a live context.
        unsafe { result::ctx::set_current(current) }.unwrap();
        let mut clipper = Clipper::new(&stream).unwrap();
        assert_eq!(here(), current);
        clipper.clip_grad_norm(&mut grads, 1.0).unwrap();
        assert_eq!(here(), current);
        drop(clipper); // unloads them
        assert_eq!(here(), current);
    }
}

/// A clipper that goes leaves its work under way; the last one, of another stream, waits before it unloads the kernels.
#[test]
fn the_last_clipper_waits_for_work_of_those_before() {
    let Some(double) = double::lock() else { return };
    let (one, two) = (stream(), stream());
    let (mut first, mut last) = (Clipper::new(&two).unwrap(), Clipper::new(&one).unwrap());
    let mut grads = three_and_four(&two);
    clip(&double, &mut last);
    double.set_deferred(true);
    double.reset_counters();
    first.clip_grad_norm(&mut grads, 1.0).unwrap();
    drop(first);
    assert_eq!((double.counters().launches, double.counters().kernels_run), (3, 0));
    drop(last);
    assert_eq!(double.counters().kernels_run, 3);
}

/// In any mode of capture, the first call of a kind goes on in another thread, and the graph is not lost.
#[test]
fn a_first_call_leaves_the_captures_of_other_streams_alone() {
    use CUstreamCaptureMode::{CU_STREAM_CAPTURE_MODE_GLOBAL as GLOBAL, CU_STREAM_CAPTURE_MODE_RELAXED as RELAXED};
    let Some(_double) = double::lock() else { return };
    for mode in [GLOBAL, MODE, RELAXED] {
        let (one, two) = (stream(), stream());
        let (mut captures, mut calls) = (Clipper::new(&one).unwrap(), Clipper::new(&two).unwrap());
        let (mut of_one, mut of_two) = (three_and_four(&one), three_and_four(&two));
        captures.clip_grad_norm(&mut of_one, 1.0).unwrap().wait().unwrap();
        calls.clip_grad_norm(&mut of_two, 1.0).unwrap().wait().unwrap();
        one.begin_capture(mode).unwrap();
        captures.clip_grad_norm(&mut of_one, 1.0).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| calls.clip_grad_value(&mut of_two, 0.5).unwrap());
        });
        assert!(one.end_capture(FLAGS).unwrap().is_some(), "{mode:?}");
        assert_eq!(two.clone_dtoh(&of_two[0]).unwrap()[0], 0.5, "{mode:?}");
    }
}

/// Last clippers go while others come, each with a captured call: the kernels that graphs launch stay, once each.
#[test]
fn clippers_that_come_while_the_last_one_goes_leave_nothing_twice() {
    let Some(double) = double::lock() else { return };
    let context = cuda::context(0).unwrap();
    // SAFETY: each stream has slices of its own.
    unsafe { context.disable_event_tracking() };
    let streams: Vec<_> = (0..3).map(|_| context.new_stream().unwrap()).collect();
    let before = double.live_handles();
    std::thread::scope(|scope| {
        for stream in &streams {
            scope.spawn(move || {
                let mut grads = three_and_four(stream);
                for _ in 0..200 {
                    let mut clipper = Clipper::new(stream).unwrap();
                    clipper.clip_grad_norm(&mut grads, 1.0).unwrap().wait().unwrap();
                    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
                    clipper.clip_grad_norm(&mut grads, 1.0).unwrap();
                    let graph = stream.end_capture(FLAGS).unwrap().unwrap();
                    drop(clipper);
                    graph.launch().unwrap();
                    stream.synchronize().unwrap();
                }
            });
        }
    });
    assert_eq!(double.live_handles(), before + 3, "norm_partials_l2, clip_coef and scale");
    assert_eq!((double.violated_guards(), double.counters().faults), (0, 0));
}

/// A call with an empty list loads what the same call launches later: how a program warms up.
#[test]
fn an_empty_list_loads_what_a_call_needs() {
    let Some(double) = double::lock() else { return };
    let stream = stream();
    let mut clipper = Clipper::new(&stream).unwrap();
    let none: &mut [CudaSlice<f32>] = &mut [];
    clipper.clip_grad_norm(none, 1.0).unwrap();
    assert_eq!(clip(&double, &mut clipper), 0);
    clipper.clip_grad_value(none, 1.0).unwrap();
    clipper.clip_grad_norm_by(none, &Scope::per_tensor(), 1.0).unwrap();
    let (loads, mut grads) = (double.counters().module_loads, three_and_four(&stream));
    clipper.clip_grad_value(&mut grads, 1.0).unwrap().wait().unwrap();
    clipper.clip_grad_norm_by(&mut grads, &Scope::per_tensor(), 1.0).unwrap().wait().unwrap();
    assert_eq!(double.counters().module_loads, loads);
}
