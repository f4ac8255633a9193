#!/usr/bin/env python3
"""Shows that compilers other than the one of the snapshot take the kernels, and that nothing is lost on the way:

    nvcc    the current toolkit, from packages, called by build.rs as it is on a user's machine
    clang   16 or later where one is installed, with no CUDA toolkit at all

Their PTX goes through scripts/ptxas.py; from clang, which nobody's build uses, only what touches results is asked: it
copies large parameters to local memory. (The host C++ compiler takes the kernels in `cargo test`.)
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import ptxas
from cuda_packages import KERNELS, NVCC, ROOT, VIRTUAL_ARCH, add_venv_option, fail, find, install, target_dir, version

OLDEST_CLANG = 16
CLANG_OPTIONS = ("-x", "cuda", "--cuda-device-only", "-nocudainc", "-nocudalib", "-Wno-unknown-cuda-version",
                 f"--cuda-gpu-arch={VIRTUAL_ARCH.replace('compute', 'sm')}", "--cuda-feature=+ptx74", "-std=c++17",
                 "-O3", "-ffp-contract=off", "-S")


def report(tools, compiler, modules, fast):
    print(f"\n{compiler}")
    table, defects = ptxas.measure(tools, modules, fast)
    if table:
        ptxas.print_table(table)
    if defects:
        fail(f"{compiler}: {len(defects)} defect(s)\n  " + "\n  ".join(defects))


def check_nvcc(tools, venvs):
    nvcc = find(install(NVCC, venvs), "cu13/bin/nvcc")
    env = {**os.environ, "GRADCLIP_PTX": "nvcc", "GRADCLIP_NVCC": str(nvcc)}
    for name in ("GRADCLIP_CUDA_ARCH", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        env.pop(name, None)
    command = ["cargo", "check", "--lib", "--no-default-features", "--features", "cuda", "--message-format=json",
               "--target-dir", target_dir() / "check-compilers"]
    build = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    if build.returncode != 0:
        fail("the crate does not build with nvcc from packages; cargo's messages are above")
    messages = [json.loads(line) for line in build.stdout.splitlines() if line.startswith("{")]
    ran = [m for m in messages if m["reason"] == "build-script-executed"]
    out_dirs = [m["out_dir"] for m in ran if re.search(r"\bgradclip(?![-\w])", m["package_id"])]
    if len(out_dirs) != 1:
        fail(f"cargo names {len(out_dirs)} output folders of build.rs, not 1")
    generated = (Path(out_dirs[0]) / "ptx.rs").read_text()
    compiler = re.search(r'COMPILER: &str = "(.*)"', generated)[1]
    release = ".".join(version(NVCC).split(".")[:2])
    if compiler != f"nvcc {release}":
        fail(f"build.rs says {compiler}, not nvcc {release}")
    modules = {path.stem: path for path in sorted((Path(out_dirs[0]) / "nvcc").glob("*.ptx"))}
    report(tools, f"{compiler}, through build.rs", modules, fast=True)


def newest_clang():
    """(major version, path), or none."""
    found = []
    for name in ["clang", *(f"clang-{n}" for n in range(OLDEST_CLANG, 100))]:
        path = shutil.which(name)
        if path:
            text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
            major = re.search(r"clang version (\d+)", text)
            if major and int(major[1]) >= OLDEST_CLANG:
                found.append((int(major[1]), path))
    return max(found, default=None)


def check_clang(tools, required):
    clang = newest_clang()
    if not clang:
        message = f"no clang {OLDEST_CLANG} or later in PATH (Debian: apt install clang-{OLDEST_CLANG})"
        if required:
            fail(message)
        print(f"\nSKIPPED: {message}")
        return
    major, path = clang
    with tempfile.TemporaryDirectory() as folder:
        modules = {}
        for source in sorted(KERNELS.glob("*.cu")):
            modules[source.stem] = Path(folder) / f"{source.stem}.ptx"
            result = subprocess.run([path, *CLANG_OPTIONS, source, "-o", modules[source.stem]])
            if result.returncode != 0:
                fail(f"clang {major} does not take kernels/{source.name}; its messages are above")
        report(tools, f"clang {major}, with no toolkit", modules, fast=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--require-clang", action="store_true", help="fail instead of skipping where there is no clang")
    add_venv_option(parser)
    args = parser.parse_args()
    tools = ptxas.Tools(args.venvs)
    check_nvcc(tools, args.venvs)
    check_clang(tools, args.require_clang)


if __name__ == "__main__":
    main()
