#!/usr/bin/env python3
"""Makes kernels/prebuilt/*.ptx, the PTX that is used where there is no nvcc, and as a fallback where there is one; and
the PTX of the examples and of the benches, beside their sources.

    scripts/ptx.py            compile every kernels/*.cu, examples/*/*.cu and benches/*/*.cu, and write the PTX
    scripts/ptx.py --check    compile, compare byte for byte with what is committed, write nothing

The compiler is a pinned NVRTC (scripts/cuda_packages.py). Even so it is free in the names of registers: it sorts some
constants by their place in memory, and the same source comes out in two or more texts that differ in nothing else. A
committed file is right when it is, byte for byte, one of the texts that the compiler gives; where the first is another
one, the script compiles again, and says so.

Every file names the hash of all the sources; build.rs and tests/build_script.rs refuse a file whose hash is not that of
kernels/.
"""

import argparse
import ctypes
import hashlib
import re
import sys
from pathlib import Path

from cuda_packages import (KERNELS, NUMERICS, NVRTC, PREBUILT, ROOT, VIRTUAL_ARCH, add_venv_option, fail, find, install,
                           version)

# Where .cu files lie that are not part of the crate, each with its PTX beside it. They may include headers that are beside
# them, and those of kernels/.
BESIDE_SOURCE = ("examples/*/*", "benches/*/*")

# The rarer of the two texts of clip_coef.cu came in 8 to 13 of 30 compilations. At 8 of 30 (and independent, which they
# are not quite), 64 compilations miss it less than once in 100 million runs.
ATTEMPTS = 64

OPTIONS = (f"--gpu-architecture={VIRTUAL_ARCH}", "--std=c++17", *NUMERICS)


def unix_lines(path):
    return path.read_bytes().replace(b"\r\n", b"\n")


def sources():
    """File name to contents, newlines as \\n: every .cu and .cuh of kernels/, in the order of the names."""
    paths = [p for p in KERNELS.iterdir() if p.suffix in (".cu", ".cuh")]
    return {p.name: unix_lines(p) for p in sorted(paths, key=lambda p: p.name.encode())}


def sources_sha256(files):
    """Twin: sources_sha256 in build/ptx.rs."""
    digest = hashlib.sha256()
    for name, contents in files.items():
        digest.update(name.encode() + b"\0" + contents + b"\0")
    return digest.hexdigest()


class Nvrtc:
    def __init__(self, nvidia):
        # The compiler looks for its builtins by bare name; loaded first, they are found wherever they lie.
        ctypes.CDLL(str(find(nvidia, "cuda_nvrtc/lib/libnvrtc-builtins.so.*")), mode=ctypes.RTLD_GLOBAL)
        self.lib = ctypes.CDLL(str(find(nvidia, "cuda_nvrtc/lib/libnvrtc.so.*")))
        self.lib.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(self, name, *args):
        status = getattr(self.lib, name)(*args)
        if status != 0:
            fail(f"{name}: {self.lib.nvrtcGetErrorString(status).decode()}")

    def text(self, what, program):
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, buffer)
        return buffer.value.decode()

    def compile(self, name, contents, headers):
        strings = lambda values: (ctypes.c_char_p * len(values))(*values)
        program = ctypes.c_void_p()
        self.call("nvrtcCreateProgram", ctypes.byref(program), contents, name.encode(), len(headers),
                  strings(list(headers.values())), strings([h.encode() for h in headers]))
        options = [option.encode() for option in OPTIONS]
        status = self.lib.nvrtcCompileProgram(program, len(options), strings(options))
        log = self.text("ProgramLog", program).strip()
        if log:
            print(log, file=sys.stderr)
        if status != 0:
            fail(f"{name} does not compile with NVRTC {version(NVRTC)}; its messages are above")
        ptx = self.text("PTX", program)
        self.call("nvrtcDestroyProgram", ctypes.byref(program))
        return ptx


def body(text):
    """PTX without what stands before it (our header, or the compiler's, which holds a build number)."""
    lines = text[text.index(".version"):].strip().split("\n") if ".version" in text else []
    return "\n".join(line.rstrip() for line in lines)


def differ_in_names_only(a, b):
    """Whether the lines are the same but for registers and order: worth another compilation, and no more than that."""
    lines = lambda ptx: sorted(re.sub(r"%\w+", "%", line) for line in ptx.split("\n"))
    return lines(a) == lines(b)


def compile_towards(path, nvrtc, name, contents, headers):
    """The PTX of `name`: that at `path` if the compiler gives it, else what it gave last."""
    committed = body(path.read_text(errors="replace")) if path.exists() else ""
    for attempt in range(1, ATTEMPTS + 1):
        ptx = body(nvrtc.compile(name, contents, headers))
        if ptx == committed or not differ_in_names_only(ptx, committed):
            break
    if attempt > 1:
        print(f"{name}: compiled {attempt} times; NVRTC gives more than one text, equal but for the names of registers")
    return ptx


def beside_source(suffix):
    return sorted(path for place in BESIDE_SOURCE for path in ROOT.glob(place + suffix))


def snapshot_text(name, sha256, ptx):
    return "\n".join([
        f"// {name} as PTX, made by scripts/ptx.py. Do not edit: change the kernel and run the script.",
        f"// sources-sha256: {sha256}",
        f"// compiler: NVRTC {version(NVRTC)} ({NVRTC[0]})",
        f"// options: {' '.join(OPTIONS)}",
        "",
        ptx,
        "",
    ])


def beside_snapshot(source, nvrtc, headers):
    """(path, text) of the PTX of one file of BESIDE_SOURCE."""
    path, text = source.with_suffix(".ptx"), unix_lines(source)
    headers = {**headers, **{path.name: unix_lines(path) for path in sorted(source.parent.glob("*.cuh"))}}
    if b"#include" not in text:
        headers = {}
    # NVRTC knows headers by name, and not by path.
    by_name = lambda text: text.replace(b'#include "../../kernels/', b'#include "')
    ptx = compile_towards(path, nvrtc, source.name, by_name(text), {name: by_name(h) for name, h in headers.items()})
    sha256 = sources_sha256({source.name: text, **headers}) if headers else hashlib.sha256(text).hexdigest()
    return path, snapshot_text(source.name, sha256, ptx)


def make_snapshot(venvs):
    """Path to text, for every .cu file."""
    files = sources()
    headers = {name: text for name, text in files.items() if name.endswith(".cuh")}
    kernels = {name: text for name, text in files.items() if name.endswith(".cu")}
    if not kernels:
        fail("there is no .cu file in kernels/")
    sha256 = sources_sha256(files)
    nvrtc = Nvrtc(install(NVRTC, venvs))
    snapshot = {}
    for name, text in kernels.items():
        path = PREBUILT / f"{Path(name).stem}.ptx"
        snapshot[path] = snapshot_text(name, sha256, compile_towards(path, nvrtc, name, text, headers))
    return snapshot | dict(beside_snapshot(source, nvrtc, headers) for source in beside_source(".cu"))


def committed_files():
    return [*PREBUILT.glob("*.ptx"), *beside_source(".ptx")]


def differences(snapshot):
    committed = {path: path.read_bytes() for path in committed_files()}
    for path in sorted(snapshot.keys() | committed.keys()):
        name = path.relative_to(ROOT)
        if path not in committed:
            yield f"{name} is missing"
        elif path not in snapshot:
            yield f"{name} belongs to no .cu file"
        elif committed[path] != snapshot[path].encode():
            ours, theirs = snapshot[path].split("\n"), committed[path].decode(errors="replace").split("\n")
            unequal = (i for i, pair in enumerate(zip(theirs, ours)) if pair[0] != pair[1])
            at = next(unequal, min(len(ours), len(theirs)))
            line = lambda text: repr(text[at]) if at < len(text) else "the end of the file"
            yield f"{name} line {at + 1}: committed {line(theirs)}, compiled {line(ours)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed files, write nothing")
    add_venv_option(parser)
    args = parser.parse_args()
    snapshot = make_snapshot(args.venvs)
    if args.check:
        found = list(differences(snapshot))
        if found:
            fail("the committed PTX is not what the sources compile to; run scripts/ptx.py and commit the result.\n  "
                 + "\n  ".join(found))
        print(f"{len(snapshot)} files of PTX, byte for byte what NVRTC {version(NVRTC)} makes of the sources")
        return
    PREBUILT.mkdir(exist_ok=True)
    for path in committed_files():
        if path not in snapshot:
            path.unlink()
            print(f"removed {path.relative_to(ROOT)}")
    for path, text in snapshot.items():
        path.write_bytes(text.encode())
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
