//! The cost contract, counted: launches, copies, allocations, waits.

use crate::suite::data::{tensor, Tensor};
use crate::suite::device::OnDevice;
use crate::support::double::{self, Double};
use gradclip::cuda::{self, Clipper};
use gradclip::{ClipNorm, ClipValue, Dtype, NonFinite, NormType, Scope};

fn list_of(count: usize) -> Vec<Tensor> {
    (0..count).map(|i| tensor(Dtype::F32, &[i as f64, 1.0, -2.0])).collect()
}

struct Bench<'a> {
    double: &'a Double,
    clipper: Clipper,
}

impl Bench<'_> {
    /// Driver calls of each kind that `call` makes.
    fn count<R>(&mut self, call: impl FnOnce(&mut Clipper) -> R) -> double::Counters {
        self.double.reset_counters();
        call(&mut self.clipper);
        self.double.counters()
    }
}

fn with_bench(body: impl FnOnce(Bench<'_>)) {
    let Some(double) = double::lock() else { return };
    let context = cuda::context(0).unwrap();
    let stream = context.new_stream().unwrap();
    let clipper = Clipper::new(&stream).unwrap();
    body(Bench { double: &double, clipper });
}

/// Everything but launches must be zero in a repeated call.
fn assert_only_launches(counters: &double::Counters, launches: u64, what: &str) {
    let others = [
        counters.htod_calls,
        counters.dtoh_calls,
        counters.dtod_calls,
        counters.memset_calls,
        counters.allocs,
        counters.frees,
        counters.pinned_allocs,
        counters.syncs,
        counters.module_loads,
    ];
    assert_eq!((counters.launches, others), (launches, [0; 9]), "{what}");
}

#[test]
fn repeated_calls_only_launch() {
    with_bench(|mut bench| {
        for count in [1, 148, 160, 161, 3000, 18_867] {
            let list = list_of(count);
            let mut device = OnDevice::upload(bench.clipper.stream(), &list);
            device.with(&list, |grads| {
                let first = bench.count(|clipper| clipper.clip_grad_norm(grads, 1.0).unwrap());
                // The first call may allocate and copy the table, once; it never waits.
                assert_eq!((first.launches, first.syncs, first.dtoh_calls), (3, 0, 0), "{count} tensors");
                assert_eq!(first.htod_calls, u64::from(count > 160), "{count} tensors");
                let unscale = ClipNorm::new(1.0).loss_scale(1024.0);
                let norm = bench.clipper.total_norm(grads, NormType::L2).unwrap();
                let calls = [
                    (3, "norm"),
                    (3, "unscale"),
                    (2, "value"),
                    (2, "measure"),
                    (2, "coef"),
                    (2, "given"),
                    (2, "number"),
                ];
                for (launches, name) in calls {
                    let mut call = || {
                        bench.count(|clipper| match name {
                            "unscale" => drop(clipper.clip_grad_norm(grads, unscale).unwrap()),
                            "coef" => drop(clipper.clip_coef(grads, unscale).unwrap()),
                            "given" => drop(clipper.clip_with_norm(grads, &norm, 1.0).unwrap()),
                            "number" => drop(clipper.clip_with_norm(grads, 5.0, unscale).unwrap()),
                            "norm" => drop(clipper.clip_grad_norm(grads, 1.0).unwrap()),
                            "value" => drop(clipper.clip_grad_value(grads, 0.5).unwrap()),
                            _ => drop(clipper.total_norm(grads, NormType::L1).unwrap()),
                        })
                    };
                    call(); // loads its kernels
                    assert_only_launches(&call(), launches, &format!("{name}, {count} tensors"));
                }
            });
        }
    });
}

/// Out of place: the first call copies the table of outputs, and that of the gradients if it is long.
#[test]
fn repeated_calls_out_of_place_only_launch() {
    with_bench(|mut bench| {
        let none: &mut [cudarc::driver::CudaSlice<f32>] = &mut [];
        bench.clipper.clip_grad_norm(none, 1.0).unwrap(); // loads the kernels of calls in place
        for count in [1, 160, 161, 3000] {
            let grads: Vec<Tensor> = (0..count).map(|i| tensor(Dtype::BF16, &[i as f64, 1.0, -2.0])).collect();
            let outputs = list_of(count);
            let mut device = OnDevice::upload(bench.clipper.stream(), &grads);
            let mut out_device = OnDevice::upload(bench.clipper.stream(), &outputs);
            device.with(&grads, |grads| {
                out_device.with(&outputs, |outputs| {
                    let mut call =
                        || bench.count(|clipper| drop(clipper.clip_grad_norm_into(grads, outputs, 1.0).unwrap()));
                    let first = call();
                    assert_eq!((first.launches, first.syncs, first.dtoh_calls), (3, 0, 0), "{count} tensors");
                    assert_eq!(first.htod_calls, 1 + u64::from(count > 160), "{count} tensors");
                    let table = if count > 160 { 24 * count } else { 0 };
                    assert_eq!(first.htod_bytes, (16 * count + table) as u64, "{count} tensors");
                    assert_only_launches(&call(), 3, &format!("{count} tensors"));
                });
                // Calls in place in between cost nothing, and cost the next one nothing.
                assert_only_launches(&bench.count(|clipper| drop(clipper.clip_grad_norm(grads, 1e9).unwrap())), 3, "");
                out_device.with(&outputs, |outputs| {
                    let again = bench.count(|clipper| drop(clipper.clip_grad_norm_into(grads, outputs, 1.0).unwrap()));
                    assert_only_launches(&again, 3, &format!("{count} tensors, again"));
                });
            });
        }
    });
}

/// Any number of tensors, groups and rows, with and without telemetry.
#[test]
fn repeated_scoped_calls_only_launch() {
    with_bench(|mut bench| {
        for count in [1, 160, 3000] {
            let list = list_of(count);
            let (groups, rows): (Vec<usize>, Vec<usize>) = (0..count).map(|i| (i % 7 % count, 3)).unzip();
            let scopes = [Scope::global(), Scope::per_tensor(), Scope::groups(&groups), Scope::rows(&rows)];
            let mut device = OnDevice::upload(bench.clipper.stream(), &list);
            device.with(&list, |grads| {
                for scope in scopes.into_iter().flat_map(|scope| [scope, scope.telemetry()]) {
                    let first = bench.count(|clipper| clipper.clip_grad_norm_by(grads, &scope, 1.0).unwrap());
                    assert_eq!((first.launches, first.syncs, first.dtoh_calls), (3, 0, 0), "{count} tensors");
                    let counters = bench.count(|clipper| clipper.clip_grad_norm_by(grads, &scope, 0.5).unwrap());
                    assert_only_launches(&counters, 3, &format!("{count} tensors, {scope:?}"));
                    let counters = bench.count(|clipper| clipper.norms_by(grads, &scope, NormType::L2).unwrap());
                    assert_only_launches(&counters, 2, &format!("{count} tensors, {scope:?}"));
                    let counters = bench.count(|clipper| clipper.clip_coef_by(grads, &scope, 1.0).unwrap());
                    assert_only_launches(&counters, 2, &format!("{count} tensors, {scope:?}, coefficients"));
                    let rms = ClipNorm::new(1.0).norm_type(NormType::Rms);
                    let counters = bench.count(|clipper| clipper.clip_grad_norm_by(grads, &scope, rms).unwrap());
                    assert_only_launches(&counters, 3, &format!("{count} tensors, {scope:?}, root mean square"));
                }
            });
        }
    });
}

/// The first call loads its own two kernels, and no others.
#[test]
fn repeated_scoped_value_clipping_only_launches() {
    with_bench(|mut bench| {
        for count in [1, 160, 3000] {
            let list = list_of(count);
            let (groups, rows): (Vec<usize>, Vec<usize>) = (0..count).map(|i| (i % 7 % count, 3)).unzip();
            let scopes = [Scope::global(), Scope::per_tensor(), Scope::groups(&groups), Scope::rows(&rows)];
            let mut device = OnDevice::upload(bench.clipper.stream(), &list);
            device.with(&list, |grads| {
                for (index, scope) in scopes.into_iter().enumerate() {
                    let first = bench.count(|clipper| clipper.clip_grad_value_by(grads, &scope, 1.0).unwrap());
                    let loads = 2 * u64::from(count == 1 && index == 0);
                    assert_eq!((first.launches, first.syncs, first.module_loads), (2, 0, loads), "{count} tensors");
                    let counters = bench.count(|clipper| clipper.clip_grad_value_by(grads, &scope, 0.5).unwrap());
                    assert_only_launches(&counters, 2, &format!("{count} tensors, {scope:?}"));
                }
            });
        }
    });
}

#[test]
fn reading_scoped_reports_is_one_wait() {
    with_bench(|mut bench| {
        let list = list_of(5);
        let mut device = OnDevice::upload(bench.clipper.stream(), &list);
        let scope = Scope::per_tensor().telemetry();
        let mut pending = None;
        device.with(&list, |grads| pending = Some(bench.clipper.clip_grad_norm_by(grads, &scope, 1.0).unwrap()));
        let counters = bench.count(|_| pending.unwrap().wait().unwrap());
        let report = size_of::<gradclip::abi::ReportSlot>() as u64;
        assert_eq!((counters.launches, counters.dtoh_bytes), (0, 64 + 5 * (report + 40)));
        assert!(counters.syncs <= 1 + counters.dtoh_calls); // a copy to pageable memory waits too
    });
}

/// The two kernels of other orders are loaded when they are first needed, once; then such a call costs what the others do.
#[test]
fn any_order_costs_no_more_calls() {
    with_bench(|mut bench| {
        for count in [1, 161] {
            let list = list_of(count);
            let mut device = OnDevice::upload(bench.clipper.stream(), &list);
            device.with(&list, |grads| {
                bench.count(|clipper| drop(clipper.clip_grad_norm(grads, 1.0).unwrap()));
                for p in [0.5, 3.0, 1e300] {
                    let clip = ClipNorm::new(1.0).norm_type(NormType::P(p)).nonfinite(NonFinite::Zero);
                    let first = bench.count(|clipper| drop(clipper.clip_grad_norm(grads, clip).unwrap()));
                    let loads = 2 * u64::from(count == 1 && p == 0.5);
                    assert_eq!((first.launches, first.syncs, first.module_loads), (3, 0, loads), "{count}, {p}");
                    let again = bench.count(|clipper| drop(clipper.clip_grad_norm(grads, clip).unwrap()));
                    assert_only_launches(&again, 3, &format!("p = {p}, {count} tensors"));
                    let measured = bench.count(|clipper| drop(clipper.total_norm(grads, NormType::P(p)).unwrap()));
                    assert_only_launches(&measured, 2, &format!("p = {p}, {count} tensors, measured"));
                }
                // 2 by number takes the kernels of 2, which are there.
                let named = bench.count(|clipper| drop(clipper.total_norm(grads, NormType::P(2.0)).unwrap()));
                assert_only_launches(&named, 2, "p = 2");
            });
        }
    });
}

/// A launch for each call that adds, two for the clip. In the first step the partials are copied when they outgrow their
/// memory, on the device; afterwards nothing is, nor allocated.
#[test]
fn running_norms_only_launch() {
    with_bench(|mut bench| {
        for (count, part) in [(5, 1), (40, 7), (700, 300)] {
            let list = list_of(count);
            let mut device = OnDevice::upload(bench.clipper.stream(), &list);
            let mut norm = bench.clipper.running_norm(NormType::L2).unwrap();
            let adds = count.div_ceil(part) as u64;
            device.with(&list, |grads| {
                for step in 0..3 {
                    let added = bench.count(|_| {
                        for part in grads.chunks(part) {
                            norm.add(part).unwrap();
                        }
                    });
                    let clipped = bench.count(|_| norm.clip(grads, 1.0).unwrap());
                    if step > 0 {
                        assert_only_launches(&added, adds, &format!("{count} tensors, step {step}"));
                        assert_only_launches(&clipped, 2, &format!("{count} tensors, clip in step {step}"));
                        continue;
                    }
                    assert_eq!((added.launches, added.syncs, added.dtoh_calls), (adds, 0, 0), "{count} tensors");
                    assert_eq!((clipped.launches, clipped.syncs), (2, 0), "{count} tensors");
                    // Doubling: 2, 3 or 4 times for 5, 40 and 700 tiles; sums and scales.
                    let copies = 2 * u64::from((count as f64 / part as f64).log2().ceil() as u32);
                    assert_eq!(added.dtod_calls, copies, "{count} tensors");
                    let tables = list.chunks(part).filter(|part| part.len() > 160).count() as u64;
                    assert_eq!(added.htod_calls, tables, "{count} tensors");
                }
                let measured = bench.count(|_| norm.total_norm().unwrap());
                assert_only_launches(&measured, 1, "measured");
            });
        }
    });
}

#[test]
fn an_empty_list_still_reports() {
    with_bench(|mut bench| {
        let none: &mut [cudarc::driver::CudaSlice<f32>] = &mut [];
        let counters = bench.count(|clipper| {
            let report = clipper.clip_grad_norm(none, 1.0).unwrap().wait().unwrap();
            assert_eq!((report.total_norm, report.written), (0.0, false));
            let report = clipper.clip_grad_value(none, ClipValue::new(1.0)).unwrap().wait().unwrap();
            assert_eq!((report.clipped, report.written), (0, false));
            let report = clipper.clip_with_norm(none, 5.0, 1.0).unwrap().wait().unwrap();
            assert_eq!((report.total_norm, report.clip_coef), (5.0, 0.2));
            let report = clipper.clip_coef(none, ClipNorm::new(1.0).loss_scale(2.0)).unwrap().wait().unwrap();
            assert_eq!((report.total_norm, report.multiplier), (0.0, 0.5));
        });
        assert_eq!(counters.launches, 4); // only the ones that make the report
    });
}

#[test]
fn reading_the_report_is_one_copy_and_one_wait() {
    with_bench(|mut bench| {
        let list = list_of(5);
        let mut device = OnDevice::upload(bench.clipper.stream(), &list);
        let mut pending = None;
        device.with(&list, |grads| pending = Some(bench.clipper.clip_grad_norm(grads, 1.0).unwrap()));
        let counters = bench.count(|_| pending.unwrap().wait().unwrap());
        assert_eq!((counters.launches, counters.dtoh_calls, counters.dtoh_bytes), (0, 1, 72));
        // A copy to pageable memory waits too.
        assert!(counters.syncs <= 2);
    });
}

/// New addresses each step, as candle's gradients have: one copy of the table, from pinned memory, and no wait even if
/// the GPU is many steps behind.
#[test]
fn new_addresses_cost_one_copy_and_no_wait() {
    with_bench(|mut bench| {
        bench.double.set_deferred(true);
        let list = list_of(300);
        let mut devices: Vec<OnDevice> = (0..6).map(|_| OnDevice::upload(bench.clipper.stream(), &list)).collect();
        let mut pending = Vec::new();
        for step in 0..12 {
            let device = &mut devices[step % 6];
            device.with(&list, |grads| {
                let counters = bench.count(|clipper| {
                    pending.push(clipper.clip_grad_norm(grads, ClipNorm::new(10.0 / (step + 1) as f64)).unwrap());
                });
                assert_eq!((counters.launches, counters.htod_calls, counters.syncs), (3, 1, 0), "step {step}");
                assert_eq!(counters.htod_bytes, 300 * 24);
                if step > 0 {
                    assert_eq!(counters.allocs, 0, "step {step}");
                }
            });
        }
        // Were a staging buffer reused while a copy from it is queued, a step would have clipped another step's list.
        let norm = list.iter().flat_map(|tensor| tensor.values.values()).map(|x| x * x).sum::<f64>().sqrt();
        for (step, pending) in pending.iter().enumerate() {
            let expected = if step < 6 { norm } else { 10.0 / (step - 5) as f64 };
            let got = pending.wait().unwrap().total_norm;
            assert!((got / expected - 1.0).abs() < 1e-6, "step {step}: {got}, expected {expected}");
        }
        // Once the copies have run, the buffers are free again.
        let device = &mut devices[0];
        device.with(&list, |grads| {
            let counters = bench.count(|clipper| drop(clipper.clip_grad_norm(grads, 1.0).unwrap()));
            assert_eq!((counters.pinned_allocs, counters.syncs), (0, 0));
        });
    });
}

#[test]
fn the_current_context_is_left_alone() {
    with_bench(|mut bench| {
        use cudarc::driver::result::ctx;
        let list = list_of(200);
        let other = cuda::context(1).unwrap();
        for current in [std::ptr::null_mut(), other.cu_ctx()] {
            let mut device = OnDevice::upload(bench.clipper.stream(), &list);
            device.with(&list, |grads| {
                // SAFETY: null, or a live context.
                unsafe { ctx::set_current(current) }.unwrap();
                let now = || ctx::get_current().unwrap().unwrap_or(std::ptr::null_mut());
                let pending = bench.clipper.clip_grad_norm(grads, 1.0).unwrap();
                assert_eq!(now(), current);
                pending.wait().unwrap();
                assert_eq!(now(), current);
                bench.clipper.clip_grad_value(grads, 1.0).unwrap();
                assert_eq!(now(), current);
                bench.clipper.clip_grad_norm(grads, -1.0).unwrap_err();
                assert_eq!(now(), current);
                drop(Clipper::new(bench.clipper.stream()).unwrap());
                assert_eq!(now(), current);
                let _held = cuda::context(0).unwrap();
                assert_eq!(now(), current);
            });
        }
    });
}
