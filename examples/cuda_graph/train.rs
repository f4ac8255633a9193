//! The training step as a CUDA graph, and the schedule of its threshold.

use super::linear::{driver, launch_backward, launch_forward, threads, Batches, BATCH, FEATURES, LINEAR_PTX};
use anyhow::{Context, Result};
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaFunction, CudaGraph, CudaSlice, CudaStream, DevicePtr, PushKernelArg};
use cudarc::nvrtc::Ptx;
use gradclip::cuda::{Clipper, Pending};
use gradclip::{ClipNorm, NormReport};
use std::sync::Arc;

const LEARNING_RATE: f32 = 0.05;

/// What one step left behind.
pub struct Step {
    pub max_norm: f64,
    pub report: NormReport,
}

/// Device memory, and the graph of forward, backward, clip and update.
pub struct Trainer {
    stream: Arc<CudaStream>,
    x: CudaSlice<f32>,
    y: CudaSlice<f32>,
    weights: CudaSlice<f32>,
    max_norm: CudaSlice<f64>,
    graph: CudaGraph,
    /// Of the captured clip: after each replay, its report.
    clipped: Pending<NormReport>,
    // The graph works in these.
    _residual: CudaSlice<f32>,
    _grad: CudaSlice<f32>,
    _clipper: Clipper,
}

impl Trainer {
    pub fn new(context: &Arc<CudaContext>) -> Result<Self> {
        // SAFETY: all work of this program goes to one stream. A capture must not wait for an event from before it, and
        // cudarc's tracking would record such events.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(driver)?; // the default stream cannot be captured
        let module = context.load_module(Ptx::from_src(LINEAR_PTX)).map_err(driver)?;
        let kernel = |name: &str| module.load_function(name).map_err(driver);
        let (forward, backward, step) = (kernel("forward")?, kernel("backward")?, kernel("step")?);

        let zeros = |numel| stream.alloc_zeros::<f32>(numel).map_err(driver);
        let (x, y) = (zeros(BATCH * FEATURES)?, zeros(BATCH)?);
        let (mut weights, mut residual, mut grad) = (zeros(FEATURES)?, zeros(BATCH)?, zeros(FEATURES)?);
        let max_norm = stream.clone_htod(&[f64::INFINITY]).map_err(driver)?;
        // SAFETY: the graph, which reads it, goes before `max_norm` does: both are fields of the trainer.
        let clip = unsafe { ClipNorm::max_norm_at(max_norm.device_ptr(&stream).0) };

        let mut clipper = Clipper::new(&stream)?;
        clipper.clip_grad_norm(&mut [&mut grad], clip)?; // once, so that its workspace is there

        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).map_err(driver)?;
        let captured = (|| {
            launch_forward(&stream, &forward, [&x, &y, &weights], &mut residual)?;
            launch_backward(&stream, &backward, [&x, &residual], &mut grad)?;
            let clipped = clipper.clip_grad_norm(&mut [&mut grad], clip)?;
            launch_step(&stream, &step, &mut weights, &grad)?;
            anyhow::Ok(clipped)
        })();
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags).map_err(driver)?.context("nothing was captured")?;
        Ok(Self {
            stream,
            x,
            y,
            weights,
            max_norm,
            graph,
            clipped: captured?,
            _residual: residual,
            _grad: grad,
            _clipper: clipper,
        })
    }

    /// One replay, on another batch and by another threshold.
    pub fn step(&mut self, x: &[f32], y: &[f32], max_norm: f64) -> Result<Step> {
        self.stream.memcpy_htod(x, &mut self.x).map_err(driver)?;
        self.stream.memcpy_htod(y, &mut self.y).map_err(driver)?;
        self.stream.memcpy_htod(&[max_norm], &mut self.max_norm).map_err(driver)?;
        self.graph.launch().map_err(driver)?;
        Ok(Step { max_norm, report: self.clipped.wait()? })
    }

    pub fn weights(&self) -> Result<Vec<f32>> {
        self.stream.clone_dtoh(&self.weights).map_err(driver)
    }
}

fn launch_step(
    stream: &Arc<CudaStream>,
    step: &CudaFunction,
    weights: &mut CudaSlice<f32>,
    grad: &CudaSlice<f32>,
) -> Result<()> {
    let d = FEATURES as i32;
    let mut launch = stream.launch_builder(step);
    launch.arg(weights).arg(grad).arg(&LEARNING_RATE).arg(&d);
    // SAFETY: the arguments are those of `step` in linear.cu, and the slices have d elements.
    unsafe { launch.launch(threads(FEATURES)) }.map(drop).map_err(driver)
}

/// AutoClip (Seetharaman, Wichern, Pardo and Le Roux, 2020): the threshold is a percentile of all norms so far.
#[derive(Default)]
pub struct AutoClip {
    norms: Vec<f64>,
}

impl AutoClip {
    const PERCENTILE: usize = 10;

    /// Infinity, which only measures, before there is any norm.
    pub fn max_norm(&self) -> f64 {
        let mut sorted = self.norms.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() * Self::PERCENTILE / 100).copied().unwrap_or(f64::INFINITY)
    }

    pub fn observe(&mut self, total_norm: f64) {
        self.norms.push(total_norm);
    }
}

/// Trains, and gives each step and how far the weights end from the truth.
pub fn train(context: &Arc<CudaContext>, seed: u64, steps: usize, clipped: bool) -> Result<(Vec<Step>, f64)> {
    let (mut trainer, mut batches) = (Trainer::new(context)?, Batches::new(seed));
    let mut schedule = AutoClip::default();
    let mut log = Vec::with_capacity(steps);
    for _ in 0..steps {
        let (x, y) = batches.next();
        let max_norm = if clipped { schedule.max_norm() } else { f64::INFINITY };
        let step = trainer.step(&x, &y, max_norm)?;
        schedule.observe(step.report.total_norm);
        log.push(step);
    }
    let off = trainer.weights()?.iter().zip(&batches.truth).map(|(w, t)| f64::from(w - t).powi(2)).sum::<f64>();
    Ok((log, off.sqrt()))
}
