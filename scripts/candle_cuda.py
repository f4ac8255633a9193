#!/usr/bin/env python3
"""Builds and tests the feature candle-cuda with no CUDA toolkit and no GPU.

    scripts/candle_cuda.py check    clippy, warnings denied
    scripts/candle_cuda.py test     tests/candle_cuda.rs on the driver double, and the tests of tests/candle_on_gpu.rs that
                                    need no GPU
    scripts/candle_cuda.py gpu-programs FOLDER
                                    builds programs with candle's own kernels into FOLDER, for a machine with a GPU:
                                    candle_on_gpu (the tests), exploding_rnn_gpu and transformer_lm_gpu (the examples)
    scripts/candle_cuda.py kernels PATH
                                    checks that the programs in a folder, or in a tar archive, contain those kernels

For check and test, tests/candle_cuda/nvcc stands in for the nvcc that candle asks for, and makes empty files. For
gpu-programs a real nvcc comes from packages (installed once, 271 MB) and compiles everything that candle loads as
PTX. It takes its headers from candle, and the PTX is for compute capability 9.0 alone (H100, H200), because candle's
build adds the "a" of sm_90a. Left out is libmoe, candle's library of quantized and mixture-of-experts kernels, which no
program here calls. It has 15 source files, which take most of the compile time; the object of the first one (q2_k) has
3.7 MB, 1.0 MB compressed. A call into libmoe ends the program.

The libraries that candle is linked to are made here. For test, the driver is the double, and each function of the others
(and each that the double lacks) does nothing and says success, or for the driver "not supported". For gpu-programs they
are only linked against, under the names that they have in CUDA 13. On the GPU machine, libcublas.so.13 with its
libcublasLt.so.13, and libcurand.so.10 must be on LD_LIBRARY_PATH; those that PyTorch brings will do.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

from cuda_packages import CANDLE_NVCC, ROOT, fail, find, install, target_dir

STUBS = target_dir() / "candle-cuda"
REAL_NAMES = target_dir() / "candle-cuda-real-names"
SONAMES = {"cublas": "libcublas.so.13", "cublasLt": "libcublasLt.so.13", "curand": "libcurand.so.10",
           "nvrtc": "libnvrtc.so.13", "cudart": "libcudart.so.13", "cuda_driver": "libcuda.so.1"}
# Library, the crate whose sources declare its functions, where, what they are called, and what they answer.
NOT_SUPPORTED = 801
LIBRARIES = (
    ("cublas", "cudarc", "src/cublas/sys", r"cublas\w+", 0),
    ("cublasLt", "cudarc", "src/cublaslt/sys", r"cublasLt\w+", 0),
    ("curand", "cudarc", "src/curand/sys", r"curand\w+", 0),
    ("nvrtc", "cudarc", "src/nvrtc/sys", r"nvrtc\w+", 0),
    ("moe_kernels", "candle-kernels", "src/ffi.rs", r"\w+", 0),
)
ENVIRONMENT = os.environ | {
    "PATH": f"{ROOT / 'tests/candle_cuda'}:{os.environ['PATH']}",
    "CUDA_COMPUTE_CAP": "80",
    "GRADCLIP_PTX": "snapshot",
}

COMPUTE_CAP = "90"
PROGRAMS = {"candle_on_gpu": "candle_on_gpu", "exploding_rnn": "exploding_rnn_gpu", "transformer_lm": "transformer_lm_gpu"}
# Of each module of candle-kernels a few kernels that a training loop launches.
KERNELS = {
    "affine": ("affine_f32",),
    "binary": ("badd_f32", "bsub_f32", "bmul_f32", "bdiv_f32"),
    "cast": ("cast_f32_u32", "cast_u8_f32"),
    "fill": ("copy2d_f32", "const_set_f32"),
    "indexing": ("is_u32_f32", "gather_u32_f32", "ia_u32_f32", "sa_u32_f32"),
    "reduce": ("fast_sum_f32", "fast_max_f32"),
    "ternary": ("where_u8_f32",),
    "unary": ("ucopy_f32", "utanh_f32", "uexp_f32", "ulog_f32", "usqr_f32", "usqrt_f32", "urelu_f32"),
}


def run(*command, **environment):
    print("+", " ".join(command), flush=True)
    if subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | environment).returncode != 0:
        fail(f"{' '.join(command)} failed")


def crate_dir(name):
    metadata = subprocess.run(["cargo", "metadata", "--format-version=1", "--features=candle-cuda"], cwd=ROOT,
                              check=True, capture_output=True, text=True).stdout
    match = re.search(r'"manifest_path":"([^"]*/%s-\d[^/"]*)/Cargo.toml"' % re.escape(name), metadata)
    return Path(match[1]) if match else fail(f"cargo does not know the crate {name}")


def functions(source, pattern):
    files = sorted(source.rglob("*.rs")) if source.is_dir() else [source]
    texts = "".join(path.read_text() for path in files)
    return sorted(set(re.findall(r"\bfn (%s)\s*\(" % pattern, texts)))


def write_stub(folder, name, symbols, answer):
    source = folder / f"{name}.c"
    source.write_text("".join(f"int {symbol}(void) {{ return {answer}; }}\n" for symbol in symbols))
    return [os.environ.get("CC", "cc"), "-fPIC", "-w", "-fno-builtin", str(source)]


def build_stub(name, symbols, answer, folder=STUBS, soname=None):
    command = write_stub(folder, name, symbols, answer)
    subprocess.run([*command, "-shared", f"-Wl,-soname,{soname or f'lib{name}.so'}", "-o", str(folder / f"lib{name}.so")],
                   check=True)


def build_double():
    """The driver double, as the tests build it."""
    printed = subprocess.run(["cargo", "test", "--quiet", "--test", "driver_double", "the_library", "--", "--nocapture"],
                             cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = re.search(r"^/.*libcuda\.so$", printed, re.MULTILINE)
    return Path(found[0]) if found else fail("the driver double was not built")


def build_libraries(double):
    STUBS.mkdir(parents=True, exist_ok=True)
    for name, crate, folder, pattern, answer in LIBRARIES:
        build_stub(name, functions(crate_dir(crate) / folder, pattern), answer)
    build_stub("cudart", [], 0)
    exported = subprocess.run(["nm", "-D", "--defined-only", str(double)], check=True, capture_output=True, text=True)
    exported = {line.split()[-1] for line in exported.stdout.splitlines()}
    rest = [name for name in functions(crate_dir("cudarc") / "src/driver/sys", r"cu[A-Z]\w+") if name not in exported]
    build_stub("cuda_rest", rest, NOT_SUPPORTED)
    # What -lcuda finds: the double, what it lacks, and candle's own functions that the empty archive lacks.
    (STUBS / "libcuda.so").write_text(f"INPUT({double} {STUBS}/libcuda_rest.so {STUBS}/libmoe_kernels.so)\n")


def build_names():
    """Libraries that have the names of the real ones, to link against, and nothing else of them."""
    REAL_NAMES.mkdir(parents=True, exist_ok=True)
    for name, crate, folder, pattern, answer in LIBRARIES[:-1]:
        build_stub(name, functions(crate_dir(crate) / folder, pattern), answer, REAL_NAMES, SONAMES[name])
    build_stub("cudart", [], 0, REAL_NAMES, SONAMES["cudart"])
    driver = functions(crate_dir("cudarc") / "src/driver/sys", r"cu[A-Z]\w+")
    build_stub("cuda_driver", driver, NOT_SUPPORTED, REAL_NAMES, SONAMES["cuda_driver"])
    # What the library that is left out has becomes part of the program.
    moe, crate, folder, pattern, _ = LIBRARIES[-1]
    source = REAL_NAMES / f"{moe}.c"
    names = functions(crate_dir(crate) / folder, pattern)
    source.write_text("".join(f"void {name}(void) {{ __builtin_trap(); }}\n" for name in names))
    subprocess.run([os.environ.get("CC", "cc"), "-fPIC", "-w", "-c", str(source), "-o", str(REAL_NAMES / f"{moe}.o")],
                   check=True)
    (REAL_NAMES / "libcuda.so").write_text(f"INPUT({REAL_NAMES}/libcuda_driver.so {REAL_NAMES}/{moe}.o)\n")


def build_gpu_programs(to):
    to.mkdir(parents=True, exist_ok=True)  # before minutes of work that need it
    build_names()
    nvcc = find(install(CANDLE_NVCC, target_dir() / "cuda-packages"), "cu13/bin/nvcc").resolve()
    environment = ENVIRONMENT | {
        "CANDLE_PTX_BY": str(nvcc),
        "NVCC_CCBIN": os.environ.get("NVCC_CCBIN") or shutil.which(os.environ.get("CXX", "c++")) or fail("no C++ compiler"),
        "CUDA_COMPUTE_CAP": COMPUTE_CAP,
        "LIBRARY_PATH": str(REAL_NAMES),
        # Cargo does not see that the kernels are others than for check and test, so they have a folder of their own.
        "CARGO_TARGET_DIR": str(target_dir() / "candle-gpu"),
        "CARGO_PROFILE_RELEASE_DEBUG": "0",
        "CARGO_PROFILE_RELEASE_STRIP": "symbols",
    }
    environment.pop("NVCC", None)
    command = ["cargo", "build", "--quiet", "--release", "--message-format=json", "-p", "gradclip", "-p", "transformer_lm",
               "--features", "gradclip/candle-cuda,transformer_lm/candle-cuda", "--test", "candle_on_gpu",
               "--example", "exploding_rnn", "--bin", "transformer_lm"]
    print("+", " ".join(command), flush=True)
    built = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if built.returncode != 0:
        for line in built.stdout.splitlines():
            print(json.loads(line).get("message", {}).get("rendered", ""), end="", file=sys.stderr)
        fail("the programs were not built")
    for message in map(json.loads, built.stdout.splitlines()):
        if message.get("executable"):
            shutil.copy(message["executable"], to / PROGRAMS[message["target"]["name"]])
    check_kernels(to)


def program_files(path):
    """The programs below a folder, or in a tar archive: name and bytes."""
    wanted = set(PROGRAMS.values())
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.name in wanted and file.is_file():
                yield file.name, file.read_bytes()
    elif path.is_file():
        with tarfile.open(path) as archive:
            for member in archive:
                if Path(member.name).name in wanted and member.isfile():
                    yield Path(member.name).name, archive.extractfile(member).read()


def targets_of_kernels(program):
    """For each kernel in a program, the GPU that its PTX is for. The PTX lies there as text."""
    found, target = {}, None
    for match in re.finditer(rb"^\.target (\w+)|^\.visible \.entry (\w+)\(", program, re.MULTILINE):
        target = match[1] or target
        if match[2]:
            found[match[2].decode()] = (target or b"").decode()
    return found


def check_kernels(path):
    """That each program has the kernels of candle that it launches, as PTX for the GPU it is meant for."""
    programs = dict(program_files(path))
    defects = [f"no {name} in {path}" for name in sorted(set(PROGRAMS.values()) - set(programs))]
    for name, program in programs.items():
        targets = targets_of_kernels(program)
        for module, kernels in KERNELS.items():
            missing = [kernel for kernel in kernels if not targets.get(kernel, "").startswith(f"sm_{COMPUTE_CAP}")]
            if missing:
                defects.append(f"{name} lacks {', '.join(missing)} of candle's {module}.ptx for sm_{COMPUTE_CAP}")
        of_candle = sum(target.startswith(f"sm_{COMPUTE_CAP}") for target in targets.values())
        print(f"{name}: {of_candle} kernels of candle, {len(targets) - of_candle} others; {len(program) / 1e6:.1f} MB, "
              f"{len(zlib.compress(program, 6)) / 1e6:.1f} MB compressed")
    if defects:
        fail("\n".join(["candle's kernels are missing", *defects]))


def main():
    if sys.argv[1:] == ["check"]:
        for package in ("--all-targets", "--package=transformer_lm"):
            run("cargo", "clippy", "--quiet", "--features", "candle-cuda", package, "--", "-D", "warnings")
    elif sys.argv[1:] == ["test"]:
        double = build_double()
        build_libraries(double)
        test = ("cargo", "test", "--quiet", "--release", "--features", "candle-cuda", "--test")
        environment = {"LIBRARY_PATH": str(STUBS), "LD_LIBRARY_PATH": f"{double.parent}:{STUBS}",
                       "GRADCLIP_REQUIRE_HOST_KERNELS": "1"}
        run(*test, "candle_cuda", **environment)
        run(*test, "candle_on_gpu", "--", "on_the_cpu", **environment)
    elif sys.argv[1:2] == ["gpu-programs"] and len(sys.argv) == 3:
        build_gpu_programs(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["kernels"] and len(sys.argv) == 3:
        check_kernels(Path(sys.argv[2]))
    else:
        fail("say check, test, gpu-programs FOLDER, or kernels PATH")


if __name__ == "__main__":
    main()
