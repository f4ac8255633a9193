//! NCCL as what carries partials, through cudarc.

use super::driver::loader_text;
use super::shards::DeviceAllGather;
use crate::error::{Error, Result};
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, DeviceSlice, SyncOnDrop};
use cudarc::nccl::result::{NcclError, NcclStatus};
use cudarc::nccl::Comm;
use std::sync::{Arc, OnceLock};

/// The name that cudarc 0.19.10 looks for, of those that NCCL goes by. (It tries others besides, which no NCCL has.)
const LIBRARY: &str = if cfg!(windows) { "nccl.dll" } else { "libnccl.so" };

/// Functions of a `Comm` that cudarc calls: it panics at the first use of one that the library lacks.
const FUNCTIONS: [&str; 6] =
    ["ncclGetUniqueId", "ncclCommInitRank", "ncclCommInitAll", "ncclCommAbort", "ncclAllGather", "ncclGetVersion"];

/// Whether NCCL is installed, under a name that cudarc finds. Call it before anything of `cudarc::nccl`, which panics
/// where it is not. Loads the library, asks nothing of any GPU; the answer is kept for the life of the process.
///
/// # Errors
/// [`Error::NcclMissing`]. Packages that hold only `libnccl.so.2` (`libnccl2` of Debian and Ubuntu, the Python wheels)
/// are not enough: cudarc looks for `libnccl.so`, which `libnccl-dev` has, or a link of that name on `LD_LIBRARY_PATH`.
pub fn check_nccl() -> Result<()> {
    static FOUND: OnceLock<Result<()>> = OnceLock::new();
    FOUND.get_or_init(find).clone()
}

fn find() -> Result<()> {
    // SAFETY: loading NCCL runs its initialisers, as any program that uses it does.
    let library = unsafe { libloading::Library::new(LIBRARY) }.map_err(|error| Error::NcclMissing {
        reason: format!(
            "{LIBRARY} could not be loaded ({}). cudarc does not look for libnccl.so.2; where that is all there is, put \
             a link of the name {LIBRARY} to it on LD_LIBRARY_PATH",
            loader_text(&error)
        ),
    })?;
    let missing = FUNCTIONS.iter().find(|function| {
        // SAFETY: the symbol is looked up, never called or read.
        unsafe { library.get::<*const ()>(function.as_bytes()) }.is_err()
    });
    std::mem::forget(library); // stays open, as the driver
    match missing {
        None => Ok(()),
        Some(function) => Err(Error::NcclMissing { reason: format!("{LIBRARY} has no {function}") }),
    }
}

// SAFETY: `ncclAllGather` enqueues on the communicator's stream, which is checked to be the one, a gathering of that
// many bytes in rank order, and touches nothing else.
unsafe impl DeviceAllGather for Comm {
    type Error = String;

    fn world_size(&self) -> usize {
        Comm::world_size(self)
    }

    unsafe fn all_gather(
        &self,
        stream: &Arc<CudaStream>,
        mine: u64,
        all: u64,
        bytes: usize,
    ) -> std::result::Result<(), String> {
        let own = self.stream();
        if own.cu_stream() != stream.cu_stream() || own.context().cu_ctx() != stream.context().cu_ctx() {
            return Err("the communicator enqueues on another stream than the clipper; make both for the same".into());
        }
        let send = Bytes { address: mine, len: bytes, stream };
        let mut receive = Bytes { address: all, len: bytes * self.world_size(), stream };
        match Comm::all_gather(self, &send, &mut receive) {
            Ok(NcclStatus::Success) => Ok(()),
            Ok(_) => Err("the communicator does not block, so nothing says when ncclAllGather is enqueued".into()),
            Err(NcclError(code)) => Err(format!("ncclAllGather: {code:?}")),
        }
    }
}

/// Memory of the clipper's, as cudarc takes it. Ordered on one stream, so that no events are needed.
struct Bytes<'s> {
    address: u64,
    len: usize,
    stream: &'s Arc<CudaStream>,
}

impl DeviceSlice<u8> for Bytes<'_> {
    fn len(&self) -> usize {
        self.len
    }

    fn stream(&self) -> &Arc<CudaStream> {
        self.stream
    }
}

impl DevicePtr<u8> for Bytes<'_> {
    fn device_ptr<'a>(&'a self, _: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
        (self.address, SyncOnDrop::Record(None))
    }
}

impl DevicePtrMut<u8> for Bytes<'_> {
    fn device_ptr_mut<'a>(&'a mut self, _: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
        (self.address, SyncOnDrop::Record(None))
    }
}

/// An error of the caller's own calls of cudarc's, for `?` between ours.
impl From<NcclError> for Error {
    fn from(NcclError(code): NcclError) -> Self {
        Self::Exchange { reason: format!("a call of cudarc: {code:?}") }
    }
}
