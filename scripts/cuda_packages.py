"""The compilers the scripts use, as pinned packages, and where they are installed.

Each set goes into a virtual environment of its own below target/ (or $CARGO_TARGET_DIR), once; no CUDA toolkit, no GPU
and no driver are needed. Changing a version here changes what scripts/ptx.py writes: run it, and scripts/ptxas.py
--write, and commit the result with the change.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

# Makes the committed PTX. The oldest NVRTC that drivers for CUDA 12.0 (and all later ones) understand; it is a compiler
# in one library: no host compiler, no headers.
NVRTC = ("nvidia-cuda-nvrtc-cu12==12.0.140",)

# Turns PTX into machine code, as the driver does when it loads a module: the newest GPUs, and the oldest driver.
PTXAS = ("nvidia-cuda-nvcc==13.0.88",)
OLDEST_PTXAS = ("nvidia-cuda-nvcc-cu12==12.0.140",)

# The nvcc a user of the current toolkit has. It needs a host C++ compiler beside it.
NVCC = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
)

# The same for candle's own kernels: cuda_fp16.h needs a header of the C++ core libraries where a host compiler reads it too.
# Those are named first, as the first package names the environment.
CANDLE_NVCC = ("nvidia-cuda-cccl==13.0.85", *NVCC)

# Reads machine code back.
NVDISASM = ("nvidia-cuda-nvdisasm==13.5.37",)

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
PREBUILT = KERNELS / "prebuilt"

VIRTUAL_ARCH = "compute_75"
# The arithmetic that the results depend on; build.rs gives nvcc the same.
NUMERICS = ("--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")


def fail(message):
    sys.exit(f"{Path(sys.argv[0]).name}: {message}")


def version(packages):
    return packages[0].split("==")[1]


def target_dir():
    return Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target").resolve()


def add_venv_option(parser):
    parser.add_argument("--venvs", type=Path, metavar="DIR", default=target_dir() / "cuda-packages",
                        help="where the compilers are installed (default: cuda-packages below the target folder)")


def environment(packages, venvs):
    """The folder of an environment that holds exactly `packages`, which it makes where there is none."""
    home = venvs.resolve() / packages[0].replace("==", "-")
    stamp = home / "installed.txt"
    wanted = "\n".join(packages)
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"installing {' '.join(packages)}", file=sys.stderr)
        try:
            venv.create(home, with_pip=True, clear=True)
            subprocess.run([home / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-input",
                            "--disable-pip-version-check", *packages], check=True)
        except subprocess.CalledProcessError as error:
            fail(f"could not install {', '.join(packages)} (exit status {error.returncode}). It takes network access, "
                 "Python with venv and pip (Debian: python3-venv), and 64-bit Linux.")
        stamp.write_text(wanted)
    return home


def install(packages, venvs):
    """The folder `nvidia` of such an environment."""
    home = environment(packages, venvs)
    found = sorted(home.glob("lib/python3*/site-packages/nvidia"))
    if not found:
        fail(f"{home} does not hold {', '.join(packages)}; remove that folder and run again")
    return found[0]


def find(nvidia, pattern):
    """The one file of an installed package that `pattern` names."""
    found = sorted(nvidia.glob(pattern))
    if not found:
        fail(f"no {pattern} below {nvidia}; remove that environment and run again")
    return found[0]
