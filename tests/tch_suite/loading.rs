//! When libtorch decides whether there is CUDA, and what `load_cuda` makes of that. The answer is kept for the life of a
//! process, so each test runs this program again, with a list of steps; a small library plays `libtorch_cuda.so`.

use crate::support::toolchain::{self, Build};
use gradclip::Error;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};
use tch::{Device, Kind, Tensor};

/// The steps of a process that a test started.
const STEPS: &str = "GRADCLIP_TCH_STEPS";

/// Before `main`, and so before any test: each may be the first, and most do what makes libtorch decide.
#[used]
#[link_section = ".init_array"]
static LOAD_CUDA: extern "C" fn() = {
    extern "C" fn load_cuda() {
        if env::var_os(STEPS).is_none() {
            let _ = gradclip::tch::load_cuda(); // where it is missing, the tests on a GPU say so
        }
    }
    load_cuda
};

/// Does one step, and says what came of it.
fn step(name: &str) -> String {
    match name {
        "backward" => {
            let weight = Tensor::ones([1], (Kind::Float, Device::Cpu)).set_requires_grad(true);
            weight.sum(Kind::Float).backward();
            "done".into()
        }
        "seed" => {
            tch::manual_seed(1);
            "done".into()
        }
        "available" => tch::Cuda::is_available().to_string(),
        "known" => tch::utils::has_cudart().to_string(),
        "load" => match gradclip::tch::load_cuda() {
            Ok(()) => "ok".into(),
            Err(Error::LibtorchCudaTooLate) => "too late".into(),
            Err(Error::LibtorchCudaMissing { reason }) => format!("missing: {reason}"),
            Err(other) => format!("{other:?}"),
        },
        "move" => {
            let moved = Tensor::ones([1], (Kind::Float, Device::Cpu)).f_to_device(Device::Cuda(0));
            moved.unwrap_err().to_string().lines().next().unwrap().into()
        }
        path => {
            // SAFETY: the library above.
            let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.unwrap();
            std::mem::forget(library);
            "opened".into()
        }
    }
}

#[test]
#[ignore = "the program that the tests below start"]
fn steps() {
    let Ok(steps) = env::var(STEPS) else { return };
    for name in steps.split(',') {
        println!("\nstep: {}", step(name));
    }
}

/// What came of each step in a process of its own, with these variables.
fn run(steps: &[&str], variables: &[(&str, OsString)]) -> Vec<String> {
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", "loading::steps", "--ignored", "--nocapture"])
        .env(STEPS, steps.join(","))
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{steps:?}: {printed}{}", String::from_utf8_lossy(&output.stderr));
    let results: Vec<String> = printed.lines().filter_map(|line| line.strip_prefix("step: ")).map(Into::into).collect();
    assert_eq!(results.len(), steps.len(), "{printed}");
    results
}

/// The library that plays libtorch_cuda.so. None, with the reason printed, where it cannot be built.
fn library() -> Option<PathBuf> {
    const SOURCE: &str = "libtorch_cuda.cpp";
    let Some(compiler) = toolchain::compiler() else {
        toolchain::skip("no C++ compiler was found ($CXX, c++, g++, clang++)");
        return None;
    };
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let torch = maps.lines().filter_map(|line| line.find('/').map(|at| &line[at..]));
    let torch = Path::new(torch.into_iter().find(|path| path.ends_with("/libtorch_cpu.so")).unwrap());
    let include = torch.parent().unwrap().with_file_name("include");
    if !include.join("ATen").is_dir() || !toolchain::double_dir().join(SOURCE).is_file() {
        toolchain::skip("the headers of libtorch, or the sources of this project, are not here");
        return None;
    }
    let build = Build {
        file_name: "libtorch_cuda.so",
        sources: &[SOURCE],
        compile_flags: &["-O1", "-fPIC", "-isystem", include.to_str().unwrap()],
        link_flags: &[
            "-shared".into(),
            "-Wl,-soname,libtorch_cuda.so".into(),
            "-Wl,--no-as-needed".into(),
            torch.into(),
            torch.with_file_name("libc10.so").into(),
        ],
    };
    Some(compiler.build(&build).expect("the library builds"))
}

/// `LD_LIBRARY_PATH` with that folder first.
fn path_with(library: &Path) -> (&'static str, OsString) {
    const NAME: &str = "LD_LIBRARY_PATH";
    let others = env::var_os(NAME).unwrap_or_default();
    let folders = [library.parent().unwrap().to_path_buf()].into_iter().chain(env::split_paths(&others));
    (NAME, env::join_paths(folders).unwrap())
}

#[test]
fn libtorch_decides_at_its_first_look_and_the_library_has_to_be_there() {
    let Some(library) = library() else { return };
    let path = [path_with(&library)];
    for look in ["backward", "seed", "available", "known"] {
        let late = run(&[look, "load", "known", "load"], &path);
        assert_eq!(late[1..], ["too late", "false", "too late"], "{look}");
        let early = run(&["load", look, "known", "load"], &path);
        assert_eq!((&*early[0], &early[2..]), ("ok", &["true".into(), "ok".into()][..]), "{look}");
    }
    let preloaded = [("LD_PRELOAD", library.into())];
    assert_eq!(run(&["backward", "known"], &preloaded), ["done", "true"]);
}

#[test]
fn a_library_that_is_missing_decides_nothing() {
    let Some(library) = library() else { return };
    if run(&["load"], &[])[0] == "ok" {
        return toolchain::skip("libtorch has its CUDA library here");
    }
    let results = run(&["load", library.to_str().unwrap(), "backward", "known"], &[]);
    assert!(results[0].starts_with("missing: libtorch_cuda.so"), "{results:?}");
    assert_eq!(results[1..], ["opened", "done", "true"]);
}

/// By this error of libtorch's, the documentation of the adapter says, a user knows that the library is not there.
#[test]
fn without_its_library_libtorch_cannot_move_a_tensor_to_cuda() {
    if run(&["load"], &[])[0] == "ok" {
        return toolchain::skip("libtorch has its CUDA library here");
    }
    let said = run(&["move"], &[]);
    assert!(
        said[0].contains("Could not run") && said[0].contains("with arguments from the 'CUDA' backend"),
        "{said:?}"
    );
}
