//! The candle adapter on CUDA tensors of a GPU: `cargo test --release --features candle-cuda --test candle_on_gpu`, with a
//! CUDA toolkit. `GRADCLIP_REQUIRE_GPU=1` makes it fail where there is no GPU. `on_the_cpu` holds the tests of
//! `candle_kernels` to the CPU, and needs none.
#![cfg(feature = "candle-cuda")]
#![allow(clippy::unwrap_used, missing_docs)]

mod candle_kernels;
mod candle_suite;
#[path = "../examples/step_share/on_candle.rs"]
mod on_candle;
#[path = "../examples/step_share/mod.rs"]
mod step_share;

mod backend {
    use candle_core::Device;
    use std::sync::OnceLock;

    /// One device for all tests, as in a program: each candle device compiles the kernels it launches anew, where the
    /// driver has no cache of them.
    pub fn with_device(body: impl FnOnce(&Device)) {
        static DEVICE: OnceLock<Result<Device, String>> = OnceLock::new();
        match DEVICE.get_or_init(|| crate::on_candle::gpu().map_err(|error| error.to_string())) {
            Ok(device) => {
                body(device);
                device.synchronize().unwrap(); // before another thread's stream reuses the memory
            }
            Err(error) if std::env::var_os("GRADCLIP_REQUIRE_GPU").is_none_or(|value| value != "1") => {
                eprintln!("SKIPPED, a test of candle on a GPU: {error}");
            }
            Err(error) => panic!("GRADCLIP_REQUIRE_GPU=1, but there is no GPU: {error}"),
        }
        gradclip::cuda::release_thread_clippers();
    }
}

macro_rules! on_both {
    ($($test:ident)*) => {
        mod on_a_gpu {
            $(#[test] fn $test() { crate::backend::with_device(crate::candle_kernels::$test) })*
        }
        mod on_the_cpu {
            $(#[test] fn $test() { crate::candle_kernels::$test(&candle_core::Device::Cpu) })*
        }
    };
}

on_both!(
    a_backward_pass_in_every_dtype
    training_goes_on_with_the_clipped_gradients
    strided_gradients
    candle_s_own_operations_agree
    the_parts_of_a_step
);
