"""Installs what the example `mpi_shards` is built and run with: MPICH, and the libclang that its bindings are made with.

    eval "$(python3 scripts/mpi.py)"
    cargo build --release -p mpi_shards
    mpiexec -n 4 target/release/mpi_shards

Both come from packages, 110 MB on disk, into an environment below the target folder; an MPI that is installed (its `mpicc`
on PATH, and libclang) does as well. 64-bit Linux, with a C compiler. What is printed, and nothing else on the standard
output, are the variables to set.
"""

import argparse
import os
import shlex
import shutil
import subprocess

from cuda_packages import add_venv_option, environment, fail, find

# MPICH 4 is what the bindings (rsmpi 0.8) are tested with; libclang has no dependencies.
PACKAGES = ("mpich==4.3.2", "libclang==18.1.1")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_venv_option(parser)
    args = parser.parse_args()
    home = environment(PACKAGES, args.venvs)
    libclang = find(home, "lib/python3*/site-packages/clang/native/libclang.so").parent
    # The package has no headers of the compiler's own (stddef.h), so those of the C compiler are taken.
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        fail("no C compiler was found ($CC, cc, gcc, clang)")
    include = subprocess.run([compiler, "-print-file-name=include"], check=True, capture_output=True, text=True)
    print(f"export PATH={shlex.quote(str(home / 'bin'))}:$PATH")
    print(f"export MPICC={shlex.quote(str(home / 'bin' / 'mpicc'))}")
    print(f"export LIBCLANG_PATH={shlex.quote(str(libclang))}")
    print(f"export BINDGEN_EXTRA_CLANG_ARGS={shlex.quote('-isystem ' + include.stdout.strip())}")
    print(f"export LD_LIBRARY_PATH={shlex.quote(str(home / 'lib'))}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}")


if __name__ == "__main__":
    main()
