//! What is timed: operations on a list of gradients, each by several implementations.

use super::limits;
use super::shapes::Shapes;
use bytemuck::Pod;
use gradclip::cpu::{self, AsGradMut};
use gradclip::{NormType, Scope};
use half::{bf16, f16};
use rayon::prelude::*;
use std::hint::black_box;

/// An operation of the crate, by what it does to memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    Norm,
    /// The norm is within the threshold.
    ClipWithin,
    /// It is not, so that every gradient is scaled.
    Clip,
    /// Every element is within the bounds.
    ValueWithin,
    /// One in 64 is not: some in every KiB, so that everything is written.
    Value,
}

impl Op {
    pub const ALL: [Self; 5] = [Self::Norm, Self::ClipWithin, Self::Clip, Self::ValueWithin, Self::Value];

    /// As the record of the GPU bench has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Norm => "norm",
            Self::ClipWithin => "clip; within",
            Self::Clip => "clip",
            Self::ValueWithin => "value; 0 % outside",
            Self::Value => "value; 2 % outside",
        }
    }

    /// How often each byte of the gradients has to be read, and read and written.
    pub fn passes(self) -> (usize, usize) {
        match self {
            Self::Norm | Self::ClipWithin | Self::ValueWithin => (1, 0),
            Self::Clip => (1, 1),
            Self::Value => (0, 1),
        }
    }

    /// Times the size of the gradients: what has to move.
    pub fn traffic(self) -> usize {
        let (read, updated) = self.passes();
        read + 2 * updated
    }
}

/// An element type, and what anybody would write for it.
pub trait Float: Pod + Send + Sync {
    const NAME: &'static str;
    /// Largest relative error of rounding to it.
    const ROUNDING: f64;
    fn from_f64(x: f64) -> Self;
    fn to_f64(self) -> f64;
    fn norm_by_loop(grads: &[Vec<Self>]) -> f64;
    fn scale_by_loop(grads: &mut [Vec<Self>], coef: f64);
    fn clamp_by_loop(grads: &mut [Vec<Self>], bound: f64);
}

/// One core, one accumulator, and the type's own arithmetic: `half`'s goes by way of f32.
macro_rules! float {
    ($type:ty, $name:literal, $rounding:expr, $arithmetic:ty, $from:expr, $to:expr, $from_f64:expr, $to_f64:expr) => {
        impl Float for $type {
            const NAME: &'static str = $name;
            const ROUNDING: f64 = $rounding;
            fn from_f64(x: f64) -> Self {
                $from_f64(x)
            }
            fn to_f64(self) -> f64 {
                $to_f64(self)
            }
            fn norm_by_loop(grads: &[Vec<Self>]) -> f64 {
                let squares = grads.iter().flatten().map(|&x| $to(x) * $to(x));
                f64::from(squares.sum::<$arithmetic>().sqrt())
            }
            fn scale_by_loop(grads: &mut [Vec<Self>], coef: f64) {
                let coef = coef as $arithmetic;
                grads.iter_mut().flatten().for_each(|x| *x = $from($to(*x) * coef));
            }
            fn clamp_by_loop(grads: &mut [Vec<Self>], bound: f64) {
                let bound = <$type as Float>::from_f64(bound);
                grads.iter_mut().flatten().for_each(|x| *x = x.clamp(-bound, bound));
            }
        }
    };
}
float!(f32, "f32", 6e-8, f32, |x| x, |x| x, |x| x as f32, f64::from);
float!(f64, "f64", 1.2e-16, f64, |x| x, |x| x, |x| x, |x| x);
float!(f16, "f16", 4.9e-4, f32, f16::from_f32, f16::to_f32, f16::from_f64, f16::to_f64);
float!(bf16, "bf16", 3.9e-3, f32, bf16::from_f32, bf16::to_f32, bf16::from_f64, bf16::to_f64);

/// One element in this many is 1 or -1, the others are a hundredth of it.
const LARGE_EVERY: usize = 64;
/// After this many they come again: making all of 1 GiB would take longer than timing it.
const PERIOD: usize = 1 << 20;
/// So little that repeating it does not change the data.
const NEARLY_ONE: f64 = 1.0 - 1.0 / (1 << 20) as f64;

/// Reproducible, of both signs and unlike its neighbours.
fn element(index: usize) -> f64 {
    let mut state = index as u64 ^ 0x9e37_79b9_7f4a_7c15;
    let mut uniform = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 40) as f64 / (1u64 << 23) as f64 - 1.0
    };
    let small = uniform() + uniform();
    if index % LARGE_EVERY == LARGE_EVERY / 2 {
        small.signum()
    } else {
        small / 200.0
    }
}

/// The gradients, and what the calls keep between them.
pub struct List<T> {
    pub name: &'static str,
    pub grads: Vec<Vec<T>>,
    copy: Vec<Vec<T>>,
    /// What every gradient holds at first, over and over.
    pattern: Vec<T>,
    /// In float64, of what the gradients were at first.
    pub norm: f64,
    threshold: f64,
    bound: f64,
    /// Whether value clipping has taken something away.
    clamped: bool,
    #[cfg(feature = "candle")]
    tensors: Vec<candle_core::Tensor>,
}

impl<T: Float> List<T>
where
    Vec<T>: AsGradMut,
{
    /// Checks the answers of what is timed, too.
    pub fn new(shapes: &Shapes) -> Self {
        let zeros = |numel: &usize| vec![T::zeroed(); *numel];
        let grads = shapes.numels.iter().map(zeros).collect();
        let longest = shapes.numels.iter().max().copied().unwrap_or(0);
        let mut list = Self {
            name: shapes.name,
            grads,
            copy: shapes.numels.iter().map(zeros).collect(),
            pattern: (0..longest.min(PERIOD)).map(|i| T::from_f64(element(i))).collect(),
            norm: 0.0,
            threshold: 0.0,
            bound: 1.0,
            clamped: false,
            #[cfg(feature = "candle")]
            tensors: Vec::new(),
        };
        list.fill();
        list.norm = list.norm_in_f64();
        list.check_norm_clipping();
        list.fill();
        list.check_value_clipping();
        list.fill();
        #[cfg(feature = "candle")]
        list.make_tensors();
        list
    }

    /// What the gradients were at first.
    pub fn fill(&mut self) {
        self.grads.par_iter_mut().for_each(|grad| {
            grad.par_chunks_mut(PERIOD).for_each(|part| part.copy_from_slice(&self.pattern[..part.len()]));
        });
        self.threshold = self.norm;
        self.bound = 1.0;
        self.clamped = false;
    }

    /// Enough of it for any operation: a scale leaves next to everything.
    pub fn fill_if_clamped(&mut self) {
        if self.clamped {
            self.fill();
        }
    }

    pub fn numel(&self) -> usize {
        self.grads.iter().map(Vec::len).sum()
    }

    fn norm_in_f64(&self) -> f64 {
        let square = |x: &T| x.to_f64() * x.to_f64();
        self.grads.par_iter().flatten().map(square).sum::<f64>().sqrt()
    }

    fn check_norm_clipping(&mut self) {
        let expected = self.norm;
        let report = clip(&mut self.grads, 0.5 * expected, true);
        let off = (report.total_norm / expected - 1.0).abs();
        assert!(off < 1e-9_f64.max(T::ROUNDING * 1e-3), "{} is not {expected}", report.total_norm);
        self.compare(|x| x * report.clip_coef, 2.01 * T::ROUNDING);
    }

    fn check_value_clipping(&mut self) {
        let large = self.grads.iter().map(|grad| (grad.len() + LARGE_EVERY / 2 - 1) / LARGE_EVERY).sum::<usize>();
        let report = cpu::clip_grad_value(&mut self.grads, 0.5).unwrap();
        assert_eq!((report.clipped, report.nan), (large as u64, 0));
        self.compare(|x| x.clamp(-0.5, 0.5), 0.0);
    }

    fn compare(&self, expected: impl Fn(f64) -> f64 + Sync, tolerance: f64) {
        self.grads.par_iter().for_each(|grad| {
            grad.par_iter().enumerate().for_each(|(i, x)| {
                let expected = expected(self.pattern[i % PERIOD].to_f64());
                // Below f16's normal range the unit is 2^-24.
                assert!((x.to_f64() - expected).abs() <= tolerance * expected.abs().max(2f64.powi(-14)), "element {i}");
            });
        });
    }

    /// A little lower with every call, so that every call clips.
    fn next_threshold(&mut self) -> f64 {
        self.threshold *= NEARLY_ONE;
        self.threshold
    }

    /// The same for a bound: a step is more than bf16's rounding hides.
    fn next_bound(&mut self) -> f64 {
        if self.bound < 0.02 {
            self.fill();
        }
        self.bound *= 0.98;
        self.clamped = true;
        self.bound
    }
}

fn norm<T>(list: &List<T>, norm_type: NormType)
where
    Vec<T>: AsGradMut,
{
    black_box(cpu::total_norm(&list.grads, norm_type).unwrap());
}

fn clip<G: AsGradMut>(grads: &mut [G], max_norm: f64, written: bool) -> gradclip::NormReport {
    let report = cpu::clip_grad_norm(grads, max_norm).unwrap();
    assert_eq!(report.written, written);
    report
}

/// Within the threshold.
fn clip_by<G: AsGradMut>(grads: &mut [G], scope: &Scope<'_>) {
    assert_eq!(cpu::clip_grad_norm_by(grads, scope, f64::MAX).unwrap().num_written(), 0);
}

fn clip_value<G: AsGradMut>(grads: &mut [G], bound: f64, written: bool) {
    assert_eq!(cpu::clip_grad_value(grads, bound).unwrap().written, written);
}

/// One way to do an operation.
pub struct Case<T> {
    pub implementation: &'static str,
    pub run: fn(&mut List<T>),
    /// One core does all.
    pub slow: bool,
}

pub const READ: &str = "limit: plain read";
pub const UPDATE: &str = "limit: plain update in place";
pub const COPY: &str = "plain copy";

/// The ways to do `op`; the limits come first.
pub fn cases<T: Float>(op: Op) -> Vec<Case<T>>
where
    Vec<T>: AsGradMut,
{
    let fast = |implementation, run| Case { implementation, run, slow: false };
    let slow = |implementation, run| Case { implementation, run, slow: true };
    let (reads, updates) = op.passes();
    let mut cases = Vec::new();
    if reads > 0 {
        cases.push(fast(READ, |list: &mut List<T>| {
            black_box(limits::read(black_box(&list.grads)));
        }));
    }
    if updates > 0 {
        cases.push(fast(UPDATE, |list| limits::update(&mut list.grads, black_box(0))));
        cases.push(fast(COPY, |list| limits::copy(&list.grads, black_box(&mut list.copy))));
    }
    match op {
        Op::Norm => cases.extend([
            fast("gradclip", |list| norm(list, NormType::L2)),
            fast("gradclip L1", |list| norm(list, NormType::L1)),
            fast("gradclip Inf", |list| norm(list, NormType::Inf)),
            slow("gradclip P(3)", |list| norm(list, NormType::P(3.0))),
            slow("naive loop", |list| {
                black_box(T::norm_by_loop(&list.grads));
            }),
        ]),
        Op::ClipWithin => cases.extend([
            fast("gradclip", |list| {
                clip(&mut list.grads, f64::MAX, false);
            }),
            // What a norm for each tensor costs, and what telemetry costs besides.
            fast("gradclip global scope", |list| clip_by(&mut list.grads, &Scope::global())),
            fast("gradclip each tensor", |list| clip_by(&mut list.grads, &Scope::per_tensor())),
            fast("gradclip each tensor with telemetry", |list| {
                clip_by(&mut list.grads, &Scope::per_tensor().telemetry());
            }),
        ]),
        Op::Clip => cases.extend([
            fast("gradclip", |list| {
                let threshold = list.next_threshold();
                clip(&mut list.grads, threshold, true);
            }),
            slow("naive loop", |list| {
                list.next_threshold();
                black_box(T::norm_by_loop(&list.grads));
                T::scale_by_loop(&mut list.grads, black_box(NEARLY_ONE));
            }),
        ]),
        Op::ValueWithin => cases.extend([
            fast("gradclip", |list| clip_value(&mut list.grads, 2.0, false)),
            fast("gradclip each tensor", |list| {
                let report = cpu::clip_grad_value_by(&mut list.grads, &Scope::per_tensor(), 2.0).unwrap();
                assert_eq!((report.groups.len(), report.num_written()), (list.grads.len(), 0));
            }),
            slow("naive loop", |list| T::clamp_by_loop(&mut list.grads, black_box(2.0))),
        ]),
        Op::Value => cases.extend([
            fast("gradclip", |list| {
                let bound = list.next_bound();
                clip_value(&mut list.grads, bound, true);
            }),
            slow("naive loop", |list| {
                let bound = list.next_bound();
                T::clamp_by_loop(&mut list.grads, black_box(bound));
            }),
        ]),
    }
    #[cfg(feature = "candle")]
    cases.extend(candle_ops::case(op).map(|run| slow("candle operations", run)));
    cases
}

/// What candle's users write.
#[cfg(feature = "candle")]
mod candle_ops {
    use super::{Float, List, Op, NEARLY_ONE};
    use candle_core::{DType, Device, Result, Tensor};
    use std::hint::black_box;

    impl<T: Float> List<T> {
        pub fn make_tensors(&mut self) {
            self.tensors = self.grads.iter().map(|grad| tensor(grad).unwrap()).collect();
        }
    }

    fn tensor<T: Float>(grad: &[T]) -> Result<Tensor> {
        let dtype = match T::NAME {
            "f32" => DType::F32,
            "f64" => DType::F64,
            "f16" => DType::F16,
            _ => DType::BF16,
        };
        Tensor::from_raw_buffer(bytemuck::cast_slice(grad), dtype, &[grad.len()], &Device::Cpu)
    }

    fn norm(tensors: &[Tensor]) -> Result<f64> {
        let mut total = 0.0;
        for tensor in tensors {
            total += tensor.sqr()?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        }
        Ok(total.sqrt())
    }

    fn each(tensors: &mut [Tensor], op: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
        tensors.iter_mut().try_for_each(|tensor| op(tensor).map(|result| *tensor = result))
    }

    pub fn case<T: Float>(op: Op) -> Option<fn(&mut List<T>)> {
        match op {
            Op::Norm => Some(|list| {
                black_box(norm(&list.tensors).unwrap());
            }),
            Op::ClipWithin => None, // its users' `if norm > max_norm` reads no more than the norm does
            Op::Clip => Some(|list| {
                black_box(norm(&list.tensors).unwrap());
                each(&mut list.tensors, |tensor| tensor.affine(NEARLY_ONE, 0.0)).unwrap();
            }),
            Op::ValueWithin => Some(|list| each(&mut list.tensors, |tensor| tensor.clamp(-2.0, 2.0)).unwrap()),
            Op::Value => None, // the same
        }
    }
}
