//! The kernels as a stand-alone program, for the sanitizers: no driver and no Rust runtime in it.
//! `GRADCLIP_HOST_SANITIZER` = `address,undefined` or `thread` chooses one.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs};

use anyhow::{ensure, Context, Result};
use bytemuck::{bytes_of, Zeroable};
use gradclip::abi::{norm_type, ClampBounds, ClipParams, StatsSlot};
use gradclip::{NormPartial, NormType};

use super::toolchain::{self, Build};

/// The numbers are those of `kernels/abi.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Dtype {
    F32 = 0,
    F64 = 1,
    F16 = 2,
    BF16 = 3,
}

impl Dtype {
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F64 => 8,
            Dtype::F16 | Dtype::BF16 => 2,
        }
    }
}

#[derive(Debug, Clone)]
pub struct Tensor {
    pub dtype: Dtype,
    /// Bytes between a 16-byte border and the first element.
    pub misalign: u32,
    /// For [`Operation::ScopedNorm`] and [`Operation::ScopedValue`].
    pub rows: u64,
    /// For [`Operation::Sharded`].
    pub copies: u32,
    pub data: Vec<u8>,
}

#[derive(Debug, Clone)]
pub enum Operation {
    /// norm_partials, clip_coef, scale.
    ClipNorm { max_norm: f64, eps: f64, loss_scale: f64, norm_type: NormType, nonfinite: u32 },
    /// norm_partials, clip_coef, scale_into: to outputs of the type of each tensor, or of f32. Output i starts
    /// `misalign + i` elements after a 16-byte border, and every byte of it is [`STALE`] before.
    ClipNormInto { max_norm: f64, loss_scale: f64, nonfinite: u32, to_f32: bool, misalign: usize },
    /// clip_coef_of_norm, scale_any.
    ClipWithNorm { total_norm: f64, max_norm: f64, loss_scale: f64, nonfinite: u32 },
    /// clamp, clamp_counts, with bounds that every dtype holds.
    ClipValue { lo: f32, hi: f32 },
    /// scoped_partials and scoped_coefs, or scoped_stats and scoped_coefs_stats, then scoped_scale: of each row, or all in
    /// one group.
    ScopedNorm { max_norm: f64, norm_type: NormType, nonfinite: u32, one_group: bool, stats: bool },
    /// scoped_clamp, scoped_clamp_counts: the same.
    ScopedValue { lo: f32, hi: f32, one_group: bool },
    /// norm_partials, weigh_partials, fold_partials, clip_coef_of_ranks, scale: on the first rank, with the partials of
    /// the others.
    Sharded { max_norm: f64, norm_type: NormType, nonfinite: u32, others: Vec<[u8; NormPartial::BYTES]> },
}

pub const STALE: u8 = 0x55;

#[derive(Debug, Clone)]
pub struct Case {
    pub tensors: Vec<Tensor>,
    pub operation: Operation,
    /// The descriptors in memory instead of the kernel's parameters.
    pub table_in_memory: bool,
    /// Whether norm_partials gets a place for the range of each partial.
    pub with_scales: bool,
    pub blocks: u32,
    pub reversed: bool,
}

/// `ReportSlot` of `kernels/abi.cuh`. What a kernel left alone is 0xFF in every byte.
#[derive(Debug, Clone, Copy)]
pub struct Report {
    pub total_norm: f64,
    pub clip_coef: f64,
    pub multiplier: f64,
    pub first_bad_tile: u64,
    pub clipped_elements: u64,
    pub nan_elements: u64,
    pub multiplier_f32: f32,
    pub found_inf: f32,
    pub coef_hi: f32,
    pub coef_lo: f32,
    pub action: u32,
    pub rank: u32,
}

const REPORT_BYTES: usize = 72;

#[derive(Debug, Clone)]
pub struct Outcome {
    pub sums: Vec<f64>,
    pub scales: Vec<f64>,
    pub counts: Vec<u64>,
    pub report: Report,
    /// The data of each tensor afterwards.
    pub tensors: Vec<Vec<u8>>,
    /// That of the outputs, if there are any.
    pub outputs: Vec<Vec<u8>>,
    /// Of [`Operation::Sharded`].
    pub partial: Option<[u8; NormPartial::BYTES]>,
    /// Of the scoped ones.
    pub groups: Vec<Report>,
    pub stats: Vec<StatsSlot>,
}

/// The program, built for one sanitizer or none.
pub struct Runner {
    program: PathBuf,
}

impl Runner {
    /// With the sanitizer that the environment asks for. None, with the reason printed, where it cannot be built.
    pub fn from_env() -> Option<Runner> {
        Runner::new(&env::var("GRADCLIP_HOST_SANITIZER").unwrap_or_default())
    }

    /// `sanitizer` is what follows -fsanitize=, or nothing.
    pub fn new(sanitizer: &str) -> Option<Runner> {
        let Some(compiler) = toolchain::compiler() else {
            toolchain::skip("no C++ compiler was found ($CXX, c++, g++, clang++)");
            return None;
        };
        let sanitize = format!("-fsanitize={sanitizer}");
        let mut flags = vec!["-O2", "-g"];
        if !sanitizer.is_empty() {
            flags = vec!["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", &sanitize];
            if !compiler.links(&flags) {
                toolchain::skip(&format!("the C++ compiler cannot link with {sanitize}"));
                return None;
            }
        }
        let program = compiler
            .build(&Build {
                file_name: "runner",
                sources: &[
                    "runner.cpp",
                    "kernels.cpp",
                    "toy_kernels.cpp",
                    "example_kernels.cpp",
                    "bench_kernels.cpp",
                    "variant_kernels.cpp",
                    "host_kernels.cpp",
                    "block.cpp",
                    "fibers.cpp",
                ],
                compile_flags: &flags,
                link_flags: &[],
            })
            .expect("the kernels build as a program");
        Some(Runner { program })
    }

    /// Runs all the cases in one process. Panics with its messages when the program or a sanitizer complains.
    pub fn run(&self, cases: &[Case]) -> Vec<Outcome> {
        self.try_run(cases).expect("the kernels run cleanly")
    }

    fn try_run(&self, cases: &[Case]) -> Result<Vec<Outcome>> {
        let file = CaseFile::write(cases)?;
        let output = self.command(&[file.path.clone().into()])?;
        let messages = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success() && messages.is_empty(),
            "{} with {}:\n{messages}",
            self.program.display(),
            output.status
        );
        let mut bytes = Bytes(&output.stdout);
        let outcomes = cases.iter().map(|case| bytes.outcome(case)).collect::<Result<_>>()?;
        ensure!(bytes.0.is_empty(), "{} bytes too many", bytes.0.len());
        Ok(outcomes)
    }

    /// Runs one of the toy kernels, right or wrong, and gives back what came of it.
    pub fn run_toy(&self, name: &str) -> Output {
        self.command(&["--toy".into(), name.into()]).expect("the program starts")
    }

    fn command(&self, arguments: &[OsString]) -> Result<Output> {
        let mut command = Command::new(&self.program);
        // A report is an error by its exit code too, and the same whatever the caller has set.
        command.args(arguments).env("TSAN_OPTIONS", "exitcode=66").env("ASAN_OPTIONS", "exitcode=65");
        command.output().with_context(|| format!("running {}", self.program.display()))
    }
}

/// Removed when dropped.
struct CaseFile {
    path: PathBuf,
}

impl CaseFile {
    fn write(cases: &[Case]) -> Result<CaseFile> {
        static UNIQUE: AtomicUsize = AtomicUsize::new(0);
        let unique = UNIQUE.fetch_add(1, Ordering::Relaxed);
        let name = format!("cases-{}-{unique}", std::process::id());
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let mut bytes = u32::try_from(cases.len())?.to_le_bytes().to_vec();
        for case in cases {
            case.encode(&mut bytes)?;
        }
        fs::write(&path, bytes)?;
        Ok(CaseFile { path })
    }
}

impl Drop for CaseFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl Case {
    /// As `CaseHeader` in tests/double/runner.cpp, then the tensors.
    fn encode(&self, out: &mut Vec<u8>) -> Result<()> {
        let others = self.others();
        let [operation, one_group, with_stats] = match self.operation {
            Operation::ClipNorm { .. } => [0, 0, 0],
            Operation::ClipNormInto { .. } => [1, 0, 0],
            Operation::ClipWithNorm { .. } => [2, 0, 0],
            Operation::ClipValue { .. } => [3, 0, 0],
            Operation::ScopedNorm { one_group, stats, .. } => [4, one_group.into(), stats.into()],
            Operation::ScopedValue { one_group, .. } => [5, one_group.into(), 0],
            Operation::Sharded { .. } => [6, 0, 0],
        };
        let header = [
            operation,
            one_group,
            with_stats,
            u32::try_from(others.len())?,
            self.table_in_memory.into(),
            self.with_scales.into(),
            self.blocks,
            self.reversed.into(),
            u32::try_from(self.tensors.len())?,
            0,
        ];
        out.extend(header.iter().flat_map(|word| word.to_le_bytes()));
        let (mut clip, mut bounds, mut total_norm) = (ClipParams::zeroed(), ClampBounds::zeroed(), 0f64);
        match self.operation {
            Operation::ClipNorm { max_norm, eps, loss_scale, norm_type, nonfinite } => {
                let (p, norm_type) = (norm_type.order(), tag_of(norm_type));
                clip = ClipParams { max_norm, eps, p, loss_scale, norm_type, nonfinite, ..ClipParams::zeroed() };
            }
            Operation::ClipWithNorm { total_norm: norm, max_norm, loss_scale, nonfinite } => {
                total_norm = norm;
                clip = ClipParams { max_norm, loss_scale, nonfinite, ..ClipParams::zeroed() };
            }
            Operation::ClipNormInto { max_norm, loss_scale, nonfinite, .. } => {
                let norm_type = norm_type::L2;
                clip = ClipParams { max_norm, loss_scale, norm_type, nonfinite, ..ClipParams::zeroed() };
            }
            Operation::ScopedNorm { max_norm, norm_type, nonfinite, .. }
            | Operation::Sharded { max_norm, norm_type, nonfinite, .. } => {
                let (p, norm_type) = (norm_type.order(), tag_of(norm_type));
                clip = ClipParams { max_norm, p, loss_scale: 1.0, norm_type, nonfinite, ..ClipParams::zeroed() };
            }
            Operation::ClipValue { lo, hi } | Operation::ScopedValue { lo, hi, .. } => {
                [bounds.lo_f64, bounds.hi_f64] = [lo.into(), hi.into()];
                ([bounds.lo_f32, bounds.hi_f32], [bounds.lo_f16, bounds.hi_f16]) = ([lo, hi], [lo, hi]);
                [bounds.lo_bf16, bounds.hi_bf16] = [lo, hi];
            }
        }
        out.extend(bytes_of(&clip));
        out.extend(bytes_of(&bounds));
        out.extend(total_norm.to_le_bytes());
        for (index, tensor) in self.tensors.iter().enumerate() {
            ensure!(tensor.data.len() % tensor.dtype.size() == 0, "a part of an element");
            let numel = (tensor.data.len() / tensor.dtype.size()) as u64;
            out.extend((tensor.dtype as u32).to_le_bytes());
            out.extend(tensor.misalign.to_le_bytes());
            out.extend(tensor.rows.to_le_bytes());
            out.extend(numel.to_le_bytes());
            out.extend(&tensor.data);
            if let Operation::Sharded { .. } = self.operation {
                out.extend(tensor.copies.to_le_bytes());
            }
            if let Some((dtype, misalign)) = self.output(index) {
                out.extend((dtype as u32).to_le_bytes());
                out.extend(misalign.to_le_bytes());
            }
        }
        out.extend(others.iter().flatten());
        Ok(())
    }

    fn others(&self) -> &[[u8; NormPartial::BYTES]] {
        match &self.operation {
            Operation::Sharded { others, .. } => others,
            _ => &[],
        }
    }

    /// Type of an output, and the bytes between a 16-byte border and its first element.
    pub fn output(&self, index: usize) -> Option<(Dtype, u32)> {
        let Operation::ClipNormInto { to_f32, misalign, .. } = self.operation else { return None };
        let dtype = if to_f32 { Dtype::F32 } else { self.tensors[index].dtype };
        Some((dtype, ((misalign + index) * dtype.size() % 16) as u32))
    }
}

fn tag_of(norm_type: NormType) -> u32 {
    match norm_type {
        NormType::L1 => norm_type::L1,
        NormType::L2 => norm_type::L2,
        NormType::Inf => norm_type::INF,
        NormType::Rms => norm_type::RMS,
        _ => norm_type::P,
    }
}

/// What is left of the program's output.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn take(&mut self, count: usize) -> Result<&[u8]> {
        let (head, tail) = self.0.split_at_checked(count).context("the output ends early")?;
        self.0 = tail;
        Ok(head)
    }

    fn words<const SIZE: usize, T>(&mut self, count: usize, from: fn([u8; SIZE]) -> T) -> Result<Vec<T>> {
        let bytes = self.take(count * SIZE)?;
        let word = |chunk: &[u8]| Ok(from(chunk.try_into()?));
        bytes.chunks_exact(SIZE).map(word).collect()
    }

    fn word<const SIZE: usize, T>(&mut self, from: fn([u8; SIZE]) -> T) -> Result<T> {
        Ok(from(self.take(SIZE)?.try_into()?))
    }

    fn report(&mut self) -> Result<Report> {
        let mut slot = Bytes(self.take(REPORT_BYTES)?);
        Ok(Report {
            total_norm: slot.word(f64::from_le_bytes)?,
            clip_coef: slot.word(f64::from_le_bytes)?,
            multiplier: slot.word(f64::from_le_bytes)?,
            first_bad_tile: slot.word(u64::from_le_bytes)?,
            clipped_elements: slot.word(u64::from_le_bytes)?,
            nan_elements: slot.word(u64::from_le_bytes)?,
            multiplier_f32: slot.word(f32::from_le_bytes)?,
            found_inf: slot.word(f32::from_le_bytes)?,
            coef_hi: slot.word(f32::from_le_bytes)?,
            coef_lo: slot.word(f32::from_le_bytes)?,
            action: slot.word(u32::from_le_bytes)?,
            rank: slot.word(u32::from_le_bytes)?,
        })
    }

    fn outcome(&mut self, case: &Case) -> Result<Outcome> {
        let num_tiles = self.word(u32::from_le_bytes)? as usize;
        let mut outcome = Outcome {
            sums: self.words(num_tiles, f64::from_le_bytes)?,
            scales: self.words(num_tiles, f64::from_le_bytes)?,
            counts: self.words(num_tiles, u64::from_le_bytes)?,
            report: self.report()?,
            tensors: case
                .tensors
                .iter()
                .map(|tensor| Ok(self.take(tensor.data.len())?.to_vec()))
                .collect::<Result<_>>()?,
            outputs: (0..case.tensors.len())
                .filter_map(|index| Some((index, case.output(index)?.0)))
                .map(|(index, dtype)| {
                    let tensor = &case.tensors[index];
                    Ok(self.take(tensor.data.len() / tensor.dtype.size() * dtype.size())?.to_vec())
                })
                .collect::<Result<_>>()?,
            partial: None,
            groups: Vec::new(),
            stats: Vec::new(),
        };
        if let Operation::Sharded { .. } = case.operation {
            outcome.partial = Some(self.take(NormPartial::BYTES)?.try_into()?);
        }
        if let Operation::ScopedNorm { .. } | Operation::ScopedValue { .. } = case.operation {
            let (groups, stats) = (self.word(u32::from_le_bytes)?, self.word(u32::from_le_bytes)?);
            outcome.groups = (0..groups).map(|_| self.report()).collect::<Result<_>>()?;
            let slot = |bytes: [u8; size_of::<StatsSlot>()]| bytemuck::pod_read_unaligned(&bytes);
            outcome.stats = self.words(stats as usize, slot)?;
        }
        Ok(outcome)
    }
}
