#!/usr/bin/env python3
"""Assembles kernels/prebuilt/*.ptx for every GPU generation and looks at what comes out. No GPU is needed.

    scripts/ptxas.py            print the tables, fail on a defect
    scripts/ptxas.py --write    the same, and write kernels/prebuilt/registers.csv and benches/variants/registers.csv
    scripts/ptxas.py --check    the same, and fail where a table differs from its file

The second table is that of the variants that benches/variants.rs measures, for the GPUs that they are meant for. They may
be slow, and none may be wrong: of the defects, those in results count.

The counts of instructions and the bytes of PTX are what the first load of a kernel costs; README.md shows them.

A defect is, in the PTX or in the machine code of any target: an atomic on floats (the order of additions would not be
fixed), flush to zero or approximate arithmetic; registers spilled or anything else in local memory; a kernel over tensors
that does not move 16 bytes at a time for every dtype, or waits for one load before it issues the next; PTX that the
assembler of CUDA 12.0, which the oldest driver has, does not take.
"""

import argparse
import csv
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from cuda_packages import NVDISASM, OLDEST_PTXAS, PREBUILT, PTXAS, ROOT, add_venv_option, fail, find, install, version
import variants

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
OLDEST_TARGETS = ("sm_75", "sm_90")  # the ends of what CUDA 12.0 knows

# Of the variants: the GPUs that they are to be measured on, and the oldest that takes what those do not.
VARIANT_TARGETS = {90: "sm_90", 100: "sm_100"}

REGISTERS = PREBUILT / "registers.csv"
VARIANT_REGISTERS = variants.FOLDER / "registers.csv"

WRONG = {
    r"\b(atom|red)\.\S*\b(b?f16(x2)?|f32|f64)\b": "has an atomic on floats",
    r"\.ftz\b": "flushes subnormals to zero (.ftz)",
    r"\.approx\b": "has approximate arithmetic (.approx)",
}
SLOW = {r"^\s*\.local\b|\b(ld|st)\.local\b": "uses local memory"}
# The same in machine code, where the assembler may have put it.
WRONG_CODE = {
    r"\b(ATOM|RED)[A-Z]*\.\S*\b(B?F16(x2)?|F32|F64)\b": "has an atomic on floats",
    # F2I.FTZ is how an integer division starts, of a row by the tiles of one.
    r"^(?!.*\bF2I\.FTZ\.U32\.TRUNC\b).*\.FTZ\b": "flushes subnormals to zero (.FTZ)",
}
SLOW_CODE = {r"\b(LDL|STL)\b": "uses local memory"}

# The kernels that walk tensors, and whether they write them.
WALKERS = {r"(norm|scoped)_partials_\w+": False, r"(scoped_)?scale(_any)?|scale_into|clamp": True}

# A thread has 8 loads in flight before it uses the first, and stores what it has made of each: once in the code of each of
# the 4 dtypes.
BATCH = 8
BATCHES = 4


class Usage(NamedTuple):
    registers: int
    shared_bytes: int
    batches: int  # places where BATCH 16-byte loads are issued before the first of them is used
    stores: int  # 16-byte stores to global memory
    instructions: int  # but for those that pad the code
    ptx_bytes: int  # of the module that the kernel is loaded as


class Tools:
    def __init__(self, venvs):
        self.ptxas = find(install(PTXAS, venvs), "cu13/bin/ptxas")
        self.oldest_ptxas = find(install(OLDEST_PTXAS, venvs), "cuda_nvcc/bin/ptxas")
        self.nvdisasm = find(install(NVDISASM, venvs), "cu13/bin/nvdisasm")


def text_defects(stem, ptx, forbidden):
    for pattern, what in forbidden.items():
        found = re.search(pattern, ptx, flags=re.MULTILINE)
        if found:
            line = ptx.count("\n", 0, found.start()) + 1
            yield f"{stem}.ptx line {line} {what}"


def walker_defects(table):
    """`table` is what came out for each kernel and target."""
    kernels = dict.fromkeys(kernel for kernel, _ in table)
    for name, writes in WALKERS.items():
        walkers = [kernel for kernel in kernels if re.fullmatch(name, kernel)]
        if not walkers:
            yield f"no kernel is called {name} any more; say in scripts/ptxas.py which ones walk tensors"
        for kernel in walkers:
            on = {target: table[kernel, target] for target in TARGETS if (kernel, target) in table}
            waits = [target for target, usage in on.items() if usage.batches < BATCHES]
            if waits:
                yield (f"{kernel} does not have {BATCH} 16-byte loads in flight for each of {BATCHES} dtypes on "
                       f"{', '.join(waits)}")
            narrow = [target for target, usage in on.items() if writes and usage.stores < BATCH * BATCHES]
            if narrow:
                yield (f"{kernel} does not have {BATCH} 16-byte stores for each of {BATCHES} dtypes on "
                       f"{', '.join(narrow)}")


def module_bytes(ptx):
    """Kernel to the bytes of the module that it is loaded as: all of the text but the other kernels. Twin: kernels_of in
    build/ptx.rs."""
    size = lambda text: len(text.encode())
    entries = {name: size(text) for name, text in re.findall(r"^(?=\.visible \.entry (\w+)\()(.*?^}\n)", ptx, re.M | re.S)}
    return {name: size(ptx) - sum(entries.values()) + own for name, own in entries.items()}


def run(command):
    return subprocess.run(command, capture_output=True, text=True)


def batches(instructions):
    """How often BATCH loads past L1 (those of whole tensors) are in flight together, in one straight line of code; or as
    many bytes in loads of 8."""
    count, pending, registers = 0, 0, set()
    for text in instructions:
        load = re.match(r"(?:@!?U?P\d+ )?LDG\.E\.NA\.(64|128)\S* R(\d+), (.*)", text)
        used = {int(r) for r in re.findall(r"\bR(\d+)\b", load.group(3) if load else text)}
        if used & registers or not text or re.match(r"(@!?U?P\d+ )?(BRA|BRX|EXIT)\b", text):
            pending, registers = 0, set()
        if load:
            size = int(load.group(1)) // 8
            pending += size
            registers |= {int(load.group(2)) + i for i in range(size // 4)}
            count += pending == BATCH * 16
    return count


def machine_code(nvdisasm, cubin):
    """Kernel to its instructions; an empty one where somebody may jump to."""
    result = run([nvdisasm, "-c", cubin])
    if result.returncode != 0:
        fail(f"nvdisasm: {result.stderr.strip()}")
    found, kernel = {}, None
    for line in result.stdout.split("\n"):
        label = re.match(r"(?:\.text\.(\w+)|\.L\w*):", line)
        instruction = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*[;(]?$", line)
        if label and label.group(1):
            kernel = label.group(1)
            found[kernel] = []
        elif label and kernel:
            found[kernel].append("")
        elif instruction and kernel:
            found[kernel].append(re.sub(r"\s+", " ", instruction.group(1)))
    return found


def code_defects(code, target, forbidden):
    for kernel, instructions in code.items():
        for pattern, what in forbidden.items():
            found = next((text for text in instructions if re.search(pattern, text)), None)
            if found:
                yield f"{kernel} on {target} {what}: {found}"


def assemble(tools, stem, path, target, folder):
    """(kernel to Usage, what is wrong, what is slow) of one PTX file on one target."""
    cubin = Path(folder) / f"{stem}.{target}.cubin"
    result = run([tools.ptxas, f"-arch={target}", "--verbose", "--warn-on-spills", "--warn-on-local-memory-usage", path,
                  "-o", cubin])
    if result.returncode != 0:
        return {}, [f"ptxas {version(PTXAS)} does not take {stem}.ptx for {target}: {result.stderr.strip()}"], []
    code, sizes = machine_code(tools.nvdisasm, cubin), module_bytes(Path(path).read_text())
    wrong, slow = (list(code_defects(code, target, forbidden)) for forbidden in (WRONG_CODE, SLOW_CODE))
    usages, kernel = {}, None
    for line in result.stderr.split("\n"):
        number = lambda pattern: int((re.search(pattern, line) or [0, 0])[1])
        compiling = re.search(r"Compiling entry function '(\w+)'", line)
        if compiling:
            kernel = compiling[1]
        elif "bytes stack frame" in line:
            for what in ("stack frame", "spill stores", "spill loads"):
                size = number(rf"(\d+) bytes {what}")
                if size:
                    slow.append(f"{kernel} on {target}: {size} bytes {what}")
        elif "Used" in line and " registers" in line:
            stores = sum(bool(re.search(r"\bSTG\.E\.\S*128\b", text)) for text in code[kernel])
            instructions = sum(bool(text) and not re.match(r"NOP\b", text) for text in code[kernel])
            usages[kernel] = Usage(number(r"Used (\d+) registers"), number(r"(\d+) bytes smem"), batches(code[kernel]),
                                   stores, instructions, sizes[kernel])
    return usages, wrong, slow


def measure(tools, modules, fast=True):
    """({(kernel, target): Usage}, defects) of PTX files, given by stem; without `fast`, only of defects in results."""
    table, defects = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for stem, path in modules.items():
            ptx = path.read_text()
            defects += text_defects(stem, ptx, {**WRONG, **SLOW} if fast else WRONG)
            for target in TARGETS:
                usages, wrong, slow = assemble(tools, stem, path, target, folder)
                defects += wrong + slow if fast else wrong
                table.update({(kernel, target): usage for kernel, usage in sorted(usages.items())})
    if fast:
        defects += walker_defects(table)
    return table, defects


def oldest_driver_defects(tools, modules):
    with tempfile.TemporaryDirectory() as folder:
        for stem, path in modules.items():
            for target in OLDEST_TARGETS:
                result = run([tools.oldest_ptxas, f"-arch={target}", path, "-o", Path(folder) / "cubin"])
                if result.returncode != 0:
                    yield (f"ptxas {version(OLDEST_PTXAS)} does not take {stem}.ptx for {target}: "
                           f"{result.stderr.strip()}")


def measure_variants(tools):
    """The same of the kernels of benches/variants, by their names; of the defects those in results."""
    table, defects = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for kernel in variants.described()["kernels"]:
            name, ptx = kernel["name"].replace(",", ";"), variants.ptx_of(kernel)
            path = Path(folder) / "variant.ptx"
            path.write_text(ptx)
            defects += text_defects(f"variant {name}", ptx, WRONG)
            target = next(target for oldest, target in VARIANT_TARGETS.items() if oldest >= variants.target_of(ptx))
            usages, wrong, slow = assemble(tools, "variant", path, target, folder)
            defects += wrong
            spilled = sum(int(size) for text in slow for size in re.findall(r"(\d+) bytes spill", text))
            table.update({(name, target): (*usage, spilled) for usage in usages.values()})
    return table, defects


def print_variants(table):
    width = max(len(name) for name, _ in table)
    print("\nvariants: the same, and bytes of spills")
    for (name, target), usage in table.items():
        print(f"{name:{width}} {target:>6} {'/'.join(map(str, usage)):>32}")


def print_table(table):
    width = max(len(kernel) for kernel, _ in table)
    print(f"registers/bytes of shared memory/places with {BATCH} 16-byte loads in flight/16-byte stores/instructions/"
          "bytes of PTX")
    print(f"{'kernel':{width}} " + " ".join(f"{t:>25}" for t in TARGETS))
    for kernel in dict.fromkeys(kernel for kernel, _ in table):
        cells = ["/".join(map(str, table[kernel, t])) if (kernel, t) in table else "-" for t in TARGETS]
        print(f"{kernel:{width}} " + " ".join(f"{cell:>25}" for cell in cells))


def rows(table, *more):
    return [["kernel", "target", *Usage._fields, *more]] + [[*key, *map(str, usage)] for key, usage in table.items()]


def difference(path, now):
    """What a committed table has otherwise, or none."""
    committed = list(csv.reader(path.open(newline=""))) if path.exists() else []
    changed = [f"- {','.join(r)}" for r in committed if r not in now] + [
        f"+ {','.join(r)}" for r in now if r not in committed]
    return [f"{path.relative_to(ROOT)} differs; if the change is wanted, run scripts/ptxas.py --write\n    "
            + "\n    ".join(changed)] if changed else []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true", help="write the two registers.csv")
    mode.add_argument("--check", action="store_true", help="compare with the two registers.csv")
    add_venv_option(parser)
    args = parser.parse_args()
    modules = {path.stem: path for path in sorted(PREBUILT.glob("*.ptx"))}
    if not modules:
        fail("there is no PTX in kernels/prebuilt/; run scripts/ptx.py")
    tools = Tools(args.venvs)
    table, defects = measure(tools, modules)
    defects += oldest_driver_defects(tools, modules)
    of_variants, wrong = measure_variants(tools)
    defects += wrong
    if table:
        print_table(table)
    if of_variants:
        print_variants(of_variants)
    tables = {REGISTERS: rows(table), VARIANT_REGISTERS: rows(of_variants, "spill_bytes")}
    for path, now in tables.items():
        if args.write:
            with path.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(now)
            print(f"wrote {path.relative_to(ROOT)}")
        if args.check:
            defects += difference(path, now)
    if defects:
        fail(f"{len(defects)} defect(s)\n  " + "\n  ".join(defects))
    print(f"{len(modules)} modules: assembled for {', '.join(TARGETS)} (ptxas {version(PTXAS)}) and for "
          f"{', '.join(OLDEST_TARGETS)} (ptxas {version(OLDEST_PTXAS)}); no defect. {len({k for k, _ in of_variants})} "
          "variants")


if __name__ == "__main__":
    main()
