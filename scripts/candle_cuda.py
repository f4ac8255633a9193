#!/usr/bin/env python3
"""Builds and tests the feature candle-cuda with no CUDA toolkit and no GPU: type checks, links, starts, and clips candle
tensors that lie in the memory of the driver double.

    scripts/candle_cuda.py check    clippy, warnings denied
    scripts/candle_cuda.py test     tests/candle_cuda.rs on the driver double; then without any driver, where the program
                                    must not start candle's device but say why
    scripts/candle_cuda.py gpu-test FILE
                                    builds tests/candle_on_gpu.rs into FILE, for a machine with a GPU and the libraries of
                                    CUDA 13 (those that PyTorch brings will do). candle's own kernels are missing in it

candle asks for nvcc, which tests/candle_cuda/nvcc stands in for, and links against the CUDA libraries. Those are made
here: the driver is the double, and each function of the others (and each that the double lacks) does nothing and says
success, or for the driver "not supported". For gpu-test they are only linked against, by the names that the real ones
have in CUDA 13, the version that the stand-in for nvcc says.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from cuda_packages import ROOT, fail, target_dir

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


def build_gpu_test(to):
    """tests/candle_on_gpu.rs, linked against libraries that have the names of the real ones and nothing else of them."""
    REAL_NAMES.mkdir(parents=True, exist_ok=True)
    for name, crate, folder, pattern, answer in LIBRARIES[:-1]:
        build_stub(name, functions(crate_dir(crate) / folder, pattern), answer, REAL_NAMES, SONAMES[name])
    build_stub("cudart", [], 0, REAL_NAMES, SONAMES["cudart"])
    driver = functions(crate_dir("cudarc") / "src/driver/sys", r"cu[A-Z]\w+")
    build_stub("cuda_driver", driver, NOT_SUPPORTED, REAL_NAMES, SONAMES["cuda_driver"])
    # candle's own functions become part of the program: no library has them where it will run.
    moe, crate, folder, pattern, answer = LIBRARIES[-1]
    subprocess.run([*write_stub(REAL_NAMES, moe, functions(crate_dir(crate) / folder, pattern), answer), "-c", "-o",
                    str(REAL_NAMES / f"{moe}.o")], check=True)
    (REAL_NAMES / "libcuda.so").write_text(f"INPUT({REAL_NAMES}/libcuda_driver.so {REAL_NAMES}/{moe}.o)\n")
    command = ["cargo", "test", "--quiet", "--release", "--features", "candle-cuda", "--test", "candle_on_gpu", "--no-run",
               "--message-format=json"]
    printed = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | {"LIBRARY_PATH": str(REAL_NAMES)}, check=True,
                             stdout=subprocess.PIPE, text=True).stdout
    messages = [json.loads(line) for line in printed.splitlines()]
    shutil.copy(next(m["executable"] for m in messages if m.get("executable")), to)


def main():
    if sys.argv[1:] == ["check"]:
        run("cargo", "clippy", "--quiet", "--features", "candle-cuda", "--all-targets", "--", "-D", "warnings")
    elif sys.argv[1:] == ["test"]:
        double = build_double()
        build_libraries(double)
        test = ("cargo", "test", "--quiet", "--release", "--features", "candle-cuda", "--test", "candle_cuda")
        run(*test, LIBRARY_PATH=str(STUBS), LD_LIBRARY_PATH=f"{double.parent}:{STUBS}",
            GRADCLIP_REQUIRE_HOST_KERNELS="1")
    elif sys.argv[1:2] == ["gpu-test"] and len(sys.argv) == 3:
        build_gpu_test(sys.argv[2])
    else:
        fail("say check, test, or gpu-test FILE")


if __name__ == "__main__":
    main()
