//! Working under candle's locks without waiting for each other in a circle.

use super::grads::GradList;
use crate::cpu::SERIAL_BYTES;
use candle_core::{Storage, StorageRef};
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::collections::BTreeMap;
use std::sync::OnceLock;

/// The read locks of all storages of a list.
///
/// Each storage is locked once: a second lock would wait behind a writer that waits for the first. And in the order of
/// their addresses, so that no two lists wait for each other.
pub(super) struct ReadLocks<'a>(BTreeMap<usize, StorageRef<'a>>);

impl<'a> ReadLocks<'a> {
    pub(super) fn of(list: &'a GradList) -> Self {
        let by_storage: BTreeMap<usize, &candle_core::Tensor> =
            list.storages().iter().copied().zip(list.tensors()).collect();
        Self(by_storage.into_iter().map(|(storage, tensor)| (storage, tensor.storage_and_layout().0)).collect())
    }

    pub(super) fn get(&self, storage: usize) -> Option<&Storage> {
        self.0.get(&storage).map(|guard| &**guard)
    }
}

/// Runs `work`, which is on that many bytes, in a pool of its own if it takes more than this thread. A thread that waits for rayon takes up other jobs of its pool meanwhile; one of the
/// caller's might want the lock that this thread holds, and all workers of the caller's pool might be waiting for it.
pub(super) fn in_own_pool<R: Send>(bytes: usize, work: impl FnOnce() -> R + Send) -> R {
    if bytes <= SERIAL_BYTES {
        return work();
    }
    static POOL: OnceLock<Option<ThreadPool>> = OnceLock::new();
    let pool = POOL.get_or_init(|| {
        let name = |index| format!("gradclip-candle-{index}");
        let threads = rayon::current_num_threads();
        ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build().ok()
    });
    let Some(pool) = pool else { return work() }; // no threads to be had
    if rayon::current_thread_index().is_none() {
        return pool.install(work);
    }
    // A worker of a pool would take up jobs here too; a thread that joins another does not.
    std::thread::scope(|scope| match scope.spawn(|| pool.install(work)).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
