//! The gradients of the given variables, as a store has them: checked, contiguous, each once, all in one place.

use crate::adapters::variables::Variables;
use crate::error::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Layout, Storage, Tensor, Var};
use std::collections::HashMap;

/// Where all gradients of a list are.
pub(super) enum Home {
    Cpu,
    #[cfg(feature = "candle-cuda")]
    Cuda(std::sync::Arc<cudarc::driver::CudaStream>),
}

/// The gradients there are.
pub(super) struct GradList {
    tensors: Vec<Tensor>,
    /// Of each tensor, the address of its storage.
    storages: Vec<usize>,
    variables: Variables,
    /// Variables, each with the index of the tensor that is a copy of what the store has for it.
    copied: Vec<(usize, usize)>,
}

impl GradList {
    pub(super) fn gather(vars: &[Var], store: &GradStore) -> Result<Self> {
        let mut list = Self {
            tensors: Vec::with_capacity(vars.len()),
            storages: Vec::with_capacity(vars.len()),
            variables: Variables::with_capacity(vars.len()),
            copied: Vec::new(),
        };
        let mut seen = HashMap::with_capacity(vars.len());
        for (var, tensor) in vars.iter().enumerate() {
            let Some(grad) = store.get(tensor) else { continue };
            check(var, grad, list.tensors.first())?;
            if grad.elem_count() == 0 {
                continue; // candle refuses an operation in place on some empty shapes
            }
            let index = *seen.entry(place(grad)).or_insert(list.tensors.len());
            if !grad.is_contiguous() {
                list.copied.push((var, index));
            }
            if index == list.tensors.len() {
                let grad = grad.contiguous()?; // itself, if it is
                list.storages.push(storage_address(&grad));
                list.tensors.push(grad);
                list.variables.push(var);
            }
        }
        Ok(list)
    }

    /// Of an empty list, the CPU.
    pub(super) fn home(&self) -> Home {
        #[cfg(feature = "candle-cuda")]
        if let Some(candle_core::Device::Cuda(device)) = self.tensors.first().map(Tensor::device) {
            return Home::Cuda(device.cuda_stream());
        }
        Home::Cpu
    }

    pub(super) fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    pub(super) fn storages(&self) -> &[usize] {
        &self.storages
    }

    pub(super) fn name_in(&self, error: Error) -> Error {
        self.variables.name_in(error)
    }

    pub(super) fn variables(&self) -> &Variables {
        &self.variables
    }

    pub(super) fn into_variables(self) -> Variables {
        self.variables
    }

    /// Puts the copies into the store.
    pub(super) fn put_back(&self, vars: &[Var], store: &mut GradStore) {
        for &(var, index) in &self.copied {
            store.insert(&vars[var], self.tensors[index].clone());
        }
    }
}

/// Dtype and device of the gradient of `var`, the latter against the first gradient of the list.
fn check(var: usize, grad: &Tensor, first: Option<&Tensor>) -> Result<()> {
    let wrong_device = |expected: &str, got: String| Error::WrongDevice { tensor: var, expected: expected.into(), got };
    if !is_supported(grad.device()) {
        let expected = if cfg!(feature = "candle-cuda") { "the CPU or CUDA" } else { "the CPU" };
        return Err(wrong_device(expected, name(grad.device())));
    }
    if let Some(first) = first.map(Tensor::device).filter(|first| !is_same(first, grad.device())) {
        let expected = format!("{}, as the gradients before it", name(first));
        let twice = name(first) == name(grad.device());
        let got = name(grad.device()) + if twice { " by another candle device, on a stream of its own" } else { "" };
        return Err(wrong_device(&expected, got));
    }
    match grad.dtype() {
        DType::F32 | DType::F64 | DType::F16 | DType::BF16 => Ok(()),
        other => Err(Error::UnsupportedDtype { tensor: var, got: other.as_str().to_owned() }),
    }
}

fn is_supported(device: &candle_core::Device) -> bool {
    device.is_cpu() || (cfg!(feature = "candle-cuda") && device.is_cuda())
}

/// Two candle devices of one GPU are the same if they have the same stream.
fn is_same(a: &candle_core::Device, b: &candle_core::Device) -> bool {
    #[cfg(feature = "candle-cuda")]
    if let (candle_core::Device::Cuda(a), candle_core::Device::Cuda(b)) = (a, b) {
        let (a, b) = (a.cuda_stream(), b.cuda_stream());
        return a.cu_stream() == b.cu_stream() && a.context() == b.context();
    }
    a.same_device(b)
}

fn name(device: &candle_core::Device) -> String {
    use candle_core::DeviceLocation::{Cpu, Cuda, Metal};
    match device.location() {
        Cpu => "the CPU".into(),
        Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

/// The same for two gradients exactly if they are the same elements of the same memory.
fn place(grad: &Tensor) -> (usize, usize, Vec<usize>, Vec<usize>) {
    let layout = grad.layout();
    let strides = if layout.is_contiguous() { Vec::new() } else { layout.stride().to_vec() };
    let dims = if layout.is_contiguous() { vec![grad.elem_count()] } else { layout.dims().to_vec() };
    (storage_address(grad), layout.start_offset(), dims, strides)
}

/// The same for two tensors exactly if they share their storage.
fn storage_address(tensor: &Tensor) -> usize {
    std::ptr::from_ref::<Storage>(&tensor.storage_and_layout().0) as usize
}

/// The elements of a contiguous layout.
pub(super) fn offsets(layout: &Layout) -> std::ops::Range<usize> {
    let start = layout.start_offset();
    start..start + layout.shape().elem_count()
}
