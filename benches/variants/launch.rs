//! One kernel launch with all that it needs, to be enqueued again and again, or captured.

use anyhow::Result;
use cudarc::driver::{result, sys, CudaFunction, CudaStream};
use std::ffi::c_void;
use std::ptr;

/// A parameter as the kernel gets it, aligned to 8 bytes.
pub type Arg = Box<[u64]>;

pub fn arg<T: bytemuck::NoUninit>(value: &T) -> Arg {
    let mut words = vec![0u64; size_of::<T>().div_ceil(8)];
    bytemuck::cast_slice_mut(&mut words)[..size_of::<T>()].copy_from_slice(bytemuck::bytes_of(value));
    words.into()
}

/// What an ordinary launch does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attribute {
    /// May start before the launch before it has ended, and waits for it itself.
    Programmatic,
    /// All blocks at once.
    Cooperative,
}

pub struct Launch {
    pub function: CudaFunction,
    pub blocks: u32,
    pub threads: u32,
    pub args: Vec<Arg>,
    pub attribute: Option<Attribute>,
}

impl Launch {
    /// # Safety
    /// The arguments are those of the kernel, and what they point to may be used as it does until it has run.
    pub unsafe fn run(&self, stream: &CudaStream) -> Result<()> {
        if self.blocks == 0 {
            return Ok(());
        }
        let function = self.function.cu_function();
        let mut args: Vec<*mut c_void> = self.args.iter().map(|arg| arg.as_ptr().cast_mut().cast()).collect();
        let (grid, block) = ((self.blocks, 1, 1), (self.threads, 1, 1));
        let Some(attribute) = self.attribute else {
            // SAFETY: the driver copies the arguments before it returns; the rest is the caller's.
            return Ok(unsafe { result::launch_kernel(function, grid, block, 0, stream.cu_stream(), &mut args) }?);
        };
        let mut attribute = attribute.of_driver();
        let config = sys::CUlaunchConfig {
            gridDimX: self.blocks,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            hStream: stream.cu_stream(),
            attrs: &raw mut attribute,
            numAttrs: 1,
        };
        // SAFETY: as above; every driver that the library takes has this function. The attribute outlives the call.
        unsafe { sys::cuLaunchKernelEx(&config, function, args.as_mut_ptr(), ptr::null_mut()) }.result()?;
        Ok(())
    }
}

impl Attribute {
    fn of_driver(self) -> sys::CUlaunchAttribute {
        let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
        let id = match self {
            Self::Programmatic => {
                value.programmaticStreamSerializationAllowed = 1;
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            }
            Self::Cooperative => {
                value.cooperative = 1;
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            }
        };
        sys::CUlaunchAttribute { id, pad: [0; 4], value }
    }
}
