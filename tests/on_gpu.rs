//! The CUDA back end on a GPU, where there is one. `GRADCLIP_REQUIRE_GPU=1` makes it an error that there is none.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod suite;
mod support;

mod backend {
    use cudarc::driver::CudaContext;
    use gradclip::cuda::{self, Clipper};
    use gradclip::Error;
    use std::io::Write;
    use std::sync::{Arc, Mutex, OnceLock};

    pub struct Large {
        pub tensors: usize,
        pub bytes: usize,
    }
    /// A mixture-of-experts list (Qwen3-30B-A3B has 18,867 tensors), and more tiles than threads fold them.
    pub const LARGE: Large = Large { tensors: 18_867, bytes: 64 << 20 };

    /// Kept for the whole process: else each test would make the context and load the kernels anew. None without a GPU.
    fn warm() -> Option<Arc<CudaContext>> {
        static WARM: OnceLock<Result<Mutex<Clipper>, Error>> = OnceLock::new();
        let make = || Ok(Mutex::new(Clipper::new(&cuda::context(0)?.default_stream())?));
        match WARM.get_or_init(make) {
            // A context object of its own for each test: what it tracks, and what a test turns off, stays there.
            Ok(_) => Some(cuda::context(0).unwrap()),
            Err(error) => skip("GPU", error),
        }
    }

    /// A context, and nothing loaded into it yet.
    pub fn with_context(body: impl FnOnce(&Arc<CudaContext>)) {
        match cuda::context(0) {
            Ok(context) => body(&context),
            Err(error) => drop(skip::<()>("GPU", &error)),
        }
    }

    fn skip<T>(what: &str, error: &Error) -> Option<T> {
        let required = std::env::var_os("GRADCLIP_REQUIRE_GPU").is_some_and(|value| value == "1");
        assert!(!required, "GRADCLIP_REQUIRE_GPU=1, and no {what} can be used: {error}");
        // Not by println!, which the test runner keeps to itself when a test passes.
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| drop(writeln!(std::io::stderr(), "SKIPPED, all tests of a {what}: {error}")));
        None
    }

    pub fn with_clipper(body: impl Fn(&mut Clipper)) {
        let Some(context) = warm() else { return };
        for stream in [context.default_stream(), context.new_stream().unwrap()] {
            body(&mut Clipper::new(&stream).unwrap());
        }
    }

    /// On a stream of its own, where NCCL is installed.
    #[cfg(feature = "nccl")]
    pub fn with_nccl(body: impl Fn(&mut Clipper)) {
        let Some(context) = warm() else { return };
        match cuda::check_nccl() {
            Ok(()) => body(&mut Clipper::new(&context.new_stream().unwrap()).unwrap()),
            Err(error) => drop(skip::<()>("NCCL", &error)),
        }
    }
}

mod gpu {
    use crate::backend::{with_clipper, with_context};
    use gradclip::cuda::Clipper;
    use gradclip::{ClipNorm, Dtype, NormType, Scope};
    use half::bf16;
    use std::time::Instant;

    /// What the first call of each verb takes, in which the driver compiles what it needs or finds it in its cache. Run
    /// it alone, in a process that has loaded nothing yet.
    #[test]
    fn first_calls() {
        with_context(|context| {
            let stream = context.default_stream();
            let mut grads = [stream.clone_htod(&[3.0f32, 4.0]).unwrap()];
            let mut outputs = [stream.alloc_zeros::<f32>(2).unwrap()];
            let mut clipper = Clipper::new(&stream).unwrap();
            let mut time = |what: &str, call: &mut dyn FnMut(&mut Clipper) -> f64, expected: f64| {
                let began = Instant::now();
                assert_eq!(call(&mut clipper), expected, "{what}");
                println!("first call of {what}: {:.1} ms", began.elapsed().as_secs_f64() * 1e3);
            };
            let any_order = NormType::P(3.0);
            let norm_3 = gradclip::cpu::total_norm(&[[3.0f32, 4.0]], any_order).unwrap().total_norm;
            let scope = Scope::per_tensor();
            let of_scope = |report: gradclip::ScopedReport| report.groups[0].total_norm;
            time("total_norm", &mut |c| c.total_norm(&grads, NormType::L2).unwrap().wait().unwrap().total_norm, 5.0);
            time(
                "the same again",
                &mut |c| c.total_norm(&grads, NormType::L2).unwrap().wait().unwrap().total_norm,
                5.0,
            );
            time("clip_grad_norm", &mut |c| c.clip_grad_norm(&mut grads, 9.0).unwrap().wait().unwrap().total_norm, 5.0);
            time(
                "clip_grad_value",
                &mut |c| c.clip_grad_value(&mut grads, 9.0).unwrap().wait().unwrap().clipped as f64,
                0.0,
            );
            time(
                "clip_grad_norm_into",
                &mut |c| c.clip_grad_norm_into(&grads, &mut outputs, 9.0).unwrap().wait().unwrap().total_norm,
                5.0,
            );
            time(
                "a norm of any order",
                &mut |c| c.total_norm(&grads, any_order).unwrap().wait().unwrap().total_norm,
                norm_3,
            );
            time(
                "clip_grad_norm_by",
                &mut |c| of_scope(c.clip_grad_norm_by(&mut grads, &scope, 9.0).unwrap().wait().unwrap()),
                5.0,
            );
            time(
                "the same with telemetry",
                &mut |c| of_scope(c.clip_grad_norm_by(&mut grads, &scope.telemetry(), 9.0).unwrap().wait().unwrap()),
                5.0,
            );
            time(
                "the same of any order",
                &mut |c| {
                    let clip = ClipNorm::new(9.0).norm_type(any_order);
                    of_scope(c.clip_grad_norm_by(&mut grads, &scope, clip).unwrap().wait().unwrap())
                },
                norm_3,
            );
            time(
                "clip_grad_value_by",
                &mut |c| {
                    c.clip_grad_value_by(&mut grads, &scope, 9.0).unwrap().wait().unwrap().groups[0].clipped as f64
                },
                0.0,
            );
        });
    }

    /// One tensor beyond 2^31 elements: torch 2.x reads out of bounds there (pytorch#169930).
    #[test]
    fn more_elements_than_fit_32_bits() {
        const NUMEL: usize = (1 << 31) + 11;
        with_clipper(|clipper| {
            let stream = clipper.stream().clone();
            let (free, _) = stream.context().mem_get_info().unwrap();
            if free < 2 * NUMEL + (64 << 20) {
                // Also where a GPU is required: this one is too small, which nobody can help.
                eprintln!("SKIPPED, a tensor of {NUMEL} elements: {free} bytes of GPU memory are free");
                return;
            }
            let mut grad = stream.alloc_zeros::<bf16>(NUMEL).unwrap();
            let (first, last) = (bf16::from_f32(3.0), bf16::from_f32(4.0));
            stream.memcpy_htod(&[first], &mut grad.slice_mut(0..1)).unwrap();
            stream.memcpy_htod(&[last], &mut grad.slice_mut(NUMEL - 1..)).unwrap();
            let report = clipper.clip_grad_norm(&mut [&mut grad], 2.5).unwrap().wait().unwrap();
            assert_eq!((report.total_norm, report.clip_coef), (5.0, 0.5));
            assert_eq!(stream.clone_dtoh(&grad.slice(NUMEL - 2..)).unwrap(), [bf16::ZERO, bf16::from_f32(2.0)]);
            let report = clipper.clip_grad_value(&mut [&mut grad], 1.0).unwrap().wait().unwrap();
            assert_eq!((report.clipped, report.nan), (2, 0));
            let max = clipper.total_norm(&[&grad], NormType::Inf).unwrap().wait().unwrap();
            assert_eq!((max.total_norm, Dtype::BF16.size()), (1.0, 2));
        });
    }

    #[test]
    fn a_captured_call_replays() {
        use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
        with_clipper(|clipper| {
            let stream = clipper.stream().clone();
            if stream.cu_stream().is_null() {
                return; // the legacy default stream cannot be captured
            }
            // SAFETY: one stream only. An event from before the capture must not be waited for in it.
            unsafe { stream.context().disable_event_tracking() };
            for count in [2, 300] {
                let mut list: Vec<_> = (0..count).map(|_| stream.clone_htod(&[3.0f32, 4.0]).unwrap()).collect();
                let norm = 5.0 * f64::from(count).sqrt();
                clipper.clip_grad_norm(&mut list, f64::INFINITY).unwrap();
                stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
                let captured = clipper.clip_grad_norm(&mut list, norm / 2.0).unwrap();
                let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
                let graph = stream.end_capture(flags).unwrap().unwrap();
                for _ in 0..3 {
                    graph.launch().unwrap();
                    assert!((captured.wait().unwrap().total_norm / norm - 1.0).abs() < 1e-9);
                    for grad in &mut list {
                        assert_eq!(stream.clone_dtoh(grad).unwrap(), [1.5, 2.0]);
                        stream.memcpy_htod(&[3.0f32, 4.0], grad).unwrap();
                    }
                }
            }
        });
    }
}
