#!/usr/bin/env python3
"""Builds and tests the feature candle-cuda with no CUDA toolkit and no GPU: type checks, links, starts, and clips candle
tensors that lie in the memory of the driver double.

    scripts/candle_cuda.py check    clippy, warnings denied
    scripts/candle_cuda.py test     tests/candle_cuda.rs on the driver double; then without any driver, where the program
                                    must not start candle's device but say why

candle asks for nvcc, which tests/candle_cuda/nvcc stands in for, and links against the CUDA libraries. Those are made
here: the driver is the double, and each function of the others (and each that the double lacks) does nothing and says
success, or for the driver "not supported".
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from cuda_packages import ROOT, fail, target_dir

STUBS = target_dir() / "candle-cuda"
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


def build_stub(name, symbols, answer, *extra):
    source = STUBS / f"{name}.c"
    source.write_text("".join(f"int {symbol}(void) {{ return {answer}; }}\n" for symbol in symbols))
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-w", "-fno-builtin", str(source),
                    f"-Wl,-soname,lib{name}.so", "-o", str(STUBS / f"lib{name}.so"), *extra], check=True)


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


def main():
    if sys.argv[1:] == ["check"]:
        run("cargo", "clippy", "--quiet", "--features", "candle-cuda", "--all-targets", "--", "-D", "warnings")
    elif sys.argv[1:] == ["test"]:
        double = build_double()
        build_libraries(double)
        test = ("cargo", "test", "--quiet", "--release", "--features", "candle-cuda", "--test", "candle_cuda")
        run(*test, LIBRARY_PATH=str(STUBS), LD_LIBRARY_PATH=f"{double.parent}:{STUBS}",
            GRADCLIP_REQUIRE_HOST_KERNELS="1")
    else:
        fail("say check or test")


if __name__ == "__main__":
    main()
