//! The training, by either way from the gradient to the step.

use super::linear::{driver, launch_backward, launch_forward, threads, Batches, BATCH, FEATURES, LINEAR_PTX};
use anyhow::Result;
use cudarc::driver::{CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, PushKernelArg};
use cudarc::nvrtc::Ptx;
use gradclip::cuda::{Clipper, Pending};
use gradclip::{ClipNorm, NormReport};
use std::sync::Arc;

const MAX_NORM: f64 = 1.0;
const LEARNING_RATE: f32 = 0.02;
const WEIGHT_DECAY: f32 = 1e-4;
const BETAS: [f32; 2] = [0.9, 0.99];
const FIRST_LOSS_SCALE: f32 = 65536.0;
/// Good steps after which the loss scale is doubled.
const GROWTH_INTERVAL: i32 = 25;
/// Fits f32, but not with the loss scale.
const CORRUPT_LABEL: f32 = 1e38;
const CORRUPT_EVERY: usize = 40;

/// From the gradient to the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// `clip_grad_norm` writes the gradients, and the step reads them.
    ClipThenStep,
    /// `clip_coef` leaves the multiplier on the device, and the step multiplies.
    HandOff,
}

/// Bytes of f32 gradients that are read and written in a step, when the loss scale has to be removed (so that there is
/// something to write in every step): one read for the norm, one of the step; one read and one write between them.
pub fn gradient_bytes(parameters: u64, way: Way) -> u64 {
    let passes = match way {
        Way::ClipThenStep => 4,
        Way::HandOff => 2,
    };
    passes * size_of::<f32>() as u64 * parameters
}

/// The same with what the step does besides: weights and two moments, read and written.
pub fn step_bytes(parameters: u64, way: Way) -> u64 {
    gradient_bytes(parameters, way) + 6 * size_of::<f32>() as u64 * parameters
}

/// What came of it.
pub struct End {
    pub weights: Vec<f32>,
    /// Distance from the weights that made the data.
    pub off: f64,
    pub loss_scale: f32,
    pub steps_left_out: usize,
    /// Of each step. The tests look at them.
    #[allow(dead_code)]
    pub reports: Vec<NormReport>,
}

/// As in fused_adamw.cu.
const LOSS_SCALE: usize = 0;
const FIRST_STATE: [f32; 4] = [FIRST_LOSS_SCALE, 0.0, 1.0, 1.0];

struct Trainer {
    stream: Arc<CudaStream>,
    clipper: Clipper,
    way: Way,
    forward: CudaFunction,
    backward: CudaFunction,
    scale_residual: CudaFunction,
    begin_step: CudaFunction,
    adamw_step: CudaFunction,
    x: CudaSlice<f32>,
    y: CudaSlice<f32>,
    weights: CudaSlice<f32>,
    moments: [CudaSlice<f32>; 2],
    residual: CudaSlice<f32>,
    grad: CudaSlice<f32>,
    state: CudaSlice<f32>,
    /// What a gradient that is clipped already is multiplied by.
    one: CudaSlice<f64>,
}

impl Trainer {
    fn new(context: &Arc<CudaContext>, way: Way) -> Result<Self> {
        let stream = context.default_stream();
        let linear = context.load_module(Ptx::from_src(LINEAR_PTX)).map_err(driver)?;
        let adamw = context.load_module(Ptx::from_src(include_str!("fused_adamw.ptx"))).map_err(driver)?;
        let zeros = |numel| stream.alloc_zeros::<f32>(numel).map_err(driver);
        Ok(Self {
            clipper: Clipper::new(&stream)?,
            way,
            forward: linear.load_function("forward").map_err(driver)?,
            backward: linear.load_function("backward").map_err(driver)?,
            scale_residual: adamw.load_function("scale_residual").map_err(driver)?,
            begin_step: adamw.load_function("begin_step").map_err(driver)?,
            adamw_step: adamw.load_function("adamw_step").map_err(driver)?,
            x: zeros(BATCH * FEATURES)?,
            y: zeros(BATCH)?,
            weights: zeros(FEATURES)?,
            moments: [zeros(FEATURES)?, zeros(FEATURES)?],
            residual: zeros(BATCH)?,
            grad: zeros(FEATURES)?,
            state: stream.clone_htod(&FIRST_STATE).map_err(driver)?,
            one: stream.clone_htod(&[1.0]).map_err(driver)?,
            stream,
        })
    }

    /// Enqueues a step.
    fn step(&mut self, x: &[f32], y: &[f32]) -> Result<Pending<NormReport>> {
        self.stream.memcpy_htod(x, &mut self.x).map_err(driver)?;
        self.stream.memcpy_htod(y, &mut self.y).map_err(driver)?;
        launch_forward(&self.stream, &self.forward, [&self.x, &self.y, &self.weights], &mut self.residual)?;
        self.launch_scale_residual()?;
        launch_backward(&self.stream, &self.backward, [&self.x, &self.residual], &mut self.grad)?;

        let loss_scale = self.state.device_ptr(&self.stream).0 + (LOSS_SCALE * size_of::<f32>()) as u64;
        // SAFETY: the state lives as long as the trainer, and only kernels on this stream write it.
        let clip = unsafe { ClipNorm::new(MAX_NORM).loss_scale_at(loss_scale) };
        let (clipped, multiplier) = match self.way {
            Way::ClipThenStep => {
                let clipped = self.clipper.clip_grad_norm(&mut [&mut self.grad], clip)?;
                (clipped, self.one.device_ptr(&self.stream).0)
            }
            Way::HandOff => {
                let clipped = self.clipper.clip_coef(&[&self.grad], clip)?;
                let multiplier = clipped.multiplier_address();
                (clipped, multiplier)
            }
        };
        self.launch_begin_step(clipped.found_inf_address())?;
        self.launch_adamw_step(multiplier, clipped.found_inf_address())?;
        Ok(clipped)
    }

    fn launch_scale_residual(&mut self) -> Result<()> {
        let n = BATCH as i32;
        let mut launch = self.stream.launch_builder(&self.scale_residual);
        launch.arg(&mut self.residual).arg(&self.state).arg(&n); // the loss scale is the first of the state
                                                                 // SAFETY: the arguments are those of `scale_residual` in fused_adamw.cu, and the residual has n elements.
        unsafe { launch.launch(threads(BATCH)) }.map(drop).map_err(driver)
    }

    fn launch_begin_step(&mut self, found_inf: u64) -> Result<()> {
        let [beta1, beta2] = BETAS;
        let mut launch = self.stream.launch_builder(&self.begin_step);
        launch.arg(&mut self.state).arg(&found_inf).arg(&beta1).arg(&beta2).arg(&GROWTH_INTERVAL);
        // SAFETY: as above, for `begin_step`; found_inf is that of a report on this stream, and the clipper is alive.
        unsafe { launch.launch(threads(1)) }.map(drop).map_err(driver)
    }

    fn launch_adamw_step(&mut self, multiplier: u64, found_inf: u64) -> Result<()> {
        let ([beta1, beta2], d) = (BETAS, FEATURES as i32);
        let [mean, square] = &mut self.moments;
        let mut launch = self.stream.launch_builder(&self.adamw_step);
        launch.arg(&mut self.weights).arg(mean).arg(square).arg(&self.grad).arg(&multiplier).arg(&found_inf);
        launch.arg(&self.state).arg(&LEARNING_RATE).arg(&beta1).arg(&beta2).arg(&WEIGHT_DECAY).arg(&d);
        // SAFETY: as above, for `adamw_step`; the slices have d elements, and the multiplier is an f64 of that report, or
        // `one`.
        unsafe { launch.launch(threads(FEATURES)) }.map(drop).map_err(driver)
    }
}

/// Trains. Waits at the end, and as often as the clipper would forget reports: every 256 steps.
pub fn train(context: &Arc<CudaContext>, seed: u64, steps: usize, way: Way) -> Result<End> {
    let (mut trainer, mut batches) = (Trainer::new(context, way)?, Batches::new(seed));
    let (mut pending, mut reports) = (Vec::new(), Vec::with_capacity(steps));
    for step in 1..=steps {
        let (x, mut y) = batches.next();
        if step % CORRUPT_EVERY == 0 {
            y[1] = CORRUPT_LABEL;
        }
        pending.push(trainer.step(&x, &y)?);
        if pending.len() == gradclip::REPORTS_KEPT || step == steps {
            reports.extend(pending.drain(..).map(|report| report.wait()).collect::<gradclip::Result<Vec<_>>>()?);
        }
    }
    let weights = trainer.stream.clone_dtoh(&trainer.weights).map_err(driver)?;
    let state = trainer.stream.clone_dtoh(&trainer.state).map_err(driver)?;
    let off = weights.iter().zip(&batches.truth).map(|(w, t)| f64::from(w - t).powi(2)).sum::<f64>().sqrt();
    let steps_left_out = reports.iter().filter(|report| report.found_inf).count();
    Ok(End { weights, off, loss_scale: state[LOSS_SCALE], steps_left_out, reports })
}
