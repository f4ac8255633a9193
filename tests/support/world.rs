//! Ranks as threads, for the collective that a norm over several of them needs.
#![allow(dead_code)] // every test binary uses a part

use gradclip::{AllGather, NormPartial};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

pub struct World {
    size: usize,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    bytes: Vec<u8>,
    arrived: usize,
    gatherings: u64,
    /// A rank has panicked: the others are not to wait for it.
    lost: bool,
}

/// One rank's end of it.
#[derive(Clone, Copy)]
pub struct Rank<'w> {
    world: &'w World,
    pub rank: usize,
}

/// Runs `rank` for each of `size` ranks, on threads; what they gave, in rank order.
pub fn run<R: Send>(size: usize, rank: impl Fn(Rank<'_>) -> R + Sync) -> Vec<R> {
    let bytes = vec![0; size * NormPartial::BYTES];
    let state = Mutex::new(State { bytes, arrived: 0, gatherings: 0, lost: false });
    let world = World { size, state, changed: Condvar::new() };
    std::thread::scope(|scope| {
        let (world, run) = (&world, &rank);
        let spawn = |rank| {
            scope.spawn(move || {
                let _leaving = Leaving(world);
                run(Rank { world, rank })
            })
        };
        let threads: Vec<_> = (0..size).map(spawn).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank panicked")).collect()
    })
}

/// Tells the others if the rank panics.
struct Leaving<'w>(&'w World);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().lost = true;
            self.0.changed.notify_all();
        }
    }
}

impl World {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when all ranks have called it as often; the first to leave cannot come back before the last.
    fn meet(&self, mut state: MutexGuard<'_, State>) {
        let number = state.gatherings;
        state.arrived += 1;
        if state.arrived == self.size {
            (state.arrived, state.gatherings) = (0, number + 1);
            self.changed.notify_all();
        }
        let waiting = |state: &mut State| state.gatherings == number && !state.lost;
        let state = self.changed.wait_while(state, waiting).unwrap_or_else(PoisonError::into_inner);
        assert!(state.gatherings > number, "another rank panicked");
    }
}

impl Rank<'_> {
    pub fn size(&self) -> usize {
        self.world.size
    }

    /// Returns when all have called it.
    pub fn gather(&self, mine: &[u8], all: &mut [u8]) {
        let mut state = self.world.lock();
        state.bytes[self.rank * mine.len()..][..mine.len()].copy_from_slice(mine);
        self.world.meet(state);
        let state = self.world.lock();
        all.copy_from_slice(&state.bytes);
        self.world.meet(state);
    }
}

impl AllGather for Rank<'_> {
    type Error = std::convert::Infallible;

    fn world_size(&self) -> usize {
        self.size()
    }

    fn all_gather(&mut self, mine: &[u8], all: &mut [u8]) -> Result<(), Self::Error> {
        self.gather(mine, all);
        Ok(())
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
            Ok(())
        }
    }
}
