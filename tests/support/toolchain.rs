//! Compiles C++ for the tests, once: objects and libraries are kept under the target folder, named by a hash of
//! everything that went into them.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::{env, fs, io, thread};

use anyhow::{bail, ensure, Context, Result};

/// A compiler that was found to work.
pub struct Compiler {
    path: OsString,
    version: String,
}

/// What to build. Sources are relative to `tests/double`.
pub struct Build<'a> {
    pub file_name: &'a str,
    pub sources: &'a [&'a str],
    pub compile_flags: &'a [&'a str],
    pub link_flags: &'a [OsString],
}

const FLAGS: &[&str] = &[
    "-std=c++17",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas", // #pragma unroll
    "-ffp-contract=off",    // a * b + c stays two roundings
    "-fno-strict-aliasing", // device memory has no type
    "-DGRADCLIP_HOST",
];

pub fn double_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/double")
}

/// Says why a test does not run. With `GRADCLIP_REQUIRE_HOST_KERNELS=1` that is a failure.
pub fn skip(why: &str) {
    let required = env::var("GRADCLIP_REQUIRE_HOST_KERNELS").is_ok_and(|v| v == "1");
    assert!(!required, "GRADCLIP_REQUIRE_HOST_KERNELS=1, but {why}");
    eprintln!("SKIPPED: {why}");
}

/// `$CXX`, c++, g++ or clang++: the first that answers.
pub fn compiler() -> Option<&'static Compiler> {
    static COMPILER: OnceLock<Option<Compiler>> = OnceLock::new();
    COMPILER
        .get_or_init(|| {
            let named = env::var_os("CXX").filter(|cxx| !cxx.is_empty());
            named.into_iter().chain(["c++", "g++", "clang++"].map(OsString::from)).find_map(Compiler::probe)
        })
        .as_ref()
}

impl Compiler {
    fn probe(path: OsString) -> Option<Compiler> {
        let output = Command::new(&path).arg("--version").output().ok()?;
        output
            .status
            .success()
            .then(|| Compiler { path, version: String::from_utf8_lossy(&output.stdout).into_owned() })
    }

    /// Whether a program can be linked with these flags: not every installation has every sanitizer.
    pub fn links(&self, flags: &[&str]) -> bool {
        let build = Build { file_name: "probe", sources: &["probe.cpp"], compile_flags: flags, link_flags: &[] };
        self.build(&build).is_ok()
    }

    /// The file, built now or earlier. An error carries what the compiler printed.
    pub fn build(&self, build: &Build) -> Result<PathBuf> {
        // One at a time in a process, so that nothing is compiled twice; the processes do not wait for each other.
        static BUILDING: Mutex<()> = Mutex::new(());
        let _building = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
        let objects = self.compile_all(build)?;
        let mut link_flags: Vec<OsString> = build.compile_flags.iter().map(OsString::from).collect();
        link_flags.extend_from_slice(build.link_flags);
        let key = hash_of(&(&self.path, &self.version, &objects, &link_flags));
        let folder = cache_dir()?.join(format!("{key:016x}"));
        let file = folder.join(build.file_name);
        if file.exists() {
            return Ok(file);
        }
        fs::create_dir_all(&folder)?;
        self.run_to(&file, |command| {
            command.args(&objects).args(&link_flags);
        })
        .with_context(|| format!("linking {}", build.file_name))?;
        Ok(file)
    }

    fn compile_all(&self, build: &Build) -> Result<Vec<PathBuf>> {
        let next = AtomicUsize::new(0);
        let objects = Mutex::new(BTreeMap::new());
        let workers = thread::available_parallelism().map_or(1, usize::from);
        thread::scope(|scope| {
            for _ in 0..workers.min(build.sources.len()) {
                scope.spawn(|| loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(source) = build.sources.get(index) else {
                        break;
                    };
                    let object = self.compile(source, build.compile_flags);
                    objects.lock().expect("no worker panics").insert(index, object);
                });
            }
        });
        objects.into_inner().expect("no worker panics").into_values().collect()
    }

    fn compile(&self, source: &str, flags: &[&str]) -> Result<PathBuf> {
        let source = double_dir().join(source);
        let mut texts = BTreeMap::new();
        read_with_includes(&source, &mut texts)?;
        let key = hash_of(&(&self.path, &self.version, FLAGS, flags, &source, &texts));
        let stem = source.file_stem().context("a source has a name")?.to_string_lossy();
        let object = cache_dir()?.join(format!("{stem}-{key:016x}.o"));
        if !object.exists() {
            self.run_to(&object, |command| {
                command.args(FLAGS).args(flags).arg("-I").arg(double_dir()).arg("-c").arg(&source);
            })
            .with_context(|| format!("compiling {}", source.display()))?;
        }
        Ok(object)
    }

    /// Runs the compiler with its output going to a file of its own, then moves that into place: another test binary
    /// sees the whole file or none.
    fn run_to(&self, output: &Path, arguments: impl FnOnce(&mut Command)) -> Result<()> {
        let partial = partial_name(output);
        let mut command = Command::new(&self.path);
        arguments(&mut command);
        let result = command.arg("-o").arg(&partial).output()?;
        let printed = String::from_utf8_lossy(&result.stderr).into_owned();
        ensure!(result.status.success(), "{command:?} failed:\n{printed}");
        if !printed.trim().is_empty() {
            eprintln!("{printed}"); // warnings
        }
        fs::rename(&partial, output)?;
        Ok(())
    }
}

/// A linker flag under which a shared library does not export these symbols.
pub fn hide_symbols(symbols: &[&str]) -> Result<OsString> {
    let script = match symbols {
        [] => "{ global: *; };".to_owned(),
        _ => format!("{{ global: *; local: {}; }};", symbols.join("; ")),
    };
    let path = cache_dir()?.join(format!("exports-{:016x}.map", hash_of(&script)));
    if !path.exists() {
        write_whole(&path, script.as_bytes())?;
    }
    let mut flag = OsString::from("-Wl,--version-script=");
    flag.push(path);
    Ok(flag)
}

/// Another test binary sees the whole file or none.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let partial = partial_name(path);
    fs::write(&partial, bytes)?;
    fs::rename(partial, path)
}

fn partial_name(path: &Path) -> PathBuf {
    static UNIQUE: AtomicUsize = AtomicUsize::new(0);
    let unique = UNIQUE.fetch_add(1, Ordering::Relaxed);
    path.with_extension(format!("{}-{unique}.partial", std::process::id()))
}

fn cache_dir() -> io::Result<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("host-kernels");
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

fn hash_of(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// The text of a source and of every file it includes by a quoted name. Names that are not found beside the including
/// file or in `tests/double` belong to another branch of an #if.
fn read_with_includes(path: &Path, texts: &mut BTreeMap<PathBuf, String>) -> Result<()> {
    if texts.contains_key(path) {
        return Ok(());
    }
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let names: Vec<String> = text
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("#include \""))
        .filter_map(|rest| rest.split('"').next())
        .map(String::from)
        .collect();
    texts.insert(path.to_path_buf(), text);
    let Some(folder) = path.parent() else {
        bail!("{} has no folder", path.display());
    };
    for name in names {
        let candidates = [folder.join(&name), double_dir().join(&name)];
        if let Some(found) = candidates.iter().find(|candidate| candidate.exists()) {
            read_with_includes(&fs::canonicalize(found)?, texts)?;
        }
    }
    Ok(())
}
