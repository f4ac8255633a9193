//! Least squares by gradient descent: the batches, and the kernels that two examples share.

use anyhow::{anyhow, Result};
use cudarc::driver::{CudaFunction, CudaSlice, CudaStream, DriverError, LaunchConfig, PushKernelArg};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::sync::Arc;

pub const BATCH: usize = 64;
pub const FEATURES: usize = 32;
pub const LINEAR_PTX: &str = include_str!("linear.ptx");

/// The driver's error as text (`DriverError`'s own asks the driver for it).
pub fn driver(error: DriverError) -> anyhow::Error {
    anyhow!("CUDA error {:?}", error.0)
}

/// Enough threads for `count`, in blocks of 32.
pub fn threads(count: usize) -> LaunchConfig {
    LaunchConfig { grid_dim: (count.div_ceil(32) as u32, 1, 1), block_dim: (32, 1, 1), shared_mem_bytes: 0 }
}

pub fn launch_forward(
    stream: &Arc<CudaStream>,
    forward: &CudaFunction,
    [x, y, weights]: [&CudaSlice<f32>; 3],
    residual: &mut CudaSlice<f32>,
) -> Result<()> {
    let (n, d) = (BATCH as i32, FEATURES as i32);
    let mut launch = stream.launch_builder(forward);
    launch.arg(x).arg(y).arg(weights).arg(residual).arg(&n).arg(&d);
    // SAFETY: the arguments are those of `forward` in linear.cu, and the slices have the sizes that n and d say.
    unsafe { launch.launch(threads(BATCH)) }.map(drop).map_err(driver)
}

pub fn launch_backward(
    stream: &Arc<CudaStream>,
    backward: &CudaFunction,
    [x, residual]: [&CudaSlice<f32>; 2],
    grad: &mut CudaSlice<f32>,
) -> Result<()> {
    let (n, d) = (BATCH as i32, FEATURES as i32);
    let mut launch = stream.launch_builder(backward);
    launch.arg(x).arg(residual).arg(grad).arg(&n).arg(&d);
    // SAFETY: as above, for `backward`.
    unsafe { launch.launch(threads(FEATURES)) }.map(drop).map_err(driver)
}

/// Batches of y = x w + noise. One in ten has a label that is off by thousands: what gradient clipping is for.
pub struct Batches {
    rng: SmallRng,
    pub truth: Vec<f32>,
}

impl Batches {
    pub fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let truth = (0..FEATURES).map(|_| rng.random_range(-1.0..1.0)).collect();
        Self { rng, truth }
    }

    pub fn next(&mut self) -> (Vec<f32>, Vec<f32>) {
        let x: Vec<f32> = (0..BATCH * FEATURES).map(|_| self.rng.random_range(-1.0..1.0)).collect();
        let label = |row: &[f32]| row.iter().zip(&self.truth).map(|(x, w)| x * w).sum::<f32>();
        let mut y: Vec<f32> = x.chunks(FEATURES).map(label).collect();
        y.iter_mut().for_each(|y| *y += self.rng.random_range(-0.1..0.1));
        if self.rng.random_range(0..10) == 0 {
            y[0] += 5000.0;
        }
        (x, y)
    }
}
