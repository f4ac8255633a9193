//! Tests of the candle adapter on gradients of a backward pass, for which candle needs kernels of its own. What each
//! checks does not depend on the device, so that they can run on the CPU where there is no GPU.
#![allow(missing_docs)]

use crate::candle_suite::{store, values};
use crate::on_candle;
use crate::step_share::{self, Borders, StepTime};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var, D};
use gradclip::candle::{clip_grad_norm, clip_grad_value, norms_by, total_norm};
use gradclip::{NormType, Scope};
use std::time::Duration;

const TOKENS: usize = 13;
const LENGTH: usize = 40;
const WIDTH: usize = 24;

/// An embedding, a layer, self-attention over the sequence, a head.
struct Model {
    vars: [Var; 4],
    tokens: Tensor,
    targets: Tensor,
}

impl Model {
    fn new(dtype: DType, device: &Device) -> Self {
        let mut state = 1u32;
        let mut weights = |rows: usize, columns: usize| {
            let values: Vec<f32> = (0..rows * columns)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as f32 / 8_388_608.0 - 1.0 // in [-1, 1)
                })
                .collect();
            let values = Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap();
            Var::from_tensor(&values.to_dtype(dtype).unwrap().to_device(device).unwrap()).unwrap()
        };
        let vars = [weights(TOKENS, WIDTH), weights(WIDTH, WIDTH), weights(1, WIDTH), weights(WIDTH, TOKENS)];
        let text: Vec<u32> = (0..=LENGTH as u32).map(|i| i * i % TOKENS as u32).collect();
        Self {
            vars,
            tokens: Tensor::new(&text[..LENGTH], device).unwrap(),
            targets: Tensor::new(&text[1..], device).unwrap(),
        }
    }

    /// Mean cross-entropy of the next token.
    fn loss(&self) -> Result<Tensor> {
        let [embedding, layer, bias, head] = &self.vars;
        let x = embedding.index_select(&self.tokens, 0)?;
        let x = x.matmul(layer)?.broadcast_add(bias)?.tanh()?;
        let scores = (x.matmul(&x.t()?)? * 0.2)?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        let logits = (&x + weights.matmul(&x)?)?.matmul(head)?;
        let right = logits.gather(&self.targets.unsqueeze(1)?, 1)?.squeeze(1)?;
        (logits.log_sum_exp(1)? - right)?.mean_all()
    }

    fn backward(&self) -> GradStore {
        self.loss().unwrap().backward().unwrap()
    }
}

/// The same gradients in the memory of the CPU.
fn on_cpu(vars: &[Var], grads: &GradStore) -> GradStore {
    let copies: Vec<Tensor> =
        vars.iter().map(|var| grads.get(var).unwrap().copy().unwrap().to_device(&Device::Cpu).unwrap()).collect();
    store(vars, &copies)
}

fn assert_same(vars: &[Var], grads: &GradStore, expected: &GradStore, what: &str) {
    for (index, var) in vars.iter().enumerate() {
        let bits = |store| values(store, var).into_iter().map(f64::to_bits).collect::<Vec<_>>();
        assert!(bits(grads) == bits(expected), "{what}: variable {index} has other bits than by the CPU path");
    }
}

/// Clips the gradients on their device, and copies of them by the CPU path: the same report, the same bits.
fn clip_both(vars: &[Var], grads: &mut GradStore, max_norm: f64, what: &str) -> GradStore {
    let mut expected = on_cpu(vars, grads);
    let clipped = clip_grad_norm(vars, grads, max_norm).unwrap();
    let report = clip_grad_norm(vars, &mut expected, max_norm).unwrap().wait().unwrap();
    assert_eq!(clipped.wait().unwrap(), report, "{what}");
    assert_same(vars, grads, &expected, what);
    expected
}

pub fn a_backward_pass_in_every_dtype(device: &Device) {
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        let (model, what) = (Model::new(dtype, device), format!("{dtype:?}"));
        let (vars, mut grads) = (&model.vars, model.backward());
        for scope in [Scope::per_tensor().telemetry(), Scope::leading_dimension()] {
            let measured = norms_by(vars, &grads, &scope, NormType::L2).unwrap().wait().unwrap();
            let expected = norms_by(vars, &on_cpu(vars, &grads), &scope, NormType::L2).unwrap().wait().unwrap();
            assert_eq!(format!("{measured:?}"), format!("{expected:?}"), "{what}");
            assert!(measured.groups.iter().any(|group| group.total_norm > 0.0), "{what}: {measured:?}");
        }
        let norm = total_norm(vars, &grads, NormType::L2).unwrap().wait().unwrap().total_norm;
        assert!(norm.is_finite() && norm > 0.0, "{what}: {norm}");
        clip_both(vars, &mut grads, 2.0 * norm, &what);
        clip_both(vars, &mut grads, 0.3 * norm, &what);
        let mut expected = on_cpu(vars, &grads);
        let clamped = clip_grad_value(vars, &mut grads, 0.01 * norm).unwrap().wait().unwrap();
        assert_eq!(clamped, clip_grad_value(vars, &mut expected, 0.01 * norm).unwrap().wait().unwrap(), "{what}");
        assert!(clamped.written, "{what}: nothing was outside");
        assert_same(vars, &grads, &expected, &what);
    }
}

/// Twenty steps of SGD: what the clip wrote is what candle's next operations read, without a wait in between.
pub fn training_goes_on_with_the_clipped_gradients(device: &Device) {
    const LR: f64 = 0.1;
    let model = Model::new(DType::F32, device);
    let first = model.loss().unwrap().to_scalar::<f32>().unwrap();
    for step in 0..20 {
        let mut grads = model.backward();
        let mut expected = on_cpu(&model.vars, &grads);
        let before = model.vars.each_ref().map(|var| var.copy().unwrap().to_device(&Device::Cpu).unwrap());
        let clipped = clip_grad_norm(&model.vars, &mut grads, 0.5).unwrap();
        let update = |weight: &Tensor, grad: &Tensor| (weight - (grad * LR)?)?.copy();
        for var in &model.vars {
            var.set(&update(var.as_tensor(), grads.get(var).unwrap()).unwrap()).unwrap();
        }
        let report = clip_grad_norm(&model.vars, &mut expected, 0.5).unwrap().wait().unwrap();
        assert_eq!(clipped.wait().unwrap(), report, "step {step}");
        for (var, before) in model.vars.iter().zip(&before) {
            let expected = update(before, expected.get(var).unwrap()).unwrap();
            let bits = |tensor: &Tensor| -> Vec<u32> {
                let tensor = tensor.to_device(&Device::Cpu).unwrap().flatten_all().unwrap();
                tensor.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
            };
            assert!(bits(var.as_tensor()) == bits(&expected), "step {step}: other weights than by the CPU path");
        }
    }
    let last = model.loss().unwrap().to_scalar::<f32>().unwrap();
    assert!(last < 0.8 * first, "the loss went from {first} to {last}");
}

/// Transposed, and every second column: candle's kernel makes a contiguous copy, which takes their place in the store.
pub fn strided_gradients(device: &Device) {
    let vars = [0, 1, 2].map(|_| crate::candle_suite::var());
    let noise: Vec<f32> = (0..300u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 * 1e-7 - 0.8).collect();
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        let base = crate::candle_suite::tensor(&noise, dtype, device).reshape((15, 20)).unwrap();
        let strided = [
            base.t().unwrap(),
            base.narrow(1, 3, 7).unwrap(),
            base.reshape((15, 10, 2)).unwrap().narrow(2, 1, 1).unwrap().squeeze(2).unwrap(),
        ];
        let before = base.copy().unwrap();
        let mut grads = store(&vars, &strided);
        assert!(vars.iter().all(|var| !grads.get(var).unwrap().is_contiguous()));
        clip_both(&vars, &mut grads, 1.0, &format!("{dtype:?}"));
        for (var, strided) in vars.iter().zip(&strided) {
            let grad = grads.get(var).unwrap();
            assert!(grad.is_contiguous());
            assert_eq!(grad.dims(), strided.dims());
        }
        let list = |tensor: &Tensor| -> Vec<f64> {
            let tensor = tensor.to_device(&Device::Cpu).unwrap().flatten_all().unwrap();
            tensor.to_dtype(DType::F64).unwrap().to_vec1().unwrap()
        };
        assert_eq!(list(&base), list(&before), "the tensor behind the views is not touched");
    }
}

/// The clip that the examples compare with. Its norm is a sum of n squares in f32, in an order that is candle's affair,
/// so it is off by at most n units of 2^-24, half of which reach the norm; coefficient and product add a unit each on
/// either side, and its formula adds 1e-6 to the norm.
pub fn candle_s_own_operations_agree(device: &Device) {
    let model = Model::new(DType::F32, device);
    let (mut ours, mut theirs) = (model.backward(), model.backward());
    let report = total_norm(&model.vars, &ours, NormType::L2).unwrap().wait().unwrap();
    let max_norm = 0.25 * report.total_norm;
    let norm = on_candle::clip_grad_norm(&model.vars, &mut theirs, max_norm).unwrap();
    let _ = clip_grad_norm(&model.vars, &mut ours, max_norm).unwrap();
    let longest = model.vars.iter().map(|var| var.elem_count()).max().unwrap() as f64;
    let unit = 2f64.powi(-24);
    let of_norm = (longest / 2.0 + 2.0) * unit;
    assert!((norm / report.total_norm - 1.0).abs() <= of_norm, "{norm} and {}", report.total_norm);
    let tolerance = of_norm + 4.0 * unit + 1e-6 / report.total_norm;
    for var in &model.vars {
        for (a, b) in values(&ours, var).into_iter().zip(values(&theirs, var)) {
            assert!((a - b).abs() <= tolerance * a.abs(), "{a} and {b}");
        }
    }
    let within = on_candle::clip_grad_norm(&model.vars, &mut ours, 2.0 * max_norm).unwrap();
    assert!((within / max_norm - 1.0).abs() <= of_norm + 2.0 * unit, "clipped to {within}, not {max_norm}");
}

/// How the examples measure: the parts of a step are positive, and the clip is no longer than the step.
pub fn the_parts_of_a_step(device: &Device) {
    let (model, timeline) = (Model::new(DType::F32, device), on_candle::timeline(device));
    let mut steps = Vec::new();
    for _ in 0..3 {
        let start = timeline.mark().unwrap();
        let mut grads = model.backward();
        let (backward, clip) = (timeline.mark().unwrap(), timeline.mark().unwrap());
        let _ = clip_grad_norm(&model.vars, &mut grads, 0.5).unwrap();
        let clipped = timeline.mark().unwrap();
        let borders = Borders { start, backward, clip, clipped, end: timeline.mark().unwrap() };
        let time = borders.times().unwrap();
        assert!(Duration::ZERO < time.clip && time.clip < time.step, "{:?} of {:?}", time.clip, time.step);
        steps.push(time);
    }
    let us = Duration::from_micros;
    let tenths = [(1, 50), (1, 10), (10, 20)].map(|(clip, step)| StepTime { clip: us(clip), step: us(step) });
    let lines = step_share::lines(&timeline, [("a", &tenths), ("b", &steps)]);
    assert!(lines.starts_with("clipping: 10.0 % of a step (a), "), "{lines}");
    assert!(lines.contains(": 1.0 us of 20 us (3 steps) and "), "{lines}");
}
