//! Ranks as threads, for the collective that a norm over several of them needs.
#![allow(dead_code)] // every test binary uses a part

use gradclip::{AllGather, NormPartial};
use std::sync::{Barrier, Mutex};

pub struct World {
    size: usize,
    bytes: Mutex<Vec<u8>>,
    barrier: Barrier,
}

/// One rank's end of it.
#[derive(Clone, Copy)]
pub struct Rank<'w> {
    world: &'w World,
    pub rank: usize,
    /// Fails after the exchange, as a connection that breaks does.
    pub broken: bool,
}

/// Runs `rank` for each of `size` ranks, on threads; what they gave, in rank order.
pub fn run<R: Send>(size: usize, rank: impl Fn(Rank<'_>) -> R + Sync) -> Vec<R> {
    let world = World { size, bytes: Mutex::new(vec![0; size * NormPartial::BYTES]), barrier: Barrier::new(size) };
    std::thread::scope(|scope| {
        let (world, run) = (&world, &rank);
        let spawn = |rank| scope.spawn(move || run(Rank { world, rank, broken: false }));
        let threads: Vec<_> = (0..size).map(spawn).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank panicked")).collect()
    })
}

impl Rank<'_> {
    pub fn size(&self) -> usize {
        self.world.size
    }

    /// Returns when all have called it.
    pub fn gather(&self, mine: &[u8], all: &mut [u8]) {
        self.world.bytes.lock().expect("no rank panicked")[self.rank * mine.len()..][..mine.len()]
            .copy_from_slice(mine);
        self.world.barrier.wait();
        all.copy_from_slice(&self.world.bytes.lock().expect("no rank panicked"));
        self.world.barrier.wait();
    }
}

impl AllGather for Rank<'_> {
    type Error = &'static str;

    fn world_size(&self) -> usize {
        self.size()
    }

    fn all_gather(&mut self, mine: &[u8], all: &mut [u8]) -> Result<(), Self::Error> {
        self.gather(mine, all);
        if self.broken {
            Err("the connection broke")
        } else {
            Ok(())
        }
    }
}

/// On a device by way of the host: waits, which no engine that is in earnest does.
#[cfg(feature = "cuda")]
mod on_device {
    use super::Rank;
    use cudarc::driver::{result, CudaStream};
    use gradclip::cuda::DeviceAllGather;
    use std::sync::Arc;

    // SAFETY: the copies are made when it returns, of exactly these bytes.
    unsafe impl DeviceAllGather for Rank<'_> {
        type Error = &'static str;

        fn world_size(&self) -> usize {
            self.size()
        }

        unsafe fn all_gather(
            &self,
            stream: &Arc<CudaStream>,
            mine: u64,
            all: u64,
            bytes: usize,
        ) -> Result<(), Self::Error> {
            let (mut host, mut gathered) = (vec![0u8; bytes], vec![0u8; bytes * self.size()]);
            // SAFETY: the address is that of `bytes` bytes, which the work on the stream has written once it is waited
            // for.
            unsafe { result::memcpy_dtoh_async(&mut host, mine, stream.cu_stream()) }.map_err(|_| "the copy failed")?;
            stream.synchronize().map_err(|_| "the wait failed")?;
            self.gather(&host, &mut gathered);
            // SAFETY: there is room for all, and the source lives until the wait is over.
            unsafe { result::memcpy_htod_async(all, &gathered, stream.cu_stream()) }.map_err(|_| "the copy failed")?;
            stream.synchronize().map_err(|_| "the wait failed")?;
            if self.broken {
                return Err("the connection broke");
            }
            Ok(())
        }
    }
}
