//! CUDA tensors: their device memory, to this thread's clipper for libtorch's current stream.

use super::grads::GradList;
use super::loading::{open, LIBTORCH_CUDA};
use crate::adapters::cudarc::{sealed, DeviceGrad, DeviceGradMut, Found, WrongContext};
use crate::adapters::deferred::{Deferred, DeferredScoped};
use crate::cuda;
use crate::error::{Error, Result};
use crate::options::{ClipNorm, ClipValue, NormType};
use crate::plan::TensorRef;
use crate::report::{NormReport, ValueReport};
use crate::scope::Scope;
use crate::total_norm::TotalNorm;
use cudarc::driver::{CudaContext, CudaStream};
use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Of libtorch's C interface (`torch/csrc/inductor/aoti_torch/c/shim.h`), which keeps its form from release to release.
const CURRENT_STREAM: &str = "aoti_torch_get_current_cuda_stream";
type CurrentStream = unsafe extern "C" fn(device_index: i32, stream: *mut *mut c_void) -> c_int;

pub(super) fn total_norm(list: GradList, ordinal: usize, norm_type: NormType) -> Result<Deferred<NormReport>> {
    let stream = current_stream(ordinal)?;
    let pending = cuda::total_norm(&stream, &device_grads(&list, ordinal), norm_type);
    Deferred::of_call(pending, list.into_variables())
}

pub(super) fn clip_grad_norm(mut list: GradList, ordinal: usize, clip: ClipNorm) -> Result<Deferred<NormReport>> {
    let stream = current_stream(ordinal)?;
    let pending = cuda::clip_grad_norm(&stream, &mut device_grads(&list, ordinal), clip);
    if pending.is_ok() {
        list.put_back()?; // whether they were scaled, the device knows; if not, they are what they were
    }
    Deferred::of_call(pending, list.into_variables())
}

pub(super) fn clip_with_norm(
    mut list: GradList,
    ordinal: usize,
    total_norm: TotalNorm<'_>,
    clip: ClipNorm,
) -> Result<Deferred<NormReport>> {
    let stream = current_stream(ordinal)?;
    let pending = cuda::clip_with_norm(&stream, &mut device_grads(&list, ordinal), total_norm, clip);
    if pending.is_ok() {
        list.put_back()?;
    }
    Deferred::of_call(pending, list.into_variables())
}

pub(super) fn clip_coef(list: GradList, ordinal: usize, clip: ClipNorm) -> Result<Deferred<NormReport>> {
    let stream = current_stream(ordinal)?;
    let pending = cuda::clip_coef(&stream, &device_grads(&list, ordinal), clip);
    Deferred::of_call(pending, list.into_variables())
}

pub(super) fn clip_grad_value(mut list: GradList, ordinal: usize, clip: ClipValue) -> Result<Deferred<ValueReport>> {
    let stream = current_stream(ordinal)?;
    let pending = cuda::clip_grad_value(&stream, &mut device_grads(&list, ordinal), clip);
    if pending.is_ok() {
        list.put_back()?;
    }
    Deferred::of_call(pending, list.into_variables())
}

pub(super) fn norms_by(
    list: &GradList,
    ordinal: usize,
    scope: &Scope<'_>,
    norm_type: NormType,
) -> Result<DeferredScoped> {
    let stream = current_stream(ordinal)?;
    let scope = scope.with_leading_dimensions(list.rows());
    cuda::norms_by(&stream, &all_parameters(list, ordinal), &scope, norm_type).map(DeferredScoped::on_device)
}

pub(super) fn clip_grad_norm_by(
    list: &mut GradList,
    ordinal: usize,
    scope: &Scope<'_>,
    clip: ClipNorm,
) -> Result<DeferredScoped> {
    let stream = current_stream(ordinal)?;
    let scope = scope.with_leading_dimensions(list.rows());
    let pending = cuda::clip_grad_norm_by(&stream, &mut all_parameters(list, ordinal), &scope, clip)?;
    list.put_back()?;
    Ok(DeferredScoped::on_device(pending))
}

pub(super) fn clip_coef_by(
    list: &GradList,
    ordinal: usize,
    scope: &Scope<'_>,
    clip: ClipNorm,
) -> Result<DeferredScoped> {
    let stream = current_stream(ordinal)?;
    let scope = scope.with_leading_dimensions(list.rows());
    cuda::clip_coef_by(&stream, &all_parameters(list, ordinal), &scope, clip).map(DeferredScoped::on_device)
}

pub(super) fn clip_grad_value_by(
    list: &mut GradList,
    ordinal: usize,
    scope: &Scope<'_>,
    clip: ClipValue,
) -> Result<DeferredScoped<ValueReport>> {
    let stream = current_stream(ordinal)?;
    let scope = scope.with_leading_dimensions(list.rows());
    let pending = cuda::clip_grad_value_by(&stream, &mut all_parameters(list, ordinal), &scope, clip)?;
    list.put_back()?;
    Ok(DeferredScoped::on_device(pending))
}

/// Every parameter has a place, so that all indices are those of parameters.
fn all_parameters(list: &GradList, ordinal: usize) -> Vec<TorchGrad> {
    let places = list.variables().spread(list.rows().len(), TensorRef::NOTHING, list.places().iter().copied());
    places.into_iter().map(|place| TorchGrad { place, ordinal }).collect()
}

fn device_grads(list: &GradList, ordinal: usize) -> Vec<TorchGrad> {
    list.places().iter().map(|&place| TorchGrad { place, ordinal }).collect()
}

/// The memory of a CUDA tensor that the list owns, and libtorch vouches for.
///
/// The list goes when the call returns, with the work still on the stream. What memory is freed then goes back to
/// libtorch's allocator, which gives it out again in the order of that stream.
struct TorchGrad {
    place: TensorRef,
    ordinal: usize,
}

impl sealed::Sealed for TorchGrad {}

impl DeviceGrad for TorchGrad {
    fn find(&self, stream: &CudaStream) -> Result<Found, WrongContext> {
        if self.ordinal != stream.context().ordinal() {
            return Err(WrongContext::new(format!("cuda:{}", self.ordinal)));
        }
        Ok(Found::vouched_for(self.place))
    }
}

impl DeviceGradMut for TorchGrad {
    fn find_mut(&mut self, stream: &CudaStream) -> Result<Found, WrongContext> {
        self.find(stream)
    }
}

/// The stream that libtorch's own operations go to now, in this thread, on this device.
fn current_stream(ordinal: usize) -> Result<Arc<CudaStream>> {
    static FUNCTION: OnceLock<Result<CurrentStream>> = OnceLock::new();
    let function = FUNCTION.get_or_init(|| look_up(LIBTORCH_CUDA)).clone()?;
    let context = context(ordinal)?;
    let mut stream = std::ptr::null_mut();
    // SAFETY: the function has this type. It writes one handle, and catches what libtorch throws.
    let status = unsafe { function(ordinal as i32, &mut stream) };
    if status != 0 {
        return Err(Error::Framework(format!("libtorch gave no current stream for cuda:{ordinal} (status {status})")));
    }
    // SAFETY: libtorch works in the primary context, as `context` does. It keeps its streams for the life of the
    // process, and the caller those that libtorch was given (the documentation of the module asks for it). Its own work
    // and ours are ordered by being on the same stream.
    Ok(unsafe { context.wrap_borrowed_stream(stream.cast()) })
}

/// The primary context of a device, once looked for. Kept for the life of the process, as libtorch does.
fn context(ordinal: usize) -> Result<Arc<CudaContext>> {
    static CONTEXTS: Mutex<Vec<Arc<CudaContext>>> = Mutex::new(Vec::new());
    let mut contexts = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(context) = contexts.iter().find(|context| context.ordinal() == ordinal) {
        return Ok(context.clone());
    }
    let context = cuda::context(ordinal)?;
    contexts.push(context.clone());
    Ok(context)
}

fn look_up(library: &str) -> Result<CurrentStream> {
    let missing = |what: String| {
        Error::Framework(format!(
            "libtorch's current CUDA stream is not known: {what}. CUDA tensors need the {LIBTORCH_CUDA} of a libtorch \
             that has {CURRENT_STREAM}, as 2.11 and 2.13 have; call gradclip::tch::load_cuda first in main, to load it \
             where the linker has dropped it"
        ))
    };
    // Where a CUDA tensor is, it is in the process already, and this finds that one.
    let library = open(library).map_err(|error| missing(cuda::loader_text(&error)))?;
    // SAFETY: the type is that of the declaration in the header named above.
    let function = unsafe { library.get::<CurrentStream>(CURRENT_STREAM.as_bytes()) }
        .map(|symbol| *symbol)
        .map_err(|error| missing(cuda::loader_text(&error)))?;
    std::mem::forget(library); // the function must stay
    Ok(function)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn without_the_library_or_the_function_the_error_says_what_is_missing() {
        let error = look_up("libtorch_cuda_that_is_not_there.so").unwrap_err().to_string();
        assert!(error.contains("libtorch_cuda_that_is_not_there.so") && error.contains("2.13"), "{error}");
        assert!(error.contains("gradclip::tch::load_cuda"), "{error}");
        if cfg!(target_os = "linux") {
            let error = look_up("libc.so.6").unwrap_err().to_string();
            assert!(error.contains(&format!("undefined symbol: {CURRENT_STREAM}")), "{error}");
        }
    }
}
