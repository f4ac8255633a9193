//! libtorch's CUDA library: in the process in time, or an error.

use crate::cuda::loader_text;
use crate::error::{Error, Result};
use libloading::Library;

#[cfg(not(windows))]
pub(super) const LIBTORCH_CUDA: &str = "libtorch_cuda.so";
#[cfg(windows)]
pub(super) const LIBTORCH_CUDA: &str = "torch_cuda.dll";

/// Loads `libtorch_cuda.so`, so that libtorch has CUDA although the linker has dropped that library from the program
/// ([why, and what else helps](crate::tch#if-libtorch-finds-no-cuda)). Call it first in `main`, before anything of
/// tch.
///
/// The library is looked for by its name, as the loader does: in `LD_LIBRARY_PATH` and the program's `RUNPATH`. It stays
/// for the life of the process. Where it is in the process already, this only checks that libtorch knows it.
///
/// `Ok` does not say that there is a GPU: `tch::Cuda::is_available()` does, and asks the driver only now.
///
/// Cost: the first call loads about 1 GB of libraries, if nothing else has.
///
/// # Errors
/// [`Error::LibtorchCudaMissing`] if it is not found or cannot be loaded, as where libtorch is built for the CPU; a program
/// that also runs there goes on with CPU tensors. [`Error::LibtorchCudaTooLate`] if libtorch has decided before that there
/// is no CUDA, which nothing undoes.
///
/// ```no_run
/// use tch::{Device, Kind, Tensor};
///
/// fn main() -> tch::Result<()> {
///     if let Err(error) = gradclip::tch::load_cuda() {
///         eprintln!("on the CPU: {error}");
///     }
///     let device = Device::cuda_if_available();
///     let weight = Tensor::f_ones([2, 2], (Kind::Float, device))?.set_requires_grad(true);
///     weight.square().sum(Kind::Float).f_backward()?;
///     gradclip::tch::clip_grad_norm(&[&weight], 1.0)?;
///     Ok(())
/// }
/// ```
pub fn load_cuda() -> Result<()> {
    let missing = |error: &libloading::Error| Error::LibtorchCudaMissing { reason: loader_text(error) };
    let library = open(LIBTORCH_CUDA).map_err(|error| missing(&error))?;
    // It cannot be unloaded: libtorch keeps pointers into it.
    std::mem::forget(library);
    // libtorch asks its CUDA library, if it has one, whether that was built with the CUDA runtime: always, so the answer
    // does not depend on a GPU. To ask is to decide, so it comes after loading and not at all where that fails.
    if ::tch::utils::has_cudart() {
        Ok(())
    } else {
        Err(Error::LibtorchCudaTooLate)
    }
}

/// With its symbols for all libraries loaded later, as if the program were linked to it.
#[cfg(unix)]
pub(super) fn open(name: &str) -> std::result::Result<Library, libloading::Error> {
    use libloading::os::unix::{Library as UnixLibrary, RTLD_GLOBAL, RTLD_NOW};
    // SAFETY: its initialisers run, as in any program that is linked to this library of libtorch.
    unsafe { UnixLibrary::open(Some(name), RTLD_NOW | RTLD_GLOBAL) }.map(Library::from)
}

#[cfg(not(unix))]
pub(super) fn open(name: &str) -> std::result::Result<Library, libloading::Error> {
    // SAFETY: its initialisers run, as in any program that is linked to this library of libtorch.
    unsafe { Library::new(name) }
}
