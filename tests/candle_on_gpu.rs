//! The candle adapter on CUDA tensors of a GPU: `cargo test --release --features candle-cuda --test candle_on_gpu`, with a
//! CUDA toolkit. `GRADCLIP_REQUIRE_GPU=1` makes it fail where there is no GPU.
#![cfg(feature = "candle-cuda")]
#![allow(clippy::unwrap_used, missing_docs)]

mod candle_suite;

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
