//! The PTX that the crate embeds: which compiler, or the committed snapshot. build.rs runs this; tests/build_script.rs
//! includes the same file. No GPU and no driver is ever asked.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, ensure, Context, Result};
use sha2::{Digest, Sha256};

/// Reads an environment variable.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// The oldest GPUs that current toolkits compile for; the driver turns it into code for every later one.
const VIRTUAL_ARCH: u32 = 75;

/// The arithmetic that the results depend on; scripts/cuda_packages.py gives NVRTC the same.
const NUMERICS: [&str; 4] = ["--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true"];

/// nvcc reads these itself.
const NVCC_READS: [&str; 3] = ["NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"];

const HOW_TO_CHOOSE: &str =
    "Set GRADCLIP_NVCC to another nvcc, NVCC_CCBIN to a host C++ compiler that this one takes, \
     or GRADCLIP_PTX=snapshot to use the PTX that comes with the crate.";

/// What [`embed`] did.
pub struct Embedded {
    pub nvcc: Option<PathBuf>,
    /// Why the snapshot is not among the PTX to try, where it is not.
    pub warning: Option<String>,
}

/// PTX by stem of its source, or by kernel, in the order of the sources.
type Modules = Vec<(String, String)>;

/// Writes `ptx.rs`, and the PTX it includes, into `out_dir`. An nvcc newer than the driver makes PTX that the driver
/// refuses, so the snapshot, which old drivers take, always comes along as the second to try.
///
/// Each kernel is embedded as a module of its own, because the driver compiles a whole module at its first load.
pub fn embed(kernels: &Path, out_dir: &Path, usual_cuda: &Path, env: Env) -> Result<Embedded> {
    let snapshot = read_snapshot(kernels).and_then(one_module_a_kernel);
    let Some(nvcc) = wanted_nvcc(usual_cuda, env)? else {
        write_modules(out_dir, "snapshot", &[("snapshot", &snapshot?)])?;
        return Ok(Embedded { nvcc: None, warning: None });
    };
    let compiler = format!("nvcc {}", nvcc_release(&nvcc)?);
    let compiled = one_module_a_kernel(compile(&nvcc, kernels, out_dir, env)?)?;
    let warning = match &snapshot {
        Ok(snapshot) => {
            write_modules(out_dir, &compiler, &[("nvcc", &compiled), ("snapshot", snapshot)])?;
            None
        }
        Err(error) => {
            write_modules(out_dir, &compiler, &[("nvcc", &compiled)])?;
            Some(format!("only the PTX of {compiler} is embedded, which older drivers refuse: {error:#}"))
        }
    };
    Ok(Embedded { nvcc: Some(nvcc), warning })
}

/// The nvcc to use, or none for the snapshot.
fn wanted_nvcc(usual_cuda: &Path, env: Env) -> Result<Option<PathBuf>> {
    let choice = env("GRADCLIP_PTX").unwrap_or_default();
    match choice.to_str() {
        Some("snapshot") => Ok(None),
        Some("nvcc") => find_nvcc(usual_cuda, env)?.map(Some).context(
            "GRADCLIP_PTX=nvcc, but there is no nvcc in PATH, in CUDA_HOME, CUDA_PATH or CUDA_ROOT, in the usual \
             place or in the Python environment. Set GRADCLIP_NVCC to it, or unset GRADCLIP_PTX.",
        ),
        Some("") if env("DOCS_RS").is_some() => Ok(None),
        Some("") => find_nvcc(usual_cuda, env),
        _ => bail!("GRADCLIP_PTX is {choice:?}; it can be `nvcc` or `snapshot`, or unset for whichever is there"),
    }
}

/// Looks where the user says, then in PATH, then where toolkits and Python packages are installed.
pub fn find_nvcc(usual_cuda: &Path, env: Env) -> Result<Option<PathBuf>> {
    let name = format!("nvcc{}", std::env::consts::EXE_SUFFIX);
    for variable in ["GRADCLIP_NVCC", "NVCC"] {
        let Some(value) = env(variable).filter(|value| !value.is_empty()) else { continue };
        // A bare name is meant for PATH, as in a shell.
        let bare = Path::new(&value).components().count() == 1;
        let found = if bare { in_path(&value.to_string_lossy(), env) } else { Some(PathBuf::from(&value)) };
        let nvcc = found.filter(|path| path.is_file());
        return nvcc
            .map(|path| Some(real_path(path)))
            .with_context(|| format!("{variable} is {value:?}: no such file"));
    }
    let folders = ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"].into_iter().filter_map(env).map(PathBuf::from);
    let installed = folders.chain([usual_cuda.to_path_buf()]).map(|folder| folder.join("bin"));
    let python = python_folders(env).into_iter();
    let found = in_path(&name, env)
        .or_else(|| installed.chain(python).map(|folder| folder.join(&name)).find(|path| path.is_file()));
    Ok(found.map(real_path))
}

fn in_path(name: &str, env: Env) -> Option<PathBuf> {
    let path = env("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// Where `pip install nvidia-cuda-nvcc` puts nvcc, in the active virtual environment.
fn python_folders(env: Env) -> Vec<PathBuf> {
    let Some(home) = env("VIRTUAL_ENV").map(PathBuf::from) else { return Vec::new() };
    let versions = fs::read_dir(home.join("lib")).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut libraries: Vec<_> = versions.chain([home.join("Lib")]).collect();
    libraries.sort();
    libraries.into_iter().map(|library| library.join("site-packages/nvidia/cu13/bin")).collect()
}

/// nvcc looks for the rest of the toolkit beside the path it is called by, so a link to it does not work. A link to
/// something else that is called nvcc (ccache) does, and only under its own name.
fn real_path(path: PathBuf) -> PathBuf {
    match path.canonicalize() {
        Ok(real) if real.file_name() == path.file_name() => real,
        _ => path,
    }
}

fn nvcc_release(nvcc: &Path) -> Result<String> {
    let output = run(Command::new(nvcc).arg("--version"))?;
    let release = output.split_once("release ").and_then(|(_, rest)| rest.split([',', '\n']).next());
    release.map(str::to_owned).with_context(|| format!("{} --version names no release:\n{output}", nvcc.display()))
}

fn compile(nvcc: &Path, kernels: &Path, out_dir: &Path, env: Env) -> Result<Modules> {
    for variable in NVCC_READS {
        env(variable); // for the caller to note that the result depends on it
    }
    let arch = format!("-arch=compute_{}", virtual_arch(env)?);
    let folder = out_dir.join("compiled");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let mut modules = Modules::new();
    for source in files(kernels, &["cu"])? {
        let stem = stem(&source)?;
        let ptx = folder.join(format!("{stem}.ptx"));
        let mut command = Command::new(nvcc);
        command.args(["-ptx", &arch, "-std=c++17"]).args(NUMERICS).arg("-o").arg(&ptx).arg(&source);
        run(&mut command).with_context(|| format!("compiling kernels/{stem}.cu. {HOW_TO_CHOOSE}"))?;
        let text = fs::read_to_string(&ptx).with_context(|| ptx.display().to_string())?;
        ensure!(
            !text.contains(".ftz") && !text.contains(".approx"),
            "{} compiled kernels/{stem}.cu with flush to zero or approximate arithmetic, which changes the results; is \
             --use_fast_math in NVCC_PREPEND_FLAGS or NVCC_APPEND_FLAGS?",
            nvcc.display(),
        );
        modules.push((stem, text));
    }
    Ok(modules)
}

/// The number of $GRADCLIP_CUDA_ARCH: `80`, `sm_80` or `compute_80`.
fn virtual_arch(env: Env) -> Result<u32> {
    let Some(value) = env("GRADCLIP_CUDA_ARCH").filter(|value| !value.is_empty()) else { return Ok(VIRTUAL_ARCH) };
    let text = value.to_string_lossy();
    let digits = text.trim_start_matches("compute_").trim_start_matches("sm_");
    digits.parse().ok().filter(|&arch| arch >= VIRTUAL_ARCH).with_context(|| {
        format!(
            "GRADCLIP_CUDA_ARCH is {value:?}; it names one architecture from compute_{VIRTUAL_ARCH} on, as compute_90"
        )
    })
}

/// The output of a command, or an error with all it said.
fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_owned();
    let output = command.output().with_context(|| format!("could not run {program:?}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    ensure!(
        output.status.success(),
        "{program:?} failed ({}):\n{}\n{}",
        output.status,
        text(&output.stderr),
        text(&output.stdout),
    );
    Ok(text(&output.stdout))
}

/// The committed PTX, if it was made from the sources as they are.
pub fn read_snapshot(kernels: &Path) -> Result<Modules> {
    let now = sources_sha256(kernels)?;
    let mut modules = Modules::new();
    for source in files(kernels, &["cu"])? {
        let stem = stem(&source)?;
        let path = kernels.join("prebuilt").join(format!("{stem}.ptx"));
        let ptx = fs::read_to_string(&path).with_context(|| {
            format!("no PTX snapshot of kernels/{stem}.cu ({}); run scripts/ptx.py", path.display())
        })?;
        let recorded = ptx.lines().find_map(|line| line.strip_prefix("// sources-sha256: ")).unwrap_or("nothing");
        ensure!(
            recorded == now,
            "kernels/prebuilt/{stem}.ptx was not made from the sources in kernels/ as they are (it records {recorded}, \
             they hash to {now}); run scripts/ptx.py, or install nvcc and set GRADCLIP_NVCC to it",
        );
        modules.push((stem, ptx));
    }
    Ok(modules)
}

/// One hash over the names and contents of all sources of kernels/, newlines as `\n`. Twin: scripts/ptx.py.
pub fn sources_sha256(kernels: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    for path in files(kernels, &["cu", "cuh"])? {
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        for part in [name, b"\0", text.replace("\r\n", "\n").as_bytes(), b"\0"] {
            hash.update(part);
        }
    }
    let mut hex = String::new();
    for byte in hash.finalize() {
        write!(hex, "{byte:02x}")?;
    }
    Ok(hex)
}

/// Takes the PTX of each source apart, into one module for each kernel.
fn one_module_a_kernel(sources: Modules) -> Result<Modules> {
    let mut modules = Modules::new();
    for (stem, ptx) in sources {
        let kernels = kernels_of(&ptx);
        ensure!(!kernels.is_empty(), "the PTX of kernels/{stem}.cu has no `.visible .entry`");
        modules.extend(kernels);
    }
    Ok(modules)
}

/// Each kernel of a PTX text by its symbol, with all of the text but the other kernels.
///
/// Kernels never refer to each other. What stands outside of them (version, target, constants, functions) any of them
/// may use, so all of it stays, in its order.
pub fn kernels_of(ptx: &str) -> Modules {
    let mut chunks: Vec<(Option<&str>, String)> = Vec::new();
    let (mut kernel, mut depth) = (None, 0);
    for line in ptx.split_inclusive('\n') {
        if kernel.is_none() {
            kernel = line.strip_prefix(".visible .entry ").and_then(|rest| rest.split(['(', '\n', ' ']).next());
        }
        match chunks.last_mut() {
            Some((of, text)) if *of == kernel => text.push_str(line),
            _ => chunks.push((kernel, line.to_owned())),
        }
        if kernel.is_some() {
            let code = line.split("//").next().unwrap_or_default();
            depth += code.matches('{').count();
            let closed = code.matches('}').count();
            depth = depth.saturating_sub(closed);
            if closed > 0 && depth == 0 {
                kernel = None;
            }
        }
    }
    let alone = |symbol: &str| {
        let parts = chunks.iter().filter(|(of, _)| of.is_none_or(|of| of == symbol));
        parts.map(|(_, text)| text.as_str()).collect()
    };
    chunks.iter().filter_map(|(symbol, _)| *symbol).map(|symbol| (symbol.to_owned(), alone(symbol))).collect()
}

fn files(kernels: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(kernels).with_context(|| kernels.display().to_string())? {
        let path = entry?.path();
        if path.extension().and_then(|e| e.to_str()).is_some_and(|e| extensions.contains(&e)) {
            found.push(path);
        }
    }
    ensure!(!found.is_empty(), "no kernels in {}", kernels.display());
    found.sort();
    Ok(found)
}

fn stem(source: &Path) -> Result<String> {
    let stem = source.file_stem().and_then(|stem| stem.to_str());
    stem.map(str::to_owned).with_context(|| format!("{} has no usable name", source.display()))
}

/// `sources` is what to try, in that order: a folder name of `out_dir`, and one PTX for each kernel.
fn write_modules(out_dir: &Path, compiler: &str, sources: &[(&str, &Modules)]) -> Result<()> {
    let mut rust = format!(
        "/// What made the PTX that is tried first.\npub(crate) const COMPILER: &str = {compiler:?};\n\n\
         /// Kernels by symbol, each with the modules to try, in that order.\n\
         pub(crate) const MODULES: &[(&str, &[&str])] = &[\n",
    );
    let symbols = sources.first().map(|(_, modules)| modules.iter().map(|(symbol, _)| symbol));
    for symbol in symbols.into_iter().flatten() {
        writeln!(rust, "    ({symbol:?}, &[")?;
        for (folder, modules) in sources {
            if modules.iter().any(|(name, _)| name == symbol) {
                writeln!(rust, "        include_str!(concat!(env!(\"OUT_DIR\"), \"/{folder}/{symbol}.ptx\")),")?;
            }
        }
        writeln!(rust, "    ]),")?;
    }
    writeln!(rust, "];")?;
    for (folder, modules) in sources {
        let folder = out_dir.join(folder);
        if folder.exists() {
            fs::remove_dir_all(&folder)?; // kernels of an earlier build
        }
        fs::create_dir_all(&folder)?;
        for (symbol, ptx) in modules.iter() {
            fs::write(folder.join(format!("{symbol}.ptx")), ptx)?;
        }
    }
    let path = out_dir.join("ptx.rs");
    fs::write(&path, rust).with_context(|| path.display().to_string())
}
