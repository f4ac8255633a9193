//! What the memory gives: the kernels of `limits.cu`, each in the launch that is fastest for its list.

use super::arena::Arena;
use anyhow::Result;
use cudarc::driver::{CudaFunction, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;
use std::time::{Duration, Instant};

/// Of each block. `tests/double/bench_kernels.cpp` knows it too.
const THREADS: u32 = 256;
const PACK: usize = 16;

pub struct Limits {
    reads: Vec<Kernel>,
    updates: Vec<Kernel>,
}

struct Kernel {
    function: CudaFunction,
    in_flight: u32,
}

/// One kernel and its grid.
#[derive(Clone)]
pub struct Launch {
    function: CudaFunction,
    blocks: u32,
    /// A read's third parameter is where it leaves what it found, an update's is the 0 that it does not know.
    third: u64,
}

impl Limits {
    pub fn load(arena: &Arena) -> Result<Self> {
        let module = arena.stream.context().load_module(Ptx::from_src(include_str!("limits.ptx")))?;
        let kernel = |name: &str, in_flight: u32| -> Result<Kernel> {
            Ok(Kernel { function: module.load_function(&format!("{name}_{in_flight}"))?, in_flight })
        };
        Ok(Self {
            reads: vec![
                kernel("read_tiles", 4)?,
                kernel("read_tiles", 8)?,
                kernel("read_tiles", 16)?,
                kernel("read_strided", 8)?,
            ],
            updates: vec![kernel("update_tiles", 4)?, kernel("update_tiles", 8)?],
        })
    }

    /// Reads for that long. A GPU that was idle runs at a fraction of its clocks, and takes a while to raise them.
    pub fn warm_up(&self, arena: &Arena, time: Duration) -> Result<()> {
        const MOST: usize = 1 << 30;
        let (started, bytes) = (Instant::now(), arena.capacity().min(MOST));
        let Some(Kernel { function, .. }) = self.reads.first() else { return Ok(()) };
        let read =
            Launch { function: function.clone(), blocks: 8 * arena.multiprocessors, third: arena.flush_address() };
        while started.elapsed() < time {
            // Some 3 ms at 3 TB/s: the GPU does not wait for the host.
            for _ in 0..8 {
                read.run(arena, arena.address(), bytes)?;
            }
            arena.stream.synchronize()?;
        }
        Ok(())
    }

    /// The launches for a plain read and a plain update of `bytes` that took the least time of those tried.
    pub fn tune(&self, arena: &Arena, bytes: usize, tries: usize) -> Result<(Launch, Launch)> {
        Ok((
            fastest(&self.reads, arena.flush_address(), arena, bytes, tries)?,
            fastest(&self.updates, 0, arena, bytes, tries)?,
        ))
    }
}

fn fastest(kernels: &[Kernel], third: u64, arena: &Arena, bytes: usize, tries: usize) -> Result<Launch> {
    let packs = (bytes / PACK) as u64;
    let mut best: Option<(f32, Launch)> = None;
    let (start, end) = (arena.event()?, arena.event()?);
    for kernel in kernels {
        let one_trip = packs.div_ceil(u64::from(THREADS * kernel.in_flight));
        let enough = packs.div_ceil(u64::from(THREADS)).clamp(1, 1 << 30) as u32;
        let one_trip = one_trip.clamp(1, 1 << 30) as u32;
        let mut grids: Vec<u32> = [2, 4, 8].iter().map(|n| (n * arena.multiprocessors).min(enough)).collect();
        grids.push(one_trip);
        grids.dedup();
        for blocks in grids {
            let launch = Launch { function: kernel.function.clone(), blocks, third };
            let mut least = f32::INFINITY;
            for trial in 0..=tries {
                launch.run(arena, arena.address(), bytes)?; // also keeps the GPU busy while the next is enqueued
                start.record(&arena.stream)?;
                launch.run(arena, arena.address(), bytes)?;
                end.record(&arena.stream)?;
                let took = start.elapsed_ms(&end)?;
                if trial > 0 || tries == 0 {
                    least = least.min(took);
                }
            }
            if best.as_ref().is_none_or(|(fastest, _)| least < *fastest) {
                best = Some((least, launch));
            }
        }
    }
    best.map(|(_, launch)| launch).ok_or_else(|| anyhow::anyhow!("there is no kernel to try"))
}

impl Launch {
    /// Over `bytes` from `address`, a multiple of 16.
    pub fn run(&self, arena: &Arena, address: u64, bytes: usize) -> Result<()> {
        let config = LaunchConfig { grid_dim: (self.blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        let packs = (bytes / PACK) as u64;
        let mut launch = arena.stream.launch_builder(&self.function);
        launch.arg(&address).arg(&packs).arg(&self.third);
        // SAFETY: the parameters are those of the kernels in limits.cu, and callers give a range inside the arena.
        unsafe { launch.launch(config) }?;
        Ok(())
    }
}
