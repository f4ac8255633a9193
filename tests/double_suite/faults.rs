//! Every driver call fails once: a typed error, no panic, nothing half done, nothing leaked, and the next call works.

use crate::suite::data::{bits, tensor, Tensor};
use crate::suite::device::OnDevice;
use crate::support::double::{self, Double};
use cudarc::driver::{CudaContext, CudaStream};
use gradclip::cuda::{self, Clipper, RawGrad};
use gradclip::{Dtype, Error, NormType, Scope};
use std::sync::Arc;

const OUT_OF_MEMORY: i32 = 2;
const NO_DEVICE: i32 = 100;
const UNSUPPORTED_PTX_VERSION: i32 = 222;
const LAUNCH_FAILED: i32 = 719;
const UNKNOWN: i32 = 999;

/// Long enough for a table in memory; mostly empty, since every element runs on a fiber, and all this runs often.
fn list() -> Vec<Tensor> {
    let values = [f64::from(LAST as u32), 1.0, -2.0];
    (0..=LAST).map(|i| tensor(Dtype::F64, if i % 100 == LAST % 100 { &values } else { &[] })).collect()
}

const LAST: usize = 199;

#[derive(Clone, Copy, Debug)]
enum Verb {
    Norm,
    Value,
    Measure,
    ByTensor,
    MeasureByTensor,
    /// Added in two calls, the first of which grows what the second outgrows.
    Running,
}

fn call(clipper: &mut Clipper, list: &[Tensor], device: &mut OnDevice, verb: Verb) -> gradclip::Result<f64> {
    device.with(list, |grads| match verb {
        Verb::Norm => clipper.clip_grad_norm(grads, 1.0)?.wait().map(|report| report.total_norm),
        Verb::Value => clipper.clip_grad_value(grads, 0.5)?.wait().map(|report| report.clipped as f64),
        Verb::Measure => clipper.total_norm(grads, NormType::L2)?.wait().map(|report| report.total_norm),
        Verb::ByTensor => {
            let report = clipper.clip_grad_norm_by(grads, &Scope::per_tensor().telemetry(), 1.0)?.wait()?;
            Ok(report.groups[LAST.min(report.groups.len() - 1)].total_norm)
        }
        Verb::Running => {
            let mut norm = clipper.running_norm(NormType::L2)?;
            norm.add(&grads[..1])?;
            if norm.add(&grads[1..]).is_err() {
                norm.add(&grads[1..])?; // a call that failed has added nothing
            }
            norm.clip(grads, 1.0)?.wait().map(|report| report.total_norm)
        }
        Verb::MeasureByTensor => {
            let report = clipper.norms_by(grads, &Scope::per_tensor(), NormType::L2)?.wait()?;
            Ok(report.groups[LAST.min(report.groups.len() - 1)].total_norm)
        }
    })
}

/// One whole life: clipper, first call, second call. What the calls gave.
fn life(stream: &Arc<CudaStream>, list: &[Tensor], device: &mut OnDevice, verb: Verb) -> gradclip::Result<f64> {
    let mut clipper = Clipper::new(stream)?;
    call(&mut clipper, list, device, verb)?;
    call(&mut clipper, list, device, verb)
}

fn stream() -> (Arc<CudaContext>, Arc<CudaStream>) {
    let context = cuda::context(0).unwrap();
    let stream = context.default_stream();
    (context, stream)
}

/// A stream on which cudarc waits for and records events, some for each gradient and call.
fn tracked_stream() -> (Arc<CudaContext>, Arc<CudaStream>) {
    let context = cuda::context(0).unwrap();
    let stream = context.new_stream().unwrap();
    (context, stream)
}

/// Clears what cudarc has recorded of errors in destructors, as any next call of a program would.
fn settle(double: &Double, context: &CudaContext) {
    double.fail(u64::MAX >> 1, 0);
    let _ = context.check_err();
}

#[test]
fn every_driver_call_fails_once() {
    let Some(double) = double::lock() else { return };
    for verb in [Verb::Norm, Verb::Value, Verb::Measure, Verb::ByTensor, Verb::MeasureByTensor, Verb::Running] {
        every_call_fails_once(&double, verb, &list(), stream);
        every_call_fails_once(&double, verb, &list()[LAST - 2..], tracked_stream);
    }
}

fn every_call_fails_once(
    double: &Double,
    verb: Verb,
    list: &[Tensor],
    stream: impl Fn() -> (Arc<CudaContext>, Arc<CudaStream>),
) {
    double.reset();
    let (context, stream) = stream();
    let last = list.len() - 1;
    let calls = {
        let mut device = OnDevice::upload(&stream, list);
        let before = double.counters().calls;
        life(&stream, list, &mut device, verb).unwrap();
        double.counters().calls - before
    };
    assert!(calls > 20);
    let live = double.live_allocations();
    let mut leaks = 0;
    for code in [UNKNOWN, OUT_OF_MEMORY] {
        for index in 0..calls {
            let mut device = OnDevice::upload(&stream, list);
            double.fail(index, code);
            let outcome = life(&stream, list, &mut device, verb);
            settle(double, &context);
            if let Err(error) = &outcome {
                let typed = matches!(error, Error::Driver { .. } | Error::OutOfMemory { .. });
                assert!(typed, "{verb:?}, call {index}: {error:?}");
            }
            // Whole or not at all.
            let mut after = list.to_vec();
            device.download(&mut after);
            let untouched = bits(&after) == bits(list);
            let values = after[last].values.values();
            let clipped = values[0].abs() <= 1.0 && values[2] > -2.0;
            assert!(untouched || clipped, "{verb:?}, call {index}: half done ({outcome:?})");
            drop(device);
            // A free that was made to fail leaks, as it would in a real driver. Nothing else does.
            let now = double.live_allocations() - live;
            assert!(now - leaks <= 1, "{verb:?}, call {index} leaks");
            leaks = now;
        }
        // And after all that a life without faults goes well.
        let mut device = OnDevice::upload(&stream, list);
        life(&stream, list, &mut device, verb).unwrap();
    }
    assert_eq!(double.violated_guards(), 0);
}

#[test]
fn a_refused_launch_of_the_last_stage_leaves_the_gradients_alone() {
    let Some(double) = double::lock() else { return };
    let list = list();
    let (context, stream) = stream();
    let mut device = OnDevice::upload(&stream, &list);
    let mut clipper = Clipper::new(&stream).unwrap();
    for (verb, launch) in
        [Verb::Norm, Verb::ByTensor].into_iter().flat_map(|verb| [0, 1, 2].map(|launch| (verb, launch)))
    {
        double.fail_named("cuLaunchKernel", launch, OUT_OF_MEMORY);
        let error = call(&mut clipper, &list, &mut device, verb).unwrap_err();
        assert!(matches!(error, Error::Driver { .. }), "{error}");
        settle(&double, &context);
        let mut after = list.clone();
        device.download(&mut after);
        assert_eq!(bits(&after), bits(&list));
    }
    call(&mut clipper, &list, &mut device, Verb::Norm).unwrap();
    call(&mut clipper, &list, &mut device, Verb::ByTensor).unwrap();
}

/// The report of the call before stays readable as long as nothing has overwritten it.
#[test]
fn a_scoped_call_that_fails_before_its_second_launch_leaves_the_last_report() {
    let Some(double) = double::lock() else { return };
    let (_context, stream) = stream();
    let mut grads = [stream.clone_htod(&[3.0f32, 4.0]).unwrap()];
    let mut clipper = Clipper::new(&stream).unwrap();
    let first = clipper.norms_by(&grads, &Scope::per_tensor(), NormType::L2).unwrap();
    for launch in 0..2 {
        double.fail_named("cuLaunchKernel", launch, OUT_OF_MEMORY);
        clipper.clip_grad_norm_by(&mut grads, &Scope::per_tensor(), 1.0).unwrap_err();
        assert_eq!(first.wait().unwrap().groups[0].total_norm, 5.0);
    }
    double.fail_named("cuLaunchKernel", 2, OUT_OF_MEMORY);
    clipper.clip_grad_norm_by(&mut grads, &Scope::per_tensor(), 1.0).unwrap_err();
    assert_eq!(first.wait().unwrap_err(), Error::ReportExpired);
    assert_eq!(stream.clone_dtoh(&grads[0]).unwrap(), [3.0, 4.0]);
    // Memory for reports that cannot be cleared is not kept: what lies in it might pass for a report.
    let mut many: Vec<_> = (0..9).map(|_| stream.clone_htod(&[3.0f32, 4.0]).unwrap()).collect();
    double.fail_named("cuMemsetD8Async", 0, OUT_OF_MEMORY);
    let live = double.live_allocations();
    clipper.clip_grad_norm_by(&mut many, &Scope::per_tensor(), 1.0).unwrap_err();
    assert!(double.live_allocations() <= live + 4, "two tables with their staging");
    double.reset_counters();
    clipper.clip_grad_norm_by(&mut many, &Scope::per_tensor(), 1.0).unwrap();
    assert_eq!(double.counters().memset_calls, 1);
}

#[test]
fn a_kernel_that_crashes_is_reported_when_somebody_waits() {
    let Some(double) = double::lock() else { return };
    let list = list();
    let (_context, stream) = stream();
    let mut device = OnDevice::upload(&stream, &list);
    let mut clipper = Clipper::new(&stream).unwrap();
    double.crash_kernel(1, LAUNCH_FAILED);
    let error = call(&mut clipper, &list, &mut device, Verb::Norm).unwrap_err();
    assert!(matches!(&error, Error::Driver { code, .. } if code.contains("LAUNCH_FAILED")), "{error}");
    // The context is broken for good: still an error, no panic.
    assert!(call(&mut clipper, &list, &mut device, Verb::Norm).is_err());
}

#[test]
fn what_is_missing_is_named() {
    let Some(double) = double::lock() else { return };
    cuda::check_driver().unwrap();
    assert!(matches!(cuda::context(7).unwrap_err(), Error::NoDevice { ordinal: 7, count: 2 }));

    double.fail_named("cuInit", 0, NO_DEVICE);
    assert!(matches!(cuda::context(0).unwrap_err(), Error::NoDevice { ordinal: 0, count: 0 }));

    let (_context, stream) = stream();
    let mut grads = [stream.clone_htod(&[3.0f32, 4.0]).unwrap()];
    let mut clipper = Clipper::new(&stream).unwrap();
    double.fail_named("cuModuleLoadData", 0, UNSUPPORTED_PTX_VERSION);
    let result = clipper.clip_grad_norm(&mut grads, 1.0);
    if cuda::compiler() == "snapshot" {
        let error = result.unwrap_err();
        assert!(matches!(&error, Error::DriverTooOld { reason } if reason.contains("PTX 8.0")), "{error}");
    }
    double.fail_named("cuModuleLoadData", 0, OUT_OF_MEMORY);
    let error = clipper.clip_grad_value(&mut grads, 1.0).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { what: "kernels", .. }), "{error}");
}

/// The clipper is refused, as nothing is compiled yet that the driver could refuse.
#[test]
fn old_drivers_are_refused() {
    let Some(double) = double::lock() else { return };
    let (_context, stream) = stream();
    for (version, name) in [(11_080, "11.8"), (10_020, "10.2")] {
        double.set_driver_version(version);
        let error = Clipper::new(&stream).unwrap_err();
        let Error::DriverTooOld { reason } = &error else { panic!("{error}") };
        assert!(reason.contains(&format!("CUDA {name},")) && reason.contains("PTX 8.0"), "{reason}");
    }
    double.set_driver_version(12_000);
    Clipper::new(&stream).unwrap();
    assert_eq!(double.counters().module_loads, 0);
}

#[test]
fn old_gpus_are_refused() {
    let Some(double) = double::lock() else { return };
    double.set_compute_capability(7, 0);
    let (_context, stream) = stream();
    assert_eq!(Clipper::new(&stream).unwrap_err(), Error::GpuTooOld { major: 7, minor: 0 });
}

#[test]
fn out_of_memory_names_what_it_was_for() {
    let Some(double) = double::lock() else { return };
    let (_context, stream) = stream();
    let mut grads = [stream.alloc_zeros::<f32>(20_000).unwrap()];
    let mut clipper = Clipper::new(&stream).unwrap();
    double.fail_named("cuMemAllocAsync", 0, OUT_OF_MEMORY);
    let error = clipper.clip_grad_norm(&mut grads, 1.0).unwrap_err();
    assert_eq!(error, Error::OutOfMemory { what: "partials", bytes: 24 });
    clipper.clip_grad_norm(&mut grads, 1.0).unwrap().wait().unwrap();
}

#[test]
fn gradients_of_another_device_are_refused() {
    let Some(_double) = double::lock() else { return };
    let (_context, stream) = stream();
    let other = cuda::context(1).unwrap().default_stream();
    let here = stream.clone_htod(&[1.0f32]).unwrap();
    let there = other.clone_htod(&[1.0f32]).unwrap();
    let mut clipper = Clipper::new(&stream).unwrap();
    let error = clipper.total_norm(&[&here, &there], NormType::L2).unwrap_err();
    let expected = Error::WrongDevice { tensor: 1, expected: "cuda:0".into(), got: "cuda:1".into() };
    assert_eq!(error, expected);

    use cudarc::driver::DevicePtr;
    // SAFETY: must be refused before any work.
    let raw = unsafe { RawGrad::new(there.device_ptr(&other).0, 1, Dtype::F32) };
    let error = clipper.total_norm(&[raw], NormType::L2).unwrap_err();
    assert!(matches!(&error, Error::BadPointer { tensor: 0, got, .. } if got.contains("cuda:1")), "{error}");
}

#[test]
fn without_memory_pools() {
    let Some(double) = double::lock() else { return };
    double.set_memory_pools(false);
    let list = list();
    {
        let (_context, stream) = stream();
        let mut device = OnDevice::upload(&stream, &list);
        life(&stream, &list, &mut device, Verb::Norm).unwrap();
    }
    assert_eq!((double.live_allocations(), double.violated_guards()), (0, 0));
}

#[test]
fn a_clipper_after_every_kind_of_error_goes_on() {
    let Some(double) = double::lock() else { return };
    let (context, stream) = stream();
    let mut clipper = Clipper::new(&stream).unwrap();
    let list: Vec<Tensor> = (0..200).map(|i| tensor([Dtype::F32, Dtype::F64][i % 2], &[1.0, -1.0])).collect();
    let mut device = OnDevice::upload(&stream, &list);
    let there = cuda::context(1).unwrap().default_stream().clone_htod(&[1f32]).unwrap();
    for round in 0..26 {
        // SAFETY: refused before any work.
        let bad = unsafe { RawGrad::new(2, 1, Dtype::F32) };
        clipper.clip_grad_norm(&mut [bad], 1.0).unwrap_err();
        clipper.total_norm(&[&there], NormType::L2).unwrap_err();
        let mut small = [stream.clone_htod(&[3.0f32]).unwrap()];
        clipper.clip_grad_norm(&mut small, f64::NAN).unwrap_err();
        double.fail(round % 13, OUT_OF_MEMORY);
        let _ = call(&mut clipper, &list, &mut device, Verb::Norm);
        settle(&double, &context);
        let mut fresh = OnDevice::upload(&stream, &list);
        assert_eq!(call(&mut clipper, &list, &mut fresh, Verb::Norm).unwrap(), 20.0, "round {round}");
        let norm = call(&mut clipper, &list, &mut device, Verb::Measure).unwrap();
        assert!(norm == 20.0 || (norm - 1.0).abs() < 1e-6, "round {round}: {norm}");
    }
}
