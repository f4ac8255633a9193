//! A driver that lacks functions: the user is told which, before cudarc would panic at its first use.
#![cfg(all(feature = "cuda", target_os = "linux"))]
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use gradclip::{cuda, Error};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

#[test]
fn a_driver_that_lacks_functions_is_named_too_old() {
    let Some(compiler) = support::toolchain::compiler() else {
        support::toolchain::skip("no C++ compiler was found");
        return;
    };
    let mut libraries = Vec::new();
    for name in ["libcuda.so.1", "libcuda.so"] {
        let build = support::toolchain::Build {
            file_name: name,
            sources: &["old_driver.cpp"],
            compile_flags: &["-O1", "-fPIC"],
            link_flags: &["-shared".into(), format!("-Wl,-soname,{name}").into()],
        };
        let path = compiler.build(&build).unwrap();
        // SAFETY: our own library, without initialisers.
        libraries.push(unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.unwrap());
    }
    for error in [cuda::check_driver().unwrap_err(), cuda::context(0).unwrap_err()] {
        assert!(matches!(&error, Error::DriverTooOld { reason } if reason.contains("cuDeviceGet")), "{error}");
    }
}
