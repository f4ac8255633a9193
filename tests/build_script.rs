//! What build.rs embeds: the choice between nvcc and the snapshot, and what is said when neither will do.

#[path = "../build/ptx.rs"]
mod ptx;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};

const KERNELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/kernels");

/// One test at a time: a program that one thread has just written cannot be started while another thread forks.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A folder of one test's own, with a copy of kernels/ and an environment that holds nothing else.
struct Bench {
    _turn: MutexGuard<'static, ()>,
    folder: PathBuf,
    env: BTreeMap<String, OsString>,
}

impl Bench {
    fn new(test: &str) -> Result<Self> {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("build_script").join(test);
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        for (from, to) in [(KERNELS.to_owned(), "kernels"), (format!("{KERNELS}/prebuilt"), "kernels/prebuilt")] {
            let to = folder.join(to);
            fs::create_dir_all(&to)?;
            for entry in fs::read_dir(&from).with_context(|| from.clone())? {
                let path = entry?.path();
                if let (true, Some(name)) = (path.is_file(), path.file_name()) {
                    fs::copy(&path, to.join(name))?;
                }
            }
        }
        fs::create_dir_all(folder.join("out"))?;
        Ok(Self { _turn: turn, folder, env: BTreeMap::new() })
    }

    fn kernels(&self) -> PathBuf {
        self.folder.join("kernels")
    }

    fn set(&mut self, variable: &str, value: impl Into<OsString>) {
        self.env.insert(variable.to_owned(), value.into());
    }

    fn embed(&self) -> Result<ptx::Embedded> {
        let env = |name: &str| self.env.get(name).cloned();
        ptx::embed(&self.kernels(), &self.folder.join("out"), &self.folder.join("cuda"), &env)
    }

    fn find_nvcc(&self) -> Result<Option<PathBuf>> {
        ptx::find_nvcc(&self.folder.join("cuda"), &|name| self.env.get(name).cloned())
    }

    /// The whole text of the error of [`Bench::embed`].
    fn refusal(&self) -> String {
        self.embed().err().map(|error| format!("{error:?}")).unwrap_or_else(|| "no error".to_owned())
    }

    fn generated(&self) -> Result<String> {
        Ok(fs::read_to_string(self.folder.join("out/ptx.rs"))?)
    }

    /// A program at `path` in the folder, run by sh.
    fn program(&self, path: &str, script: &str) -> Result<PathBuf> {
        let path = self.folder.join(path);
        fs::create_dir_all(path.parent().context("a path in a folder")?)?;
        fs::write(&path, format!("#!/bin/sh\n{script}\n"))?;
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        Ok(path)
    }

    fn change_a_kernel(&self) -> Result<()> {
        let path = self.kernels().join("abi.cuh");
        let text = fs::read_to_string(&path)?;
        Ok(fs::write(path, text.replacen("kPackBytes = 16", "kPackBytes = 8", 1))?)
    }
}

fn contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
}

/// A file name that find_nvcc takes for nvcc on this system.
fn nvcc_in(folder: &str) -> String {
    format!("{folder}/nvcc{}", std::env::consts::EXE_SUFFIX)
}

/// An nvcc 99.1 that notes its arguments and writes a kernel with the name of the file, which says `ptx`.
#[cfg(unix)]
fn working_nvcc(ptx: &str) -> String {
    format!(
        r#"[ "$1" = --version ] && echo "Cuda compilation tools, release 99.1, V99.1.5" && exit
echo "$@" >> "$(dirname "$0")/arguments"
while [ "$1" != -o ]; do shift; done
echo ".visible .entry $(basename "$2" .ptx)() {{ {ptx} }}" > "$2""#
    )
}

#[test]
fn committed_snapshot_fits_the_kernels() -> Result<()> {
    let stems: Vec<_> = ptx::read_snapshot(Path::new(KERNELS))?.into_iter().map(|(stem, _)| stem).collect();
    let expected = [
        "clamp",
        "clip_coef",
        "norm_partials",
        "norm_partials_p",
        "scale",
        "scale_into",
        "scoped",
        "scoped_clamp",
        "scoped_p",
        "scoped_stats",
        "shards",
    ];
    assert_eq!(stems, expected);
    Ok(())
}

#[test]
fn hash_covers_names_and_contents_but_not_line_ends() -> Result<()> {
    let bench = Bench::new("hash")?;
    let hash = || ptx::sources_sha256(&bench.kernels());
    let first = hash()?;
    assert_eq!(first.len(), 64);

    let header = bench.kernels().join("abi.cuh");
    let text = fs::read_to_string(&header)?;
    fs::write(&header, text.replace('\n', "\r\n"))?;
    assert_eq!(hash()?, first, "line ends");
    fs::write(bench.kernels().join("README.md"), "no source")?;
    assert_eq!(hash()?, first, "other files");

    fs::write(&header, format!("{text} "))?;
    assert_ne!(hash()?, first, "contents");
    fs::write(&header, &text)?;
    fs::rename(&header, bench.kernels().join("abj.cuh"))?;
    assert_ne!(hash()?, first, "names");
    Ok(())
}

#[test]
fn without_nvcc_the_snapshot_is_embedded() -> Result<()> {
    let bench = Bench::new("snapshot")?;
    let embedded = bench.embed()?;
    assert!(embedded.nvcc.is_none() && embedded.warning.is_none());
    let generated = bench.generated()?;
    contains(&generated, &["COMPILER: &str = \"snapshot\"", "(\"scale_any\", &[", "/snapshot/scale_any.ptx"]);
    // A module for each kernel: the file up to the first, and that one.
    for (stem, kernels) in [("scale_into", &["scale_into"][..]), ("scale", &["scale", "scale_any"])] {
        let whole = fs::read_to_string(format!("{KERNELS}/prebuilt/{stem}.ptx"))?;
        for kernel in kernels {
            let mut parts = whole.split(".visible .entry ");
            let (head, own) = (parts.next(), parts.find(|part| part.starts_with(&format!("{kernel}("))));
            let expected = format!("{}.visible .entry {}", head.context("a head")?, own.context("a kernel")?);
            let module = fs::read_to_string(bench.folder.join(format!("out/snapshot/{kernel}.ptx")))?;
            let code = |text: &str| -> Vec<String> {
                let lines = text.lines().filter(|line| !line.is_empty() && !line.trim_start().starts_with("//"));
                lines.map(str::to_owned).collect()
            };
            assert!(code(&module) == code(&expected), "{kernel} is otherwise");
            assert_eq!(module.matches(".entry").count(), 1, "{kernel}");
        }
    }
    Ok(())
}

/// What stands between kernels belongs to all of them, and braces in comments to nobody.
#[test]
fn each_kernel_becomes_a_module_with_all_that_is_no_kernel() {
    let [head, helper, tail] = [".version 8.0\n", ".func helper()\n{\n}\n", ".global .u32 last;\n"];
    let first = ".visible .entry first(\n\t.param .u64 a\n)\n{ // callseq 0, {\n\t{\n\tret;\n\t}\n}\n";
    let second = ".visible .entry second()\n.maxntid 256\n{ ret; }\n";
    let modules = ptx::kernels_of(&[head, first, helper, second, tail].concat());
    let expected = [("first", [head, first, helper, tail]), ("second", [head, helper, second, tail])];
    assert_eq!(modules, expected.map(|(symbol, parts)| (symbol.to_owned(), parts.concat())));
    let touching = ptx::kernels_of(&[head, first, second].concat());
    assert_eq!(touching[1].1, [head, second].concat());
    assert!(ptx::kernels_of(head).is_empty());
}

#[cfg(unix)]
#[test]
fn ptx_without_a_kernel_is_refused() -> Result<()> {
    let bench = Bench::new("no_kernel")?;
    bench.program("cuda/bin/nvcc", &working_nvcc("").replace(".visible .entry", ".func"))?;
    contains(&bench.refusal(), &["the PTX of kernels/clamp.cu has no `.visible .entry`"]);
    Ok(())
}

#[test]
fn snapshot_of_other_sources_is_refused() -> Result<()> {
    let bench = Bench::new("stale")?;
    bench.change_a_kernel()?;
    contains(
        &bench.refusal(),
        &["prebuilt/clamp.ptx was not made from the sources", "scripts/ptx.py", "GRADCLIP_NVCC"],
    );
    fs::remove_file(bench.kernels().join("prebuilt/clamp.ptx"))?;
    contains(&bench.refusal(), &["no PTX snapshot of kernels/clamp.cu", "scripts/ptx.py"]);
    Ok(())
}

#[test]
fn nvcc_is_looked_for_in_the_documented_order() -> Result<()> {
    let mut bench = Bench::new("order")?;
    assert_eq!(bench.find_nvcc()?, None);
    // From the last resort to the first choice: each one found wins over all before it.
    for (variable, value, path) in [
        ("VIRTUAL_ENV", "venv", nvcc_in("venv/lib/python3.11/site-packages/nvidia/cu13/bin")),
        ("", "", nvcc_in("cuda/bin")),
        ("CUDA_ROOT", "root", nvcc_in("root/bin")),
        ("CUDA_PATH", "path", nvcc_in("path/bin")),
        ("CUDA_HOME", "home", nvcc_in("home/bin")),
        ("PATH", "tools", nvcc_in("tools")),
        ("NVCC", "second/nvcc-12", "second/nvcc-12".to_owned()),
        ("GRADCLIP_NVCC", "first/nvcc-13", "first/nvcc-13".to_owned()),
    ] {
        let nvcc = bench.program(&path, "")?;
        if !variable.is_empty() {
            bench.set(variable, bench.folder.join(value));
        }
        assert_eq!(bench.find_nvcc()?, Some(nvcc.canonicalize()?), "{variable}");
    }
    Ok(())
}

#[test]
fn named_nvcc_must_exist() -> Result<()> {
    let mut bench = Bench::new("named")?;
    bench.program("tools/nvcc-12", "")?;
    bench.set("PATH", bench.folder.join("tools"));
    bench.set("NVCC", "nvcc-12");
    assert_eq!(bench.find_nvcc()?, Some(bench.folder.join("tools/nvcc-12").canonicalize()?));
    bench.set("GRADCLIP_NVCC", "elsewhere/nvcc");
    contains(&bench.refusal(), &["GRADCLIP_NVCC is \"elsewhere/nvcc\": no such file"]);
    Ok(())
}

#[test]
fn environment_that_makes_no_sense_is_refused() -> Result<()> {
    let mut bench = Bench::new("environment")?;
    bench.set("GRADCLIP_PTX", "ptx");
    contains(&bench.refusal(), &["GRADCLIP_PTX is \"ptx\"", "`nvcc` or `snapshot`"]);
    bench.set("GRADCLIP_PTX", "nvcc");
    contains(&bench.refusal(), &["there is no nvcc in PATH", "Set GRADCLIP_NVCC"]);
    Ok(())
}

#[cfg(unix)]
#[test]
fn linked_nvcc_is_called_where_it_lies() -> Result<()> {
    let mut bench = Bench::new("link")?;
    let real = bench.program("toolkit/bin/nvcc", "")?;
    let wrapper = bench.program("ccache/ccache", "")?;
    fs::create_dir_all(bench.folder.join("tools"))?;
    let link = bench.folder.join("tools/nvcc");
    bench.set("PATH", bench.folder.join("tools"));
    std::os::unix::fs::symlink(&real, &link)?;
    assert_eq!(bench.find_nvcc()?, Some(real.canonicalize()?));
    fs::remove_file(&link)?;
    std::os::unix::fs::symlink(wrapper, &link)?;
    assert_eq!(bench.find_nvcc()?, Some(link));
    Ok(())
}

#[cfg(unix)]
#[test]
fn ptx_of_nvcc_comes_first_and_the_snapshot_second() -> Result<()> {
    let mut bench = Bench::new("both")?;
    let nvcc = bench.program("cuda/bin/nvcc", &working_nvcc("fresh"))?;
    bench.set("GRADCLIP_CUDA_ARCH", "sm_90");
    let embedded = bench.embed()?;
    assert_eq!((embedded.nvcc, embedded.warning), (Some(nvcc.canonicalize()?), None));
    let generated = bench.generated()?;
    contains(&generated, &["COMPILER: &str = \"nvcc 99.1\""]);
    let place = |path: &str| generated.find(path).context("not in ptx.rs").map(|at| (at, path.to_owned()));
    assert!(place("/nvcc/scale.ptx")? < place("/snapshot/scale.ptx")?, "{generated}");
    assert_eq!(fs::read_to_string(bench.folder.join("out/nvcc/scale.ptx"))?, ".visible .entry scale() { fresh }\n");
    let arguments = fs::read_to_string(bench.folder.join("cuda/bin/arguments"))?;
    contains(&arguments, &["-ptx -arch=compute_90 -std=c++17 --fmad=false --ftz=false --prec-div=true"]);

    for variable in ["GRADCLIP_PTX", "DOCS_RS"] {
        bench.env.clear();
        bench.set(variable, "snapshot");
        assert!(bench.embed()?.nvcc.is_none(), "{variable}");
        contains(&bench.generated()?, &["COMPILER: &str = \"snapshot\""]);
    }
    bench.env.clear();
    bench.set("GRADCLIP_CUDA_ARCH", "sm_61");
    contains(&bench.refusal(), &["GRADCLIP_CUDA_ARCH is \"sm_61\"", "from compute_75 on"]);
    Ok(())
}

#[cfg(unix)]
#[test]
fn with_nvcc_a_stale_snapshot_is_left_out_with_a_warning() -> Result<()> {
    let bench = Bench::new("stale_beside_nvcc")?;
    bench.program("cuda/bin/nvcc", &working_nvcc("fresh"))?;
    bench.change_a_kernel()?;
    let warning = bench.embed()?.warning.context("no warning")?;
    contains(&warning, &["older drivers refuse", "scripts/ptx.py"]);
    assert!(!bench.generated()?.contains("/snapshot/"));
    Ok(())
}

#[cfg(unix)]
#[test]
fn failing_nvcc_says_why_and_what_to_do() -> Result<()> {
    let bench = Bench::new("failing")?;
    let nvcc = bench.program(
        "cuda/bin/nvcc",
        "[ \"$1\" = --version ] && echo 'release 99.1, V99.1.5' && exit\necho 'unsupported GNU version' >&2\nexit 1",
    )?;
    let path = nvcc.canonicalize()?;
    contains(
        &bench.refusal(),
        &[
            "compiling kernels/clamp.cu",
            "unsupported GNU version",
            &path.to_string_lossy(),
            "exit status: 1",
            "GRADCLIP_NVCC",
            "NVCC_CCBIN",
            "GRADCLIP_PTX=snapshot",
        ],
    );
    bench.program("cuda/bin/nvcc", "echo broken >&2; exit 1")?;
    contains(&bench.refusal(), &["failed (exit status: 1)", "broken"]);
    Ok(())
}

#[cfg(unix)]
#[test]
fn fast_math_is_refused() -> Result<()> {
    let bench = Bench::new("fast_math")?;
    bench.program("cuda/bin/nvcc", &working_nvcc("mul.ftz.f32 a, b, c;"))?;
    contains(&bench.refusal(), &["flush to zero", "NVCC_APPEND_FLAGS"]);
    Ok(())
}
