//! The CUDA back end on the driver double: no GPU, every call.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod suite;
mod support;

mod backend {
    use crate::support;
    use gradclip::cuda::{self, Clipper};

    /// How large the large tests are, where every CUDA thread is a fiber on one core.
    pub struct Large {
        pub tensors: usize,
        pub bytes: usize,
    }
    pub const LARGE: Large = Large { tensors: 3000, bytes: 9 * 32 * 1024 };

    /// Runs `body` with threads and blocks in order, then reversed with all work deferred; nothing may be left
    /// behind.
    pub fn with_clipper(body: impl Fn(&mut Clipper)) {
        let Some(double) = support::double::lock() else { return };
        for adverse in [false, true] {
            double.reset();
            double.set_reversed_order(adverse);
            double.set_deferred(adverse);
            {
                let context = cuda::context(0).unwrap();
                let mut clipper = Clipper::new(&context.default_stream()).unwrap();
                body(&mut clipper);
            }
            assert_eq!(double.violated_guards(), 0);
            if double.counters().graph_instantiations == 0 {
                // What graphs may use is left to the context: tests/double_suite/graphs.rs says how much.
                assert_eq!((double.live_allocations(), double.live_handles()), (0, 0));
            }
            assert_eq!(double.counters().faults, 0);
        }
    }

    /// The same where the double is NCCL too.
    #[cfg(feature = "nccl")]
    pub fn with_nccl(body: impl Fn(&mut Clipper)) {
        let Some(double) = support::double::lock() else { return };
        double.be_nccl();
        cuda::check_nccl().unwrap();
        let context = cuda::context(0).unwrap();
        body(&mut Clipper::new(&context.new_stream().unwrap()).unwrap());
        assert_eq!((double.violated_guards(), double.counters().faults), (0, 0));
    }
}

#[path = "double_suite"]
mod double {
    pub mod cost;
    pub mod every_kernel;
    pub mod faults;
    pub mod gpu_bench;
    pub mod graphs;
    pub mod host_allocations;
    pub mod lifetimes;
    pub mod loading;
    #[cfg(feature = "nccl")]
    pub mod nccl;
    pub mod pointers;
    pub mod predictions;
    pub mod raw;
    pub mod streams;
    pub mod threads;
    pub mod torch_gpu;
    pub mod traffic;
    pub mod variants;
}
