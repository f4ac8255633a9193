//! A machine without a driver: typed errors that say what is missing, no panic. On a machine with one, that it works.
#![cfg(feature = "cuda")]
#![allow(missing_docs)]

use gradclip::{cuda, Error};

#[test]
fn the_first_question_is_answered_without_a_panic() {
    match cuda::check_driver() {
        Ok(()) => {
            // A driver, perhaps without a GPU.
            if let Err(error) = cuda::context(0) {
                assert!(matches!(error, Error::NoDevice { .. } | Error::Driver { .. }), "{error}");
            }
        }
        Err(error) => {
            assert_eq!(cuda::context(0).map(drop), Err(error.clone()));
            let Error::DriverMissing { tried, .. } = &error else { panic!("{error}") };
            assert!(tried.contains("cuda"));
            assert!(error.to_string().contains("Install the NVIDIA driver"), "{error}");
        }
    }
}

/// cudarc panics where NCCL is missing; so it is asked for first.
#[cfg(feature = "nccl")]
#[test]
fn a_missing_nccl_is_an_error() {
    if let Err(error) = cuda::check_nccl() {
        assert_eq!(cuda::check_nccl(), Err(error.clone()));
        assert!(matches!(error, Error::NcclMissing { .. }) && error.to_string().contains("libnccl.so"), "{error}");
    }
}
