//! The CUDA back end on a GPU, where there is one. `GRADCLIP_REQUIRE_GPU=1` makes it an error that there is none.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod suite;
mod support;

mod backend {
    use gradclip::cuda::{self, Clipper};
    use std::io::Write;

    pub struct Large {
        pub tensors: usize,
        pub bytes: usize,
    }
    /// A mixture-of-experts list (Qwen3-30B-A3B has 18,867 tensors), and more tiles than threads fold them.
    pub const LARGE: Large = Large { tensors: 18_867, bytes: 64 << 20 };

    pub fn with_clipper(body: impl Fn(&mut Clipper)) {
        let context = match cuda::context(0) {
            Ok(context) => context,
            Err(error) => {
                let required = std::env::var_os("GRADCLIP_REQUIRE_GPU").is_some_and(|value| value == "1");
                assert!(!required, "GRADCLIP_REQUIRE_GPU=1, and no GPU can be used: {error}");
                // Not by println!, which the test runner keeps to itself when a test passes.
                static ONCE: std::sync::Once = std::sync::Once::new();
                ONCE.call_once(|| drop(writeln!(std::io::stderr(), "SKIPPED, all tests of a GPU: {error}")));
                return;
            }
        };
        for stream in [context.default_stream(), context.new_stream().unwrap()] {
            body(&mut Clipper::new(&stream).unwrap());
        }
    }
}

mod gpu {
    use crate::backend::with_clipper;
    use gradclip::{Dtype, NormType};
    use half::bf16;

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
