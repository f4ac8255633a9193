//! What is alive while kernels run: gradients, reports, what graphs refer to.

use crate::support::double;
use gradclip::cuda::{self, Clipper};
use gradclip::{ClipNorm, Error, NonFinite, NormType, Scope, REPORTS_KEPT};

const OUT_OF_MEMORY: i32 = 2;

/// After an error of a later launch the earlier ones still read (or write) the gradients: cudarc has to know of them
/// before it frees the memory.
#[test]
fn a_failed_launch_does_not_let_gradients_be_freed_under_a_kernel() {
    let Some(double) = double::lock() else { return };
    for (verb, failing) in
        [("norm", 1), ("norm", 2), ("value", 1), ("measure", 1), ("by", 1), ("by", 2), ("measure by", 1)]
    {
        double.reset();
        let context = cuda::context(0).unwrap();
        let (own, stream) = (context.new_stream().unwrap(), context.new_stream().unwrap());
        let mut clipper = Clipper::new(&stream).unwrap();
        let mut warm = [own.clone_htod(&[3.0f32, 4.0]).unwrap()];
        clipper.clip_grad_norm(&mut warm, 1.0).unwrap().wait().unwrap();
        clipper.clip_grad_norm_by(&mut warm, &Scope::per_tensor(), 1.0).unwrap().wait().unwrap();
        let mut grads = [own.clone_htod(&[3.0f32; 1000]).unwrap()];
        own.synchronize().unwrap();
        double.set_deferred(true);
        double.fail_named("cuLaunchKernel", failing, OUT_OF_MEMORY);
        let result = match verb {
            "norm" => clipper.clip_grad_norm(&mut grads, 1.0).map(drop),
            "value" => clipper.clip_grad_value(&mut grads, 1.0).map(drop),
            "by" => clipper.clip_grad_norm_by(&mut grads, &Scope::per_tensor(), 1.0).map(drop),
            "measure by" => clipper.norms_by(&grads, &Scope::per_tensor(), NormType::L2).map(drop),
            _ => clipper.total_norm(&grads, NormType::L2).map(drop),
        };
        result.unwrap_err();
        drop(grads); // freed on `own`, after what cudarc knows of
        own.synchronize().unwrap();
        stream.synchronize().unwrap();
        assert_eq!(double.counters().faults, 0, "{verb}, launch {failing}: a kernel used freed gradients");
        assert_eq!(double.violated_guards(), 0);
    }
}

#[test]
fn reports_outlive_the_clipper_in_any_order_and_in_other_threads() {
    let Some(double) = double::lock() else { return };
    for deferred in [false, true] {
        double.reset();
        {
            let context = cuda::context(0).unwrap();
            let stream = context.new_stream().unwrap();
            double.set_deferred(deferred);
            let mut clipper = Clipper::new(&stream).unwrap();
            let mut grads = [stream.clone_htod(&[3.0f32, 4.0]).unwrap()];
            let expired = 44;
            let mut reports: Vec<_> =
                (0..REPORTS_KEPT + expired).map(|_| clipper.clip_grad_norm(&mut grads, 100.0).unwrap()).collect();
            drop(clipper);
            drop(grads);
            for (index, report) in reports.iter().enumerate() {
                assert_eq!(report.wait().is_ok(), index >= expired, "{index}");
                if index >= expired {
                    assert_eq!(report.wait().unwrap(), report.clone().wait().unwrap());
                }
            }
            let last = reports.pop().unwrap();
            reports.reverse();
            std::thread::spawn(move || drop(reports)).join().unwrap();
            std::thread::spawn(move || assert_eq!(last.wait().unwrap().total_norm, 5.0)).join().unwrap();
        }
        assert_eq!((double.violated_guards(), double.live_allocations(), double.live_handles()), (0, 0, 0));
    }
}

#[test]
fn scoped_reports_outlive_the_clipper_and_other_memory_than_theirs() {
    let Some(double) = double::lock() else { return };
    for pools in [true, false] {
        double.reset();
        double.set_memory_pools(pools);
        {
            let stream = cuda::context(0).unwrap().new_stream().unwrap();
            let mut clipper = Clipper::new(&stream).unwrap();
            let mut grads: Vec<_> = (0..40).map(|_| stream.clone_htod(&[3.0f32, 4.0]).unwrap()).collect();
            let scope = Scope::per_tensor().telemetry();
            double.set_deferred(true);
            let short = clipper.norms_by(&grads[..3], &scope, NormType::L2).unwrap();
            let long = clipper.clip_grad_norm_by(&mut grads, &scope, 2.5).unwrap(); // with more room, elsewhere
            drop(clipper);
            drop(grads);
            let copy = long.clone();
            let elsewhere = std::thread::spawn(move || copy.wait().unwrap()).join().unwrap();
            assert_eq!(elsewhere, long.wait().unwrap());
            assert_eq!((elsewhere.groups.len(), elsewhere.num_written(), elsewhere.tensors[39].max_abs), (40, 40, 4.0));
            // Of calls before the last only that nothing else comes of them is promised.
            assert!(short.wait().map_or_else(|error| error == Error::ReportExpired, |report| report.groups.len() == 3));
            std::thread::spawn(move || drop((short, long))).join().unwrap();
            stream.synchronize().unwrap();
        }
        assert_eq!((double.violated_guards(), double.live_allocations(), double.live_handles()), (0, 0, 0));
        assert_eq!(double.counters().faults, 0);
    }
}

/// The wait of [`NonFinite::Error`] comes between the stages: what is launched before it, and after it, is recorded.
#[test]
fn gradients_of_a_scoped_call_that_waits_are_not_freed_under_a_kernel() {
    let Some(double) = double::lock() else { return };
    for values in [[3.0f32; 1000], [f32::NAN; 1000]] {
        double.reset();
        let context = cuda::context(0).unwrap();
        let (own, stream) = (context.new_stream().unwrap(), context.new_stream().unwrap());
        let mut clipper = Clipper::new(&stream).unwrap();
        let mut grads = [own.clone_htod(&values).unwrap()];
        own.synchronize().unwrap();
        double.set_deferred(true);
        let clip = ClipNorm::new(1.0).nonfinite(NonFinite::Error);
        let result = clipper.clip_grad_norm_by(&mut grads, &Scope::per_tensor(), clip);
        assert_eq!(result.is_err(), values[0].is_nan());
        drop(grads);
        own.synchronize().unwrap();
        stream.synchronize().unwrap();
        assert_eq!((double.counters().faults, double.violated_guards()), (0, 0));
    }
}
