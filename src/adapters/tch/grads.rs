//! The gradients of the given parameters: checked, each once, all on one device, each as one piece of memory.

use super::framework;
use crate::adapters::variables::Variables;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::plan::{refuse_overlaps, TensorRef};
use ::tch::{no_grad_guard, Device, Kind, Tensor};
use std::borrow::Borrow;
use std::collections::HashSet;

/// Where all gradients of a list are.
pub(super) enum Home {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda(usize),
}

/// The gradients there are.
#[derive(Default)]
pub(super) struct GradList {
    /// Where each one is, or the copy that stands for it.
    places: Vec<TensorRef>,
    /// The tensors that own these places.
    owners: Vec<Tensor>,
    variables: Variables,
    device: Option<Device>,
    copied: Vec<Copied>,
    /// Leading dimension of each parameter's gradient, or of the parameter; 1 where there are no dimensions.
    rows: Vec<usize>,
}

/// In which order a gradient's elements have to lie, to be clipped where they are.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Order {
    /// In any, without gaps.
    Any,
    /// The slices along dimension 0 one after the other, each in any order.
    BySlice,
    /// As they are counted.
    Contiguous,
}

/// A gradient that is clipped in a contiguous copy.
struct Copied {
    grad: Tensor,
    /// Index of the copy in the list.
    index: usize,
}

impl GradList {
    pub(super) fn gather<T: Borrow<Tensor>>(params: &[T], order: Order) -> Result<Self> {
        let mut list = Self {
            places: Vec::with_capacity(params.len()),
            owners: Vec::with_capacity(params.len()),
            variables: Variables::with_capacity(params.len()),
            rows: Vec::with_capacity(params.len()),
            ..Self::default()
        };
        // The same for two gradients exactly if they are the same elements of the same memory: the shape counts only
        // where there are gaps.
        let mut seen = HashSet::with_capacity(params.len());
        // Memory that a gradient takes, from its first element to its last; in step with `places`.
        let mut spans = Vec::with_capacity(params.len());
        for (param, tensor) in params.iter().enumerate() {
            let tensor = tensor.borrow();
            if !tensor.defined() {
                list.rows.push(0);
                continue; // tch's own default
            }
            let grad = tensor.f_grad().map_err(framework)?;
            if !grad.defined() {
                list.rows.push(leading_dimension(tensor));
                continue;
            }
            list.rows.push(leading_dimension(&grad));
            list.check_device(param, &grad)?;
            let dtype = dtype_of(param, &grad)?;
            let shape = Shape::of(&grad);
            if shape.meets_itself() {
                return Err(Error::Overlap { first: param, second: param });
            }
            let (dense, numel) = (shape.is_dense(), shape.numel);
            let in_place = dense && has_order(&grad, order);
            let address = if numel == 0 { 0 } else { grad.data_ptr() as u64 };
            if address == 0 && numel > 0 {
                // Zeros that libtorch keeps as no more than their shape.
                return Err(Error::Framework(format!("the gradient of parameter {param} has no memory")));
            }
            let dims = if dense { Vec::new() } else { shape.dims };
            if !seen.insert((address, numel, dtype, dims)) {
                continue; // another parameter's, too
            }
            if address % dtype.size() as u64 != 0 {
                return Err(Error::Misaligned { tensor: param, dtype, address });
            }
            list.variables.push(param);
            spans.push((address, address + shape.span * dtype.size() as u64, list.places.len()));
            if in_place && !grad.requires_grad() && !grad.f_is_neg().map_err(framework)? {
                list.push(address, numel, dtype, grad);
            } else {
                list.push_copy(numel, dtype, grad)?;
            }
        }
        if !list.copied.is_empty() {
            // What is a copy in the list meets nothing there.
            spans.retain(|(begin, end, _)| begin < end);
            refuse_overlaps(&mut spans, &mut Vec::new()).map_err(|error| list.name_in(error))?;
        }
        Ok(list)
    }

    fn push(&mut self, address: u64, numel: u64, dtype: Dtype, owner: Tensor) {
        self.places.push(TensorRef { address, numel, dtype });
        self.owners.push(owner);
    }

    fn push_copy(&mut self, numel: u64, dtype: Dtype, grad: Tensor) -> Result<()> {
        let _untracked = no_grad_guard();
        let kind = grad.f_kind().map_err(framework)?;
        let mut copy = Tensor::f_empty(grad.size(), (kind, grad.device())).map_err(framework)?;
        copy.f_copy_(&grad).map_err(framework)?;
        self.copied.push(Copied { grad, index: self.places.len() });
        self.push(copy.data_ptr() as u64, numel, dtype, copy);
        Ok(())
    }

    /// Of an empty list, the CPU.
    pub(super) fn home(&self) -> Home {
        match self.device {
            #[cfg(feature = "cuda")]
            Some(Device::Cuda(ordinal)) => Home::Cuda(ordinal),
            _ => Home::Cpu,
        }
    }

    pub(super) fn places(&self) -> &[TensorRef] {
        &self.places
    }

    pub(super) fn rows(&self) -> &[usize] {
        &self.rows
    }

    pub(super) fn variables(&self) -> &Variables {
        &self.variables
    }

    pub(super) fn name_in(&self, error: Error) -> Error {
        self.variables.name_in(error)
    }

    pub(super) fn into_variables(self) -> Variables {
        self.variables
    }

    /// Writes the copies to the gradients they stand for.
    pub(super) fn put_back(&mut self) -> Result<()> {
        let _untracked = no_grad_guard();
        let owners = &self.owners;
        self.copied.iter_mut().try_for_each(|copied| copied.grad.f_copy_(&owners[copied.index])).map_err(framework)
    }

    /// Whether the gradient of `param` is on a device this is built for, and on that of those before it.
    fn check_device(&mut self, param: usize, grad: &Tensor) -> Result<()> {
        let device = grad.device();
        let expected = match self.device {
            Some(first) if first == device => return Ok(()),
            Some(first) => format!("{}, as the gradients before it", name(first)),
            None if device == Device::Cpu || (cfg!(feature = "cuda") && device.is_cuda()) => {
                self.device = Some(device);
                return Ok(());
            }
            None if cfg!(feature = "cuda") => "the CPU or CUDA".into(),
            None => "the CPU, as gradclip is built without its feature `cuda`".into(),
        };
        Err(Error::WrongDevice { tensor: param, expected, got: name(device) })
    }
}

fn leading_dimension(tensor: &Tensor) -> usize {
    tensor.size().first().map_or(1, |&size| size as usize)
}

/// Of a gradient without gaps.
fn has_order(grad: &Tensor, order: Order) -> bool {
    let slices_follow = || {
        let (size, stride) = (grad.size(), grad.stride());
        size.first()
            .zip(stride.first())
            .is_none_or(|(&size, &stride)| size <= 1 || (size * stride) as usize == grad.numel())
    };
    order == Order::Any || grad.is_contiguous() || order == Order::BySlice && slices_follow()
}

fn name(device: Device) -> String {
    match device {
        Device::Cpu => "the CPU".into(),
        Device::Cuda(ordinal) => format!("cuda:{ordinal}"),
        // tch takes every device it does not know for the first of these.
        Device::Mps => "MPS, or another device that tch has no name for".into(),
        Device::Vulkan => "Vulkan".into(),
    }
}

/// Kind and layout of the gradient of `param`.
fn dtype_of(param: usize, grad: &Tensor) -> Result<Dtype> {
    let unsupported = |got: String| Error::UnsupportedDtype { tensor: param, got };
    let dtype = match grad.f_kind() {
        Ok(Kind::Float) => Dtype::F32,
        Ok(Kind::Double) => Dtype::F64,
        Ok(Kind::Half) => Dtype::F16,
        Ok(Kind::BFloat16) => Dtype::BF16,
        Ok(other) => return Err(unsupported(format!("{other:?}"))),
        Err(error) => return Err(unsupported(error.to_string())), // a kind that tch has no name for
    };
    // tch has no function for the layout. This one is 0 exactly of strided tensors and of sparse ones without sparse
    // dimensions, and an error of layouts that are neither strided nor sparse.
    match grad.f_sparse_dim() {
        Ok(0) if !grad.is_sparse() => Ok(dtype),
        Ok(_) => Err(unsupported(format!("{dtype} in a sparse layout"))),
        Err(_) => Err(unsupported(format!("{dtype} in a layout that is not strided"))),
    }
}

/// Sizes and strides of a strided tensor.
struct Shape {
    /// Size and stride of each dimension that has more than one element, by stride. Left out of contiguous tensors.
    dims: Vec<(i64, i64)>,
    numel: u64,
    /// Elements from the first in memory to the last, those in gaps too.
    span: u64,
}

impl Shape {
    fn of(grad: &Tensor) -> Self {
        let numel = grad.numel() as u64;
        if numel == 0 || grad.is_contiguous() {
            return Self { dims: Vec::new(), numel, span: numel };
        }
        Self::new(grad.size().into_iter().zip(grad.stride()))
    }

    fn new(dims: impl IntoIterator<Item = (i64, i64)>) -> Self {
        let mut dims: Vec<(i64, i64)> = dims.into_iter().filter(|&(size, _)| size > 1).collect();
        dims.sort_unstable_by_key(|&(_, stride)| stride);
        let numel = dims.iter().map(|&(size, _)| size as u64).product();
        let span = 1 + dims.iter().map(|&(size, stride)| (size - 1) as u64 * stride as u64).sum::<u64>();
        Self { dims, numel, span }
    }

    /// Whether the elements, in whatever order, fill the memory between the first and the last.
    fn is_dense(&self) -> bool {
        self.span == self.numel && !self.meets_itself()
    }

    /// Whether two elements may be in the same place: each dimension has to step over all that the smaller ones reach.
    fn meets_itself(&self) -> bool {
        let mut reach = 0;
        self.dims.iter().any(|&(size, stride)| {
            let meets = stride <= reach;
            reach += (size - 1) * stride;
            meets
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dense_in_any_order_with_gaps_and_on_itself() {
        let dense = |dims: &[(i64, i64)]| Shape::new(dims.iter().copied()).is_dense();
        let meets = |dims: &[(i64, i64)]| Shape::new(dims.iter().copied()).meets_itself();
        for dims in [
            &[][..],
            &[(1, 7)],
            &[(5, 1)],
            &[(3, 1), (2, 3)],                  // transposed
            &[(2, 24), (3, 1), (4, 6), (2, 3)], // channels last
            &[(2, 3), (1, 1000), (3, 1)],
        ] {
            assert!(dense(dims) && !meets(dims), "{dims:?}");
        }
        for dims in [&[(5, 2)][..], &[(2, 4), (3, 1)], &[(3, 2), (2, 6)]] {
            assert!(!dense(dims) && !meets(dims), "{dims:?}");
        }
        for dims in [&[(5, 0)][..], &[(2, 1), (2, 1)], &[(3, 1), (2, 2)], &[(3, 0), (3, 1)], &[(2, 2), (4, 1)]] {
            assert!(!dense(dims) && meets(dims), "{dims:?}");
        }
        // As many elements as places, but one place is taken twice and one not at all.
        assert!(!dense(&[(2, 3), (2, 2), (2, 2)]));
        let column = Shape::new([(3, 4), (2, 1)]);
        assert_eq!((column.numel, column.span), (6, 10));
    }
}
