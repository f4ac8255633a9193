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

    pub fn with_device(body: impl FnOnce(&Device)) {
        match Device::new_cuda(0) {
            Ok(device) => body(&device),
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
