//! Everything that can go wrong, as one type.

use crate::{Dtype, NormType};

/// Result with [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call did nothing. Unless a variant says otherwise, no gradient has been touched.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A threshold that is negative or NaN (`max_norm`, `eps`, a clip value, a norm that is given), or a loss scale that
    /// is no positive number.
    #[error("{name} must be {expected}, got {got}")]
    InvalidThreshold {
        /// Which option.
        name: &'static str,
        /// What it has to be.
        expected: &'static str,
        /// What was given.
        got: f64,
    },
    /// A [`NormType::P`](crate::NormType::P) whose order is not positive. PyTorch takes such orders: 0 counts the
    /// elements that are not zero, and a negative one goes by the smallest of them; neither scales with the gradients as
    /// a norm has to.
    #[error(
        "a norm of order {got}: the order must be positive (below 1 is allowed, though no norm in the strict sense); 0 \
         counts elements, and a negative order is no norm"
    )]
    InvalidNormType {
        /// The order given.
        got: f64,
    },
    /// [`NormType::Rms`] over several ranks: what they exchange does not have their numbers of elements.
    #[error(
        "the root mean square is not measured over several ranks; clip by NormType::L2, with max_norm times the root of \
         the number of elements of all ranks"
    )]
    RmsOverRanks,
    /// A threshold, loss scale or norm by device address ([`ClipNorm::max_norm_at`](crate::ClipNorm::max_norm_at),
    /// [`ClipNorm::loss_scale_at`](crate::ClipNorm::loss_scale_at), [`TotalNorm::at`](crate::TotalNorm::at)) that cannot
    /// be read.
    #[error("the address of {name}, {address:#x}, {reason}")]
    ThresholdAddress {
        /// What lies there.
        name: &'static str,
        /// The address given.
        address: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Value bounds that enclose no number: `lo > hi`, both the same infinity, or one is NaN.
    #[error("value bounds need lo <= hi and a number between them, got lo {lo} and hi {hi}")]
    InvalidBounds {
        /// Lower bound given.
        lo: f64,
        /// Upper bound given.
        hi: f64,
    },
    /// The norm is NaN or infinite, and the caller asked for an error ([`NonFinite::Error`](crate::NonFinite::Error)).
    #[error("the norm of the gradients is {total_norm}{}; nothing was clipped", at_tensor(.tensor))]
    NonFinite {
        /// The norm: NaN if any element is NaN, else infinite.
        total_norm: f64,
        /// Index of the first tensor that holds a NaN or an Inf; `None` if all are finite and only their norm overflows f64.
        tensor: Option<usize>,
    },
    /// What a running norm is asked to clip is not what was added to it: another tensor, another order, or more or fewer.
    #[error("tensor {tensor} is {got}; what was added to the running norm there is {expected}")]
    OtherGradients {
        /// Index of the first that differs.
        tensor: usize,
        /// What was added at that place.
        expected: String,
        /// What the list has there.
        got: String,
    },
    /// A running norm of one kind is asked to clip by a norm of another.
    #[error("the running norm is {running:?}, and the clip asks for {got:?}")]
    OtherNormType {
        /// That of the running norm.
        running: NormType,
        /// That asked for.
        got: NormType,
    },
    /// Two entries of the list share memory: it would be counted, and scaled, twice.
    #[error("tensors {first} and {second} overlap in memory; each gradient may be listed once")]
    Overlap {
        /// Index of one of them.
        first: usize,
        /// Index of the other.
        second: usize,
    },
    /// Something is wrong with the outputs of [`clip_grad_norm_into`](crate::cpu::clip_grad_norm_into), as it could be with
    /// gradients: the index of a tensor inside this error is that of an output.
    #[error("outputs: {0}")]
    Outputs(Box<Error>),
    /// There are not as many outputs as gradients.
    #[error("{gradients} gradients, but {outputs} outputs; each gradient needs one")]
    OutputCount {
        /// Length of the list of gradients.
        gradients: usize,
        /// Length of the list of outputs.
        outputs: usize,
    },
    /// An output has not as many elements as its gradient.
    #[error("output {tensor} has {output} elements, gradient {tensor} has {gradient}")]
    OutputNumel {
        /// Index of both.
        tensor: usize,
        /// Elements of the gradient.
        gradient: u64,
        /// Elements of the output.
        output: u64,
    },
    /// An output of a type that its gradient cannot be clipped into.
    #[error("output {tensor} is {output}, gradient {tensor} is {gradient}; the output can be {}", types_of_output(*.gradient))]
    OutputDtype {
        /// Index of both.
        tensor: usize,
        /// Type of the gradient.
        gradient: Dtype,
        /// Type of the output.
        output: Dtype,
    },
    /// An output shares memory with a gradient, maybe its own. Clipping in place is what
    /// [`clip_grad_norm`](crate::cpu::clip_grad_norm) is for.
    #[error("output {output} overlaps gradient {gradient} in memory; to clip in place, use clip_grad_norm")]
    OutputOverlapsGradient {
        /// Index of the output.
        output: usize,
        /// Index of the gradient.
        gradient: usize,
    },
    /// The address of a tensor is not a multiple of its element size.
    #[error("tensor {tensor} ({dtype}) starts at {address:#x}, which is not a multiple of {} bytes", .dtype.size())]
    Misaligned {
        /// Index in the list.
        tensor: usize,
        /// Its element type.
        dtype: Dtype,
        /// Its address.
        address: u64,
    },
    /// A list that has not one entry for each tensor (`groups` and `rows` of a [`Scope`](crate::Scope),
    /// [`copies`](crate::Copies)) or for each group (`max_norms`).
    #[error("{what} has {got} entries, expected {expected}")]
    ScopeLength {
        /// Which list.
        what: &'static str,
        /// Entries it should have.
        expected: usize,
        /// Entries it has.
        got: usize,
    },
    /// Bytes that are no [`NormPartial`](crate::NormPartial), or partials that cannot be merged.
    #[error("no partial of a norm: {reason}")]
    InvalidPartial {
        /// What is wrong with them.
        reason: &'static str,
    },
    /// Of a call over several ranks: one of them could not take part, so that the norm over all is not known. Every other
    /// rank that reads its result gets this error, and no rank has written a gradient.
    #[error("rank {rank} {reason}; no rank has clipped anything")]
    RankFailed {
        /// The first such rank.
        rank: usize,
        /// What is known of it.
        reason: &'static str,
    },
    /// The engine that exchanges partials between ranks ([`AllGather`](crate::AllGather)) failed on this rank. Of the
    /// others nothing is known.
    #[error("the partial norms could not be gathered: {reason}")]
    Exchange {
        /// What the engine said.
        reason: String,
    },
    /// NCCL could not be loaded, or lacks a function.
    #[error("no NCCL: {reason}")]
    NcclMissing {
        /// What was tried, and what the loader said.
        reason: String,
    },
    /// libtorch's CUDA library is not found, or cannot be loaded: `tch::load_cuda`.
    #[error(
        "libtorch has no CUDA here: its CUDA library could not be loaded ({reason}). Put the folder of a libtorch built \
         for CUDA on the loader's path, or use CPU tensors"
    )]
    LibtorchCudaMissing {
        /// What the loader said.
        reason: String,
    },
    /// libtorch's CUDA library is in the process, but libtorch had decided before that there is none: `tch::load_cuda`.
    #[error(
        "libtorch has decided that there is no CUDA: it asks once, at the first backward, manual_seed or \
         Cuda::is_available, and its CUDA library was loaded later. Call gradclip::tch::load_cuda first in main, or link \
         the program with -Wl,--no-as-needed and -ltorch_cuda"
    )]
    LibtorchCudaTooLate,
    /// A group that is not below the number of thresholds, or, where there are none, of tensors.
    #[error("tensor {tensor} is in group {group}; groups are below {groups}: one for each of max_norms, else for each tensor")]
    NoSuchGroup {
        /// Index in the list.
        tensor: usize,
        /// Its group.
        group: usize,
        /// How many groups there can be.
        groups: usize,
    },
    /// A tensor that cannot be cut into so many rows of one length.
    #[error("tensor {tensor} has {numel} elements, which are not {rows} rows of one length")]
    UnevenRows {
        /// Index in the list.
        tensor: usize,
        /// Its number of elements.
        numel: u64,
        /// Rows asked for.
        rows: usize,
    },
    /// [`Scope::leading_dimension`](crate::Scope::leading_dimension) of gradients that have no shape.
    #[error("these gradients have no shape; say how many rows each has, with Scope::rows")]
    ShapesUnknown,
    /// An option of a [`Scope`](crate::Scope) that only norms have, for a call that measures none.
    #[error("{option} of the scope is for calls with norms; clipping by value has none")]
    ScopeForNorms {
        /// Which option.
        option: &'static str,
    },
    /// A tensor larger than the address space, or a list of more than 2^31 tiles of 32 KiB.
    #[error("tensor {tensor} with {numel} elements makes the list too large")]
    TooLarge {
        /// Index in the list.
        tensor: usize,
        /// Its number of elements.
        numel: u64,
    },
    /// An element type that gradients cannot be clipped in.
    #[error("tensor {tensor} has dtype {got}; expected f32, f64, f16 or bf16")]
    UnsupportedDtype {
        /// Index in the list.
        tensor: usize,
        /// Its type.
        got: String,
    },
    /// A tensor on another device than the call runs on, or on the same one through another `CudaContext` object of
    /// cudarc's, whose event tracking knows nothing of the call.
    #[error("tensor {tensor} is on {got}, expected {expected}")]
    WrongDevice {
        /// Index in the list.
        tensor: usize,
        /// Where it should be.
        expected: String,
        /// Where it is.
        got: String,
    },
    /// A raw pointer that, by what the driver says, cannot be device memory of the right device and size.
    #[error("tensor {tensor}: {got}; expected {expected}")]
    BadPointer {
        /// Index in the list.
        tensor: usize,
        /// What the pointer should be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// No CUDA driver could be loaded.
    #[error(
        "no CUDA driver: none of {tried} could be loaded ({reason}). Install the NVIDIA driver, or use the CPU path"
    )]
    DriverMissing {
        /// Library names tried.
        tried: &'static str,
        /// What the loader said.
        reason: String,
    },
    /// The CUDA driver lacks a function, or does not take the PTX of this crate.
    #[error("the CUDA driver is too old: {reason}. Drivers for CUDA 12.0 (525) and later work")]
    DriverTooOld {
        /// What is missing.
        reason: String,
    },
    /// The driver is there, but no GPU is.
    #[error("no CUDA device {ordinal}: the driver reports {count}")]
    NoDevice {
        /// Device asked for.
        ordinal: usize,
        /// Devices present.
        count: usize,
    },
    /// The GPU is older than the oldest one the kernels are built for.
    #[error("the GPU has compute capability {major}.{minor}; 7.5 or later is needed")]
    GpuTooOld {
        /// Major compute capability.
        major: i32,
        /// Minor compute capability.
        minor: i32,
    },
    /// Device or pinned memory for the workspace could not be had.
    #[error("out of memory: {bytes} bytes for the {what}")]
    OutOfMemory {
        /// What it was for.
        what: &'static str,
        /// Size asked for.
        bytes: usize,
    },
    /// The call would have to allocate, copy or wait during stream capture. Make the same call once before the capture;
    /// wait after it. The capture goes on.
    #[error(
        "{what} is not ready, and nothing can be prepared during stream capture; make the same call once before it"
    )]
    CaptureNeedsWarmup {
        /// What would have to be prepared.
        what: &'static str,
    },
    /// The report was overwritten: [`REPORTS_KEPT`](crate::REPORTS_KEPT) later calls went through the same clipper, or, of a
    /// call with a [`Scope`](crate::Scope), one more such call.
    #[error(
        "the report is gone: only the last {} are kept on the device, and of calls with a scope the last",
        crate::REPORTS_KEPT
    )]
    ReportExpired,
    /// The report of a call that was captured into a graph, before the graph has run.
    #[error("the call was captured into a graph that has not run yet; launch the graph before its report is read")]
    ReportNotReady,
    /// A norm that `clip_with_norm` was given as the report of another call, and that it cannot read on the device.
    #[error("the given norm {reason}")]
    NormOutOfReach {
        /// Why not, and what to do.
        reason: &'static str,
    },
    /// Every report slot for captured calls is taken: [`REPORTS_KEPT`](crate::REPORTS_KEPT) calls of the same clipper
    /// were captured.
    #[error("all {} report slots are held by captured graphs; use another clipper", crate::REPORTS_KEPT)]
    NoReportSlot,
    /// A clipper for the per-thread default stream, or one of its reports, was used in another thread than the one that
    /// made the clipper: the same handle means another stream there.
    #[error(
        "this clipper was made for the per-thread default stream of another thread; use it and read its reports in that \
         thread, or make the clipper for a stream that is the same in every thread"
    )]
    WrongThread,
    /// A function that keeps a clipper for its thread was called while the thread ends, from the destructor of a
    /// thread-local value: what the thread kept may be gone already.
    #[error("the thread is ending, and keeps no clippers any more; call this earlier, or use a Clipper of your own")]
    ThreadEnding,
    /// Any other error of the CUDA driver. If it happened in a launch, earlier stages of the same call may have run.
    #[error("{op}: CUDA error {code}")]
    Driver {
        /// What was being done.
        op: &'static str,
        /// Name of the driver's error.
        code: String,
    },
    /// An error of the framework whose tensors were passed.
    #[error("{0}")]
    Framework(String),
}

#[cfg(any(feature = "cuda", feature = "candle", feature = "tch"))]
impl Error {
    /// The same error, with the index of each tensor in it changed.
    pub(crate) fn rename_tensors(mut self, name: impl Fn(usize) -> usize) -> Self {
        match &mut self {
            Self::Overlap { first, second } => (*first, *second) = (name(*first), name(*second)),
            Self::NonFinite { tensor: Some(tensor), .. }
            | Self::Misaligned { tensor, .. }
            | Self::TooLarge { tensor, .. }
            | Self::UnsupportedDtype { tensor, .. }
            | Self::WrongDevice { tensor, .. }
            | Self::BadPointer { tensor, .. } => *tensor = name(*tensor),
            _ => {}
        }
        self
    }
}

fn at_tensor(tensor: &Option<usize>) -> String {
    tensor.map_or(String::new(), |index| format!(" (first in tensor {index})"))
}

fn types_of_output(gradient: Dtype) -> String {
    if gradient == Dtype::F32 {
        gradient.to_string()
    } else {
        format!("{gradient} or f32")
    }
}
