"""Installs what the feature `tch` is built against: libtorch, for CPU tensors.

    eval "$(python3 scripts/libtorch.py)"           # for the tch of Cargo.lock
    cargo test --features tch --test tch

    eval "$(python3 scripts/libtorch.py --torch 2.11.0)"    # for the other one
    cargo update -p tch --precise 0.24.0                    # git checkout Cargo.lock undoes it
    cargo test --features tch --test tch

It comes from the PyTorch wheel, of which it takes the headers and the CPU library, and from the two small NVIDIA wheels
that this library is linked to: about 600 MB to download, once. 64-bit Linux. What is printed, and nothing else on the
standard output, are the two variables to set. For CUDA tensors use a whole PyTorch instead, of the same version:
LIBTORCH_USE_PYTORCH=1, in its environment, with its libraries on LD_LIBRARY_PATH.
"""

import argparse
import shlex
import shutil
from pathlib import Path

from cuda_packages import fail, find, install, target_dir

# What each release of tch is built for (TORCH_VERSION in the build script of torch-sys).
TCH = {"2.13.0": "0.26", "2.11.0": "0.24"}
# libtorch_cpu.so of both is linked to these, though it calls them for no CPU tensor.
NVIDIA = ("nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cupti==13.0.85")
LIBRARIES = ("torch/lib/libtorch_cpu.so", "torch/lib/libc10.so", "torch/lib/libgomp*.so*",
             "nvidia/*/lib/libcudart.so.*", "nvidia/*/lib/libcupti.so.*")
# All of libtorch that is not the CPU part is left out, so this name, which torch-sys links, stands for that part.
LIBTORCH = "INPUT(libtorch_cpu.so)\n"


def link(packages, home):
    """`home` as a libtorch: `include`, and all libraries in `lib`, so that one folder is enough for the loader."""
    if (home / "lib" / "libtorch.so").is_file():  # the last one made
        return
    shutil.rmtree(home, ignore_errors=True)
    (home / "lib").mkdir(parents=True)
    (home / "include").symlink_to(find(packages, "torch/include"))
    for pattern in LIBRARIES:
        for library in sorted(packages.glob(pattern)) or fail(f"no {pattern} in {packages}"):
            (home / "lib" / library.name).symlink_to(library)
    (home / "lib" / "libtorch.so").write_text(LIBTORCH)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--torch", choices=TCH, default=next(iter(TCH)), metavar="VERSION",
                        help="; ".join(f"{torch} for tch {tch}" for torch, tch in TCH.items()))
    parser.add_argument("--dir", type=Path, metavar="DIR", default=target_dir() / "libtorch",
                        help="where it is installed (default: libtorch below the target folder)")
    args = parser.parse_args()
    home = args.dir.resolve() / args.torch
    link(install((f"torch=={args.torch}", *NVIDIA), args.dir).parent, home)
    print(f"export LIBTORCH={shlex.quote(str(home))}")
    print(f"export LD_LIBRARY_PATH={shlex.quote(str(home / 'lib'))}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}")


if __name__ == "__main__":
    main()
